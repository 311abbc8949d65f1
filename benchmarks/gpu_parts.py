"""The parts of gpu.py: ``python benchmarks/gpu_parts.py PART`` runs one on the GPU and prints its figures at the end.

Each takes a device and whether to use tiny models, and returns name -> figure: seconds, GiB, ratios, tokens per second.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from gpu_models import BILLION, TINY, batch_of, random_model, saved, student_of  # noqa: E402
from kvpress import ExpectedAttentionPress, KeyDiffPress  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

ROOT = Path(__file__).parents[1]
Figures = dict[str, Any]


def tests(device: str, tiny: bool) -> Figures:  # noqa: ARG001
    """Run the tests marked cuda; on a CPU they are skipped with a reason."""
    command = [sys.executable, *"-m pytest -n 0 -m cuda -p no:cacheprovider tests/test_cuda.py".split()]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode not in (0, 5):
        raise RuntimeError(finished.stdout[-2000:] + finished.stderr[-2000:])
    return {"result": finished.stdout.strip().splitlines()[-1]}


def quickstart(device: str, tiny: bool) -> Figures:  # noqa: ARG001
    """Run ``make quickstart``'s two commands in a temporary folder; with ``tiny``, two steps of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        train = ["train.py", "fit", "--config", str(ROOT / "configs/quickstart.yaml")]
        test = ["evaluate.py", "test", "--config", str(ROOT / "configs/evaluate/quickstart.yaml")]
        if tiny:
            model = f"--model.init_args.backbone.pretrained={saved(Path(folder) / 'model', TINY)}"
            both = [model, "--trainer.accelerator=cpu"]
            train += [*both, "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
            few = ["windows=1", "depths=[0.5]", "cases_per_cell=1", "lengths=[256]", "continuation_tokens=16"]
            test += [*both, *(f"--data.init_args.{setting}" for setting in few)]
        seconds = [_ran(folder, *train), _ran(folder, *test)]
        rows = json.loads((Path(folder) / "output/quickstart/report.json").read_text())["rows"]
    found = {f"{row['metric']}, {row['press']} {row['compression_ratio']:g}": row for row in rows}
    scores = {name: f"{row['base']:.4g} -> {row['trained']:.4g}" for name, row in found.items() if row["error"] is None}
    return {"train, s": seconds[0], "evaluate, s": seconds[1], **scores}


def _ran(folder: str, script: str, *arguments: str) -> float:
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *arguments]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(finished.stdout[-1000:] + finished.stderr[-2000:])
    return round(time.perf_counter() - start, 1)


def step(device: str, tiny: bool) -> Figures:
    """Compare an EIT step with selection loss, and one with KV dropout, with a plain LoRA step on the same tokens."""
    figures: Figures = {}
    for tokens in (64,) if tiny else (2_048, 8_192):
        model = random_model(TINY if tiny else BILLION, device)
        batch = batch_of(tokens, tokens * 3 // 4, device)
        ids = torch.cat([batch["context_ids"], batch["continuation_ids"]], 1)
        plain, plain_peak = _cost(partial(_plain, model, ids), device)
        figures |= {f"plain LoRA, {tokens} tokens, s": plain, f"plain LoRA, {tokens} tokens, GiB": plain_peak}
        for kind in ("selection", "kv_dropout"):
            student = student_of(model, kind)
            seconds, peak = _cost(partial(_learn, student, batch), device)
            figures[f"{kind}, {tokens} tokens, s (over plain)"] = f"{seconds:.4g} ({seconds / plain:.2f})"
            figures[f"{kind}, {tokens} tokens, GiB (over plain)"] = f"{peak:.4g} ({peak / max(plain_peak, 1e-9):.2f})"
    return figures


def _plain(model: Any, ids: Tensor) -> None:
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()


def _learn(student: Any, batch: Any) -> None:
    student.model.zero_grad()
    with torch.autocast(batch["labels"].device.type, torch.bfloat16):
        view, _ = student.view(batch, 0.5, 0)
        loss = student.objective(view)["loss"]
    loss.backward()


def _cost(run: Callable[[], object], device: str, rounds: int = 3) -> tuple[float, float]:
    """Seconds (the minimum of several rounds after a warm-up) and the peak of GPU memory in GiB."""
    run()
    cuda = device == "cuda"
    rounds = rounds if cuda else 1
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start = _now(cuda)
        run()
        times.append(_now(cuda) - start)
    return min(times), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def kv_dropout(device: str, tiny: bool) -> Figures:
    """Compare KV dropout's attention, and FlexAttention with the same mask, with the dense reference."""
    from gpu_attention import dropout_against_reference

    return dropout_against_reference(device, 64 if tiny else 2_048, _cost)


def blocks(device: str, tiny: bool) -> Figures:
    """Compare Sketch&Walk with PyTorch's causal attention, and a block dropout step with one without eviction."""
    from gpu_attention import sketch_walk_against_dense

    figures = sketch_walk_against_dense(device, (256,) if tiny else (8_192, 32_768), _cost)
    model, batch = random_model(TINY if tiny else BILLION, device), batch_of(128 if tiny else 4_096, 96, device)
    for kind in ("nothing", "blocks"):
        figures[f"step, {kind} dropped, s"] = _cost(partial(_learn, student_of(model, kind), batch), device)[0]
    return figures


def four_bit(device: str, tiny: bool) -> Figures:
    """Run a step on 4-bit weights; the teacher is the same network with its adapter off."""
    from sparsekv_pl.models.backbone import Backbone

    with tempfile.TemporaryDirectory() as folder:
        shape = TINY if tiny else BILLION | {"num_hidden_layers": 4}
        model, _ = Backbone(saved(Path(folder), shape), load_in_4bit=True).load()
    model = model.to(device).train()
    student, batch = student_of(model, "selection"), batch_of(128 if tiny else 2_048, 96, device)
    seconds, peak = _cost(partial(_learn, student, batch), device)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)
    kl = float(student.objective(student.view(batch, 0.0, 0)[0])["kl"].detach())
    return {
        "step, s": seconds,
        "peak, GiB": peak,
        "gradients finite": finite,
        "KL of a fresh adapter, nothing evicted": kl,
    }


def sharded(device: str, tiny: bool) -> Figures:
    """Compare three steps under FSDP2 with one rank with the same steps in a plain process."""
    from gpu_attention import losses_of_three_steps

    from sparsekv_pl.models.backbone import Backbone

    with tempfile.TemporaryDirectory() as folder:
        model, adapter = saved(Path(folder) / "model", TINY if tiny else BILLION | {"num_hidden_layers": 4}), folder
        Backbone(model).load()[0].save_pretrained(adapter)
        alone, sharded_ = (losses_of_three_steps(model, adapter, device, flag) for flag in (False, True))
    return {"losses, one process": alone, "losses, FSDP2 with one rank": sharded_}


def evaluation(device: str, tiny: bool) -> Figures:
    """Tokens per second of prefill and decoding, with the full and with an evicted cache."""
    from sparsekv_pl.eviction.decoding import greedy
    from sparsekv_pl.eviction.prefill import prefill

    model = random_model(TINY if tiny else BILLION, device, lora=False).eval()
    tokens, new = (128, 4) if tiny else (8_192, 64)
    batch = batch_of(tokens, tokens - 32, device)
    context, question = batch["context_ids"], batch["continuation_ids"]
    lengths = torch.tensor([question.shape[1]], device=device)
    figures: Figures = {}
    for press in (None, KeyDiffPress(0.9), ExpectedAttentionPress(0.9)):
        name = "full cache" if press is None else type(press).__name__.removesuffix("Press")
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            filled = _cost(partial(prefill, model, context, press), device)[0]
            prefilled = prefill(model, context, press)
            decoding = _cost(lambda made=prefilled: greedy(model, made.copy(), question, lengths, [new]), device, 1)[0]
        figures[f"{name}, prefill of {tokens}, tokens/s"] = context.numel() / filled
        figures[f"{name}, decoding, tokens/s"] = new / decoding
    return figures


PARTS: dict[str, Callable[[str, bool], Figures]] = {
    part.__name__: part for part in (tests, quickstart, step, kv_dropout, four_bit, sharded, blocks, evaluation)
}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]]("cuda", False)))
