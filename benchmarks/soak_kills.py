"""Random SIGKILLs of trainings, evaluations and conversions with one and two ranks, all of which must continue.

Run from the checkout, on Linux: ``python benchmarks/soak_kills.py --kills 100``. Each kind runs once undisturbed, then
is killed at random moments and started again until it ends; then it starts over in an empty folder. After every kill,
each named export, checkpoint and report is read completely. Repeated micro-batches, results and exports must equal
those of the undisturbed run bit for bit. Prints a line per kill and, at the end, "kills, lost, tracebacks"; exits with
1 unless the last two are 0. With two ranks, the first, the second or both are killed; a traceback of one rank about
the other's death is not counted.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is a folder of the checkout, not of an installation

from benchmarks.soak_kills_source import ACCUMULATED, ROOT, STEPS, conversion, evaluation, prepare, training

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PATIENCE = 600
"""Seconds after which a process that does not end counts as lost."""
TIMES = ("seconds", "run", "ledger", "wall", "peak", "prefill", "decode", "tokens_per")
"""Prefixes of columns in a report's rows that differ from run to run."""


@dataclass
class Lane:
    """A kind of run: its command, its progress and its results."""

    name: str
    weight: float
    command: Callable[[Path, bool], list[str]]
    """Command for an output folder, and whether it was started before."""
    working: Callable[[Path], int]
    """Progress: 0 until there is work that a kill could lose."""
    check: Callable[[Path], list[str]]
    """Faults in a folder after a kill."""
    outcome: Callable[[Path], Any]
    """Results that must be equal in every finished run."""
    ranks: int = 1
    output: Path = Path()
    expected: Any = None
    starts: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    tracebacks: int = 0

    def start(self) -> subprocess.Popen[bytes]:
        """A process in its own group, with its log beside the output."""
        command = self.command(self.output, self.starts > 0)
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=os.environ | QUIET, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of an undisturbed run, and compare its results."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        self.count_tracebacks(killed=False)
        if code:
            self.wrong.append(f"{self.output.name}: exit code {code}")
            return
        found = self.outcome(self.output)
        if self.expected is None:
            self.expected = found
        elif found != self.expected:
            self.wrong.append(f"{self.output.name}: ends otherwise than alone")

    def count_tracebacks(self, killed: bool) -> None:
        """Count the tracebacks of this start, but for those about another rank that was killed."""
        text = self.log.read_bytes().decode(errors="replace")
        if not (killed and self.ranks > 1):
            self.tracebacks += text.count("Traceback (most recent call last)")
        self.log.write_bytes(b"")
        (self.output.parent / "all.log").open("a").write(f"== {self.output.name}\n{text}")


def alone(lane: Lane, folder: Path) -> None:
    """The undisturbed run for comparison."""
    lane.output, began = folder / f"{lane.name} alone", time.monotonic()
    lane.finish(lane.start())
    lane.seconds = time.monotonic() - began
    fresh(lane, folder, 0)


def fresh(lane: Lane, folder: Path, number: int) -> None:
    """Use a new folder for the next start."""
    lane.output, lane.starts = folder / f"{lane.name} {number}", 0


def kill(lane: Lane, rng: random.Random) -> str | None:
    """Start, and SIGKILL at a random moment of its work; return what was killed, None if the run ended before."""
    process, before = lane.start(), lane.working(lane.output)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and lane.working(lane.output) <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.15 * lane.seconds))
    if process.poll() is not None:
        lane.finish(process)
        return None
    whom = rng.choice(["both ranks", "rank 0", "rank 1"]) if lane.ranks > 1 else "it"
    children = [int(pid) for pid in _children(process.pid)] if whom == "rank 1" else []
    if whom == "rank 0":
        process.kill()
    elif children:
        os.kill(children[0], signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    _all_gone(process)
    lane.count_tracebacks(killed=True)
    lane.wrong += lane.check(lane.output)
    if lane.working(lane.output) < before:
        lane.wrong.append(f"{lane.output.name}: of {before} finished pieces {lane.working(lane.output)} are left")
    return whom


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _all_gone(process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait for the remaining ranks to end, and kill them after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- reading after a kill ---


def torn(folder: Path) -> list[str]:
    """Faults of files with a final name that cannot be read completely."""
    from safetensors import safe_open

    from callbacks.checkpoint_files import checkpoints_in, fault

    wrong = [f"{path}: {why}" for path in checkpoints_in(folder) if (why := fault(path))]
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  no mapping
                        file.get_tensor(name)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".yaml" and not path.read_text().endswith("\n"):
                wrong.append(f"{path}: half a file")
        except Exception as error:
            wrong.append(f"{path}: {error}")
    wrong += [f"{at}: no training.json" for at in exports(folder) if not (at / "training.json").exists()]
    return wrong


def exports(folder: Path) -> list[Path]:
    """Folders of a training's exports."""
    return [path for name in ("checkpoint-*", "final", "merged") for path in sorted(folder.glob(name))]


def losses(folder: Path) -> dict[tuple[str, int], Any]:
    """(rank, micro-batch) -> loss; raises if a repeated micro-batch differs."""
    found: dict[tuple[str, int], Any] = {}
    for path in folder.glob("losses.*.jsonl"):
        for line in path.read_text().split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line that the kill cut
            key = path.name, record.pop("batch")
            if found.setdefault(key, record) != record:
                raise ValueError(f"{path}: micro-batch {key[1]} was {found[key]} and {record}")
    return found


def trained(folder: Path) -> Any:
    """A training's losses, and the content of its tensor files."""
    tensors = {str(p.relative_to(folder)): p.read_bytes() for at in exports(folder) for p in at.glob("*.safetensors")}
    made = losses(folder)
    assert len({batch for _, batch in made}) == STEPS * ACCUMULATED and len(tensors) == STEPS // 2 + 2
    return made, tensors


def measured(folder: Path) -> Any:
    """The report's rows without times and memory."""
    rows = json.loads((folder / "report.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def lines(folder: Path) -> int:
    """Number of finished pieces of an evaluation."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "results").glob("*.jsonl"))


def batches(folder: Path) -> int:
    """Number of micro-batches made in all starts."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("losses.0.jsonl"))


def converted(folder: Path) -> Any:
    """The content of all files of a conversion."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def lanes(folder: Path) -> list[Lane]:
    """The kinds of runs, weighted by how often each is killed."""

    def train(ranks: int) -> Callable[[Path, bool], list[str]]:
        return lambda output, again: training(folder, output, ranks, again)

    def measure(ranks: int) -> Callable[[Path, bool], list[str]]:
        return lambda output, _: evaluation(folder, output, ranks)

    def convert(output: Path, _: bool) -> list[str]:
        return conversion(folder, output)

    return [
        Lane("train", 0.4, train(1), batches, torn, trained),
        Lane("train on two", 0.15, train(2), batches, torn, trained, ranks=2),
        Lane("evaluate", 0.25, measure(1), lines, torn, measured),
        Lane("evaluate on two", 0.08, measure(2), lines, torn, measured, ranks=2),
        Lane("convert", 0.12, convert, lambda output: int((output / ".lock").exists()), torn, converted),
    ]


def main() -> int:
    """Run all kills; return 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/soak_kills"), help="kept if something was lost")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=given.output)).resolve()
    prepare(folder)
    rng, kills, all_lanes = random.Random(given.seed), 0, lanes(folder)
    for lane in all_lanes:
        alone(lane, folder)
    finished = 0
    while kills < given.kills:
        lane = rng.choices(all_lanes, [lane.weight for lane in all_lanes])[0]
        whom = kill(lane, rng)
        kills += whom is not None
        finished += 1
        print(f"{kills:3} {lane.output.name}, start {lane.starts}: {f'killed {whom}' if whom else 'ended'}", flush=True)
        if whom is None:
            fresh(lane, folder, finished)
    for lane in all_lanes:
        if lane.starts:
            lane.finish(lane.start())
    wrong = [one for lane in all_lanes for one in lane.wrong]
    tracebacks = sum(lane.tracebacks for lane in all_lanes)
    print(*wrong, sep="\n")
    print(f"{kills} kills, {len(wrong)} lost, {tracebacks} tracebacks")
    if not wrong and not tracebacks:
        shutil.rmtree(folder)
        return 0
    print(f"logs and folders are in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
