"""Files named in a task of lm_eval."""

from pathlib import Path

from sparsekv_pl.evaluation.lm_eval_tasks import named_files, task_manager


def test_data_that_a_task_names_counts_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    task = (
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\noutput_type: loglikelihood\n"
    )
    (tmp_path / "tasks" / "own.yaml").write_text(task)
    (tmp_path / "tasks" / "all.yaml").write_text("group: every\ntask: [own]\n")
    manager = task_manager(["own", "every"], tmp_path / "tasks")
    first = [named_files(manager, name) for name in ("own", "every")]
    assert first[0] == first[1] and len(first[0]) == 1
    rows.write_text('{"other": 1}\n')
    assert named_files(manager, "own") != first[0]
