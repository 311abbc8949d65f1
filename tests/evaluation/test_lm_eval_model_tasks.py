"""Whole lm_eval tasks on PressedLM: equal to HFLM without a press, what an eviction changes, a task's files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import BasePress, StreamingLLMPress
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sparsekv_pl.evaluation.lm_eval_model import PressedLM
from sparsekv_pl.evaluation.lm_eval_tasks import named_files, task_manager
from tests.evaluation.lm_eval_cases import TEXT, adapted, hflm
from tests.tiny_training import MakeBackbone

pytestmark = pytest.mark.usefixtures("datasets_cache")

LETTERS = "QXZJ"
"""No other word of the contexts holds them as a token of its own."""


def letters_task(folder: Path, before: str) -> dict[str, Any]:
    """Which letter was named, after ``before`` and long before the question? Each of the four is right twice."""
    rows = [
        {
            "text": f"{before}{LETTERS[i % 4]} is the letter. " + TEXT * 2 + "It is",
            "options": list(LETTERS),
            "answer": i % 4,
        }
        for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }


@pytest.fixture(scope="module")
def tiny(tiny_backbone: MakeBackbone) -> tuple[Any, Any]:
    return adapted(tiny_backbone())


def evaluated(lm: HFLM, task: dict[str, Any]) -> dict[str, Any]:
    found = evaluate(lm=lm, task_dict=TaskManager(include_defaults=False).load([task]), bootstrap_iters=0)
    return found["results"]["letters"]


def test_a_task_scores_as_with_hflm(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    task = letters_task(tmp_path, "")
    assert evaluated(PressedLM(*tiny), task) == evaluated(hflm(tiny), task)


def copier(tokenizer: Any) -> Any:
    """One layer that looks at all tokens alike and says the letter that is among them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model = LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for parameter in (*attention.parameters(), *model.model.layers[0].mlp.parameters(), model.lm_head.weight):
            parameter.zero_()
        attention.v_proj.weight.copy_(torch.eye(8))
        attention.o_proj.weight.copy_(1000 * torch.eye(8))
        spelled = [tokenizer.decode([token]).strip() for token in range(1024)]
        places = torch.tensor([LETTERS.index(word) if word in list(LETTERS) else 7 for word in spelled])
        model.model.embed_tokens.weight.copy_(torch.eye(8)[places])
        model.lm_head.weight[:, :4] = torch.eye(8)[places][:, :4]
    return model


@pytest.mark.parametrize(
    ("press", "before", "expected"),
    [
        (None, TEXT, 1.0),
        (StreamingLLMPress(0.5), "", 1.0),  # the letter is among the first tokens, which stay
        (StreamingLLMPress(0.5), TEXT, 0.25),  # it is gone: always the first option
        (StreamingLLMPress(0.2), TEXT * 2, 1.0),
    ],
)
def test_a_model_that_copies_scores_one_while_what_it_copies_is_kept(
    tiny: tuple[Any, Any], tmp_path: Path, press: BasePress | None, before: str, expected: float
) -> None:
    assert evaluated(PressedLM(copier(tiny[1]), tiny[1], press), letters_task(tmp_path, before))["acc,none"] == expected


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
