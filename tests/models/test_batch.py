"""Ragged batches: cut into parts without padding, every row in exactly one of them."""

import pytest
import torch

from sparsekv_pl.models.batch import IGNORE, Batch, Supervised, rows_of_equal_length, supervised_in, tokens_read

PAD = 9


def ragged(lengths: list[int], padded_to: int) -> Batch:
    """Row b holds the context token b, and a continuation of three."""
    rows = len(lengths)
    context = torch.full((rows, padded_to), PAD)
    for row, length in enumerate(lengths):
        context[row, :length] = row
    continuation = torch.arange(rows)[:, None].expand(rows, 3)
    return Batch(
        context_ids=context,
        context_lengths=lengths,
        continuation_ids=continuation,
        labels=continuation.masked_fill(torch.tensor([True, False, False]), IGNORE),
        document_ids=[f"doc/{row}" for row in range(rows)],
        tasks=[f"task {row}" for row in range(rows)],
    )


def test_parts_hold_every_row_once_and_no_padding() -> None:
    lengths = [5, 3, 5, 4, 3]
    batch = ragged(lengths, 5)
    parts = list(rows_of_equal_length(batch))
    assert [part["context_ids"].shape for part in parts] == [(2, 3), (1, 4), (2, 5)]
    seen = []
    for part in parts:
        rows = part["context_ids"][:, 0].tolist()
        assert torch.equal(part["context_ids"], torch.tensor(rows)[:, None].expand_as(part["context_ids"]))
        for name in ("continuation_ids", "labels"):
            assert torch.equal(part[name], batch[name][rows])
        assert part["document_ids"] == [f"doc/{row}" for row in rows]
        assert part["tasks"] == [f"task {row}" for row in rows]
        assert "context_lengths" not in part
        seen += rows
    assert seen == [1, 4, 3, 0, 2]


def test_position_t_minus_1_predicts_label_t() -> None:
    labels = torch.tensor([[IGNORE, 5, IGNORE, 7], [IGNORE, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 8, IGNORE]])
    found = Supervised.of(labels)
    assert found.counts == [2, 0, 1]
    rows, columns = found.places()
    assert torch.arange(12).view(3, 4)[rows, columns].tolist() == [0, 2, 9]
    assert labels[rows, columns + 1].tolist() == [5, 7, 8]


def test_parts_say_of_their_rows_what_the_batch_says() -> None:
    batch = ragged([5, 3, 5], 5)
    batch["labels"] = torch.tensor([[IGNORE, 1, 1], [IGNORE, IGNORE, 1], [IGNORE, IGNORE, IGNORE]])
    batch["supervised"] = Supervised.of(batch["labels"])
    for part in rows_of_equal_length(batch):
        said, looked = supervised_in(part), Supervised.of(part["labels"])
        assert said.counts == looked.counts
        assert torch.equal(said.columns, looked.columns)


def test_a_batch_of_one_length_is_its_only_part() -> None:
    batch = ragged([4, 4], 4)
    assert list(rows_of_equal_length(batch)) == [batch]
    del batch["context_lengths"]
    assert list(rows_of_equal_length(batch)) == [batch]


def test_padding_that_all_rows_have_is_cut_off() -> None:
    (part,) = rows_of_equal_length(ragged([2, 2], 4))
    assert part["context_ids"].tolist() == [[0, 0], [1, 1]]


def test_tokens_read_leave_the_contexts_padding_out() -> None:
    assert tokens_read(ragged([5, 3, 4], 6)) == 12 + 9
    whole = ragged([4, 4], 4)
    del whole["context_lengths"]
    assert tokens_read(whole) == 8 + 6
    parts = rows_of_equal_length(ragged([5, 3, 5], 6))
    assert sum(map(tokens_read, parts)) == tokens_read(ragged([5, 3, 5], 6))


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [4, 5], [0, 4]])
def test_lengths_that_are_not_the_rows_are_refused(lengths: list[int]) -> None:
    batch = ragged([4, 4], 4)
    batch["context_lengths"] = lengths
    with pytest.raises(AssertionError):
        list(rows_of_equal_length(batch))
