"""The Slurm scripts: their commands and their submission.

sbatch, srun and scontrol are stand-ins on PATH that record their arguments.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.cluster import submit
from configs.cluster.submit import TRAININGS, jobs_of, plan
from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import CommandLine
from sparsekv_pl.cli.run_name import fill_name
from tests.cluster_cases import CLUSTER, QWEN, ROOT, SCRIPTS, batch, dry, put_on_path
from train import TrainCommandLine


def parsed(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse srun's command with train.py or evaluate.py, without building or running anything."""
    start = command.index(".venv/bin/python")
    line = {"train.py": TrainCommandLine, "evaluate.py": EvaluateCommandLine}[command[start + 1]]
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda _self: None)
    monkeypatch.setattr(CommandLine, "_run_subcommand", lambda _self, _name: None)
    made = line(args=list(command[start + 2 :]), save_config_callback=None)
    config = made.config[made.subcommand]
    fill_name(config)
    return config


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which nothing is complete."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """A stand-in that returns the ids 101, 102, ..., and its calls so far."""
    log = tmp_path / "sbatch.log"
    script = f'printf "%q " "$@" >> {log}; echo >> {log}; echo "$((100 + $(wc -l < {log})));cluster"'
    put_on_path(tmp_path / "bin", "sbatch", script, monkeypatch)
    return lambda: [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []


def finish(checkout: Path, name: str, training: dict[str, int] | None = None) -> None:
    """Write the files of a complete job."""
    result = checkout / "output" / name
    result.parent.mkdir(parents=True, exist_ok=True)
    if result.suffix:
        result.write_text(json.dumps({"training": training or {}}))
    else:
        result.mkdir()


def option(command: Sequence[str], name: str) -> str:
    return next(word.partition("=")[2] for word in command if word.startswith(f"--{name}="))


def test_every_script_is_good_bash_and_asks_for_a_signal_and_a_requeue() -> None:
    assert [path.name for path in SCRIPTS] == ["evaluate.sbatch", "train.sbatch"]
    for path in [*SCRIPTS, CLUSTER / "job.sh"]:
        subprocess.run(["bash", "-n", str(path)], check=True)
        if shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"):
            subprocess.run([shellcheck, "-x", str(path)], check=True, cwd=ROOT)
    for path in SCRIPTS:
        options = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
        assert "#SBATCH --requeue" in options and "#SBATCH --open-mode=append" in options
        # Lightning asks for as many tasks on a node as it is given devices.
        assert {"#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=1"} <= set(options)
        assert not any("--partition" in line or "--account" in line for line in options)
    assert "#SBATCH --signal=SIGUSR1@300" in (CLUSTER / "train.sbatch").read_text()  # to the processes
    assert "#SBATCH --signal=B:SIGUSR1@90" in (CLUSTER / "evaluate.sbatch").read_text()  # to the shell alone


JOBS = {f"{job.phase} {job.result.parent.name}": job for job in jobs_of(QWEN, 2)}


@pytest.mark.parametrize("job", [job for job in JOBS.values() if job.phase != "baseline"], ids=lambda job: job.name)
def test_the_command_of_every_job_is_one_that_the_real_parser_takes(
    job: submit.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = dry(job.script, *job.arguments, SLURM_NTASKS_PER_NODE="2", SLURM_NNODES="3", SLURM_SUBMIT_DIR=str(ROOT))
    assert command[:3] == ["srun", "--kill-on-bad-exit=1", ".venv/bin/python"]
    assert command[4] == {"analyse": "predict", "train": "fit"}.get(job.phase, "test")
    config = parsed(command, monkeypatch)
    assert (int(config.trainer.devices), config.trainer.num_nodes) == (2, 3)
    init = config.model.init_args
    assert init.backbone.pretrained == "Qwen/Qwen3-8B"
    if job.phase == "train":
        assert config.ckpt_path == "last"
        assert config.trainer.accumulate_grad_batches == 4 and config.trainer.val_check_interval == 1000
        assert Path(config.trainer.default_root_dir) / "final" == job.result
        return
    assert Path(init.output) / "report.json" == job.result
    assert init.backbone.get("adapter") == ("output/eit_qwen3_8b/final" if job.phase == "trained" else None)
    if config.trainer.logger:
        assert config.trainer.logger.init_args.save_dir == init.output == config.trainer.default_root_dir


@pytest.mark.parametrize("name", ["matrix", "niah"])
def test_a_baseline_is_its_trained_evaluation_without_the_adapter(name: str) -> None:
    adapter = "--model.backbone.adapter=final"
    trained = JOBS[f"trained {name}"].arguments
    assert JOBS[f"baseline {name}"].arguments == tuple(word for word in trained if word != adapter) != trained


def test_a_script_says_what_is_wrong_before_it_starts_anything(tmp_path: Path) -> None:
    for arguments, said in [([], "which config"), (["configs/none.yaml"], "no config at configs/none.yaml")]:
        done = batch("train.sbatch", *arguments)
        assert done.returncode == 2 and said in done.stderr
    done = batch("evaluate.sbatch", "configs/evaluate/niah.yaml")
    assert done.returncode == 2 and "not in a job: submit with sbatch" in done.stderr
    done = batch("train.sbatch", str(QWEN), SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and f"submit from the checkout, not from {tmp_path}" in done.stderr


def test_a_job_runs_through_srun_and_takes_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(tmp_path / "bin", "srun", f'echo "$SRUN_CPUS_PER_TASK $*" > {tmp_path}/srun.log; exit 7', monkeypatch)
    for script, config in (("train.sbatch", str(QWEN)), ("evaluate.sbatch", "configs/evaluate/niah.yaml")):
        done = batch(script, config, SLURM_JOB_ID="77", SLURM_CPUS_PER_TASK="5", SLURM_SUBMIT_DIR=str(ROOT))
        assert done.returncode == 7, done.stderr
        said = (tmp_path / "srun.log").read_text()
        assert said.startswith("5 --kill-on-bad-exit=1 .venv/bin/python") and config in said


def test_an_evaluation_at_its_time_limit_asks_for_a_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, requeued = tmp_path / "started", tmp_path / "scontrol.log"
    wait = f"touch {started}; until [ -e {requeued} ]; do sleep 0.05; done"
    put_on_path(tmp_path / "bin", "srun", wait, monkeypatch)
    put_on_path(tmp_path / "bin", "scontrol", f'echo "$@" > {requeued}', monkeypatch)
    job = os.environ | {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT)}
    script = subprocess.Popen(["bash", str(CLUSTER / "evaluate.sbatch"), "configs/evaluate/niah.yaml"], env=job)
    while not started.exists() and script.poll() is None:
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    script.wait(timeout=30)
    said = requeued.read_text() if requeued.exists() else ""
    requeued.touch()  # lets srun end, also where nobody asked
    assert said == "requeue 77\n"


def test_everything_is_submitted_in_order_with_its_dependencies(
    checkout: Path, sbatch: Callable[[], list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    submit.main(["--partition=gpu", "--account=us", "--gpus=2", "--at-once=3"])
    calls = sbatch()
    ids = {f"{option(call, 'job-name')} {number}": str(101 + number) for number, call in enumerate(calls)}
    assert len(calls) == len(ids) == 14
    assert all({"--parsable", "--partition=gpu", "--account=us", "--gpus-per-node=2"} <= set(call) for call in calls)
    assert [call[call.index("configs/cluster/train.sbatch") + 1] for call in calls[4:6]] == list(map(str, TRAININGS))
    dependencies = [option(call, "dependency") for call in calls]
    assert dependencies == [
        *["singleton"] * 3,  # Qwen's two analyses and Llama's first
        "afterany:101,singleton",  # three at once
        "afterok:101:102,singleton",  # Qwen's training: after its analyses, of which 102 also makes room
        "afterok:103:104,singleton",
        *[f"afterany:{before},singleton" for before in (104, 105, 106, 107)],  # the baselines
        "afterok:105:107,afterany:108,singleton",  # trained: after the training and the same evaluation's baseline
        "afterok:105:108,afterany:109,singleton",
        "afterok:106:109,afterany:110,singleton",
        "afterok:106:110,afterany:111,singleton",
    ]
    assert (checkout / submit.LOGS).is_dir()  # or Slurm would throw the logs away
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [str(101 + i) for i in range(14)]


def test_the_plan_needs_no_cluster_and_names_its_own_lines(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    submit.main(["--dry-run", str(QWEN)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [
        *["1  analyse  eit_qwen3_8b-anchors", "2  analyse  eit_qwen3_8b-statistics", "3  train  eit_qwen3_8b-train"],
        *["4  baseline  eit_qwen3_8b-matrix", "5  baseline  eit_qwen3_8b-niah"],
        *["6  trained  eit_qwen3_8b-matrix", "7  trained  eit_qwen3_8b-niah"],
    ]
    commands = [shlex.split(line) for line in lines[1::2]]
    assert [option(command, "dependency") for command in commands][2] == "afterok:1:2,singleton"
    assert not (checkout / "output").exists()
    with pytest.raises(SystemExit, match="no sbatch on this machine"):
        submit.main([str(QWEN)])


def test_what_is_complete_is_skipped(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def left() -> list[str]:
        return [f"{job.phase} {job.name.rpartition('-')[2]}" for job in plan([QWEN], submit.PHASES, 1)]

    finish(checkout, "eit_qwen3_8b/anchors/report.json")
    finish(checkout, "eit_qwen3_8b/matrix/report.json")
    rest = ["trained matrix", "trained niah"]
    assert left() == ["analyse statistics", "train train", "baseline niah", *rest]
    finish(checkout, "eit_qwen3_8b/final")
    assert left() == ["analyse statistics", "baseline niah", *rest]
    finish(checkout, "eit_qwen3_8b/matrix/report.json", training={"steps": 1250})
    assert left() == ["analyse statistics", "baseline niah", "trained niah"]
    finish(checkout, "eit_qwen3_8b/statistics/report.json")
    finish(checkout, "eit_qwen3_8b/niah/report.json", training={"steps": 1250})
    assert left() == []
    submit.main(["--dry-run", str(QWEN)])
    assert capsys.readouterr().out == "everything is complete\n"


def test_a_baseline_or_a_trained_model_alone(checkout: Path) -> None:
    assert {job.phase for job in plan(TRAININGS, ["baseline"], 1)} == {"baseline"}
    with pytest.raises(ValueError, match=r"needs output/eit_qwen3_8b/final, which is not there: add the phase train"):
        plan(TRAININGS, ["trained"], 1)
    finish(checkout, "eit_qwen3_8b/final")
    assert {job.phase for job in plan([QWEN], ["trained"], 1)} == {"trained"}


@pytest.mark.usefixtures("checkout")
def test_what_cannot_be_planned_is_said_in_one_line(sbatch: Callable[[], list[list[str]]]) -> None:
    for arguments, said in [
        (["configs/none.yaml"], "no config at configs/none.yaml"),
        (["configs/train/small.yaml"], "sets no 'name'"),
        ([str(QWEN), "--gpus=3"], "accumulate_grad_batches: 8 in .* does not divide by --gpus 3"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            submit.main(arguments)
    assert not sbatch()


@pytest.mark.usefixtures("checkout")
def test_a_refusal_of_sbatch_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1", monkeypatch)
    with pytest.raises(SystemExit, match=r"error: sbatch said: .*invalid partition.*SBATCH_PARTITION"):
        submit.main([str(QWEN)])
