"""The reconstruction objective supervises evicted blocks, and nothing else."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kvpress import KnormPress
from torch import Tensor

from sparsekv_pl.eviction.interface import EvictedContext
from sparsekv_pl.eviction.prefill import continue_from, prefill
from sparsekv_pl.eviction.prefilled_cache import copy_cache
from sparsekv_pl.eviction.real import evicted_context
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives import Reconstruction, StudentView
from tests.random_models import Build

VOCABULARY, WIDTH, LENGTH = 64, 8, 40
INSTRUCTION = [60, 61, 62]


class Tokenizer:
    """A tokenizer that encodes any text as ``INSTRUCTION``, with special tokens if requested."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert text
        return [63, *INSTRUCTION] if add_special_tokens else INSTRUCTION


def prepared(**settings: Any) -> Reconstruction:
    objective = Reconstruction(**({"block_size": 6, "cue_tokens": 3} | settings))
    objective.prepare(Tokenizer())
    return objective


def ids(rows: int = 2, seed: int = 0) -> Tensor:
    """Make rows of distinct tokens, so that a token identifies its position."""
    draws = torch.rand(rows, VOCABULARY - 4, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(1)[:, :LENGTH]


class Asked:
    """A context that records its continuations; its hidden states are embeddings plus a kept key."""

    def __init__(self, context_ids: Tensor, lost: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        self.embeddings = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.head = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.kept = torch.zeros(WIDTH, requires_grad=True)
        self.continuations: list[Tensor] = []
        self.context = EvictedContext(context_ids, lost, self._continued)

    def _continued(self, continuation: Tensor) -> Tensor:
        self.continuations.append(continuation)
        return self.embeddings[continuation] + self.kept

    def view(self, *more: EvictedContext) -> StudentView:
        nothing = torch.zeros(0, WIDTH, requires_grad=True)
        labels = torch.zeros(0, dtype=torch.long)
        return StudentView(nothing, labels, self.head, contexts=[self.context, *more])


def lost_at(*blocks: tuple[int, int, float], rows: int = 2) -> Tensor:
    """(rows, LENGTH) lost shares: each (start, stop, share), alike in every row."""
    lost = torch.zeros(rows, LENGTH)
    for start, stop, share in blocks:
        lost[:, start:stop] = share
    return lost


# --- what is asked ---


def test_the_loss_is_the_cross_entropy_of_the_evicted_block_alone() -> None:
    """The block 20..25 is lost for the most part; of it 22 was kept in most heads, so it is read and not supervised."""
    lost = lost_at((20, 26, 0.75), (5, 10, 0.5))
    lost[:, 22] = 0.25
    asked = Asked(ids(), lost)
    terms = prepared(slack=0.0)(asked.view())
    instruction = torch.tensor(INSTRUCTION).expand(2, -1)
    assert torch.equal(asked.continuations[0], torch.cat([instruction, ids()[:, 17:26]], dim=1))

    supervised = [20, 21, 23, 24, 25]
    logits = asked.embeddings[ids()[:, [place - 1 for place in supervised]]] @ asked.head.T
    expected = F.cross_entropy(logits.flatten(0, 1), ids()[:, supervised].flatten())
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["reconstruction"], expected)
    assert float(terms["reconstruction_lost"]) == pytest.approx(0.75)
    hits = (logits.argmax(-1) == ids()[:, supervised]).float().mean()
    assert float(terms["reconstruction_accuracy"]) == pytest.approx(float(hits))

    logits = (asked.embeddings + asked.kept)[ids()[:, [place - 1 for place in supervised]]] @ asked.head.T
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), ids()[:, supervised].flatten()), asked.kept)
    terms["loss"].backward()
    torch.testing.assert_close(asked.kept.grad, gradient)
    assert gradient.abs().sum() > 0


def test_right_answers_are_counted() -> None:
    """The hidden state of a token is one-hot in its successor, so the block is predicted exactly."""
    context_ids = ids(1)
    successors = torch.zeros(VOCABULARY, dtype=torch.long)
    successors[context_ids[0, :-1]] = context_ids[0, 1:]
    next_token = F.one_hot(successors, VOCABULARY).float() * 50
    context = EvictedContext(context_ids, torch.ones(1, LENGTH), lambda ids: next_token[ids].requires_grad_())
    view = StudentView(torch.zeros(0, VOCABULARY), torch.zeros(0, dtype=torch.long), torch.eye(VOCABULARY))
    view.contexts = [context]
    terms = prepared()(view)
    assert float(terms["reconstruction_accuracy"]) == 1
    assert terms["loss"].item() == pytest.approx(0, abs=1e-6)
    chunked = prepared(chunk_tokens=4)(view)
    assert float(chunked["reconstruction_accuracy"]) == 1
    context.ids = context_ids.flip(1)
    assert float(prepared()(view)["reconstruction_accuracy"]) == 0


def test_each_row_is_asked_for_its_own_block_and_contexts_count_by_tokens() -> None:
    lost = torch.zeros(2, LENGTH)
    lost[0, 10:16] = lost[1, 30:36] = 1
    first, second = Asked(ids(), lost), Asked(ids(1, seed=5), lost_at((14, 20, 1.0), rows=1))
    terms = prepared()(first.view(second.context))
    assert torch.equal(first.continuations[0][0, 6:], ids()[0, 10:16])
    assert torch.equal(first.continuations[0][1, 6:], ids()[1, 30:36])
    assert torch.equal(second.continuations[0][0, 6:], ids(1, seed=5)[0, 14:20])
    alone = [float(prepared()(asked.view())["loss"]) for asked in (first, second)]
    assert float(terms["loss"]) == pytest.approx((2 * alone[0] + alone[1]) / 3, rel=1e-5)


def test_where_nothing_was_evicted_the_loss_is_0_and_keeps_a_graph() -> None:
    asked = Asked(ids(), torch.zeros(2, LENGTH))
    terms = prepared()(asked.view())
    terms["loss"].backward()
    assert asked.kept.grad is not None
    assert not asked.kept.grad.any()
    assert {name: value.item() for name, value in terms.items()} == dict.fromkeys(
        ("loss", "reconstruction", "reconstruction_lost", "reconstruction_accuracy"), 0.0
    )


# --- which block ---


def blocks(lost: Tensor, context_ids: Tensor, **settings: Any) -> list[int]:
    """Where each row's block begins."""
    asked = Asked(context_ids, lost)
    prepared(**settings)(asked.view())
    begun = asked.continuations[0][:, len(INSTRUCTION) + 3]
    return (context_ids == begun.unsqueeze(1)).int().argmax(1).tolist()


def test_the_block_is_a_function_of_the_rows_tokens_alone() -> None:
    lost = torch.ones(8, LENGTH)
    begun = blocks(lost, ids(8))
    assert begun == blocks(lost, ids(8))
    assert [blocks(lost[:1], row.unsqueeze(0))[0] for row in ids(8)] == begun
    assert len(set(begun)) > 4  # spread over what was lost, not always the first
    assert min(begun) >= 3  # after a whole cue
    assert max(begun) <= LENGTH - 6


@pytest.mark.parametrize(("slack", "expected"), [(0.0, {30}), (0.15, {10, 30})])
def test_slack_lets_blocks_that_lost_nearly_as_much_be_asked_for(slack: float, expected: set[int]) -> None:
    """A token further, and a sixth of the block was kept."""
    lost = lost_at((10, 16, 0.95), (30, 36, 1.0), rows=40)
    assert set(blocks(lost, ids(40), slack=slack)) == expected


def test_a_block_may_fill_the_context() -> None:
    assert blocks(torch.ones(2, LENGTH), ids(), block_size=LENGTH - 3) == [3, 3]


# --- with a model ---


@pytest.mark.parametrize("chunk_tokens", [None, 10])
def test_the_gradient_reaches_every_kept_key(chunk_tokens: int | None, random_model: Build) -> None:
    """Against the same question put by hand to a copy of the evicted cache."""
    model, context_ids = random_model(), ids()
    with torch.no_grad():
        prefilled = prefill(model, context_ids, KnormPress(0.6), chunk_tokens, request=Request(contexts=True))
    by_hand = copy_cache(prefilled.cache)
    for cache in (prefilled.cache, by_hand):
        for layer in cache.layers:
            layer.keys, layer.values = (x.detach().requires_grad_() for x in (layer.keys, layer.values))  # type: ignore[union-attr]
    keys = [layer.keys for layer in prefilled.cache.layers]
    copies = [layer.keys for layer in by_hand.layers]
    context = evicted_context(model, prefilled, context_ids)
    asked: list[Tensor] = []

    def continued(continuation: Tensor) -> Tensor:
        asked.append(continuation)
        return context.continued(continuation)

    head = model.lm_head.weight
    view = StudentView(torch.zeros(0, 32), torch.zeros(0, dtype=torch.long), head)
    view.contexts = [EvictedContext(context.ids, context.lost, continued)]
    loss = prepared(least_lost=1.0)(view)["loss"]

    hidden = continue_from(model, asked[0], by_hand, prefilled.next_position)
    log_shares = (hidden @ head.T).log_softmax(-1)
    terms = [
        -log_shares[row, place - 1, token]
        for row in range(2)
        for place, token in enumerate(asked[0][row].tolist())
        if place >= len(INSTRUCTION) + 3 and context.lost[row, context_ids[row].tolist().index(token)] == 1
    ]
    assert 2 <= len(terms) < 12  # some of the blocks' tokens were kept
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    pairs = zip(torch.autograd.grad(loss, keys), torch.autograd.grad(expected, copies), strict=True)  # type: ignore[arg-type]
    for gradient, dense in pairs:
        torch.testing.assert_close(gradient, dense, rtol=1e-4, atol=1e-6)
        assert (gradient.abs().sum(-1) > 0).all()


# --- mistakes ---


def test_it_must_be_prepared() -> None:
    with pytest.raises(ValueError, match=r"call prepare\(tokenizer\) first"):
        Reconstruction()(Asked(ids(), torch.ones(2, LENGTH)).view())


def test_a_context_that_is_too_short_is_named() -> None:
    asked = Asked(ids(), torch.ones(2, LENGTH))
    with pytest.raises(ValueError, match=r"38 tokens after a cue of 3, and a context of 40 is shorter"):
        prepared(block_size=38)(asked.view())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "Reconstruction.block_size=0"),
        ({"cue_tokens": 0}, "Reconstruction.cue_tokens=0"),
        ({"least_lost": 0.0}, "Reconstruction.least_lost=0.0"),
        ({"least_lost": 1.5}, "Reconstruction.least_lost=1.5"),
        ({"slack": -0.1}, "Reconstruction.slack=-0.1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reconstruction(**settings)
