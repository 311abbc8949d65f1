"""RULER's tasks against the published ones: prompts, presets, examples, frequencies; and their errors."""

import random
import re

import pytest

from data.cases import Frame
from data.packing import Tokens
from data.ruler import CommonWords, FrequentWords, Niah, VariableTracking
from data.ruler_filler import line_filler
from data.ruler_needles import PRESETS
from data.ruler_vocabulary import ADJECTIVES, NOUNS, distinct_words, words
from sparsekv_pl.metrics import retrieval_scores
from tests.data.ruler_cases import PLAIN, TASKS, WITH_DEPTH

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


def test_answers_may_be_shorter_than_ruler_s() -> None:
    assert Niah().max_new_tokens == 128
    assert Niah(max_new_tokens=24).max_new_tokens == 24
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Niah(max_new_tokens=0)
