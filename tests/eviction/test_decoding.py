"""Batched decoding gives every row what it would get alone, from transformers, one token at a time."""

import pytest
import torch
from kvpress import AdaKVPress, BasePress, KeyRerotationPress, KnormPress, PyramidKVPress, SnapKVPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.prefill import prefill
from tests.random_models import Build

CONTEXT, NEW = 40, 6
LENGTHS = [7, 3, 5]


@pytest.fixture
def context() -> Tensor:
    return torch.randint(0, 64, (3, CONTEXT), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def questions() -> Tensor:
    return torch.randint(0, 64, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))


def alone(model: PreTrainedModel, press: BasePress | None, context: Tensor, question: Tensor, new: int) -> list[int]:
    """Decode as kvpress does: a prefill under the press, then single tokens with transformers' stock attention."""
    cache = DynamicCache()
    if press is None:
        model.model(context[None], past_key_values=cache)
    else:
        with press(model):
            model.model(context[None], past_key_values=cache)
    start = cache.get_seq_length() if isinstance(press, KeyRerotationPress) else CONTEXT
    said: list[int] = []
    forced = question.tolist()
    for step in range(len(forced) + new - 1):
        token = forced[step] if step < len(forced) else said[-1]
        logits = model(
            torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[start + step]])
        ).logits
        if step >= len(forced) - 1:
            said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize(
    "press",
    [
        None,
        KnormPress(0.5),
        SnapKVPress(0.5, window_size=4),
        PyramidKVPress(0.5, window_size=4),
        KeyRerotationPress(KnormPress(0.5)),
        AdaKVPress(KnormPress(0.5)),
    ],
    ids=lambda press: type(press).__name__,
)
@torch.no_grad()
def test_every_row_of_a_batch_says_what_it_says_alone(
    random_model: Build, press: BasePress | None, context: Tensor, questions: Tensor
) -> None:
    model = random_model()
    together = greedy(model, prefill(model, context, press), questions, torch.tensor(LENGTHS), [NEW] * 3)
    singly = [
        alone(model, press, row, question[:length], NEW)
        for row, question, length in zip(context, questions, LENGTHS, strict=True)
    ]
    assert together == singly
    assert len({token for row in singly for token in row}) > 3, "a model that always says the same proves nothing"


@torch.no_grad()
def test_padding_says_nothing(random_model: Build, context: Tensor, questions: Tensor) -> None:
    model, lengths = random_model(), torch.tensor(LENGTHS)
    answers = greedy(model, prefill(model, context, None), questions, lengths, [NEW] * 3)
    padding = torch.arange(max(LENGTHS)) >= lengths[:, None]
    other = greedy(model, prefill(model, context, None), questions.masked_fill(padding, 63), lengths, [NEW] * 3)
    assert answers == other


@torch.no_grad()
def test_a_row_ends_at_its_stop_token_and_the_others_go_on(
    random_model: Build, context: Tensor, questions: Tensor
) -> None:
    model, lengths = random_model(), torch.tensor(LENGTHS)
    endless = greedy(model, prefill(model, context, None), questions, lengths, [NEW] * 3)
    stop = endless[0][2]
    ended = greedy(model, prefill(model, context, None), questions, lengths, [NEW] * 3, {stop})
    assert ended == [row[: row.index(stop)] if stop in row else row for row in endless]
    assert len(ended[0]) < NEW


@torch.no_grad()
def test_a_copy_is_continued_and_the_original_stays(random_model: Build, context: Tensor, questions: Tensor) -> None:
    model, lengths = random_model(), torch.tensor(LENGTHS)
    prefilled = prefill(model, context, KnormPress(0.5))
    before = [layer.keys.clone() for layer in prefilled.cache.layers]
    answers = greedy(model, prefilled.copy(), questions, lengths, [NEW] * 3)
    assert greedy(model, prefilled.copy(), questions, lengths, [NEW] * 3) == answers
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefilled.cache.layers, before, strict=True))
