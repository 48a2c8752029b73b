"""One thing to learn: a conversation whose last turn is the answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One piece of an example.

    `role` is `prompt` or `answer` for text made by templates, and `system`, `user`, `assistant` or `tool` in a chat.
    The text of an `answer` keeps the white space that stands before it.
    """

    role: str
    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Example:
    """Turns, of which the last is the answer.

    Attributes:
        target: the last answer without surrounding white space; what predictions are compared with.
        choices: all allowed answers in their order when the answer set is closed.
    """

    turns: tuple[Turn, ...]
    target: str
    choices: tuple[str, ...] | None = None

    @property
    def prompt(self) -> str:
        """Everything before the last answer, as plain text."""
        return "".join(segment.text for segment in plain_segments(self)[:-1])


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text to tokenise on its own; `ends` adds the end-of-sequence token after it."""

    text: str
    trained: bool
    ends: bool = False


def plain_segments(example: Example) -> list[Segment]:
    """An example as text without a chat template; chat roles become `User:`, `Assistant:` and so on."""
    learns_all = all(turn.trained for turn in example.turns)
    segments = []
    for turn in example.turns:
        if turn.role in ("prompt", "answer"):
            segments.append(Segment(turn.text, turn.trained, ends=turn.role == "answer"))
        elif turn.role == "assistant":
            segments.append(Segment("Assistant:", learns_all))
            segments.append(Segment(f" {turn.text.strip()}", turn.trained, ends=True))
        else:
            segments.append(Segment(f"{turn.role.capitalize()}: {turn.text.strip()}\n", turn.trained))
    return _joined(segments)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbouring pieces of a prompt become one, so that it is tokenised as a whole; answers stay on their own."""
    result: list[Segment] = []
    for segment in segments:
        last = result[-1] if result else None
        if last and not (last.ends or segment.ends) and last.trained == segment.trained:
            result[-1] = Segment(last.text + segment.text, segment.trained)
        else:
            result.append(segment)
    return result
