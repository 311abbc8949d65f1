"""In a ragged batch, each row has the terms, gradients and kept pairs that it has alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KnormPress, SnapKVPress
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.anchors import Anchors, AnchorTable
from sparsekv_pl.models.batch import IGNORE, Batch
from sparsekv_pl.objectives import EIT, LM, Mixed, Objective, SelectionObjective, SparseLM, StudentView
from sparsekv_pl.objectives.reconstruction import Reconstruction
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.press_context import press_context_in
from sparsekv_pl.training.eit_module import EITModule
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, trained

SINKS, WINDOW, TOKENS, VOCABULARY = 4, 8, 12, 256
RATIO, STEP = 0.5, 3
MakeModel = Callable[..., PreTrainedModel]


@dataclass
class LayersAgree(Objective):
    """Mean over tokens and layers of the distance between student's and teacher's layer outputs."""

    request = Request(teacher=True, layers=frozenset({"hidden", "attention"}))

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        pairs = [(own[layer], other[layer]) for own, other in view.layers.values() for layer in own]
        return {"loss": torch.stack([(own - other).square().mean() for own, other in pairs]).mean()}


class AddsKeySize(SnapKVPress):
    """SnapKV that asks objectives to add the mean size of its keys."""

    def compress(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        press_context = press_context_in(others[-1])
        if press_context is not None:
            press_context.losses.setdefault("size", []).append(keys.square().mean())
        return super().compress(module, hidden_states, keys, *others)


PRESSES: dict[str, Callable[[], BasePress]] = {
    "SnapKV": lambda: SnapKVPress(window_size=WINDOW),
    "ExpectedAttention": ExpectedAttentionPress,
    "EvictionAug": lambda: EvictionAugPress(
        [SnapKVPress(window_size=WINDOW), ExpectedAttentionPress(), KnormPress()], score_all=True
    ),
}
TOKEN_OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "lm": LM,
    "eit": lambda: EIT(kl_weight=2.0, temperature=1.5),
    "layers": LayersAgree,
    "mixed": lambda: Mixed([LM(), EIT()], [0.5, 2.0]),
}
LENGTHS = {"all different": [40, 56, 47], "two alike": [56, 40, 56]}


def student(make: MakeModel, eviction: Eviction, objective: Objective) -> Student:
    """Make a student whose adapter differs from the teacher's zero."""
    model = make(vocab_size=VOCABULARY)
    teacher = Teacher(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return Student(model, eviction, teacher, objective)


def ragged(lengths: list[int]) -> Batch:
    """Contexts of distinct tokens (no two keys tie) and continuations, both padded; row b supervises b + 3 tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, longest = len(lengths), max(lengths)
    context = 2 + torch.randperm(VOCABULARY - 2, generator=generator)[: rows * longest].view(rows, longest)
    context[torch.arange(longest) >= torch.tensor(lengths)[:, None]] = 1
    continuation = torch.randint(2, VOCABULARY, (rows, TOKENS), generator=generator)
    labels = torch.full_like(continuation, IGNORE)
    for row in range(rows):
        labels[row, 2 : row + 5] = continuation[row, 2 : row + 5]
        continuation[row, row + 6 :] = 1
    return Batch(
        context_ids=context,
        context_lengths=lengths,
        continuation_ids=continuation,
        labels=labels,
        document_ids=["doc"] * rows,
        tasks=["text"] * rows,
    )


def rows_alone(batch: Batch) -> Iterator[Batch]:
    """Each row as a batch of its own, without any padding."""
    for row, length in enumerate(batch["context_lengths"]):
        end = row + 6
        yield Batch(
            context_ids=batch["context_ids"][row : row + 1, :length],
            continuation_ids=batch["continuation_ids"][row : row + 1, :end],
            labels=batch["labels"][row : row + 1, :end],
            document_ids=["doc"],
            tasks=["text"],
        )


def terms_and_gradients(own: Student, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """The objective's terms, the loss's gradient by parameter, and the share of pairs that was kept."""
    own.model.zero_grad()
    view, kept = own.view(batch, RATIO, STEP)
    terms = own.objective(view)
    terms["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in own.model.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in terms.items()}, gradients, kept


def check_weighted_mean(own: Student, batch: Batch, weights: list[float]) -> None:
    """The batch's terms, gradients and kept share are the means of the rows', the share's with equal weights."""
    terms, gradients, kept = terms_and_gradients(own, batch)
    rows = [terms_and_gradients(own, row) for row in rows_alone(batch)]
    shares = [weight / sum(weights) for weight in weights]
    for found, single in ((terms, [row[0] for row in rows]), (gradients, [row[1] for row in rows])):
        assert found
        assert all(one.keys() == found.keys() for one in single)
        for name, value in found.items():
            expected = torch.stack([one[name] * share for one, share in zip(single, shares, strict=True)]).sum(0)
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5), (name, value, expected)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    assert kept == pytest.approx(sum(row[2] for row in rows) / len(rows))
    assert 0.4 < kept < 0.6


def supervised_tokens(batch: Batch) -> list[float]:
    return (batch["labels"] != IGNORE).sum(1).tolist()


# --- objectives over tokens ---


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES)
@pytest.mark.parametrize("press", PRESSES)
def test_a_token_weighs_the_same_in_whatever_row_it_is(
    press: str, objective: str, lengths: list[int], random_model: MakeModel
) -> None:
    own = student(random_model, RealEviction(PRESSES[press]()), TOKEN_OBJECTIVES[objective]())
    batch = ragged(lengths)
    check_weighted_mean(own, batch, supervised_tokens(batch))


def test_contexts_in_many_chunks(random_model: MakeModel) -> None:
    own = student(random_model, RealEviction(SnapKVPress(window_size=WINDOW), chunk_tokens=20), EIT())
    batch = ragged(LENGTHS["two alike"])
    check_weighted_mean(own, batch, supervised_tokens(batch))


def test_padding_would_change_the_loss(random_model: MakeModel) -> None:
    """The above does not hold for padded contexts that run together."""
    own = student(random_model, RealEviction(PRESSES["SnapKV"]()), LM())
    batch = ragged(LENGTHS["two alike"])
    right, *_ = terms_and_gradients(own, batch)
    del batch["context_lengths"]
    wrong, *_ = terms_and_gradients(own, batch)
    assert abs(wrong["loss"] - right["loss"]) > 1e-2


# --- KV dropout: draws belong to a row's tokens ---


def kv_dropout() -> KVDropout:
    eviction = KVDropout(Anchors(sinks=2, recent=4, special=False, punctuation=False), query_chunk=16)
    nothing = torch.zeros(VOCABULARY, dtype=torch.bool)
    eviction.tokenizer = AnchorTable(nothing, nothing)
    return eviction


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_row_loses_what_it_loses_alone(lengths: list[int], random_model: MakeModel) -> None:
    own = student(random_model, kv_dropout(), EIT())
    batch = ragged(lengths)
    check_weighted_mean(own, batch, supervised_tokens(batch))


# --- selection ---


def evictable_mass(view: StudentView) -> float:
    """The attention that the teacher pays to what SnapKV may evict, summed over layers and heads of a row alone."""
    return sum(float(mass[..., SINKS : mass.shape[-1] - WINDOW].sum()) for _, mass in view.selections)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", ["mass", "equal"])
def test_the_selection_loss_weighs_rows_as_it_weighs_heads(
    heads: Any, lengths: list[int], random_model: MakeModel
) -> None:
    own = student(random_model, RealEviction(PRESSES["SnapKV"]()), SelectionObjective(sinks=SINKS, heads=heads))
    batch = ragged(lengths)
    masses = [evictable_mass(own.view(row, RATIO, STEP)[0]) for row in rows_alone(batch)]
    assert max(masses) > 1.05 * min(masses)
    check_weighted_mean(own, batch, masses if heads == "mass" else [1.0] * len(masses))


def test_every_press_that_scores_is_aligned_on_every_row(random_model: MakeModel) -> None:
    own = student(random_model, RealEviction(PRESSES["EvictionAug"]()), SelectionObjective(heads="equal"))
    batch = ragged(LENGTHS["two alike"])
    check_weighted_mean(own, batch, [1.0] * 3)
    terms, *_ = terms_and_gradients(own, batch)
    kinds, presses = ("selection", "kept_mass", "kept_mass_most"), ("SnapKV", "ExpectedAttention", "Knorm")
    assert terms.keys() == {"loss", *(f"{kind}/{name}" for kind in kinds for name in presses)}


# --- what presses add, what they evicted ---


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_presss_own_loss_weighs_every_row_the_same(lengths: list[int], random_model: MakeModel) -> None:
    own = student(random_model, RealEviction(AddsKeySize(window_size=WINDOW)), SparseLM())
    batch = ragged(lengths)
    found = own.view(batch, RATIO, STEP)[0].press_losses["size"]
    alone = [own.view(row, RATIO, STEP)[0].press_losses["size"] for row in rows_alone(batch)]
    torch.testing.assert_close(found, torch.stack(alone).mean())
    assert torch.stack(alone).std() > 1e-4
    parameters = [p for p in own.model.parameters() if p.requires_grad]
    one, other = (
        torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, torch.stack(alone).mean())
    )
    for got, expected in zip(one, other, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_token_that_is_asked_for_weighs_the_same_in_whatever_row_it_is(random_model: MakeModel) -> None:
    objective = Reconstruction(block_size=8, cue_tokens=3)
    objective.instruction_ids = [5, 6]
    own = student(random_model, RealEviction(PRESSES["SnapKV"]()), objective)
    batch = ragged(LENGTHS["two alike"])
    asked = [objective._ask(own.view(row, RATIO, STEP)[0].contexts[0])[1] for row in rows_alone(batch)]
    check_weighted_mean(own, batch, [int((labels != IGNORE).sum()) for labels in asked])


# --- a whole run ---


@pytest.mark.parametrize(
    "eviction",
    [lambda: RealEviction(PRESSES["EvictionAug"](), chunk_tokens=160), lambda: KVDropout(Anchors(recent=8))],
    ids=["chunks", "kv dropout"],
)
def test_contexts_of_different_lengths_train(
    eviction: Callable[[], Eviction], tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), eviction(), optimizer=adamw)
    module.compression_ratio, before = 0.5, trained(module)
    data = tiny_data(context_tokens=192, shortest_context=128, batch_size=3, retrieval_share=0.5)
    trainer = tiny_trainer(max_steps=2, limit_val_batches=1, val_check_interval=2)
    trainer.fit(module, data)
    assert trainer.global_step == 2
    assert any(not torch.equal(value, before[name]) for name, value in trained(module).items())
    assert torch.isfinite(trainer.callback_metrics["val/perplexity_evicted"])


def test_a_shortest_context_that_a_press_cannot_cut_stops_before_training(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer
) -> None:
    module = EITModule(tiny_backbone(), RealEviction(SnapKVPress(window_size=130)))
    data = tiny_data(context_tokens=192, shortest_context=128)
    with pytest.raises(ValueError, match="window of 130 tokens but the context is run in chunks of 128"):
        tiny_trainer().fit(module, data)
    # 193 tokens make two chunks of 96, shorter than any whole context.
    module = EITModule(tiny_backbone(), RealEviction(SnapKVPress(window_size=100), chunk_tokens=192))
    data = tiny_data(context_tokens=256, shortest_context=128)
    with pytest.raises(ValueError, match="window of 100 tokens but the context is run in chunks of 96"):
        tiny_trainer().fit(module, data)
    assert module.global_step == 0
