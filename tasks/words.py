"""The small world the generated tasks and the bundled base talk about: people, things, places, qualities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`a/b c/d` as (("a", "b"), ("c", "d"))."""
    return tuple((left, right) for left, right in (word.split("/") for word in text.split()))


NAMES = _words(
    "Mia Tom Anna Ben Lily Max Emma Sam Nora Leo Zoe Jack Ella Finn Ruth Paul Ida Carl Eva Hugo Clara Oscar Rosa "
    "Felix Amy Noah Lucy Adam Sara Peter Julia Henry Alice Oliver Grace Simon Maya David Helen Martin"
)
COLOURS = _words("red blue green yellow white black brown pink grey purple")
VERBS = _pairs(  # past/base
    "put/put hid/hide left/leave found/find lost/lose dropped/drop saw/see kept/keep broke/break cleaned/clean "
    "painted/paint threw/throw sold/sell bought/buy washed/wash drew/draw"
)
PLACES = _pairs(  # preposition/place; `near`, `by` and `behind` go with any
    "in/garden in/kitchen at/beach under/bed in/river in/barn behind/house on/lake in/park on/hill in/attic in/cellar "
    "on/roof at/market by/window at/station under/tree on/boat in/cave at/farm at/school in/church in/shop in/mill "
    "in/tower in/castle in/forest in/field in/pond on/bridge"
)
THINGS = _words("cup ball book key box letter basket bottle coin spoon plate bag drum kite clock pen")

# Nouns of one kind, as singular/plural.
KINDS = {
    "animals": _pairs(
        "cat/cats dog/dogs sheep/sheep horse/horses cow/cows wolf/wolves goat/goats fox/foxes goose/geese duck/ducks "
        "mouse/mice pony/ponies pig/pigs lion/lions bear/bears rabbit/rabbits calf/calves frog/frogs"
    ),
    "food": _pairs(
        "apple/apples pear/pears potato/potatoes plum/plums tomato/tomatoes cherry/cherries carrot/carrots "
        "peach/peaches loaf/loaves egg/eggs onion/onions berry/berries cake/cakes lemon/lemons melon/melons "
        "bean/beans sandwich/sandwiches cookie/cookies"
    ),
    "clothes": _pairs(
        "shirt/shirts coat/coats dress/dresses hat/hats scarf/scarves sock/socks shoe/shoes boot/boots glove/gloves "
        "skirt/skirts belt/belts jacket/jackets cap/caps sweater/sweaters vest/vests robe/robes apron/aprons tie/ties"
    ),
    "tools": _pairs(
        "hammer/hammers saw/saws knife/knives rope/ropes axe/axes brush/brushes ladder/ladders spade/spades "
        "wrench/wrenches drill/drills rake/rakes shovel/shovels bucket/buckets broom/brooms needle/needles nail/nails "
        "hook/hooks screw/screws"
    ),
    "furniture": _pairs(
        "chair/chairs table/tables shelf/shelves sofa/sofas desk/desks bench/benches lamp/lamps stool/stools "
        "couch/couches mirror/mirrors rug/rugs bed/beds cupboard/cupboards cradle/cradles pillow/pillows "
        "curtain/curtains wardrobe/wardrobes carpet/carpets"
    ),
}
PEOPLE_QUALITIES = _pairs(
    "happy/sad strong/weak fast/slow loud/quiet awake/asleep calm/angry brave/timid lazy/busy polite/rude "
    "healthy/sick clever/silly rich/poor early/late"
)
THING_QUALITIES = _pairs(
    "heavy/light clean/dirty wet/dry hard/soft long/short cheap/expensive thick/thin wide/narrow sharp/blunt "
    "smooth/rough hot/cold big/small good/bad tight/loose dark/bright new/old straight/bent"
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The words a text may use; `kinds` maps a kind to its (singular, plural) nouns."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[tuple[str, str], ...]
    kinds: dict[str, tuple[tuple[str, str], ...]]
    people_qualities: tuple[tuple[str, str], ...]
    thing_qualities: tuple[tuple[str, str], ...]

    @property
    def nouns(self) -> tuple[tuple[str, str], ...]:
        return tuple(pair for pairs in self.kinds.values() for pair in pairs)


def _part(words: Sequence[T], held_out: bool | None) -> tuple[T, ...]:
    """All words (None), the three of ten held out for evaluation (True), or the other seven (False)."""
    return tuple(word for i, word in enumerate(words) if held_out is None or (i % 10 in (2, 5, 8)) is held_out)


def vocabulary(held_out: bool | None = None) -> Vocabulary:
    """The whole vocabulary, or only the part that the tasks' training rows never use (True) or do use (False)."""
    return Vocabulary(
        names=_part(NAMES, held_out),
        things=_part(THINGS, held_out),
        places=_part(PLACES, held_out),
        kinds={kind: _part(nouns, held_out) for kind, nouns in KINDS.items()},
        people_qualities=_part(PEOPLE_QUALITIES, held_out),
        thing_qualities=_part(THING_QUALITIES, held_out),
    )
