"""Contexts of different lengths: drawn evenly, padded on the right, resumed to the token; one length is as it was."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from data import EvictionData
from data.collate import pad_id
from data.mixture_stream import MixtureStream
from data.needles import NeedleTask
from data.packing import DocumentStream, WindowStream
from data.text import Splits
from sparsekv_pl.models.batch import Batch, rows_of_equal_length

SPLITS = Splits(0.6, 0.2, 0.2)
SHORTEST, LONGEST, CONTINUATION, ROWS = 240, 300, 20, 3


def ragged(tokenizer: Any, source: Any, **options: Any) -> EvictionData:
    settings = {"context_tokens": LONGEST, "continuation_tokens": CONTINUATION, "batch_size": ROWS, "splits": SPLITS}
    data = EvictionData(source, **(settings | {"shortest_context": SHORTEST} | options))  # type: ignore[arg-type]
    data.tokenizer = tokenizer
    data.setup()
    return data


def take(data: EvictionData, count: int) -> list[Batch]:
    return list(islice(iter(data.train_dataloader()), count))


def lengths_of(batch: Batch) -> list[int]:
    rows, longest = batch["context_ids"].shape
    return batch.get("context_lengths", [longest] * rows)


def unpadded(batch: Batch, row: int) -> list[int]:
    return batch["context_ids"][row, : lengths_of(batch)[row]].tolist()


def same(one: Batch, other: Batch) -> bool:
    """Every entry, the lengths included; where it is supervised follows from the labels."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]  # type: ignore[literal-required]
        for name, value in one.items()
        if name != "supervised"
    )


def windows(tokenizer: Any, source: Any) -> WindowStream:
    """The text that the stream of seed 0 reads, window after window."""
    return WindowStream(DocumentStream(source, SPLITS, "train"), tokenizer, LONGEST + CONTINUATION)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_end_in_padding_after_their_own_length(tokenizer, numbered, share):
    pad = pad_id(tokenizer)
    for batch in take(ragged(tokenizer, numbered, retrieval_share=share), 10):
        lengths = lengths_of(batch)
        assert max(lengths) == batch["context_ids"].shape[1] <= LONGEST
        assert min(lengths) >= SHORTEST
        for row, length in enumerate(lengths):
            assert batch["context_ids"][row, length:].eq(pad).all()
            assert pad not in unpadded(batch, row)
        parts = list(rows_of_equal_length(batch))
        assert sum(len(part["labels"]) for part in parts) == ROWS
        assert not any(part["context_ids"].eq(pad).any() for part in parts)


def test_text_goes_on_where_its_context_ends(tokenizer, numbered):
    text = windows(tokenizer, numbered)
    for batch in take(ragged(tokenizer, numbered, retrieval_share=0.0), 5):
        for row, length in enumerate(lengths_of(batch)):
            read = next(text).ids[: length + CONTINUATION]
            assert unpadded(batch, row) + batch["continuation_ids"][row].tolist() == read


def test_a_short_needle_case_is_the_one_that_its_length_alone_would_make(tokenizer, numbered):
    text = windows(tokenizer, numbered)
    batches = take(ragged(tokenizer, numbered, retrieval_share=1.0), 4)
    cases = [(batch, row) for batch in batches for row in range(ROWS)]
    for number, (batch, row) in enumerate(cases):
        length = lengths_of(batch)[row]
        alone = NeedleTask(tokenizer, length, 0, "train", (1, 3), "value_and_stop", ask="all").case(number, next(text))
        assert unpadded(batch, row) == alone.context_ids
        assert batch["continuation_ids"][row, : len(alone.continuation_ids)].tolist() == alone.continuation_ids
        assert alone.fact.value in tokenizer.decode(alone.context_ids)


def test_every_length_is_as_likely_as_any_other(plain_tokenizer, numbered):
    data = ragged(plain_tokenizer, numbered, context_tokens=20, shortest_context=11, retrieval_share=0.0, batch_size=8)
    counts = Counter(length for batch in take(data, 250) for length in lengths_of(batch))
    assert sorted(counts) == list(data.context_lengths) == list(range(11, 21))
    assert max(abs(count - 200) for count in counts.values()) < 60  # four and a half standard deviations


def test_ranks_draw_lengths_of_their_own(tokenizer, numbered):
    data = ragged(tokenizer, numbered)
    zero, one = (list(islice(iter(MixtureStream(data, rank, 2)), 6)) for rank in (0, 1))
    assert [lengths_of(batch) for batch in zero] != [lengths_of(batch) for batch in one]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("consumed", [1, 5])
def test_resumes_to_the_token(tokenizer, numbered, workers, consumed):
    first = ragged(tokenizer, numbered, num_workers=workers).train_dataloader()
    iterator = iter(first)
    for _ in range(consumed):
        next(iterator)
    state = first.state_dict()
    rest = [next(iterator) for _ in range(6)]
    second = ragged(tokenizer, numbered, num_workers=workers).train_dataloader()
    second.load_state_dict(state)
    assert all(map(same, rest, islice(iter(second), 6)))
    assert len({tuple(lengths_of(batch)) for batch in rest}) == 6


def test_the_seed_decides_the_lengths(tokenizer, numbered):
    one, again, other = (
        [lengths_of(batch) for batch in take(ragged(tokenizer, numbered, seed=seed), 4)] for seed in (0, 0, 1)
    )
    assert one == again
    assert one != other


def test_without_a_shortest_context_all_have_one_length(tokenizer, numbered):
    whole, one_length = (ragged(tokenizer, numbered, shortest_context=length) for length in (None, LONGEST))
    assert all(map(same, take(whole, 12), take(one_length, 12)))
    assert not any("context_lengths" in batch for batch in take(whole, 12))
    assert list(whole.context_lengths) == list(one_length.context_lengths) == [LONGEST]


def test_validation_stays_at_full_length(tokenizer, numbered):
    cases = {"validation_windows": 3, "validation_needles": 3}
    whole, cut = (
        ragged(tokenizer, numbered, shortest_context=shortest, **cases).val_dataloader()
        for shortest in (None, SHORTEST)
    )
    assert all(map(same, whole, cut))


@pytest.mark.parametrize("shortest", [0, -5, LONGEST + 1])
def test_a_shortest_context_outside_the_lengths_is_named(shortest):
    with pytest.raises(ValueError, match=rf"shortest_context is {shortest}: give 1 to context_tokens \({LONGEST}\)"):
        EvictionData(context_tokens=LONGEST, shortest_context=shortest)


def test_a_shortest_context_without_room_for_a_fact_is_refused_before_training(tokenizer, numbered):
    with pytest.raises(
        ValueError, match=r"shortest_context is 100: .* Give at least (\d+), or retrieval_share 0"
    ) as refused:
        ragged(tokenizer, numbered, shortest_context=100)
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    assert len(take(ragged(tokenizer, numbered, shortest_context=least, retrieval_share=1.0), 20)) == 20
    with pytest.raises(ValueError, match="shortest_context"):
        ragged(tokenizer, numbered, shortest_context=least - 1)
    assert ragged(tokenizer, numbered, shortest_context=30, retrieval_share=0.0).context_lengths[0] == 30
