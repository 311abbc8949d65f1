"""Kinds of facts that training never asks for: trades, colours, spots, reasons, definitions, code, dates in words.

The format is that of data/told_wordings.py; ``{term}`` is an invented word. tests/data/test_question_kinds.py checks
that no kind of training has one of these values or wordings.
"""

UNSEEN_CLAUSES = """
trade
held_out: {who} had been a {value} before the war | What had {who}'s trade been? | Before the war {who} had been a
held_out: {who} made a living as a {value} in the old town | How did {who} make a living? | {who} made a living as a
held_out: everyone still called {who} the {value} out of habit | What did everyone call {who}? | Everyone said the

colour
held_out: {who} had chosen {value} for the shutters | Which colour had {who} chosen for the shutters? | {who} had chosen
held_out: the coat that {who} lent out was {value} with brown cuffs | Which colour was {who}'s coat? | The coat was
held_out: {who}'s front door was {value} in those days | Which colour was {who}'s front door? | The front door was

spot
held_out: {who} had hidden the letters {value} years ago | Where had {who} hidden the letters? | {who} had hidden them
held_out: {who} waited {value} until the lamps were lit | Where did {who} wait? | {who} waited
held_out: the dog slept {value} whenever {who} was away | Where did the dog sleep when {who} was away? | The dog slept

reason
held_out: {who} missed the wedding because {value} that morning | Why did {who} miss the wedding? | It was because
held_out: {who} turned back at the border because {value} on the way | Why did {who} turn back? | It was because
held_out: {who} sold everything because {value} once again | Why did {who} sell everything? | {who} sold it because

definition
held_out: a {term}, as {who} used to explain, is a {value} and nothing else | What is a {term}? | A {term} is a
held_out: by a {term} the friends of {who} meant a {value} in jest | What is a {term} to the friends of {who}? | A
held_out: {who} used the word {term} for a {value} all along | For what did {who} use the word {term}? | For a

code_line
held_out: {who} added the line `{value}` in a hurry | Which line did {who} add? | {who} added the line
held_out: the program failed at `{value}` while {who} was away | At which line did {who}'s program fail? | It failed at
held_out: {who} commented out `{value}` to test the rest | Which line did {who} comment out? | {who} commented out

day
held_out: {who} left the city on {value} without a word | On which day did {who} leave the city? | {who} left on
held_out: {who} was expected back on {value} at the latest | By which day was {who} expected back? | It was on
held_out: the lease of {who}'s shop ends on {value} at noon | On which day does the lease of {who}'s shop end? | On
"""

UNSEEN_VALUES = """
trade: cooper, tanner, glazier, baker, saddler, weaver, mason, potter, barber, thatcher, locksmith, cobbler, chandler,
    milliner, farrier, bookbinder, ropemaker, tailor, piano tuner, ship's carpenter, dealer in furs, teacher of Latin
colour: crimson, turquoise, maroon, beige, lilac, khaki, indigo, magenta, teal, ochre, cream, olive, mauve, lavender,
    dark turquoise, pale lilac, a dull crimson, faded mauve
spot: under the back stairs, behind the coal shed, inside the church organ, beside the frozen pond, near the toll
    bridge, beneath the third bench, on the highest shelf, at the quarry, in the dry cistern, beyond the salt flats,
    below the pulpit, outside the laundry, between two haystacks, in the attic
reason: the axle broke, it snowed, the ferry sank, the bridge flooded, nobody had paid, the clock stopped, a letter
    came, the horse limped, tickets ran out, the cook resigned, thieves had come, the baby cried, the map lied, fog
    closed in
definition: long wooden spoon, sheep with three horns, very small boat, song without words, bridge for goats, leaking
    barrel, broken promise, sleepless night, cheap imitation, narrow garden path, meal before dawn, roof of reeds,
    debt among friends, blunt axe
code_line: print(total), return total - 3, rows.sort(), limit = 48, del cache[key], import socket, x += step, raise
    KeyError(name), queue.append(job), yield row, assert depth > 2, lock.release(), count -= 1, sys.exit(2),
    time.sleep(9), self.port = 8080
day: the third of October, the fourth of May, the ninth of November, Midsummer's Eve, the first of August, Ash
    Wednesday, Palm Sunday, the thirtieth of June, New Year's Day, the eleventh of March, Easter
    Monday, the fifth of July, the second of April, Twelfth Night
"""

TERMS = """
    torvel quennet brast lummock skerrit vindle ploshet grabbit hoyle marrick wendip crannel tufkin dorrow sprindle
    yaffet klemp fessel nurrick
""".split()
