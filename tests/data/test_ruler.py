"""RULER's tasks: published prompts, exact lengths and depths for any tokenizer, answers that are really there."""

import itertools
import random
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.cases import Case, Frame
from data.packing import Tokens, take_tokens
from data.ruler import Niah, VariableTracking
from data.ruler_needles import PRESETS
from data.text import EmbeddedText
from tests.data.ruler_cases import LENGTH, PLAIN, TASKS


def _wordpiece() -> Tokenizer:
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    return raw


def _unigram() -> Tokenizer:
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits()])
    raw.decoder = decoders.Metaspace()
    return raw


def _trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with 2,000 pieces of the documentation's text, the needles' letters and digits among them."""
    alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.,:=?'()\n")
    texts = [document.text for document in EmbeddedText().documents()][::6]
    if kind == "bpe":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "wordpiece":
        raw = _wordpiece()
        texts += ["".join(alphabet), " ".join(alphabet)]
        trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=["[UNK]"], show_progress=False)
    else:
        raw = _unigram()
        trainer = trainers.UnigramTrainer(
            vocab_size=2000,
            special_tokens=["<unk>", "<s>"],
            unk_token="<unk>",
            initial_alphabet=alphabet,
            show_progress=False,
        )
    raw.train_from_iterator(texts, trainer)
    marks = {"bpe": {}, "wordpiece": {"unk_token": "[UNK]"}, "unigram": {"bos_token": "<s>", "unk_token": "<unk>"}}[
        kind
    ]
    return PreTrainedTokenizerFast(tokenizer_object=raw, **marks)


@pytest.fixture(scope="module", params=["bytes", "bpe", "wordpiece", "unigram"])
def frame(request: pytest.FixtureRequest) -> Frame:
    if request.param == "bytes":  # the one with a chat template
        return Frame(request.getfixturevalue("tokenizer"))
    return Frame(_trained(request.param))


@pytest.fixture(scope="module")
def haystack(frame: Frame) -> Tokens:
    return take_tokens(EmbeddedText().documents(), frame.tokenizer, 12_000)


def _length(frame: Frame, name: str) -> int:
    """Bytes are many more tokens."""
    return PLAIN if len(frame.tokenizer) < 300 else LENGTH if name != "cwe" else 2 * LENGTH


def _find(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]


def _squeezed(text: str) -> str:
    """WordPiece has neither case nor the spaces around punctuation."""
    return re.sub(r"\s", "", text).lower()


@pytest.mark.parametrize("name", TASKS)
def test_context_has_the_exact_length_and_the_answers(frame: Frame, haystack: Tokens, name: str) -> None:
    task, length = TASKS[name], _length(frame, name)
    for more, (depth, query_aware) in enumerate([(0.0, False), (0.37, True), (1.0, False)]):
        case = task.case(frame, haystack, length + more, depth, random.Random(more), query_aware)
        assert len(case.context_ids) == length + more
        assert case.context_ids[: len(frame.prefix_ids)] == frame.prefix_ids
        assert case.info.context == frame.decode(case.context_ids[len(frame.prefix_ids) :])
        context = _squeezed(case.info.context)
        assert case.info.answers
        assert all(_squeezed(answer) in context for answer in case.info.answers)
        assert context.endswith(_squeezed(case.info.question)) == query_aware
        asked = "" if query_aware else case.info.question
        expected = frame.encode(f"{asked}{frame.question_suffix}{case.info.answer_prefix}")
        assert case.continuation_ids == expected
        assert case.info.depth == (depth if task.uses_depth else None)
        assert (case.info.document_ids != ()) == (task.tokens_needed(frame, length) > 0)


@pytest.mark.parametrize(("depth", "query_aware"), [(0.618, False), (1.0, True)])
@pytest.mark.parametrize("name", PRESETS)
def test_asked_needle_stands_at_the_exact_token(
    frame: Frame, haystack: Tokens, name: Any, depth: float, query_aware: bool
) -> None:
    task, length = Niah(name), _length(frame, name)
    case = task.case(frame, haystack, length, depth, random.Random(7), query_aware)
    many = "Some special magic {0}s are" if len(case.info.answers) > 1 else "A special magic {0} is"
    kind = task.needles.value_kind
    plural = f"{kind}s" if len(case.info.answers) > 1 else kind
    head = frame.encode(
        f"{many.format(kind)} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {plural} afterwards.\n"
    )
    body = case.context_ids[len(frame.prefix_ids) + len(head) :]
    body = body[: len(body) - len(frame.encode("\n")) - (len(frame.encode(case.info.question)) if query_aware else 0)]
    found = _statements(task, frame, case)
    needles = [place for statement in found for place in [_find(body, statement)]]
    assert all(len(places) == 1 for places in needles[: len(case.info.answers)])
    # Distractors are unknown here: their number and length show in what is left of the text.
    filler = _without(task, frame, body, found)
    start = needles[0][0]
    before = len(_without(task, frame, body[:start], found))
    assert before == round(depth * len(filler))


def _statements(task: Niah, frame: Frame, case: Case) -> list[list[int]]:
    """The needles that are asked for, in the order of the answers."""
    keys = re.findall(r"for (.+) mentioned", case.info.question)[0]
    queries = re.split(r", and |, ", keys)
    values = task.needles.values
    pairs = [(queries[i // values], answer) for i, answer in enumerate(case.info.answers)]
    sentences = [f"One of the special magic {task.needles.value_kind}s for {key} is: {value}." for key, value in pairs]
    text = task.needles.haystack == "text"
    return [frame.encode(f" {sentence}" if text else f"{sentence}\n") for sentence in sentences]


def _without(task: Niah, frame: Frame, body: list[int], asked: list[list[int]]) -> list[int]:
    """The filler: ``body`` without its needles, among them those of keys that nobody asks for."""
    ids = list(body)
    for statement in asked:
        for place in reversed(_find(ids, statement)):
            del ids[place : place + len(statement)]
    if task.needles.keys > task.needles.queries:
        opening = frame.encode(" One of the special magic")
        for place in reversed(_find(ids, opening)):
            # Distractors end with the full stop after seven digits.
            end = next(
                e for e in range(place, len(ids)) if re.search(r"is\s?: ?\d{7} ?\.$", frame.decode(ids[place:e]))
            )
            del ids[place:end]
    return ids


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["text", "noise"])
def test_first_assignment_stands_at_the_exact_token_and_the_chain_in_order(
    frame: Frame, haystack: Tokens, kind: Any, depth: float
) -> None:
    task = VariableTracking(haystack=kind, example_tokens=0)
    case = task.case(frame, haystack, _length(frame, "vt"), depth, random.Random(3))
    head = frame.encode(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    )
    names, value = case.info.answers, re.findall(r"value (\d+)", case.info.question)[0]
    assignments = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    statements = [frame.encode(f" {line}." if kind == "text" else f"{line}\n") for line in assignments]
    body = case.context_ids[len(frame.prefix_ids) + len(head) :]
    places = [place for statement in statements for place in _find(body, statement)]
    assert len(places) == 5
    assert places == sorted(places)
    filler = len(body) - len(frame.encode("\n")) - sum(map(len, statements))
    assert places[0] == round(depth * filler)


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery"])
def test_needles_that_are_all_asked_for_spread_evenly_from_the_depth(plain: tuple[Frame, Tokens], name: Any) -> None:
    frame, haystack = plain
    case = Niah(name).case(frame, haystack, 8000, 0.1, random.Random(0))
    places = [case.info.context.index(f"is: {value}.") / len(case.info.context) for value in case.info.answers]
    assert places == pytest.approx([0.1, 0.35, 0.6, 0.85], abs=0.04)
    later = Niah(name).case(frame, haystack, 8000, 0.5, random.Random(0)).info
    assert later.answers == case.info.answers
    places = [later.context.index(f"is: {value}.") / len(later.context) for value in later.answers]
    assert places == pytest.approx([0.5, 0.75, 0.0, 0.25], abs=0.05)


def test_needles_never_split_a_word_or_a_line(plain: tuple[Frame, Tokens]) -> None:
    frame, haystack = plain
    source = frame.decode(haystack.ids)
    for seed in range(20):
        case = Niah("niah_multikey_1").case(frame, haystack, 4000, None, random.Random(seed))
        body = case.info.context.split("afterwards.\n", 1)[1][:-1]
        parts = re.split(r" One of the special magic numbers for [a-z-]+ is: \d{7}\.", body)
        assert len(parts) == 5
        assert "".join(parts) in source
        assert all(part == "" or part[0].isspace() for part in parts[1:])
        lines = Niah("niah_single_1").case(frame, haystack, 4000, None, random.Random(seed)).info.context.splitlines()
        needle = next(i for i, line in enumerate(lines) if "magic" in line and i)
        whole = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        assert set(lines[2:needle] + lines[needle + 1 : -1]) <= {whole}
        assert whole.endswith(lines[1]) or needle == 1
