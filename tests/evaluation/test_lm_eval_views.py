"""The viewer in a run of lm_eval's tasks: which documents it links, and that the bits are what their contexts kept."""

import base64
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kvpress import AdaKVPress, KnormPress

from sparsekv_pl.evaluation.lm_eval_model import PressedLM
from sparsekv_pl.evaluation.lm_eval_views import answer_of, document_view, expected_of, viewed_documents
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.evaluation.view_pages import view_pages
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.presses.ratio import set_compression_ratio
from tests.tiny_training import MakeBackbone

TEXT = "The lookup of a name goes through the namespaces that a statement can see. " * 3 + "It is"
CHOICE = {
    "doc_id": 0,
    "filter": "none",
    "target": 1,
    "arguments": [(TEXT, " a name"), (TEXT, " a statement")],
    "filtered_resps": [(-1.0, False), (-2.0, False)],
}
ANSWER = {
    "doc_id": 0,
    "filter": "none",
    "target": "a name",
    "arguments": [(TEXT, {"until": ["."]})],
    "filtered_resps": ["a road"],
}
READ = {"doc_id": 0, "filter": "none", "target": TEXT, "arguments": [(TEXT,)], "filtered_resps": [-3.0]}


@pytest.fixture
def tiny(tiny_backbone: MakeBackbone) -> tuple[Any, Any]:
    return tiny_backbone(lora=None).load(trainable=False)


def test_documents_with_a_whole_context_of_their_own_are_viewed(tiny: tuple[Any, Any]) -> None:
    lm = PressedLM(*tiny)
    long = CHOICE | {"doc_id": 1, "arguments": [(TEXT * 40, " a name"), (TEXT * 40, " a statement")]}
    samples = {"read": [READ], "choice": [long, CHOICE, CHOICE | {"filter": "strict"}], "answer": [ANSWER]}
    found = viewed_documents(lm, samples, 2, 10_000)
    assert list(found) == [("choice", 0), ("answer", 0)]
    assert found["answer", 0] == lm.tok_encode(TEXT)
    assert list(viewed_documents(lm, samples, 1, 10_000)) == [("choice", 0)]
    assert viewed_documents(lm, samples, 2, 10) == viewed_documents(lm, samples, 0, 10_000) == {}


@pytest.mark.parametrize(
    ("sample", "expected", "answer"),
    [(CHOICE, ("a statement",), "a name"), (ANSWER, ("a name",), "a road"), (READ, (TEXT,), "")],
)
def test_answers_are_texts(sample: dict[str, Any], expected: tuple[str, ...], answer: str) -> None:
    assert (expected_of(sample), answer_of(sample)) == (expected, answer)


def test_the_page_joins_what_each_point_kept_of_a_document(tiny: tuple[Any, Any]) -> None:
    """The last tokens, which no press sees, are not part of the view."""
    press, held_back = KnormPress(), 5
    points, records = [Point(), Point(press, 0.5), Point(press, 0.75)], []
    for point in points:
        set_compression_ratio(press, point.compression_ratio)
        lm = PressedLM(*tiny, point.press, held_back=held_back)
        ids = lm.tok_encode(TEXT)
        view = document_view(lm, "answer/0", ANSWER, ids, point, teacher=True)
        case = {"case": "answer/0", "exact": 0.0, "answer": answer_of(ANSWER)}
        records += [{"variant": "base", **point.condition.columns(), **record} for record in (view, case)]
        if point.press is not None:
            seen = torch.tensor([ids[:-held_back]])
            positions = prefill(lm.model, seen, press, request=Request(contexts=True)).positions
            bits = np.unpackbits(np.frombuffer(base64.b64decode(view["kept"][point.name]), np.uint8))
            bits = bits[: 4 * seen.shape[1]].reshape(2, 2, -1)
            for layer, kept in positions.items():
                assert [[*np.flatnonzero(row)] for row in bits[layer]] == kept[0].sort(-1).values.tolist()
        assert "".join(view["tokens"]) == lm.tok_decode(ids[:-held_back])
    ((label, page),) = view_pages(records, 2, "kept", {}).values()
    content = json.loads(re.search(rb'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    assert label == "answer/0" and content["mass"] and not content["missing"]
    assert [(point["press"], point["ratio"], point["pairs"]) for point in content["points"]] == [
        ("Knorm", 0.5, int(0.5 * len(content["tokens"]))),
        ("Knorm", 0.75, int(0.25 * len(content["tokens"]))),
    ]
    assert content["full"]["answers"]["base"] == {"text": "a road", "right": False}


def test_what_cannot_be_known_is_named(tiny: tuple[Any, Any]) -> None:
    point = Point(SimpleNamespace(compression_ratio=0.5), 0.5)  # type: ignore[arg-type]
    lm = PressedLM(*tiny)
    lm.press, lm.window = KnormPress(0.5), 1000
    view = document_view(lm, "answer/0", ANSWER, lm.tok_encode(TEXT), point, teacher=True)
    assert list(view["unknown"].values()) == ["ValueError: its window of 1000 tokens is longer than the context"]


def test_what_a_head_wise_press_hides_is_not_kept(tiny: tuple[Any, Any]) -> None:
    press, held_back = AdaKVPress(KnormPress()), 5
    point = Point(press, 0.5)
    set_compression_ratio(press, point.compression_ratio)
    lm = PressedLM(*tiny, press, held_back=held_back)
    ids = lm.tok_encode(TEXT)
    view = document_view(lm, "answer/0", ANSWER, ids, point, teacher=False)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(view["kept"][point.name]), np.uint8))
    tokens = len(ids) - held_back
    assert bits[: 4 * tokens].sum() == pytest.approx(4 * tokens / 2, abs=4)
