"""RULER's tasks: published prompts, exact lengths and depths for any tokenizer, answers that are really there."""

import itertools
import random
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.cases import Case, CaseTask, Frame
from data.packing import Tokens, encode_document, take_tokens
from data.ruler import CommonWords, FrequentWords, Niah, VariableTracking
from data.ruler_filler import line_filler
from data.ruler_needles import PRESETS
from data.ruler_vocabulary import ADJECTIVES, NOUNS, distinct_words, words
from data.text import EmbeddedText
from sparsekv_pl.metrics import retrieval_scores

LENGTH = 1400
PLAIN = 9000
"""For one token per byte."""
TASKS: dict[str, CaseTask] = {
    **{name: Niah(name) for name in PRESETS},
    "vt": VariableTracking(),
    "vt_noise": VariableTracking(haystack="noise"),
    "two chains": VariableTracking(chains=2, example_tokens=0),
    "cwe": CommonWords(),
    "cwe without": CommonWords(repeats=(8, 2), example=False),
    "fwe": FrequentWords(),
}
WITH_DEPTH = [name for name, task in TASKS.items() if task.uses_depth]


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


@pytest.fixture(scope="module")
def plain(tokenizer: Any) -> tuple[Frame, Tokens]:
    """One token per byte, so that texts can be compared letter by letter."""
    return Frame(tokenizer), take_tokens(EmbeddedText().documents(), tokenizer, 30_000)


def _length(frame: Frame, name: str) -> int:
    """Bytes are many more tokens."""
    return PLAIN if len(frame.tokenizer) < 300 else LENGTH if name != "cwe" else 2 * LENGTH


def _find(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]


def _squeezed(text: str) -> str:
    """WordPiece has neither case nor the spaces around punctuation."""
    return re.sub(r"\s", "", text).lower()


@pytest.mark.parametrize("query_aware", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_context_has_the_exact_length_and_the_answers(
    frame: Frame, haystack: Tokens, name: str, query_aware: bool
) -> None:
    task, length = TASKS[name], _length(frame, name)
    for more, depth in enumerate([0.0, 0.37, 1.0]):
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


@pytest.mark.parametrize("query_aware", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.618, 1.0])
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


PROMPTS = {
    "niah_single_2": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n",
        r"What is the special magic number for [a-z]+-[a-z]+ mentioned in the provided text\?",
        r"The special magic number for [a-z]+-[a-z]+ mentioned in the provided text is",
        128,
    ),
    "niah_multikey_3": (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the uuid afterwards.\n",
        r"What is the special magic uuid for [0-9a-f-]{36} mentioned in the provided text\?",
        r"The special magic uuid for [0-9a-f-]{36} mentioned in the provided text is",
        128,
    ),
    "niah_multivalue": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n",
        r"What are all the special magic numbers for [a-z]+-[a-z]+ mentioned in the provided text\?",
        r"The special magic numbers for [a-z]+-[a-z]+ mentioned in the provided text are",
        128,
    ),
    "niah_multiquery": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n",
        r"What are all the special magic numbers for (\S+, ){3}and \S+ mentioned in the provided text\?",
        r"The special magic numbers for (\S+, ){3}and \S+ mentioned in the provided text are",
        128,
    ),
    "two chains": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        r"Question: Find all variables that are assigned the value \d{5} in the text above\.",
        r"Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assigned the "
        r"value \d{5}, they are:",
        30,
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n1. ",
        r"Question: What are the 10 most common words in the above list\?",
        r"Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        r"Question: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What are the three most "
        r"frequently appeared words in the above coded text\?",
        r"Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_published_ones(plain: tuple[Frame, Tokens], name: str) -> None:
    intro, question, answer_prefix, new_tokens = PROMPTS[name]
    info = TASKS[name].case(*plain, PLAIN, 0.5, random.Random(0)).info
    assert info.context.startswith(intro)
    assert info.context.endswith("\n")
    assert re.fullmatch(question, info.question)
    assert re.fullmatch(answer_prefix, info.answer_prefix)
    assert info.max_new_tokens == new_tokens


def test_presets_are_the_published_settings(plain: tuple[Frame, Tokens]) -> None:
    counts = {}
    for name in PRESETS:
        needles = Niah(name).needles
        assert Niah(name).name == name
        counts[name] = (needles.keys, needles.values, needles.queries, needles.haystack)
        context = Niah(name).case(*plain, PLAIN, 0.5, random.Random(0)).info.context
        hidden = len(re.findall(r"One of the special magic \w+ for \S+ is: \S+\.(?!\S)", context))
        assert hidden == needles.keys * needles.values or needles.haystack == "needles"
        assert ("The grass is green." in context) == (name == "niah_single_1")
    assert counts == {
        "niah_single_1": (1, 1, 1, "noise"),
        "niah_single_2": (1, 1, 1, "text"),
        "niah_single_3": (1, 1, 1, "text"),
        "niah_multikey_1": (4, 1, 1, "text"),
        "niah_multikey_2": (1, 1, 1, "needles"),
        "niah_multikey_3": (1, 1, 1, "needles"),
        "niah_multivalue": (1, 4, 1, "text"),
        "niah_multiquery": (4, 1, 4, "text"),
    }


def test_options_change_a_preset_and_its_name() -> None:
    assert Niah("niah_multikey_1", keys=1).name == "niah_single_2"
    assert Niah(keys=8, value_kind="word").name == "niah_8_1_1_word_word_text"


def test_solved_examples_are_the_published_ones(plain: tuple[Frame, Tokens]) -> None:
    context = VariableTracking().case(*plain, PLAIN, 0.5, random.Random(0)).info.context
    solved = re.match(
        r"(?s)Memorize and track .*\nQuestion: Find all variables that are assigned the value (\d{5}) in the text "
        r"above. Answer: According .* 5 variables are assigned the value \1, they are: ([A-Z]{3}( [A-Z]{3}){4})\n\n"
        r"Memorize and",
        context,
    )
    assert solved is not None
    names = solved[2].split()
    assert solved[0].index(f"VAR {names[0]} = {solved[1]}.") < solved[0].index(f"VAR {names[1]} = VAR {names[0]}.")
    assert len(solved[0]) - len("Memorize and") == 500
    context = CommonWords().case(*plain, PLAIN, None, random.Random(0)).info.context
    solved = re.match(r"(?s).*Question: .* list\? Answer: .* are: (1\. \S+ .* 10\. \S+)\nBelow is a", context)
    assert solved is not None
    entries = re.findall(r"\d+\. ([\w-]+)", solved[0].split("\nQuestion")[0])
    assert len(entries) == 190
    assert all(entries.count(word) == 10 for word in re.findall(r"\d+\. ([\w-]+)", solved[1]))


@pytest.mark.parametrize(("length", "often", "seldom"), [(5000, 30, 3), (3500, 6, 1)])
def test_common_words_are_more_common(plain: tuple[Frame, Tokens], length: int, often: int, seldom: int) -> None:
    case = CommonWords(example=False).case(*plain, length, None, random.Random(1))
    entries = re.findall(r"(\d+)\. ([\w-]+)", case.info.context)[:-1]
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    listed = [word for _, word in entries]
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == often} == set(case.info.answers)
    others = [count for word, count in counts.items() if word not in case.info.answers]
    assert len(others) > 10
    # What fills up the rest is in the list once.
    assert set(others) <= {seldom, 1}
    assert others.count(1) <= seldom or seldom == 1


def test_coded_words_follow_the_law(plain: tuple[Frame, Tokens]) -> None:
    case = FrequentWords().case(*plain, 5000, None, random.Random(1))
    text = case.info.context.split("coded words.")[-1].split()
    counts = sorted(((text.count(word), word) for word in set(text) if set(word) != {"."}), reverse=True)
    assert [word for _, word in counts[:3]] == list(case.info.answers)
    assert all(re.fullmatch("[a-z]{6}", word) for _, word in counts)
    dots = text.count("...")
    assert counts[2][0] > counts[3][0]
    # One more or less is a word that the noise's own remainder adds.
    for rank, (count, _) in enumerate(counts[:3], start=2):
        assert count == pytest.approx(dots / rank**2, rel=0.1)


def test_the_third_coded_word_is_always_more_frequent_than_the_fourth(plain: tuple[Frame, Tokens]) -> None:
    for length in range(290, 400, 5):  # 25 to 31 dots would make a tie: contexts of 304 to 359 bytes
        case = FrequentWords().case(*plain, length, None, random.Random(length))
        text = case.info.context.split("coded words.")[-1].split()
        others = [text.count(word) for word in set(text) - set(case.info.answers) if word.isalpha()]
        assert min(text.count(word) for word in case.info.answers) > max(others, default=0)


@pytest.mark.parametrize("name", TASKS)
def test_case_is_a_function_of_the_generator(plain: tuple[Frame, Tokens], name: str) -> None:
    first, again, other = (TASKS[name].case(*plain, PLAIN, None, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.info.answers != other.info.answers
    aware = TASKS[name].case(*plain, PLAIN, None, random.Random(1), True)
    assert (aware.info.answers, aware.info.question) == (first.info.answers, first.info.question)


@pytest.mark.parametrize("name", TASKS)
def test_saying_the_answers_scores_one_and_saying_nothing_zero(plain: tuple[Frame, Tokens], name: str) -> None:
    answers = TASKS[name].case(*plain, PLAIN, 0.5, random.Random(4)).info.answers
    assert set(retrieval_scores(" " + ", ".join(answers) + ".", answers).values()) == {1.0}
    assert set(retrieval_scores(" I do not know.", answers).values()) == {0.0}


@pytest.mark.parametrize("name", ["niah_single_2", "vt"])
def test_haystack_must_be_enough(plain: tuple[Frame, Tokens], name: str) -> None:
    frame, haystack = plain
    with pytest.raises(ValueError, match="haystack is empty"):
        TASKS[name].case(frame, Tokens(), PLAIN, 0.5, random.Random(0))
    with pytest.raises(ValueError, match="haystack has 100 tokens"):
        TASKS[name].case(frame, haystack.slice(0, 100), PLAIN, 0.5, random.Random(0))
    needed = TASKS[name].tokens_needed(frame, PLAIN)
    TASKS[name].case(frame, haystack.slice(0, needed), PLAIN, 0.5, random.Random(0))


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_3", "vt_noise", "cwe", "fwe"])
def test_synthetic_contexts_need_no_haystack(plain: tuple[Frame, Tokens], name: str) -> None:
    frame = plain[0]
    assert TASKS[name].tokens_needed(frame, PLAIN) == 0
    depth = 0.5 if TASKS[name].uses_depth else None
    assert len(TASKS[name].case(frame, Tokens(), PLAIN, depth, random.Random(0)).context_ids) == PLAIN


@pytest.mark.parametrize("name", WITH_DEPTH)
@pytest.mark.parametrize("depth", [-0.1, 1.1])
def test_depth_must_be_a_fraction(plain: tuple[Frame, Tokens], name: str, depth: float) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}"):
        TASKS[name].case(*plain, PLAIN, depth, random.Random(0))


@pytest.mark.parametrize("query_aware", [False, True])
@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2", "two chains"])
def test_needle_longer_than_the_context_names_the_least_length(
    plain: tuple[Frame, Tokens], name: str, query_aware: bool
) -> None:
    with pytest.raises(ValueError, match="at least") as error:
        TASKS[name].case(*plain, 100, 0.5, random.Random(0), query_aware)
    least = 100 + int(re.findall(r"at least (\d+) more", str(error.value))[0])
    case = TASKS[name].case(*plain, least, 0.5, random.Random(0), query_aware)
    assert len(case.context_ids) == least
    with pytest.raises(ValueError, match="at least"):
        TASKS[name].case(*plain, least - 1, 0.5, random.Random(0), query_aware)


@pytest.mark.parametrize("name", ["cwe", "fwe", "vt"])
def test_contexts_too_short_for_words_are_refused(plain: tuple[Frame, Tokens], name: str) -> None:
    for length in (1, 200):
        with pytest.raises(ValueError, match=f"context of {length} tokens"):
            TASKS[name].case(*plain, length, None, random.Random(0))
    with pytest.raises(ValueError, match="vt: example_tokens=100 has no room"):
        VariableTracking(example_tokens=100).case(*plain, PLAIN, None, random.Random(0))


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="preset is 'niah'"):
        Niah("niah")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many keys as queries"):
        Niah(queries=2)
    with pytest.raises(ValueError, match="as many keys as queries, at most 1000"):
        Niah(keys=20_000)
    with pytest.raises(ValueError, match="variables together"):
        VariableTracking(chains=300)
    with pytest.raises(ValueError, match="chains=0"):
        VariableTracking(chains=0)
    with pytest.raises(ValueError, match=r"repeats is \(3, 3\)"):
        CommonWords(repeats=(3, 3))
    with pytest.raises(ValueError, match="alpha is 0"):
        FrequentWords(alpha=0)


def test_words_are_distinct_and_endless() -> None:
    assert len(set(ADJECTIVES)) * len(set(NOUNS)) == len(ADJECTIVES) * len(NOUNS) == 96 * 145
    drawn = distinct_words(random.Random(0))
    taken = [next(drawn) for _ in range(len(words()) + 500)]
    assert len(set(taken)) == len(taken)
    assert all(not set(pair.split("-")) & set(taken[:100]) for pair in taken[len(words()) :])


@pytest.mark.parametrize("at", range(12))
def test_a_line_begins_at_the_asked_token(at: int) -> None:
    filler = line_filler(lambda: [1, 2, 3], 11, at)
    assert len(filler.ids) == 11
    assert all(filler.ids[place] == 1 for place in filler.places if place < 11)
    assert at in filler.places
    assert [filler.near(place) for place in (at, 0, 11)] == [at, min(filler.places), max(filler.places)]


def test_documents_are_those_of_the_filler(plain: tuple[Frame, Tokens]) -> None:
    frame, _ = plain
    texts = [document for document in EmbeddedText().documents() if len(document.text) > 3000][:4]
    haystack = Tokens()
    for document in texts:
        haystack.append(document.id, encode_document(frame.tokenizer, document))
    case = Niah().case(frame, haystack, 1000, 0.5, random.Random(0))
    by_id = {document.id: document.text for document in texts}
    assert 1 <= len(case.info.document_ids) <= 2
    body = case.info.context.split("afterwards.\n")[1]
    assert body[:80] in "\n\n".join(by_id[name] for name in case.info.document_ids)


def test_answers_may_be_shorter_than_ruler_s() -> None:
    assert Niah().max_new_tokens == 128
    assert Niah(max_new_tokens=24).max_new_tokens == 24
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Niah(max_new_tokens=0)
