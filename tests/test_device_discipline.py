"""What a GPU would show and no machine here has: tensors of several devices that meet, and waits in every layer."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, BasePress, ExpectedAttentionPress, KeyDiffPress, KnormPress, SnapKVPress, TOVAPress
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sparsekv_pl.analysis.anchor_attention import observed
from sparsekv_pl.analysis.anchor_profile import profile_records
from sparsekv_pl.analysis.hot_blocks import HotBlocks
from sparsekv_pl.analysis.statistics_analysis import _row_record, run_observed
from sparsekv_pl.analysis.token_types import TYPES
from sparsekv_pl.attention.statistics import AttentionStatistics, StatisticsSettings
from sparsekv_pl.evaluation.context_sparsity import attention_sparsity
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Setting, points_of
from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.anchors import Anchors, AnchorTable
from sparsekv_pl.models.batch import IGNORE, TEXT, Batch, CaseBatch, CaseInfo, Supervised
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.objectives import EIT, Layerwise, Mixed, Objective, Reconstruction, SelectionObjective
from sparsekv_pl.presses import AnchorPress, BlockDropoutPress, EvictionAugPress, SoftThresholdPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.training.non_finite_guard import MicroBatch, _fault
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher
from tests.accelerator import Accelerators, place, placed, spread
from tests.conftest import VOCABULARY

CONTEXT, CONTINUATION = 48, 12
PRESSES = [ExpectedAttentionPress(), SnapKVPress(window_size=8), KeyDiffPress()]


def model_of(layers: int) -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, head_dim=8, num_hidden_layers=layers, **shape))


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCABULARY, (2, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(1))
    return ids[:, :CONTEXT], ids[:, CONTEXT:]


def training_batch(**more: Any) -> Batch:
    context, continuation = tokens()
    labels = continuation.clone()
    labels[:, 0] = labels[1, 4:] = IGNORE
    return Batch(
        context_ids=context,
        continuation_ids=continuation,
        labels=labels,
        supervised=Supervised.of(labels),
        document_ids=["a", "b"],
        tasks=[TEXT, TEXT],
        **more,
    )


def cases(task: str) -> CaseBatch:
    context, continuation = tokens()
    infos = [CaseInfo(f"{task}/{row}", task, answers=("7",), max_new_tokens=3) for row in range(2)]
    lengths = torch.tensor([CONTINUATION, CONTINUATION])
    return CaseBatch(context_ids=context, continuation_ids=continuation, continuation_lengths=lengths, cases=infos)


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, str]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


def waits_of_a_step(layers: int, eviction: Eviction, objective: Objective, tokenizer: Any, **more: Any) -> Counter[str]:
    """What a training step on one GPU waits for: forward, backward and the look for what is not finite."""
    model = model_of(layers).train()
    place(model, "cuda:0")
    objective.prepare(tokenizer)
    if isinstance(eviction, KVDropout):
        eviction.tokenizer = AnchorTable(*placed(torch.zeros(2, VOCABULARY, dtype=torch.bool), "cuda:0"))
    student = Student(model, eviction, Teacher(model), objective)
    batch = training_batch(**more)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Accelerators() as accelerators:
        view, _ = student.view(placed(batch, "cuda:0"), 0.5, 0)
        terms = objective(view)
        terms["loss"].backward()
        assert not _fault([MicroBatch({"loss": terms["loss"].detach()}, {}, [])], optimizer, False)
    return accelerators.waits


def learnt(press: BasePress, tokenizer: Any, device: str | None) -> dict[str, Tensor]:
    """The loss and the gradients of a training step, on the CPU or on what says that it is a GPU."""
    model = model_of(2).train()
    objective = Mixed([EIT(), SelectionObjective()])
    objective.prepare(tokenizer)
    batch = training_batch()
    if device is not None:
        place(model, device)
        batch = placed(batch, device)
    student = Student(model, RealEviction(press), Teacher(model), objective)
    with Accelerators():
        loss = objective(student.view(batch, 0.5, 0)[0])["loss"]
        loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(value, "plain", value) for name, value in found.items()}


@pytest.mark.parametrize("press", [ExpectedAttentionPress(), SnapKVPress(window_size=8), TOVAPress()], ids=press_name)
def test_a_press_that_is_not_waited_for_computes_what_it_does_on_a_cpu(press: BasePress, tokenizer: Any) -> None:
    on_cpu, on_gpu = learnt(press, tokenizer, None), learnt(press, tokenizer, "cuda:0")
    assert on_cpu.keys() == on_gpu.keys()
    assert len(on_cpu) > 10
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], value, msg=name)


STEPS: dict[str, tuple[Callable[[], Eviction], Callable[[], Objective], dict[str, Any], int]] = {
    "every kind of score": (
        lambda: RealEviction(EvictionAugPress(PRESSES, score_all=True)),
        lambda: Mixed([EIT(), SelectionObjective(form="ranking"), SelectionObjective()]),
        {},
        2,
    ),
    "rows of different lengths": (
        lambda: RealEviction(ExpectedAttentionPress()),
        lambda: Mixed([EIT(), SelectionObjective()]),
        {"context_lengths": [CONTEXT, CONTEXT - 8]},
        3,
    ),
    "chunks": (
        lambda: RealEviction(SnapKVPress(window_size=8), chunk_tokens=16, budget=20),
        lambda: Mixed([EIT(), SelectionObjective()]),
        {},
        2,
    ),
    "soft weights": (lambda: RealEviction(SoftThresholdPress(window_size=8)), EIT, {}, 3),
    "dropped blocks": (lambda: RealEviction(BlockDropoutPress(block_size=8, protect_recent=8)), EIT, {}, 3),
    "dropped pairs": (lambda: KVDropout(Anchors(recent=8), query_chunk=16), EIT, {}, 5),
    "layers and what was evicted": (
        lambda: RealEviction(KeyDiffPress()),
        lambda: Mixed([Layerwise(), Reconstruction(block_size=8, cue_tokens=4)]),
        {},
        7,
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_training_step_waits_no_more_often_in_a_deeper_model(step: str, tokenizer: Any) -> None:
    eviction, objective, more, most = STEPS[step]
    waits = waits_of_a_step(2, eviction(), objective(), tokenizer, **more)
    assert waits.total() <= most, waits
    assert waits_of_a_step(4, eviction(), objective(), tokenizer, **more) == waits


@pytest.mark.parametrize(("task", "most"), [(TEXT, 3), ("needle", 3)])
def test_a_measured_point_waits_no_more_often_in_a_deeper_model(task: str, most: int, tokenizer: Any) -> None:
    """For its rows' results, or for each token of its answers."""

    def waits(layers: int) -> Counter[str]:
        model = model_of(layers).eval()
        place(model, "cuda:0")
        measurement = Measurement(model, tokenizer, placed(cases(task), "cuda:0"))
        points = points_of([Setting(press, [0.5]) for press in PRESSES])
        with Accelerators() as accelerators:
            for point in points:
                measurement.at(point)
        assert accelerators.waits.total() <= most * len(points), accelerators.waits
        return accelerators.waits

    assert waits(2) == waits(4)


@pytest.fixture(scope="module")
def on_two() -> LlamaForCausalLM:
    """A model whose layers lie on two devices, embeddings and head on the first."""
    model = model_of(3).eval()
    spread(decoder_of(model), ["cuda:0", "cuda:1", "cuda:1"])
    place(model, "cuda:0")
    return model


@pytest.mark.parametrize("task", [TEXT, "needle"])
def test_layers_on_two_devices_are_measured_as_on_one(task: str, on_two: LlamaForCausalLM, tokenizer: Any) -> None:
    anchored = AnchorPress(press=KnormPress(), anchors=Anchors(recent=8))
    anchored.tokenizer = tokenizer
    presses = [ExpectedAttentionPress(), anchored, AdaKVPress(KnormPress())]
    points = points_of([Setting(press, [0.5]) for press in presses])
    alone = Measurement(model_of(3).eval(), tokenizer, cases(task), with_stability=True)
    with Accelerators():
        measurement = Measurement(on_two, tokenizer, placed(cases(task), "cuda:0"), with_stability=True)
        for point in points:
            for found, wanted in zip(measurement.at(point), alone.at(point), strict=True):
                numbers = {name for name, value in wanted.items() if isinstance(value, (int, float))}
                for name in numbers - {"prefill_seconds", "eviction_seconds", "decode_seconds", "peak_bytes"}:
                    assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), (point.name, name)


def test_attention_of_layers_on_two_devices_is_what_it_is_on_one(on_two: LlamaForCausalLM, tokenizer: Any) -> None:
    ids, model, types = tokens()[0], model_of(3).eval(), torch.arange(CONTEXT).expand(2, -1) % len(TYPES)
    with Accelerators():
        there = placed(ids, "cuda:0")
        assert attention_sparsity(on_two, tokenizer, there) == attention_sparsity(model, tokenizer, ids)
        kinds = placed(types, "cuda:0")
        found = profile_records(observed(on_two, there, kinds), kinds, 0.8)
        assert found == profile_records(observed(model, ids, types), types, 0.8)
        hot, wanted = HotBlocks(CONTEXT, 16), HotBlocks(CONTEXT, 16)
        continue_from(on_two, there, DynamicCache(), 0, observer=hot)
        continue_from(model, ids, DynamicCache(), 0, observer=wanted)
        assert torch.equal(hot.mass, wanted.mass)
        settings = StatisticsSettings()
        statistics = [AttentionStatistics(settings, Anchors(recent=0).mask(i, tokenizer)) for i in (there, ids)]
        for network, rows, observer in zip((on_two, model), (there, ids), statistics, strict=True):
            run_observed(network, rows, observer)
        measured = [_row_record([s.layers[n] for n in range(3)], 1, settings) for s in statistics]
        assert measured[0] == measured[1]


def test_what_a_gpu_would_refuse_or_wait_for_is_seen() -> None:
    here, there = placed(torch.arange(6.0), "cuda:0"), placed(torch.arange(6.0), "cuda:1")
    with Accelerators() as accelerators:
        for other in (there, torch.arange(6.0)):
            with pytest.raises(RuntimeError, match="same device"):
                here + other
        assert not accelerators.waits
        (
            here[here > 2],
            here.sum().item(),
            here.tolist(),
            bool((here > 2).any()),
            here.cpu(),
            torch.arange(3).to("cuda:0"),
        )
        assert accelerators.waits.total() == 6
        assert (here + there.to("cuda:0")).tolist() == [0, 2, 4, 6, 8, 10]
