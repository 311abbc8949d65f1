"""Every kind of question: answered by its context alone, unambiguous, and in wordings of its split alone."""

import random
import re
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

import pytest

from data import distractors, names
from data.asked_context import AskedContext, NothingToAsk, asked_context
from data.cases import Frame
from data.event_order import LABELS
from data.facts import KINDS, SPLITS, Split, draw_fact, part
from data.packing import Tokens
from data.passage import Passage
from data.question_kind import QuestionKind
from data.question_kinds import QUESTION_KINDS, checked_weights
from data.told_facts import TOLD_KINDS, ToldKind, value_lists
from data.told_wordings import FRAMES, TOLD_VALUES
from data.unseen_facts import UNSEEN_KINDS, UnseenFacts
from data.unseen_wordings import TERMS, UNSEEN_VALUES
from tests.data.dialogue import PLAY

EVERY_KIND = [*QUESTION_KINDS.values(), UnseenFacts()]


@cache
def haystack(tokenizer: Any) -> Tokens:
    ids = tokenizer.encode(PLAY, add_special_tokens=False)
    return Tokens(ids, [("play", len(ids))])


def asked(kind: QuestionKind, tokenizer: Any, split: Split, seed: int, depth: float | None = None) -> AskedContext:
    frame = Frame(tokenizer)
    return asked_context(frame, haystack(tokenizer), 1500, [kind], random.Random(seed), split, depth)


def fields_of(kind: QuestionKind, split: Split, question: str) -> dict[str, str]:
    """Read a question's fields by the wordings of its kind and split."""
    for asking in kind.wordings[split]:
        pattern = re.escape(asking.question)
        for name in set(re.findall(r"{(\w+)}", asking.question)):
            first, *others = pattern.split(rf"\{{{name}\}}")
            own = "[12ABKLPQXY]" if name in "ab" else ".+"
            pattern = first + f"(?P<{name}>{own})" + f"(?P={name})".join(others)
        if found := re.fullmatch(pattern, question, re.DOTALL):
            return found.groupdict()
    raise AssertionError(f"{question!r} is in no wording of {kind.name}, {split}")


def quoted(context: str, fields: dict[str, str], answer: str) -> None:
    assert context.count(fields["quote"]) == 1
    assert f"{fields['quote']} {answer}" in context
    assert (len(fields["quote"].split()), len(answer.split())) == (12, 8)


def left_out_word(context: str, fields: dict[str, str], answer: str) -> None:
    assert context.count(fields["sentence"].replace("____", answer)) == 1
    assert re.findall(rf"\b{answer}\b", context, re.IGNORECASE) == [answer]


def beside(context: str, fields: dict[str, str], answer: str) -> None:
    quote = fields["quote"]
    place = context.index(quote)
    assert context.count(quote) == 1
    near = f"{quote} {answer}" in context or f"{answer} {quote}" in context
    assert near or re.search(rf"[.!?] {re.escape(answer)}[^.!?]*[.!?]+ $", context[:place])


def in_order(context: str, fields: dict[str, str], answer: str) -> None:
    assert context.count(fields["one"]) == context.count(fields["other"]) == 1
    first = "a" if context.index(fields["one"]) < context.index(fields["other"]) else "b"
    assert answer == fields[first]


def said_by(context: str, fields: dict[str, str], answer: str) -> None:
    assert context.count(fields["line"]) == 1
    assert f" {answer}: {fields['line']}" in context


def copied(context: str, fields: dict[str, str], answer: str) -> None:
    assert context.count(fields["quote"]) == 1
    assert f"{fields['quote']} {answer}" in context
    assert len(answer.split()) == int(fields["number"])


def counted(context: str, fields: dict[str, str], answer: str) -> None:
    first, second, *_ = numbers = [int(number) for number in answer.split(", ")]
    assert numbers == list(range(first, numbers[-1] + 1, second - first)) and len(numbers) == int(fields["number"])
    [told] = [sentence for sentence in re.split(r"[.!?]", context) if fields["who"] in sentence]
    assert re.findall(r"\d+", told) == [str(first), str(second - first)]


CHECKS: dict[str, Callable[[str, dict[str, str], str], None]] = {
    "quotes": quoted,
    "cloze": left_out_word,
    "neighbours": beside,
    "order": in_order,
    "speakers": said_by,
    "copying": copied,
    "counting": counted,
}


@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.name)
@pytest.mark.parametrize("chat", [True, False])
def test_the_context_answers_the_question_and_says_it_once(
    kind: QuestionKind, chat: bool, tokenizer: Any, plain_tokenizer: Any
) -> None:
    chosen = tokenizer if chat else plain_tokenizer
    for split in kind.wordings:
        for seed in range(6):
            one = asked(kind, chosen, split, seed)
            [turn] = one.turns
            assert len(one.ids) == 1500
            assert one.kinds == [kind.name]
            context = " ".join(chosen.decode(one.ids).split())
            fields = {} if kind.name == "facts" else fields_of(kind, split, turn.question)
            assert turn.answers and not {"{", "}"} & set(turn.question + turn.answer_prefix)
            assert turn.answer == " ".join(turn.answer.split())
            assert seed or one == asked(kind, chosen, split, seed), "it is a function of its draw"
            if kind.name in CHECKS:
                CHECKS[kind.name](context, fields, turn.answer)
            else:
                assert all(answer.lower() in context.lower() for answer in turn.answers)
                assert not any(answer.lower() in PLAY.lower() for answer in turn.answers if len(answer) > 8)


def test_distractors_answer_in_the_order_that_is_asked_for(tokenizer: Any) -> None:
    kind, forms = QUESTION_KINDS["distractors"], set()
    for seed in range(60):
        one = asked(kind, tokenizer, "train", seed)
        [turn], context = one.turns, tokenizer.decode(one.ids)
        key = fields_of(kind, "train", turn.question)["key"]
        statement = next(form for form in distractors.STATEMENTS["train"] if _stands(form, key, turn.answers, context))
        places = [context.index(answer) for answer in turn.answers]
        forms.add((len(turn.answers), " and " in key))
        if " and " not in key:
            assert places == sorted(places)
            told = [context.lower().count(_said(statement, key, value).lower()) for value in turn.answers]
            assert told == [1] * len(told)
    assert forms == {(1, False), (2, False), (3, False), (2, True)}


def _said(form: str, key: str, value: str) -> str:
    return form.format(key=key, value=value)


def _stands(form: str, key: str, answers: tuple[str, ...], context: str) -> bool:
    keys = key.split(" and ") if " and " in key else [key] * len(answers)
    return all(_said(form, own, value).lower() in context.lower() for own, value in zip(keys, answers, strict=True))


def test_what_is_told_stands_in_the_middle_of_a_sentence() -> None:
    rng, shapes = random.Random(0), set()
    for kind in (QUESTION_KINDS["told"], UnseenFacts()):
        for _ in range(300):
            one = kind.ask(Passage(), rng, "held_out")
            assert one is not None
            [sentence], [value] = one.hidden, one.turn.answers
            before, found, after = sentence.strip().partition(value)
            assert found and before and len(re.findall(r"\w+", after)) >= 2, sentence
            assert 1 <= len(value.split()) <= 4
            shapes.add(before.split()[0])
    assert len(shapes) >= 6


def strings(split: Split) -> dict[str, set[str]]:
    """Return all templates of a split: questions, beginnings of answers, and sentences around values."""
    askings = [asking for kind in EVERY_KIND for asking in kind.wordings.get(split, ())]
    told: list[ToldKind] = [*TOLD_KINDS.values(), *UNSEEN_KINDS.values()]
    return {
        "questions": {asking.question for asking in askings},
        "answers": {asking.answer_prefix for asking in askings},
        "clauses": {clause.text for kind in told for clause in kind.clauses.get(split, [])},
        "sentences": {*FRAMES[split], *distractors.STATEMENTS[split]},
        "labels": {label for pair in LABELS[split] for label in pair},
        "nouns": set(distractors.NUMBERED[split]),
    }


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_no_wording_and_no_value(one: Split, other: Split) -> None:
    mine, theirs = strings(one), strings(other)
    assert {name: mine[name] & theirs[name] for name in mine} == {name: set() for name in mine}
    assert all(mine.values())
    for name, values in value_lists(TOLD_VALUES).items():
        assert len(set(values)) == len(values), name
        assert part(values, one) and not set(part(values, one)) & set(part(values, other)), name


def test_no_kind_of_training_has_a_value_or_wording_of_the_unseen_kinds() -> None:
    trained = {kind.name for kind in KINDS} | set(TOLD_KINDS) | set(QUESTION_KINDS)
    assert not trained & set(UNSEEN_KINDS)
    unseen = {value.lower() for values in value_lists(UNSEEN_VALUES).values() for value in values}
    assert len(unseen) > 100
    pools = [getattr(names, name).copy() for name in vars(names) if name.isupper()]
    known = {value.lower() for values in [*pools, *value_lists(TOLD_VALUES).values()] for value in values}
    rng = random.Random(0)
    split: Split
    for split in ("train", "validation"):
        drawn = [draw_fact(rng, split).value for _ in range(1500)]
        drawn += [
            answer for name in ("told", "distractors") for _ in range(1500) for answer in _answers(name, rng, split)
        ]
        known |= {value.lower() for value in drawn}
        wordings = strings(split)
        for kind in UNSEEN_KINDS.values():
            for clause in kind.clauses["held_out"]:
                assert clause.text not in wordings["clauses"]
                assert clause.asking.question not in wordings["questions"]
    assert not known & unseen
    assert not {term for term in TERMS if any(term in value for value in known)}
    assert set(UnseenFacts.wordings) == {"held_out"}


def _answers(name: str, rng: random.Random, split: Split) -> tuple[str, ...]:
    one = QUESTION_KINDS[name].ask(Passage(), rng, split)
    assert one is not None
    return one.turn.answers


def test_every_unseen_kind_is_drawn_and_can_be_asked_alone() -> None:
    rng = random.Random(0)
    lists = value_lists(UNSEEN_VALUES)
    for name in UNSEEN_KINDS:
        drawn = {UnseenFacts(name).ask(Passage(), rng, "held_out").turn.answers[0] for _ in range(200)}
        assert drawn <= set(lists[name]) and len(drawn) > 10
    mixed = {UnseenFacts().ask(Passage(), rng, "held_out").turn.answers[0] for _ in range(300)}
    assert all(mixed & set(values) for values in lists.values())


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.name)
def test_the_answer_lies_near_its_depth(kind: QuestionKind, depth: float, tokenizer: Any) -> None:
    if kind.name == "order":
        return  # its answer is a label; one of the two phrases lies there
    one = asked(kind, tokenizer, "held_out", 5, depth)
    context, answer = tokenizer.decode(one.ids), one.turns[0].answers[0]
    if kind.name in ("speakers", "counting"):
        told = "line" if kind.name == "speakers" else "who"
        answer = fields_of(kind, "held_out", one.turns[0].question)[told]
    shown = re.search(r"\s+".join(map(re.escape, answer.split())), context, re.IGNORECASE)
    assert shown is not None
    assert abs(sum(shown.span()) / 2 / len(context) - depth) < 0.25


def test_a_text_without_dialogue_has_no_speakers(tokenizer: Any) -> None:
    prose = tokenizer.encode(
        "Notes:\nThe old mill stands by the river. It has no door.\n\n" * 60, add_special_tokens=False
    )
    with pytest.raises(NothingToAsk) as nothing:
        asked_context(Frame(tokenizer), Tokens(prose, [("a", len(prose))]), 1000, [QUESTION_KINDS["speakers"]],
                      random.Random(0), "train")  # fmt: skip
    assert nothing.value.kind == "speakers"
    for text, who in {
        "“I shall be late again today!” said the Rabbit. “Oh dear.” And so it was.": "the Rabbit",
        'Then Mr. Darcy replied, "You are mistaken about all of it." Elizabeth laughed.': "Mr. Darcy",
        "At noon.\n\nHOB. Who has taken the lantern?\n\nANN. It was not me, Hob.\n\nHOB. Then go.\n\nEnd": "ANN",
    }.items():
        drawn = [
            QUESTION_KINDS["speakers"].ask(Passage([(f" {text} ", True)]), random.Random(i), "train") for i in range(9)
        ]
        assert who in {one.turn.answer for one in drawn if one}
    novel = 'She ran. "We must leave before the storm," said Mary Webb. He nodded, and they left. '
    passage = Passage([(f"Once. {novel} And so on. ", True)])
    one = QUESTION_KINDS["speakers"].ask(passage, random.Random(0), "train")
    assert one is not None
    assert one.turn.answers == ("Mary Webb",)
    assert fields_of(QUESTION_KINDS["speakers"], "train", one.turn.question) == {
        "line": "We must leave before the storm,"
    }
    assert QUESTION_KINDS["speakers"].ask(Passage([(f"{novel} {novel} ", True)]), random.Random(0), "train") is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"riddles": 1}, "questions has 'riddles': give weights of facts, told"),
        ({"unseen": 1}, "questions has 'unseen'"),
        ({"quotes": -1}, r"questions.quotes is -1"),
        ({"quotes": float("nan")}, r"questions.quotes is nan"),
        ({"quotes": 0}, "no weight above 0"),
        ({}, "no weight above 0"),
    ],
)
def test_bad_weights_are_named(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_weights(weights)
