"""The ways in which a new task can join a trained hub, as data, and how they are asked for."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..adapters import NewTask, StageConfig, Trained
from ..support.config import config
from ..support.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Need:
    """What a hub must offer for a way, and what is said where it does not."""

    is_met: Callable[[NewTask], bool]
    otherwise: str


A_ROW = Need(lambda new: "row" in new.brings, "nothing in it says, task by task, how tasks use the experts they share")
AN_EXPERT = Need(lambda new: "expert" in new.brings, "it gives the task no expert of its own")
APART = Need(
    lambda new: not new.joins_every_task,
    "tokens of all tasks choose among all its experts, so a new one would move the others",
)
PROTOTYPES = Need(lambda new: new.has_prompt_prototypes, "it has no router that finds experts by prototypes of prompts")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way for a new task to join.

    Attributes:
        name: how it is asked for.
        says: what it does, for people.
        adapter: what carries the task: nothing, the hub itself, or a plain LoRA beside it.
        start: how what is new starts. In a hub: fresh as the method makes it, at the mean of the other tasks, or as the
            blend of their experts that its prompts are nearest to. A LoRA: fresh, or the even blend of all experts.
        trains: the parts of a hub that train or are fitted; a plain LoRA trains whole.
        moves_others: whether the tasks that were there may change.
        rate: peak learning rate, as a multiple of the run's; rows alone want steps far above those of factors (Caccia
            et al. 2023 use 3e-3 for skills and 0.1 to 0.5 for rows alone).
        row_rate: that of rows, as a multiple of `rate`.
        needs: what a hub must offer.
    """

    name: str
    says: str
    adapter: Literal["none", "hub", "lora"]
    start: Literal["fresh", "mean", "even", "nearest"] = "fresh"
    trains: tuple[Trained, ...] = ()
    moves_others: bool = False
    rate: float = 1.0
    row_rate: float = 1.0
    needs: tuple[Need, ...] = ()

    def missing(self, new: NewTask) -> str | None:
        """Why a hub cannot do it; None where it can."""
        return next((need.otherwise for need in self.needs if not need.is_met(new)), None)

    def stages(self, new: NewTask | None) -> tuple[StageConfig, ...]:
        """How it trains: in one stage, and where a router of prompts must learn the task, in a second one for that."""
        after: tuple[Literal["fit_prototypes"], ...] = ("fit_prototypes",) if new and new.has_prompt_prototypes else ()
        if new is None or not (new.learns_labels and "class" in self.trains):
            return (StageConfig(name=self.name, after=after),)
        return (
            StageConfig(name=self.name, share=0.75, train=("experts",)),
            StageConfig(name="router", share=0.25, train=("router",), after=after),
        )


BASE = Way(name="base", says="the frozen base", adapter="none")
SCRATCH = Way(name="scratch", says="a fresh plain LoRA, as large as the largest of the ways below", adapter="lora")
"""Both are always measured, so that nobody takes a way for better than what needs no hub."""

WAYS = {
    way.name: way
    for way in (
        Way(
            name="row",
            says="only what says how the task uses the experts, from the mean of the other tasks (MHR-z)",
            adapter="hub",
            start="mean",
            trains=("row",),
            rate=50.0,
            needs=(A_ROW,),
        ),
        Way(
            name="row_and_experts",
            says="that and all experts (MHR); the other tasks move",
            adapter="hub",
            start="mean",
            trains=("row", "all experts"),
            moves_others=True,
            row_rate=10.0,
            needs=(A_ROW,),
        ),
        Way(
            name="mean_expert",
            says="a plain LoRA that starts as the even blend of all experts (MHR-mu)",
            adapter="lora",
            start="even",
        ),
        Way(
            name="prototype",
            says="nothing trains: the prototype of its prompts, and the blend of the experts they are nearest to",
            adapter="hub",
            start="nearest",
            trains=("class",),
            needs=(AN_EXPERT, PROTOTYPES),
        ),
        Way(
            name="new_expert",
            says="an expert of its own; all others are held",
            adapter="hub",
            trains=("expert", "row", "gate", "class"),
            row_rate=10.0,
            needs=(AN_EXPERT, APART),
        ),
    )
}


EVERY_WAY = "all"


@config
class AdaptConfig:
    """How a task joins.

    Attributes:
        ways: names of `WAYS`; None takes all the hub can do.
        shots: training examples of the task, drawn by the seed; None takes all.
        steps: of every way that trains.
        learning_rates: peak learning rates by way, or of `EVERY_WAY`; without one, the way's multiple of the run's.
        method_options: what options of the method that are given task by task are for the new one, such as
            `{"languages": "de"}`.
    """

    ways: tuple[str, ...] | None = None
    shots: int | None = None
    steps: int = 200
    learning_rates: dict[str, float] = field(default_factory=dict)
    method_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_known("ways", self.ways or (), WAYS)
        _check_known("learning_rates", self.learning_rates, [EVERY_WAY, SCRATCH.name, *WAYS])
        for name, rate in self.learning_rates.items():
            if not 0 < rate < float("inf"):
                raise ConfigError(f"learning_rates: {name}={rate} must be above 0 and finite")
        for key, value in {"shots": self.shots, "steps": self.steps}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{key} (={value}) must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed (={self.seed}) must be in [0, 2**32)")


def choose_ways(asked: Sequence[str] | None, new: NewTask, method: str) -> tuple[list[Way], dict[str, str]]:
    """The ways to take, in the order of `WAYS`, and why others are left out.

    Args:
        asked: names; None asks for all that the hub can do.

    Raises:
        ConfigError: for a way that was asked for and that the hub cannot do.
    """
    missing = {way.name: f"method {method!r}: {why}" for way in WAYS.values() if (why := way.missing(new)) is not None}
    able = [way for way in WAYS.values() if way.name not in missing]
    if asked is None:
        return able, missing
    for name in asked:
        if name in missing:
            raise ConfigError(f"--ways {name}: {missing[name]}; it can: {', '.join(way.name for way in able)}")
    return [way for way in able if way.name in asked], {}


def _check_known(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: no way {name!r}; {did_you_mean(name, known)}")
