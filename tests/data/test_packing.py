"""Packing: nothing lost, nothing read twice, exact resume."""

import json
from itertools import chain

import pytest

from data.packing import DocumentStream, Tokens, WindowStream, encode_document, spread_windows, take_tokens
from data.text import Splits
from sparsekv_pl.models.encoding import Encoder

ALL = Splits(1, 0, 0)


def _epoch(stream):
    ids = []
    while (document := next(stream)) and stream.epoch == 0:
        ids.append(document.id)
    return ids


@pytest.mark.parametrize("total", [1, 2, 4])
def test_workers_share_an_epoch(numbered, total):
    parts = [_epoch(DocumentStream(numbered, ALL, "train", 0, number, total)) for number in range(total)]
    assert sorted(chain.from_iterable(parts)) == sorted(f"doc/{i}" for i in range(40))


def test_order_depends_on_seed_and_epoch(numbered):
    def two_epochs(seed):
        stream = DocumentStream(numbered, ALL, "train", seed)
        ids = [next(stream).id for _ in range(80)]
        return ids[:40], ids[40:]

    first, second = two_epochs(0)
    assert sorted(first) == sorted(second)
    assert first != second
    assert two_epochs(0) == (first, second)
    assert two_epochs(1)[0] != first


def test_windows_are_the_documents_in_order_without_gaps(numbered, tokenizer):
    windows = WindowStream(DocumentStream(numbered, ALL, "train"), tokenizer, 50)
    documents = DocumentStream(numbered, ALL, "train")
    expected, owner = [], []
    for _ in range(20):
        document = next(documents)
        ids = encode_document(Encoder(tokenizer), document)
        expected += ids
        owner += [document.id] * len(ids)
    for i in range(60):
        window = next(windows)
        assert window.ids == expected[i * 50 : (i + 1) * 50]
        assert window.document_ids == list(dict.fromkeys(owner[i * 50 : (i + 1) * 50]))


@pytest.mark.parametrize("consumed", [0, 1, 7, 250])
def test_windows_resume_exactly(numbered, tokenizer, consumed):
    def stream():
        return WindowStream(DocumentStream(numbered, ALL, "train"), tokenizer, 50)

    first, second = stream(), stream()
    for _ in range(consumed):
        next(first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(40):
        assert next(first) == next(second)


def test_state_of_another_share_is_refused(numbered):
    state = DocumentStream(numbered, ALL, "train", 0, 0, 2).state_dict()
    with pytest.raises(ValueError, match=r"share 0 of 2.*as many ranks and workers"):
        DocumentStream(numbered, ALL, "train", 0, 0, 1).load_state_dict(state)


def test_share_without_documents_is_an_error(numbered):
    numbered.count = 1
    with pytest.raises(ValueError, match=r"share 1 of 2.*no document"):
        next(DocumentStream(numbered, ALL, "train", 0, 1, 2))


def test_spread_windows_never_predict_a_token_twice(tokenizer):
    text = Tokens(list(range(100)), [("a", 60), ("b", 40)])
    windows = spread_windows(text, 7, window=40, fresh=10, encoder=Encoder(tokenizer))
    predicted = [i for window in windows for i in window.ids[-10:]]
    assert len(predicted) == len(set(predicted)) == 70
    assert windows[0].document_ids == ["a"]
    assert windows[3].document_ids == ["a", "b"]
    assert windows[-1].document_ids == ["b"]
    with pytest.raises(ValueError, match=r"8 windows of 40 tokens.*room for 7"):
        spread_windows(text, 8, window=40, fresh=10, encoder=Encoder(tokenizer))


def test_take_tokens_stops_when_there_is_enough(numbered, tokenizer):
    taken = take_tokens(numbered.documents(), tokenizer, enough=100)
    assert taken.document_ids == ["doc/0"]
    assert len(take_tokens(numbered.documents(), tokenizer, enough=10**9).spans) == 40
