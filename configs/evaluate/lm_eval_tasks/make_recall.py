"""Writes recall.jsonl beside itself: python -m configs.evaluate.lm_eval_tasks.make_recall (the file is checked in).

A document is a page of everyday notes in which four facts of one kind stand somewhere; the question asks for one of
them, and the others' values are the wrong options. Facts and wordings are those that training never sees.
"""

import json
import random
from pathlib import Path

from data.facts import KINDS, draw_fact

DOCUMENTS = 24
FACTS = 4
SENTENCES = 16
NOTES = """
The ferry was late again because of the fog over the estuary.
Nobody had closed the window in the reading room, so the papers were damp by morning.
The baker on the corner has started to sell rye bread on Thursdays.
Two of the chairs in the hall need new legs before the concert.
A heron has been standing by the pond since the weekend.
The new kettle boils faster than the old one, but it whistles too loudly.
We moved the bicycles to the shed because rain is expected until Sunday.
The choir practised the second half only and went home early.
Someone left a blue umbrella and a bag of apples at the front desk.
The gardener says the hedge should not be cut before the end of summer.
Half of the lamps in the stairwell have been replaced so far.
The train to the coast now stops at the mill as well.
It took three people to carry the piano up to the first floor.
The library bought a map of the valley from before the dam was built.
Lunch was soup, bread and the last of the plums.
The painters will come back for the doors when the weather is dry.
A letter about the roof arrived, but it was meant for the house next door.
The children built a bridge of planks over the ditch behind the school.
There is a draught in the archive that nobody can explain.
The clock in the square was set right and is already slow again.
The dog from the farm followed the postman as far as the church.
We counted forty boats in the harbour on Saturday, more than last year.
The carpenter prefers oak, but the budget only allows pine.
Snow is lying on the hills although the valley is green.
The visitors asked for tea and stayed until the evening.
A branch fell on the fence and broke two of its boards.
The market was moved to the car park while the square is being paved.
Whoever borrowed the long ladder should bring it back to the workshop.
""".strip().splitlines()


def document(rng: random.Random) -> dict[str, object]:
    """One row: notes, the question about one of the facts in them, the options and which one is right."""
    kind = rng.choice(KINDS)
    facts = {fact.value: fact for fact in (draw_fact(rng, "held_out", kind) for _ in range(10 * FACTS))}
    chosen = rng.sample(sorted(facts), FACTS)
    sentences = rng.sample(NOTES, SENTENCES) + [facts[value].statement for value in chosen]
    rng.shuffle(sentences)
    answer = rng.randrange(FACTS)
    asked = facts[chosen[answer]]
    return {
        "notes": " ".join(sentences),
        "question": asked.question,
        "answer_prefix": asked.answer_prefix,
        "options": chosen,
        "answer": answer,
    }


if __name__ == "__main__":
    generator = random.Random(0)
    rows = [json.dumps(document(generator)) + "\n" for _ in range(DOCUMENTS)]
    Path(__file__).with_name("recall.jsonl").write_text("".join(rows), encoding="utf-8")
