"""A long run with every survivable fault, compared with the same run without faults.

Run from the checkout, on Linux: ``python benchmarks/soak.py``. train.py trains the smallest random model twice on text
streamed over HTTP. The second run is killed four times, loses its source, gets garbage, a corrupt shard, a full disk, a
truncated newest checkpoint and SIGTERM; each time it continues by itself or with --ckpt_path last. Prints PASS or FAIL
for each fault and for each final comparison; exits with 1 if one fails.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is a folder of the checkout, not of an installation
if TYPE_CHECKING:
    from benchmarks.soak_source import Run

GROWTH = 0.02
"""Largest relative growth of memory after the first tenth of the steps."""
OPENED_AGAIN = "Opening it again"

Record = dict[str, Any]


class Check(NamedTuple):
    """A line of the report."""

    passed: bool
    name: str
    figures: str


Fault = Callable[["Run"], Check]
"""Causes a fault in a run, and checks that the run continues."""


def kill(run: "Run") -> Check:
    """SIGKILL at any moment."""
    code, newest = run.end(signal.SIGKILL), run.newest()
    run.start()
    return Check(code == -signal.SIGKILL, "SIGKILL", f"after micro-batch {newest}")


def kill_between(run: "Run") -> Check:
    """SIGKILL while a step has only the gradients of its first micro-batch."""
    while True:
        run.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, run.process.pid, os.WSTOPPED)
        if run.newest() % 2 == 0:
            return kill(run)._replace(name="SIGKILL in the middle of accumulation")
        run.process.send_signal(signal.SIGCONT)
        time.sleep(0.003)


def healing(fault: str) -> Fault:
    """Damage one reply of the source; the process itself continues."""

    def heal(run: "Run") -> Check:
        before = run.log_text().count(OPENED_AGAIN)
        run.server.faults.append(fault)
        run.wait(lambda: not run.server.faults and run.log_text().count(OPENED_AGAIN) > before)
        newest = run.newest()
        run.wait(lambda: run.newest() > newest)
        return Check(True, f"{fault} of the source", f"went on after micro-batch {newest}: {run.line(OPENED_AGAIN)}")

    return heal


def corrupt_shard(run: "Run") -> Check:
    """Corrupt a shard until it is repaired: the run stops and names it."""
    run.server.faults.append("corrupt")
    code, line, url = run.end(), run.line("error: "), run.server.url(run.server.corrupt)
    run.server.corrupt = None
    run.start()
    return Check(code == 1 and f"shard {url}:" in line, "corrupt shard", line)


def full_disk(run: "Run") -> Check:
    """Limit file sizes below a checkpoint's: the run stops, leaves no partial file, and earlier checkpoints stay."""
    limit = run.checkpoints()[0].stat().st_size * 2 // 3
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    code, line = run.end(), run.line("error: ")
    left = [path.name for path in run.folder.rglob(".*.partial")]
    named = f"checkpoint {run.folder}/checkpoints/step=" in line and "was not saved" in line
    gone = all(str(path) not in line.split("was not saved")[0] for path in run.checkpoints())
    run.start()
    return Check(code == 1 and named and gone and not left, "full disk", f"{line} Left over: {left or 'nothing'}")


def truncated_checkpoint(run: "Run") -> Check:
    """Truncate the newest checkpoint after a kill: it is reported, and the one before it is used."""
    run.end(signal.SIGKILL)
    newest, before = run.checkpoints()[:2]
    os.truncate(newest, newest.stat().st_size // 2)
    run.start()
    run.wait(lambda: run.newest() >= 0)
    first = json.loads(run.records.read_text().splitlines()[0])["batch"]
    line = run.line(f"checkpoint not used: {newest}")
    passed = "truncated" in line and before.stem == f"step={first // 2}"
    return Check(passed, "SIGKILL and a truncated checkpoint", f"{line}; went on from {before.name}")


def terminate(run: "Run") -> Check:
    """SIGTERM saves at the end of the step."""
    code, line = run.end(signal.SIGTERM), run.line("SIGTERM: ")
    run.start()
    return Check(code == 128 + signal.SIGTERM and "stopped after step" in line, "SIGTERM", f"exit code {code}, {line}")


# An abandoned read may retry seconds later and would use up the next fault, so a kill follows it.
FAULTS: dict[float, Fault] = {
    0.11: healing("stall"),
    0.19: kill,
    0.27: healing("drop"),
    0.36: kill_between,
    0.44: healing("garbage"),
    0.52: corrupt_shard,
    0.61: full_disk,
    0.71: truncated_checkpoint,
    0.82: terminate,
    0.92: kill,
}
"""Share of the steps done -> fault."""


def same_steps(alone: Iterable[Record], disturbed: Sequence[Record], count: int) -> Check:
    """Check that every micro-batch was made, always with the loss and the documents of the undisturbed run."""
    expected = {record["batch"]: _told(record) for record in alone}
    made = Counter(record["batch"] for record in disturbed)
    lost = sorted(set(range(count)) - (expected.keys() & made.keys()))
    other = sorted({record["batch"] for record in disturbed if _told(record) != expected.get(record["batch"])})
    figures = f"{len(made)} of {count} micro-batches, {len(disturbed) - len(made)} of them made again, "
    figures += f"{len(lost)} lost {lost[:3]}, {len(other)} different {other[:3]}"
    return Check(not lost and not other, "losses and documents bit for bit", figures)


def _told(record: Record) -> tuple[Any, ...]:
    return record["step"], record["loss"], record["documents"]


def readings(records: Iterable[Record]) -> Counter[str]:
    """Number of readings of each document, by the last record of each micro-batch; windows may divide a document."""
    last = {record["batch"]: record["documents"][0].split(" + ") for record in records}
    found: Counter[str] = Counter()
    before: list[str] = []
    for batch in sorted(last):
        found.update(name for name in last[batch] if name not in before)
        before = last[batch]
    return found


def same_documents(alone: Iterable[Record], disturbed: Iterable[Record], documents: set[str]) -> Check:
    """Check that both runs read exactly ``documents``, equally often, with counts that differ by at most one."""
    one, other = readings(alone), readings(disturbed)
    different = sum(one[name] != other[name] for name in one.keys() | other.keys())
    even = max(one.values()) - min(one.values()) <= 1 and one.keys() == documents
    figures = f"{len(one)} of {len(documents)} documents, {min(one.values())} to {max(one.values())} times each, "
    figures += f"{one.total()} and {other.total()} readings, {different} not as often"
    return Check(even and not different, "every document as often", figures)


def same_parameters(alone: Path, disturbed: Path) -> Check:
    """Compare trained weights and optimizer state of two checkpoints."""
    import torch
    from torch.utils._pytree import tree_flatten

    saved = [torch.load(path, weights_only=True) for path in (alone, disturbed)]
    (one, shape), (other, shape2) = (tree_flatten([state["state_dict"], state["optimizer_states"]]) for state in saved)
    different = sum(
        not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) for a, b in zip(one, other, strict=True)
    )
    numbers = sum(value.numel() for value in saved[0]["state_dict"].values())
    figures = f"{numbers:,} trained parameters, {different} of {len(one)} tensors and settings differ"
    return Check(shape == shape2 and not different, "final parameters and optimizer state bit for bit", figures)


def flat_memory(records: Iterable[Record], steps: int) -> Check:
    """Compare resident memory at the end with that after a tenth of the steps, as medians over a twentieth of them."""
    resident = {record["step"]: record["resident"] / 2**20 for record in records if "resident" in record}
    first, window = steps // 10, steps // 20
    begin = median(size for step, size in resident.items() if first <= step <= first + window)
    end = median(size for step, size in resident.items() if step > steps - window)
    growth, greatest = end / begin - 1, max(resident.values())
    figures = (
        f"{begin:.1f} MiB after step {first}, {end:.1f} MiB at the end ({growth:+.2%}), at most {greatest:.1f} MiB"
    )
    return Check(growth < GROWTH, "resident memory flat", figures)


def flat_files(records: Iterable[Record], steps: int) -> Check:
    """Compare open files at the end with those after a tenth of the steps."""
    files: Mapping[int, int] = {record["step"]: record["files"] for record in records if "files" in record}
    begin, end = files[steps // 10], files[steps]
    figures = f"{begin} at step {steps // 10}, {end} at step {steps}, {min(files.values())} to {max(files.values())}"
    return Check(begin == end, "open files flat", figures)


def soak(folder: Path, steps: int) -> Iterator[Check]:
    """Run both, and return the checks of the faults and of the final comparison."""
    from benchmarks.soak_source import Run, Shards, config, make_model, make_shards
    from data.text import Splits

    make_model(folder / "model")
    shards = make_shards(steps)
    server = Shards(shards)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config(str(folder / "model"), server.urls, steps, saved_every=steps // 40)))
    runs = alone, disturbed = Run(folder / "undisturbed", path, server), Run(folder / "disturbed", path, server)
    try:
        began = time.monotonic()
        alone.start()
        code = alone.end()
        figures = f"{time.monotonic() - began:.0f} s, {server.replies} reads of {len(shards)} shards"
        yield Check(code == 0, "undisturbed run", f"exit code {code}, {figures}")
        began, before = time.monotonic(), server.replies
        disturbed.start()
        for share, fault in FAULTS.items():
            disturbed.reach(int(share * steps) * 2)
            yield fault(disturbed)
        code = disturbed.end()
        figures = f"{time.monotonic() - began:.0f} s, {server.replies - before} reads, {disturbed.starts} starts"
        yield Check(code == 0, "disturbed run", f"exit code {code}, {figures}")
    finally:
        for run in runs:
            run.stop()
        server.close()
    split = Splits()
    rows = [row for shard in shards.values() for row in shard]
    train = {f"json/{row['id']}" for row in rows if split.of(row["text"]) == "train"}
    records = alone.all_records()
    yield same_steps(records, disturbed.all_records(), steps * 2)
    yield same_documents(records, disturbed.all_records(), train)
    yield same_parameters(alone.checkpoints()[0], disturbed.checkpoints()[0])
    yield flat_memory(records, steps)
    yield flat_files(records, steps)


def main() -> int:
    """Run and print all checks; return 0 if every check passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000, help="optimizer steps of each run, 200 or more")
    parser.add_argument(
        "--output", type=Path, default=Path("output/soak"), help="working folder; kept if a check fails"
    )
    arguments = parser.parse_args()
    if arguments.steps < 200:
        parser.error(f"--steps {arguments.steps}: give 200 or more, or the faults come too close to each other")
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=arguments.output)).resolve()
    passed = True
    for check in soak(folder, arguments.steps):
        print("PASS" if check.passed else "FAIL", f"{check.name}: {check.figures}".replace(str(folder), ""), flush=True)
        passed = passed and check.passed
    if passed:
        shutil.rmtree(folder)
    else:
        print(f"logs, records and checkpoints are in {folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
