"""The wordings of facts, by split. No string appears in two splits.

Fields: ``{topic}`` is an attribute with its subject ("access code for the Lisbon archive"), ``{subject}`` the
subject alone, ``{value}`` the answer, ``{who}`` a person who reports it; a capital in the field's name means a
capital in the text.
"""

from typing import NamedTuple


class Wording(NamedTuple):
    """A statement, the question it answers, and the answer's beginning (the value and a full stop follow)."""

    statement: str
    question: str
    answer_prefix: str


GENERIC_STATEMENTS: dict[str, tuple[str, ...]] = {
    "train": (
        "The {topic} is {value}.",
        "Note: the {topic} is {value}.",
        "Remember that the {topic} is {value}.",
        "{Value} is the {topic}.",
        "According to {who}, the {topic} is {value}.",
        "{who} confirmed that the {topic} was {value}.",
        "{Topic}: {value}.",
        "- {topic} = {value}",
        "(The {topic}, by the way, is {value}.)",
        "It should be mentioned that the {topic} is {value}.",
        "As the {topic}, {value} was chosen.",
        '"The {topic} is {value}," said {who}.',
        "Do not forget: the {topic} is {value}.",
        "The {topic} has been changed to {value}.",
        "The {topic} was set to {value} by {who}.",
        "Everybody here knows that the {topic} is {value}.",
        "[{topic}] {value}",
        "They decided on {value} as the {topic}.",
        "For the record, {value} was registered as the {topic}.",
        "{who} wrote down the {topic}: {value}.",
        "Important! The {topic} is {value}.",
        "What is the {topic}? It is {value}.",
        "If anybody asks for the {topic}, the answer is {value}.",
        "In the end the {topic} turned out to be {value}.",
        "* {Topic} -> {value}",
        "NB {topic}: {value}",
    ),
    "validation": (
        "Please keep in mind that the {topic} is {value}.",
        "The {topic}, as {who} noted, is {value}.",
        "Memo to all: {topic} is {value}.",
    ),
    "held_out": (
        "One of the special facts is that the {topic} is {value}.",
        "You will need this later: the {topic} is {value}.",
        "Reminder from {who}: the {topic} is {value}.",
        "We recently learned that the {topic} is {value}.",
        "A note on the table says that the {topic} is {value}.",
        "The {topic} happens to be {value}.",
        "{who} told us that the {topic} is {value}.",
        "Since last week the {topic} is {value}.",
    ),
}
"""Statements for any kind of fact."""

GENERIC_QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("What is the {topic}?", "The {topic} is"),
        ("Question: what is the {topic}?", "Answer: the {topic} is"),
        ("Tell me the {topic}.", "The {topic} is"),
        ("According to the text, what is the {topic}?", "According to the text, the {topic} is"),
        ("Which is the {topic} that the text mentions?", "It is"),
        ("Fill in the gap. {Topic}: ___", "{Topic}:"),
        ("Do you remember the {topic}?", "Yes, it is"),
        ("Please look up the {topic} in the passage above.", "In the passage, the {topic} is given as"),
        ("I forgot the {topic}. What was it?", "It was"),
        ("Give the {topic}, nothing else.", "Answer:"),
        ("Q: {topic}?", "A:"),
        ("Can you find the {topic}?", "Sure, the {topic} is"),
        ("Somewhere above, the {topic} is stated. Repeat it.", "The {topic} is"),
        ("Complete the sentence: the {topic} is", "The {topic} is"),
    ),
    "validation": (
        ("Could you remind me of the {topic}?", "Of course. The {topic} is"),
        ("What does the passage give as the {topic}?", "The passage says that the {topic} is"),
    ),
    "held_out": (
        ("What is the {topic} mentioned in the document?", "In the document, the {topic} is"),
        ("From what you have read, what is the {topic}?", "From what I have read, the {topic} is"),
        ("I need to know the {topic}. What is it?", "Certainly: the {topic} is"),
        ("Would you say again what the {topic} is?", "As stated, the {topic} is"),
        ("State the {topic}.", "Here it is. The {topic} is"),
    ),
}
"""Questions for any kind of fact, each with the beginning of its answer."""

KIND_WORDINGS: dict[str, dict[str, tuple[Wording, ...]]] = {
    "train": {
        "number": (
            Wording(
                "To enter, {subject} uses {value}.",
                "Which number does {subject} use to enter?",
                "To enter, {subject} uses",
            ),
            Wording(
                "{Subject} was assigned the number {value}.",
                "Which number was {subject} assigned?",
                "{Subject} was assigned the number",
            ),
        ),
        "code": (
            Wording(
                "{Subject} can be unlocked with {value}.",
                "What unlocks {subject}?",
                "{Subject} can be unlocked with",
            ),
            Wording("Typing {value} opens {subject}.", "What opens {subject}?", "What opens {subject} is"),
        ),
        "word": (
            Wording(
                "Whisper {value} to get past {subject}.",
                "What must be whispered to get past {subject}?",
                "One must whisper",
            ),
        ),
        "name": (
            Wording(
                "{Subject} is looked after by {value}.",
                "Who looks after {subject}?",
                "{Subject} is looked after by",
            ),
            Wording("{Value} sold {subject} last year.", "Who sold {subject}?", "{Subject} was sold by"),
        ),
        "date": (
            Wording(
                "{Subject} was first mentioned on {value}.",
                "When was {subject} first mentioned?",
                "{Subject} was first mentioned on",
            ),
            Wording(
                "On {value} a letter about {subject} arrived.",
                "When did the letter about {subject} arrive?",
                "It arrived on",
            ),
        ),
        "place": (
            Wording("{Subject} is moving to {value}.", "Where is {subject} moving?", "{Subject} is moving to"),
            Wording(
                "A postcard from {value} reached {subject}.",
                "Where did the postcard to {subject} come from?",
                "The postcard came from",
            ),
        ),
        "object": (
            Wording(
                "{Subject} received {value} as a prize.",
                "What did {subject} receive as a prize?",
                "{Subject} received",
            ),
        ),
        "time": (
            Wording(
                "The lights at {subject} go out at {value}.",
                "When do the lights at {subject} go out?",
                "They go out at",
            ),
        ),
        "money": (
            Wording(
                "{who} paid {value} for {subject}.",
                "How much was paid for {subject}?",
                "The price paid for {subject} was",
            ),
            Wording(
                "{Subject} owes the bank {value}.",
                "How much does {subject} owe the bank?",
                "{Subject} owes the bank",
            ),
        ),
        "phone": (
            Wording(
                "Call {value} to reach {subject}.",
                "Which number reaches {subject}?",
                "To reach {subject}, call",
            ),
        ),
    },
    "validation": {
        "name": (Wording("{Subject} was painted by {value}.", "Who painted {subject}?", "{Subject} was painted by"),),
        "money": (
            Wording(
                "{Subject} costs {value} a year.",
                "What does {subject} cost a year?",
                "A year of {subject} costs",
            ),
        ),
    },
    "held_out": {
        "number": (
            Wording(
                "The number on the door of {subject} is {value}.",
                "Which number is on the door of {subject}?",
                "On the door of {subject} is the number",
            ),
        ),
        "name": (Wording("{Subject} is insured by {value}.", "Who insures {subject}?", "{Subject} is insured by"),),
        "date": (
            Wording(
                "{Subject} will be renovated on {value}.",
                "When will {subject} be renovated?",
                "{Subject} will be renovated on",
            ),
        ),
        "place": (
            Wording(
                "The twin of {subject} stands in {value}.",
                "Where does the twin of {subject} stand?",
                "The twin of {subject} stands in",
            ),
        ),
        "money": (
            Wording(
                "{Subject} was sold at auction for {value}.",
                "How much did {subject} fetch at auction?",
                "At auction, {subject} was sold for",
            ),
        ),
    },
}
"""Wordings for single kinds of facts, without an attribute."""
