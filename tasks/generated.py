"""The tasks that ship with loramux: small, readable, generated from a seed, and really in conflict.

Tasks of one family share their inputs and nothing in the prompt names the task, so one shared adapter cannot serve them
all: asked "Mia hid the red cup in the garden.", `who` wants "Mia", `where` "in the garden", `tomorrow" the sentence in
the future. Families differ in what their inputs look like, so a router that reads the prompt can tell them apart.

| family | an input | tasks |
|---|---|---|
| sentence | Mia hid the red cup in the garden. | who, where, tomorrow, colour, thing |
| numbers | 7 12 3 19 | sort, largest, smallest, reverse |
| one | one old wolf | plural |
| quality | The soup is hot. | opposite |
| group | goat, duck, fox | kind |

Validation and test rows use people, things, places, nouns and qualities that no training row contains.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..support.errors import ConfigError, did_you_mean
from .words import COLOURS, KINDS, VERBS, Vocabulary, vocabulary

SPLITS = {"train": 800, "validation": 64, "test": 128}


@dataclass(frozen=True)
class Drawn:
    """One random input and the right answer for every task of its family."""

    input: str
    answers: dict[str, str]


def sentence(rng: random.Random, words: Vocabulary) -> Drawn:
    name, colour, thing = (rng.choice(some) for some in (words.names, COLOURS, words.things))
    preposition, place = rng.choice(words.places)
    where = f"{rng.choice((preposition, preposition, 'near', 'by', 'behind'))} the {place}"
    past, base = rng.choice(VERBS)
    answers = {
        "who": name,
        "where": where,
        "tomorrow": f"{name} will {base} the {colour} {thing} {where}.",
        "colour": colour,
        "thing": thing,
    }
    return Drawn(f"{name} {past} the {colour} {thing} {where}.", answers)


def numbers(rng: random.Random, words: Vocabulary) -> Drawn:
    drawn = rng.sample(range(1, 21), rng.choice((4, 5)))
    answers = {"sort": sorted(drawn), "largest": [max(drawn)], "smallest": [min(drawn)], "reverse": drawn[::-1]}
    return Drawn(_spaced(drawn), {task: _spaced(answer) for task, answer in answers.items()})


def one(rng: random.Random, words: Vocabulary) -> Drawn:
    singular, plural = rng.choice(words.nouns)
    adjective = rng.choice((*COLOURS, "big", "small", "old", "new", "good", "clean"))
    return Drawn(f"one {adjective} {singular}", {"plural": f"two {adjective} {plural}"})


def quality(rng: random.Random, words: Vocabulary) -> Drawn:
    if rng.random() < 0.4:
        subject, pair = rng.choice(words.names), rng.choice(words.people_qualities)
    else:
        subject, pair = f"The {rng.choice(words.nouns)[0]}", rng.choice(words.thing_qualities)
    this, other = rng.sample(pair, 2)
    return Drawn(f"{subject} is {this}.", {"opposite": f"{subject} is {other}."})


def group(rng: random.Random, words: Vocabulary) -> Drawn:
    kind = rng.choice(list(KINDS))
    members = rng.sample([singular for singular, _ in words.kinds[kind]], 3)
    return Drawn(", ".join(members), {"kind": kind})


def _spaced(values: list[int]) -> str:
    return " ".join(map(str, values))


FAMILIES: dict[str, Callable[[random.Random, Vocabulary], Drawn]] = {
    family.__name__: family for family in (sentence, numbers, one, quality, group)
}
FAMILY_OF = {task: name for name, draw in FAMILIES.items() for task in draw(random.Random(0), vocabulary()).answers}


def rows(task: str, split: str) -> list[dict[str, Any]]:
    """The rows of one generated task, the same on every machine.

    Args:
        task: a task named in the table above.
        split: "train" (800 rows), "validation" (64) or "test" (128).

    Returns:
        `{"input", "target"}` per row, for `kind` also `"choices"`.

    Raises:
        ConfigError: for an unknown task or split.
    """
    if task not in FAMILY_OF:
        raise ConfigError(f"generated task {task!r}: unknown; {did_you_mean(task, FAMILY_OF)}")
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} of generated task {task!r}: {did_you_mean(split, SPLITS)}")
    extra = {"choices": list(KINDS)} if task == "kind" else {}
    return [{"input": d.input, "target": d.answers[task], **extra} for d in drawn(FAMILY_OF[task])[split]]


@cache
def drawn(family: str) -> dict[str, tuple[Drawn, ...]]:
    """The inputs of a family by split; no input occurs twice, be it in one split or in two."""
    seen: set[str] = set()
    result = {}
    for split, size in SPLITS.items():
        words, rng = vocabulary(held_out=split != "train"), random.Random(f"{family}/{split}")
        result[split] = tuple(_unseen(family, rng, words, seen) for _ in range(size))
    return result


def _unseen(family: str, rng: random.Random, words: Vocabulary, seen: set[str]) -> Drawn:
    while (candidate := FAMILIES[family](rng, words)).input in seen:
        pass
    seen.add(candidate.input)
    return candidate
