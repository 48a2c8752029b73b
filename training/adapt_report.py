"""What came of the ways in which a task joined a hub: a table, a page, the figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapters import ExportReport
from ..support.console import say, show_table
from ..support.files import write_json, write_text
from .adapt_ways import Way
from .exports import EXPORTS
from .old_tasks import ROUNDING, Drawn, Moved
from .report import MISSING, markdown_table, percent

MARKDOWN, DATA = "adapt.md", "adapt.json"
FORMAT = 1
HEADER = ["way", "score", "loss", "trained", "rate", "seconds", "the other tasks"]


@dataclass(frozen=True)
class Outcome:
    """What came of one way.

    Attributes:
        scores: metrics and loss of the new task.
        parameters: how many numbers trained.
        seconds: of training.
        learning_rate: at its peak; None where nothing trained.
        export: how the new task left as a plain LoRA; None where that would lose something, or the base is not public.
        others: how far the tasks that were there have moved; None where their hub is not touched.
        only_to_rounding: whether the method sums over the new expert for them too, at weight zero.
        drawn: which prompts a router of prompts sends to the new task.
    """

    way: Way
    scores: dict[str, float]
    parameters: int = 0
    seconds: float = 0.0
    learning_rate: float | None = None
    export: ExportReport | None = None
    others: dict[str, Moved] | None = None
    only_to_rounding: bool = False
    drawn: Drawn | None = None

    @property
    def bound(self) -> float:
        """How far a logit of the other tasks may move."""
        if self.way.moves_others:
            return float("inf")
        return ROUNDING if self.only_to_rounding else 0.0

    @property
    def broken(self) -> str | None:
        """What moved though it must not, in words."""
        for task, moved in (self.others or {}).items():
            if not moved.bit_equal and not moved.max_logit_difference <= self.bound:
                return (
                    f"{self.way.name} moved task {task!r}, which it must not: logits differ by up to "
                    f"{moved.max_logit_difference:.1e}; do not use what it left"
                )
        return None

    def told_of_others(self) -> str:
        """How the other tasks fared, in a few words."""
        if self.others is None:
            return "not touched"
        if all(moved.bit_equal for moved in self.others.values()):
            return "bit-equal"
        worst = max(moved.max_logit_difference for moved in self.others.values())
        if self.broken is None and not self.way.moves_others:
            return f"equal to rounding ({worst:.0e})"
        same = sum(moved.same_top_token for moved in self.others.values()) / len(self.others)
        return f"moved: {100 * same:.0f} % same top token"

    def to_data(self) -> dict[str, Any]:
        return {
            "way": self.way.name,
            "scores": self.scores,
            "trained_parameters": self.parameters,
            "seconds": self.seconds,
            "learning_rate": self.learning_rate,
            "export": None if self.export is None else self.export.to_data(),
            "others": None if self.others is None else {task: asdict(moved) for task, moved in self.others.items()},
            "others_told": self.told_of_others(),
            "drawn_prompts": None if self.drawn is None else asdict(self.drawn),
        }


@dataclass(frozen=True)
class Adaptation:
    """All outcomes, in the order of the table.

    Attributes:
        facts: what a reader must know beside them: `task`, `metric`, `split`, `run`, `method`, `shots`, ...
        left_out: by way, why the hub cannot do it.
    """

    facts: dict[str, Any]
    outcomes: Sequence[Outcome]
    left_out: dict[str, str]

    @property
    def title(self) -> str:
        facts = self.facts
        return (
            f"{facts['task']} joins {facts['run']} ({facts['method']}): {facts['metric']} in % on the {facts['split']} "
            f"split, {facts['shots']} of {facts['training_examples']} training examples, {facts['steps']} steps"
        )

    def rows(self) -> list[list[str]]:
        return [self._row(outcome) for outcome in self.outcomes]

    def notes(self) -> list[str]:
        """What the table has no room for."""
        reasons = dict.fromkeys(self.left_out.values())
        lines = [
            f"Left out: {', '.join(way for way, other in self.left_out.items() if other == reason)} ({reason})."
            for reason in reasons
        ]
        for outcome in self.outcomes:
            if outcome.drawn is not None:
                own, others = (percent(share) for share in (outcome.drawn.own, outcome.drawn.others))
                lines.append(
                    f"{outcome.way.name}: where no task is named, the router sends {own} % of the new task's prompts "
                    f"to its expert, and {others} % of the other tasks'."
                )
        return lines

    def others(self) -> tuple[list[str], list[list[str]]]:
        """How each of the other tasks fared in each way that has them: a table."""
        hubs = [outcome for outcome in self.outcomes if outcome.others is not None]
        tasks = list(hubs[0].others or {}) if hubs else []
        rows = [[task, *(_told((hub.others or {})[task]) for hub in hubs)] for task in tasks]
        return ["task", *(hub.way.name for hub in hubs)], rows

    def to_data(self) -> dict[str, Any]:
        ways = [outcome.to_data() for outcome in self.outcomes]
        return {"format": FORMAT, "facts": self.facts, "ways": ways, "left_out": self.left_out}

    def _row(self, outcome: Outcome) -> list[str]:
        scores, rate = outcome.scores, outcome.learning_rate
        return [
            outcome.way.name,
            percent(scores[self.facts["metric"]]),
            f"{scores['loss']:.3f}",
            f"{outcome.parameters:,}",
            MISSING if rate is None else f"{rate:g}",
            f"{outcome.seconds:.1f}",
            outcome.told_of_others(),
        ]


def write_adaptation(folder: Path, adaptation: Adaptation) -> None:
    """Write the page and the figures."""
    ways = "\n".join(f"- `{outcome.way.name}`: {outcome.way.says}" for outcome in adaptation.outcomes)
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in adaptation.facts.items())
    parts = [f"# {adaptation.title}", markdown_table(HEADER, adaptation.rows()), *adaptation.notes(), ways]
    head, others = adaptation.others()
    if others:
        parts += ["## The other tasks", _OTHERS_NOTE, markdown_table(head, others)]
    write_text(folder / MARKDOWN, "\n\n".join([*parts, "## Facts", facts]) + "\n")
    write_json(folder / DATA, adaptation.to_data())


def show_adaptation(folder: Path, adaptation: Adaptation) -> None:
    """Print the table and what lies where."""
    show_table(adaptation.title, HEADER, adaptation.rows())
    for note in adaptation.notes():
        say(note)
    exported = [outcome.way.name for outcome in adaptation.outcomes if outcome.export is not None]
    say(f"{folder}: {MARKDOWN}, {DATA}, and a run folder for each way; `loramux evaluate` and `serve` take them")
    if exported:
        say(f"{EXPORTS}/{adaptation.facts['task']} in {', '.join(exported)}: the task as a plain LoRA")


_OTHERS_NOTE = (
    "The largest difference of any logit from what the run itself says, over the answers of validation examples, where "
    "the task is named; what each way left on the disk was read back for it."
)


def _told(moved: Moved) -> str:
    return "bit-equal" if moved.bit_equal else f"{moved.max_logit_difference:.1e}"
