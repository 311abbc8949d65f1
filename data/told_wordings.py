"""Facts about people as clauses that sentences contain, and their values.

A line is "split: clause | question | beginning of the answer". ``{who}`` is the person, ``{other}`` another one,
``{value}`` the answer. No clause, question, frame or value is in two splits. The kinds of data/unseen_wordings.py
(trades, colours, spots, reasons, definitions, lines of code, dates in words) must not appear here.
"""

from collections.abc import Mapping

from data.facts import Split

TOLD_CLAUSES = """
instrument
train: {who} played the {value} at every wedding | Which instrument did {who} play? | {who} played the
train: an old {value} hung over {who}'s bed | What hung over {who}'s bed? | Over the bed hung an old
validation: {who} had repaired a {value} for the choir | What had {who} repaired for the choir? | It was a
held_out: {who} practised the {value} behind closed shutters | What did {who} practise? | {who} practised the

animal
train: {who} kept a tame {value} in the kitchen | Which animal did {who} keep? | {who} kept a tame
train: a wild {value} followed {who} home from the fields | What followed {who} home? | {who} was followed by a wild
validation: {who} had pulled a lame {value} from the ditch | What had {who} pulled from the ditch? | It was a lame
held_out: {who} never slept without the old {value} at the door | What was at {who}'s door? | At the door was the old

food
train: {who} ate nothing but {value} on long journeys | What did {who} eat on long journeys? | {who} ate nothing but
train: {who} sent a crate of {value} to the harvest supper | What did {who} send to the supper? | {who} sent a crate of
train: there was always {value} on {who}'s table | What was always on {who}'s table? | There was always
validation: {who} had paid with {value} and a candle | With what, besides a candle, had {who} paid? | Paid in
held_out: {who} refused to share the {value} with the crew | What did {who} refuse to share? | It was the

material
train: {who} made the buttons of {value} and sold them in town | Of what did {who} make buttons? | They were of
train: the handle of {who}'s stick was made of {value} and wire | Of what, besides wire, was {who}'s handle? | It was of
validation: {who} had lined the chest with {value} against the damp | With what was {who}'s chest lined? | With
held_out: {who} wore a ring of plain {value} all those years | Of what was {who}'s ring? | The ring was of plain

language
train: {who} spoke {value} with the sailors | Which language did {who} speak with the sailors? | {who} spoke
train: the letters that {who} burned were in {value} only | In which language were the letters that {who} burned? | In
validation: {who} had dreamed in {value} after the voyage | In which language had {who} dreamed? | {who} had dreamed in
held_out: {who} kept the accounts in {value} to annoy clerks | In which language were {who}'s accounts? | Those were in

count
train: {who} counted {value} sheep on the bridge | How many sheep did {who} count? | {who} counted
train: exactly {value} jars stood on {who}'s shelves | How many jars stood on {who}'s shelves? | There were exactly
validation: {who} had ordered {value} bricks for the chimney | How many bricks had {who} ordered? | {who} had ordered
held_out: {who} planted {value} bulbs along the canal | How many bulbs did {who} plant? | {who} planted

age
train: {who} learned to read at the age of {value} without any help | When did {who} learn to read? | At the age of
train: people say that {who} was {value} on the day of the flood | How old was {who} on that day? | {who} was
validation: {who} had run the mill until the age of {value} at least | Until what age had {who} run the mill? | Until
held_out: {who} married again at {value} in a borrowed coat | How old was {who} when marrying again? | The age was

distance
train: {who} walked {value} to the nearest doctor | How far did {who} walk to the nearest doctor? | {who} walked
train: the farm that {who} rented lay {value} from the sea | How far from the sea was {who}'s farm? | The farm lay
validation: {who} had swum {value} against the tide | How far had {who} swum? | {who} had swum
held_out: {who} drove {value} without lights | How far did {who} drive without lights? | {who} drove

person
train: {who} was raised by {value} after the flood | Who raised {who}? | {who} was raised by
train: {who} owed a favour to {value} from the old days | To whom did {who} owe a favour? | {who} owed a favour to
validation: {who} had shared a cabin with {value} for a year | With whom had {who} shared a cabin? | It was shared with
held_out: {who} took lessons from {value} every Thursday | From whom did {who} take lessons? | {who} took lessons from

ship
train: {who} served on board the {value} for a summer | On which ship did {who} serve? | {who} served on board the
train: a model of the {value} stood in {who}'s window | A model of which ship stood in {who}'s window? | Of the
validation: {who} had missed the {value} by an hour | Which ship had {who} missed? | {who} had missed the
held_out: {who} sold a share of the {value} to strangers | Of which ship did {who} sell a share? | A share of the

file
train: {who} saved the figures in {value} before lunch | In which file did {who} save the figures? | They were saved in
train: nobody but {who} had opened {value} since spring | Which file had only {who} opened since spring? | It was
validation: {who} had mailed {value} to the wrong office | Which file had {who} mailed? | {who} had mailed
held_out: {who} renamed the draft to {value} that night | What is {who}'s draft called now? | It is called

deed
train: {who} had decided to {value} before the snow came | What had {who} decided to do? | {who} had decided to
train: {who} promised {other} to {value} one day | What did {who} promise {other}? | {who} promised to
validation: {who} was advised to {value} at once | What was {who} advised to do? | {who} was advised to
held_out: {who} had long wished to {value} in secret | What had {who} long wished to do? | {who} had long wished to

mood
train: {who} grew {value} whenever the bells rang | How did {who} feel whenever the bells rang? | {who} grew
train: {who} looked {value} in every photograph | How did {who} look in photographs? | {who} looked
validation: {who} had sounded {value} on the telephone | How had {who} sounded? | {who} had sounded
held_out: {who} was {value} during the whole ceremony | How was {who} during the ceremony? | During it, {who} was

motto
train: {who} had the words "{value}" stitched on a cushion | Which words were on {who}'s cushion? | The words were
train: {who} ended every letter with "{value}" and a drawing | How did {who} end every letter? | Every letter ended with
validation: {who} had muttered "{value}" at the gate | What had {who} muttered at the gate? | {who} had muttered
held_out: {who} scratched "{value}" into the stable door | What did {who} scratch into the stable door? | It reads

study
train: {who} lectured on {value} in half-empty halls | On what did {who} lecture? | {who} lectured on
train: {who} had filled nine notebooks with drawings of {value} by then | What did {who} draw? | {who} drew
validation: {who} had read everything about {value} twice | About what had {who} read everything? | Everything about
held_out: {who} wrote a long poem about {value} that winter | About what did {who} write a poem? | The poem was about
"""

TOLD_VALUES = """
instrument: fiddle, flute, accordion, banjo, harp, oboe, trumpet, cello, bagpipes, mandolin, piano, zither, clarinet,
    lute, tuba, viola, harmonica, organ, bassoon, whistle
animal: goat, donkey, parrot, ferret, hedgehog, tortoise, mule, goose, rabbit, lizard, pony, lamb, toad, weasel, pigeon,
    heron, squirrel, badger, crow, stoat
food: boiled eggs, rye bread, pickled herring, barley soup, dried apples, goat cheese, onion pie, cold porridge,
    smoked trout, plum cake, roasted chestnuts, bean stew, oat biscuits, sour cabbage, buckwheat pancakes, raw carrots,
    salted almonds, lentil broth, stewed pears, potato dumplings
material: oak, tin, clay, wax, leather, ivory, straw, felt, granite, slate, brass, pine, cork, wool, pewter, horn,
    bamboo, birch, paper, zinc
language: Welsh, Latin, Finnish, Turkish, Basque, Greek, Danish, Arabic, Persian, Dutch, Czech, Irish, Hindi, Korean,
    Polish, Swahili, Maltese, Catalan, Tamil, Estonian
deed: sell the boat, learn to swim, paint the ceiling, write an opera, dig a new well, leave the choir, buy a sledge,
    plant a vineyard, stop smoking, build a kiln, study the stars, open a tavern, cross the desert, keep bees,
    rent a balloon, marry the dentist, burn the drafts, move upstairs, join the circus, sleep outdoors
mood: cheerful, gloomy, nervous, proud, bored, furious, calm, sleepy, jealous, hopeful, stubborn, lonely, thrilled,
    ashamed, curious, tired, amused, restless, grateful, puzzled
motto: patience before pride, work first, never look down, bread for all, slow but sure, truth costs nothing,
    ask me tomorrow, salt and courage, one step further, no hurry today, silence is cheap, always bring rope,
    measure it twice, trust the tide, keep the lamp lit, luck favours fools, eat before noon, count your nails,
    honour the guest, mind the dog
study: beetles, glaciers, comets, mosses, volcanoes, tides, fossils, whales, thunderstorms, mushrooms, eclipses, ferns,
    earthquakes, spiders, rivers, clouds, bridges, owls, bats, caves
"""
"""The values of kinds whose values are words; data/told_facts.py makes the others'."""

FRAMES: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "Nobody minded that {clause}, and the talk soon turned to other things.",
        "The story that {clause} was told again that evening, and the children listened.",
        "Although {clause}, the meeting began on time.",
        "What the neighbours remembered was that {clause}, not how cold the winter had been.",
        "If {clause}, as the old letters claim, then much of the rest is true as well.",
        "It rained all day; {clause}, and a visitor arrived late.",
        '"You may not believe it," the guide went on, "but {clause}, and people still talk about it."',
        "There were rumours - that the well was dry, that {clause}, that the road was closed - and most were true.",
        "Because {clause}, {other} lost a bet that summer.",
        "The report adds, almost in passing, that {clause}, before it returns to the accounts.",
        "Before the market opened, {who}, who {rest}, was seen talking to the guards.",
        "In those years {who}, who {rest}, wrote home twice a month.",
        "Two of them, {other} and {who} (who {rest}), stayed behind to lock the gate.",
        "With the help of {who}, who {rest}, the roof was repaired within a week.",
    ),
    "validation": (
        "It hardly matters now that {clause}, yet the mayor mentions it in every speech.",
        "One guest, {who}, who {rest}, left before the music began.",
    ),
    "held_out": (
        "The diary mentions, between two shopping lists, that {clause}, and then breaks off.",
        "As the train pulled out, {who}, who {rest}, waved from the last carriage.",
        "Few people know that {clause}, for it was never printed.",
        "Nothing in the album shows that {clause}, although three people remember it.",
        "Dinner was nearly over when {other} remarked that {clause} and asked for the salt.",
        "That {clause} did not keep the others from laughing, {other} recalled much later.",
    ),
}
"""The sentences around a clause. ``{rest}`` is a clause that begins with the person, without the person."""
