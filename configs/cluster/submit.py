"""Submit the phases of one or more trainings to Slurm with dependencies, a few at a time, without complete ones.

Run from anywhere: ``python configs/cluster/submit.py --partition gpu``; first with ``--dry-run``, which prints the plan
and needs no cluster. For each training config (default: Qwen3-8B and Llama-3.1-8B) the phases are

    analyse    attention of its base model, configs/analyze/
    train      after its analyses
    baseline   the base model under eviction, configs/evaluate/
    trained    base against trained, configs/evaluate/, after the training and the same evaluation's baseline

A job is complete if its report.json, or the training's final/, exists: delete that to repeat the job. A second call
submits failed and missing jobs; two jobs of one name never run at once.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = [Path("configs/train/eit_qwen3_8b.yaml"), Path("configs/train/eit_llama31_8b.yaml")]
PHASES = ("analyse", "train", "baseline", "trained")
"""In the order of submission: what others wait for comes first."""

# Configurations of each phase, with settings larger than the files' defaults, which take minutes on a CPU.
ANALYSES = {
    "configs/analyze/anchors.yaml": ["--data.windows=90", "--data.cases_per_cell=10"],
    "configs/analyze/statistics.yaml": ["--data.windows=100"],
}
EVALUATIONS = {
    "configs/evaluate/matrix.yaml": ["--data.lengths=[4096]", "--data.cases_per_cell=10", "--data.windows=32"],
    "configs/evaluate/niah.yaml": ["--data.lengths=[1024, 2048, 4096, 8192]"],
}
LOGS = "output/slurm"


@dataclass(frozen=True)
class Job:
    """One sbatch: a script with its arguments, the file or folder it ends in, and the jobs it needs."""

    phase: str
    name: str
    script: str
    arguments: tuple[str, ...]
    result: Path
    needs: "tuple[Job, ...]" = ()

    def complete(self) -> bool:
        """Whether what it makes is there; a report counts as trained if it says what training was."""
        path = ROOT / self.result
        if self.phase != "trained" or not path.exists():
            return path.exists()
        return bool(json.loads(path.read_text())["training"])


def jobs_of(training: Path, gpus: int) -> list[Job]:
    """Every job for one training config, each after those that it needs."""
    config = _read(training)
    old = config.get("trainer", {}).get("default_root_dir")
    try:
        model = config["model"]["init_args"]["backbone"]["pretrained"]
        run = config["name"] if old is None else str(ROOT / old)
    except KeyError as error:
        raise ValueError(f"{training} sets no {error}, so it is no training on its own: take {TRAININGS[0]}") from None
    folder = Path("output") / run

    def evaluation(phase: str, path: str, arguments: Iterable[str], needs: tuple[Job, ...] = ()) -> Job:
        report = _read(Path(path))["report"]
        given = (path, f"--name={run}", f"--model.backbone.pretrained={model}", *arguments)
        result = folder / report / "report.json"
        return Job(phase, f"{folder.name}-{report}", "evaluate.sbatch", given, result, needs)

    analyses = [evaluation("analyse", path, more) for path, more in ANALYSES.items()]
    baselines = [evaluation("baseline", path, more) for path, more in EVALUATIONS.items()]
    given = (str(training), *_same_batch(training, config["trainer"], gpus))
    train = Job("train", f"{folder.name}-train", "train.sbatch", given, folder / "final", tuple(analyses))
    trained = [
        evaluation("trained", path, [*more, "--model.backbone.adapter=final"], (train, baseline))
        for (path, more), baseline in zip(EVALUATIONS.items(), baselines, strict=True)
    ]
    return [*analyses, *baselines, train, *trained]


def _same_batch(path: Path, trainer: dict[str, Any], gpus: int) -> list[str]:
    """Overrides that keep the examples of an optimizer step and of a validation interval as one GPU has them."""
    if gpus == 1:
        return []
    names = [name for name in ("accumulate_grad_batches", "val_check_interval") if name in trainer]
    for name in names:
        if trainer[name] % gpus:
            raise ValueError(
                f"{name}: {trainer[name]} in {path} does not divide by --gpus {gpus}: choose one that does"
            )
    return [f"--trainer.{name}={trainer[name] // gpus}" for name in names]


def _read(path: Path) -> dict[str, Any]:
    if not (ROOT / path).is_file():
        raise ValueError(f"no config at {path}: a path from the checkout, such as {TRAININGS[0]}")
    return yaml.safe_load((ROOT / path).read_text())


def plan(trainings: Iterable[Path], phases: Sequence[str], gpus: int) -> list[Job]:
    """What is to be done of ``phases``, phase by phase; a ValueError where a training is missing and not asked for."""
    every = [job for training in trainings for job in jobs_of(training, gpus)]
    jobs = [job for phase in PHASES for job in every if job.phase == phase and phase in phases and not job.complete()]
    for job in jobs:
        missing = [need for need in job.needs if need.phase == "train" and need not in jobs and not need.complete()]
        if missing:
            raise ValueError(f"{job.name} needs {missing[0].result}, which is not there: add the phase train")
    return jobs


def sbatch(job: Job, ids: dict[Job, str], before: str | None, options: Sequence[str]) -> list[str]:
    """The command that submits ``job``.

    Parameters
    ----------
    job
        What to submit.
    ids
        Of what is submitted already; the job starts once all it needs of these have succeeded.
    before
        Id of the job whose end, good or bad, makes room for this one.
    options
        More options of sbatch.
    """
    needs = [ids[need] for need in job.needs if need in ids]
    dependency = ["afterok:" + ":".join(needs)] if needs else []
    dependency += [f"afterany:{before}"] if before and before not in needs else []
    dependency += ["singleton"]  # baseline and trained write to one folder, and so do jobs submitted twice
    return [
        "sbatch",
        "--parsable",
        f"--job-name={job.name}",
        f"--output={LOGS}/%x-%j.log",
        f"--dependency={','.join(dependency)}",
        "--kill-on-invalid-dep=yes",  # otherwise jobs that depend on a failed one wait forever
        *options,
        f"configs/cluster/{job.script}",
        *job.arguments,
    ]


def submit(jobs: Sequence[Job], at_once: int, options: Sequence[str], dry_run: bool) -> None:
    """Submit all of them, at most ``at_once`` running at a time, or print what would be."""
    ids: dict[Job, str] = {}
    for number, job in enumerate(jobs, start=1):
        before = list(ids.values())[-at_once] if len(ids) >= at_once else None
        command = sbatch(job, ids, before, options)
        ids[job] = str(number) if dry_run else _start(command)
        print(f"{ids[job]}  {job.phase}  {job.name}" + (f"\n    {shlex.join(command)}" if dry_run else ""), flush=True)


def _start(command: Sequence[str]) -> str:
    """The id that sbatch gives."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("no sbatch on this machine: run on a login node, or see the plan with --dry-run") from None
    if done.returncode:
        raise ValueError(
            f"sbatch said: {done.stderr.strip()}. Partition and account are --partition and --account here, or "
            "SBATCH_PARTITION and SBATCH_ACCOUNT; what was submitted stays, and is safe to submit again"
        )
    return done.stdout.strip().partition(";")[0]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, plan, submit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="*", type=Path, default=TRAININGS, help="configs under configs/train/")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, metavar="PHASE")
    parser.add_argument("--gpus", type=_positive, default=1, help="for each job; a training's batch stays the same")
    parser.add_argument("--at-once", type=_positive, default=4, help="jobs that may run at a time")
    parser.add_argument("--partition", help="of the cluster; else SBATCH_PARTITION, else the cluster's default")
    parser.add_argument("--account", help="to charge; else SBATCH_ACCOUNT, else the cluster's default")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, its line numbers as job ids")
    given = parser.parse_args(arguments)
    options = [f"--{name}={getattr(given, name)}" for name in ("partition", "account") if getattr(given, name)]
    options += [f"--gpus-per-node={given.gpus}", f"--ntasks-per-node={given.gpus}"]
    try:
        jobs = plan(given.trainings, given.phases, given.gpus)
        if not jobs:
            print("everything is complete")
        if not given.dry_run:
            (ROOT / LOGS).mkdir(parents=True, exist_ok=True)
        submit(jobs, given.at_once, options, given.dry_run)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
