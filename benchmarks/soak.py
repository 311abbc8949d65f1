"""A long run under every fault that a run can survive, against the same run left alone.

Run from the checkout, on Linux: ``python benchmarks/soak.py``. Twice train.py trains the smallest random model on text
streamed over HTTP. The second run is killed four times, loses its source, gets garbage, finds a shard corrupt, its disk
full and its newest checkpoint truncated, and is told to stop; each time it goes on by itself or with --ckpt_path last.
Prints PASS or FAIL for each fault and for what must be the same in the end; exits with 1 where one fails.
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
"""Of memory, after the first tenth of the steps."""
OPENED_AGAIN = "Opening it again"

Record = dict[str, Any]


class Check(NamedTuple):
    """A line of the report."""

    passed: bool
    name: str
    figures: str


Fault = Callable[["Run"], Check]
"""Does it to a run, and sees the run go on."""


def kill(run: "Run") -> Check:
    """At any moment."""
    code, newest = run.end(signal.SIGKILL), run.newest()
    run.start()
    return Check(code == -signal.SIGKILL, "SIGKILL", f"after micro-batch {newest}")


def kill_between(run: "Run") -> Check:
    """While a step has gradients of its first micro-batch only."""
    while True:
        run.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, run.process.pid, os.WSTOPPED)
        if run.newest() % 2 == 0:
            return kill(run)._replace(name="SIGKILL in the middle of accumulation")
        run.process.send_signal(signal.SIGCONT)
        time.sleep(0.003)


def healing(fault: str) -> Fault:
    """One reply of the source is spoilt; the process itself goes on."""

    def heal(run: "Run") -> Check:
        before = run.said().count(OPENED_AGAIN)
        run.server.faults.append(fault)
        run.wait(lambda: not run.server.faults and run.said().count(OPENED_AGAIN) > before)
        newest = run.newest()
        run.wait(lambda: run.newest() > newest)
        return Check(True, f"{fault} of the source", f"went on after micro-batch {newest}: {run.line(OPENED_AGAIN)}")

    return heal


def corrupt_shard(run: "Run") -> Check:
    """A shard is garbage until it is repaired: the run stops and names it."""
    run.server.faults.append("corrupt")
    code, said, url = run.end(), run.line("error: "), run.server.url(run.server.corrupt)
    run.server.corrupt = None
    run.start()
    return Check(code == 1 and f"shard {url}:" in said, "corrupt shard", said)


def full_disk(run: "Run") -> Check:
    """No file may become as large as a checkpoint: the run stops, nothing of it is left, those before are whole."""
    limit = run.checkpoints()[0].stat().st_size * 2 // 3
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    code, said = run.end(), run.line("error: ")
    left = [path.name for path in run.folder.rglob(".*.partial")]
    named = f"checkpoint {run.folder}/checkpoints/step=" in said and "was not saved" in said
    gone = all(str(path) not in said.split("was not saved")[0] for path in run.checkpoints())
    run.start()
    return Check(code == 1 and named and gone and not left, "full disk", f"{said} Left over: {left or 'nothing'}")


def truncated_checkpoint(run: "Run") -> Check:
    """The newest ends in the middle after a kill: it is reported, and the one before it is used."""
    run.end(signal.SIGKILL)
    newest, before = run.checkpoints()[:2]
    os.truncate(newest, newest.stat().st_size // 2)
    run.start()
    run.wait(lambda: run.newest() >= 0)
    first = json.loads(run.records.read_text().splitlines()[0])["batch"]
    said = run.line(f"checkpoint not used: {newest}")
    passed = "truncated" in said and before.stem == f"step={first // 2}"
    return Check(passed, "SIGKILL and a truncated checkpoint", f"{said}; went on from {before.name}")


def terminate(run: "Run") -> Check:
    """SIGTERM saves at the end of the step."""
    code, said = run.end(signal.SIGTERM), run.line("SIGTERM: ")
    run.start()
    return Check(code == 128 + signal.SIGTERM and "stopped after step" in said, "SIGTERM", f"exit code {code}, {said}")


# A read that was given up may ask again seconds later, and would take the next fault: a kill follows it.
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
"""By the share of the steps that are done before."""


def same_steps(alone: Iterable[Record], disturbed: Sequence[Record], count: int) -> Check:
    """Every micro-batch was made, and whenever one was, it had the loss and the documents of the run left alone."""
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
    """How often each document was read, where the last record of a micro-batch counts; windows may divide one."""
    last = {record["batch"]: record["documents"][0].split(" + ") for record in records}
    found: Counter[str] = Counter()
    before: list[str] = []
    for batch in sorted(last):
        found.update(name for name in last[batch] if name not in before)
        before = last[batch]
    return found


def same_documents(alone: Iterable[Record], disturbed: Iterable[Record], documents: set[str]) -> Check:
    """All ``documents`` and no others, as often in both runs, and none more than once more often than another."""
    one, other = readings(alone), readings(disturbed)
    different = sum(one[name] != other[name] for name in one.keys() | other.keys())
    even = max(one.values()) - min(one.values()) <= 1 and one.keys() == documents
    figures = f"{len(one)} of {len(documents)} documents, {min(one.values())} to {max(one.values())} times each, "
    figures += f"{one.total()} and {other.total()} readings, {different} not as often"
    return Check(even and not different, "every document as often", figures)


def same_parameters(alone: Path, disturbed: Path) -> Check:
    """Trained weights and the optimizer's state of two checkpoints."""
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
    """Resident memory at the end over that after a tenth of the steps: medians over a twentieth of them each."""
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
    """Open files at the end and after a tenth of the steps."""
    files: Mapping[int, int] = {record["step"]: record["files"] for record in records if "files" in record}
    begin, end = files[steps // 10], files[steps]
    figures = f"{begin} at step {steps // 10}, {end} at step {steps}, {min(files.values())} to {max(files.values())}"
    return Check(begin == end, "open files flat", figures)


def soak(folder: Path, steps: int) -> Iterator[Check]:
    """Both runs, what the faults did, and what the two have in common."""
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
    """0 where every check passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000, help="optimizer steps of each run, 200 or more")
    parser.add_argument(
        "--output", type=Path, default=Path("output/soak"), help="where it works; kept if a check fails"
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
