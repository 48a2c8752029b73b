"""The text the bundled base is pretrained on: little stories, facts, and exercises with their questions written out.

Every skill of the generated tasks occurs here with its question ("Who did it?"), before or after the input, so the base
has the skills; a task then shows the input alone, and an adapter has only to learn which question is meant.
No input of a validation or test row of the generated tasks occurs as an exercise.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ..tasks.generated import FAMILIES, Drawn, drawn
from ..tasks.words import COLOURS, KINDS, VERBS, vocabulary

QUESTIONS = {
    "who": ("Who was it?", "Who did it?", "Name the person."),
    "where": ("Where was it?", "Where did it happen?", "Name the place."),
    "tomorrow": ("Say it for tomorrow.", "Say it in the future.", "What will happen tomorrow?"),
    "colour": ("What colour was it?", "Name the colour."),
    "thing": ("What was it?", "Name the thing."),
    "sort": ("Sort the numbers.", "From small to large.", "Put them in order."),
    "largest": ("Which is the largest?", "Name the largest number."),
    "smallest": ("Which is the smallest?", "Name the smallest number."),
    "reverse": ("Say them backwards.", "From last to first."),
    "plural": ("Now two of them.", "And two?", "Say it for two."),
    "opposite": ("Say the opposite.", "No, the opposite is true.", "What is the opposite?"),
    "kind": ("What are they?", "Name the kind.", "What do we call them?"),
}
_WORDS = vocabulary()
_EVERY_WORD = (
    *_WORDS.names,
    *_WORDS.things,
    *COLOURS,
    *(word for pair in (*_WORDS.places, *_WORDS.nouns, *VERBS, *_WORDS.thing_qualities) for word in pair),
    *map(str, range(1, 21)),
)
_SHARES = {
    "sentence": 0.33,
    "numbers": 0.29,
    "one": 0.08,
    "quality": 0.1,
    "group": 0.05,
    "echo": 0.05,
    "story": 0.06,
    "fact": 0.04,
}


@dataclass(frozen=True)
class Line:
    """A line of a document; `given` ones are drawn at random (inputs, questions), the others follow from them."""

    text: str
    given: bool = False


def documents(seed: int) -> Iterator[tuple[Line, ...]]:
    """An endless stream of short documents, the same for the same seed on every machine."""
    rng = random.Random(f"corpus/{seed}")
    kinds, shares = list(_SHARES), list(_SHARES.values())
    while True:
        kind = rng.choices(kinds, shares)[0]
        if kind in FAMILIES:
            yield exercise(rng, kind)
        else:
            yield echo(rng) if kind == "echo" else (Line(story(rng) if kind == "story" else fact(rng)),)


def text(document: tuple[Line, ...]) -> str:
    return "\n".join(line.text for line in document)


def exercise(rng: random.Random, family: str) -> tuple[Line, ...]:
    """An input of a family with questions and answers, or one question with inputs and answers."""
    first = _draw(rng, family)
    tasks = rng.sample(list(first.answers), min(len(first.answers), rng.choice((1, 1, 2, 3))))
    if rng.random() < 0.5:
        pairs = [(rng.choice(QUESTIONS[task]), first.answers[task]) for task in tasks]
        return (Line(first.input, given=True), *_alternating(pairs))
    inputs = [first] if rng.random() < 0.7 else [first, _draw(rng, family)]
    question = Line(rng.choice(QUESTIONS[tasks[0]]), given=True)
    return (question, *_alternating([(d.input, d.answers[tasks[0]]) for d in inputs]))


def echo(rng: random.Random) -> tuple[Line, ...]:
    """Words in no order, then the same words again: it teaches to copy anything, not only what is expected."""
    words = " ".join(rng.sample(_EVERY_WORD, rng.randint(2, 7)))
    lines = [Line(words, given=True), Line("Say it again.", given=True)]
    return (*(lines if rng.random() < 0.5 else lines[::-1]), Line(words))


def story(rng: random.Random) -> str:
    """A few sentences about one person, one thing and the places it came to."""
    name, friend = rng.sample(_WORDS.names, 2)
    thing, colour = rng.choice(_WORDS.things), rng.choice(COLOURS)
    here, there = (f"{preposition} the {place}" for preposition, place in rng.sample(_WORDS.places, 2))
    mood, later = rng.sample(rng.choice(_WORDS.people_qualities), 2)
    sentences = [
        f"{name} has a {colour} {thing}.",
        f"The {thing} is {rng.choice(rng.choice(_WORDS.thing_qualities))}.",
        f"{name} {rng.choice(VERBS)[0]} the {colour} {thing} {here}.",
        f"{name} is {mood}.",
        f"{friend} {rng.choice(VERBS)[0]} the {colour} {thing} {there}.",
        f"Tomorrow {friend} will {rng.choice(VERBS)[1]} the {thing} {there}.",
        f"Now {name} is {later}.",
    ]
    start = rng.randrange(3)
    return " ".join(sentences[start : start + rng.randint(3, 5)])


def fact(rng: random.Random) -> str:
    """A few statements about words: their kind, plural and opposite."""
    makers = (_kind_fact, _plural_fact, _opposite_fact)
    return " ".join(rng.choice(makers)(rng) for _ in range(rng.randint(2, 4)))


def _kind_fact(rng: random.Random) -> str:
    kind = rng.choice(list(KINDS))
    (_, first), (_, second) = rng.sample(KINDS[kind], 2)
    return f"{first.capitalize()} and {second} are {kind}."


def _plural_fact(rng: random.Random) -> str:
    singular, plural = rng.choice(_WORDS.nouns)
    return f"We say one {singular} and two {plural}."


def _opposite_fact(rng: random.Random) -> str:
    this, other = rng.sample(rng.choice((*_WORDS.people_qualities, *_WORDS.thing_qualities)), 2)
    return f"The opposite of {this} is {other}."


def _alternating(pairs: list[tuple[str, str]]) -> list[Line]:
    return [line for given, answer in pairs for line in (Line(given, given=True), Line(answer))]


def _draw(rng: random.Random, family: str) -> Drawn:
    while (candidate := FAMILIES[family](rng, _WORDS)).input in _evaluated(family):
        pass
    return candidate


@cache
def _evaluated(family: str) -> frozenset[str]:
    return frozenset(d.input for split in ("validation", "test") for d in drawn(family)[split])
