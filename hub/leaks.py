"""What must not be published by mistake: tokens, private keys, paths of this machine, examples of the tasks' data.

Known shapes only. Strings that merely look random are not looked for: hashes stand in every file we write.
"""

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..support.errors import LeakFound

Kind = Literal["token", "private-key", "home-path", "example"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SHAPES: dict[Kind, str] = {
    "token": "|".join(
        (
            r"\bhf_[A-Za-z0-9]{30,}",
            r"\bsk-(?:proj-|ant-[a-z0-9]+-)?[A-Za-z0-9_-]{20,}",
            r"\bgh[opsur]_[A-Za-z0-9]{36,}",
            r"\bgithub_pat_[A-Za-z0-9_]{40,}",
            r"\bglpat-[A-Za-z0-9_-]{20,}",
            r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
            r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
            r"\bAIza[A-Za-z0-9_-]{35}",
            r"\bpypi-[A-Za-z0-9_-]{50,}",
            r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
            r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>]+:[^\s/@\"'<>]+@",
        )
    ),
    "private-key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "home-path": r"(?<![\w.])/(?:home|Users)/[\w.-]+|(?<![\w.])/root/|\b[A-Z]:[\\/]+Users[\\/]+[\w.-]+",
}
_SHOWN = 12
_FEWEST_WORDS = 4
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Leak:
    """Something to look at before it leaves: its kind, its file and line, and how it begins."""

    kind: Kind
    file: str
    line: int
    begins: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.kind} ({self.begins})"


class Examples:
    """Prompts of the tasks' data, to be found again in other text.

    Prompts of fewer than four words, or without a letter, are left out: they stand anywhere by chance.

    Args:
        prompts: of all splits.
        shown: texts that were chosen to be read; what stands in them is not looked for.
    """

    def __init__(self, prompts: Iterable[str], shown: Iterable[str]) -> None:
        self._by_start: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for prompt in prompts:
            words = tuple(word for word, _ in _words(prompt))
            if len(words) >= _FEWEST_WORDS and any(word.isalpha() for word in words):
                self._by_start.setdefault(words[:_FEWEST_WORDS], set()).add(words)
        for text in shown:
            for words, _ in list(self._found(text)):
                self._by_start[words[:_FEWEST_WORDS]].discard(words)

    def find(self, text: str) -> Iterator[tuple[str, int]]:
        """Each prompt that stands in a text, and where."""
        for words, start in self._found(text):
            yield " ".join(words), start

    def _found(self, text: str) -> Iterator[tuple[tuple[str, ...], int]]:
        there = list(_words(text))
        words = tuple(word for word, _ in there)
        for number in range(len(words) - _FEWEST_WORDS + 1):
            for prompt in self._by_start.get(words[number : number + _FEWEST_WORDS], ()):
                if words[number : number + len(prompt)] == prompt:
                    yield prompt, there[number][1]


def find_leaks(files: Mapping[str, Path | bytes], examples: Examples) -> list[Leak]:
    """Look through files: text and pictures whole, of weights the header."""
    leaks = []
    for name, content in files.items():
        text = _text_of(name, content)
        breaks = [match.start() for match in re.finditer("\n", text)]
        for kind, begins, start in itertools.chain(_of_known_shape(text), _of_data(text, examples)):
            leaks.append(Leak(kind, name, bisect_right(breaks, start) + 1, begins))
    return list(dict.fromkeys(leaks))


def refuse_leaks(leaks: Iterable[Leak], allowed: Iterable[str]) -> None:
    """Raise LeakFound, with every file and line, unless all kinds that occur are allowed."""
    found = [leak for leak in leaks if leak.kind not in set(allowed)]
    if found:
        listed = "\n".join(f"  {leak}" for leak in found[:_SHOWN])
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        kinds = " ".join(f"--allow {kind}" for kind in dict.fromkeys(leak.kind for leak in found))
        raise LeakFound(f"nothing was published, since this would be too:\n{listed}{more}\nIf it may be: {kinds}")


def _of_known_shape(text: str) -> Iterator[tuple[Kind, str, int]]:
    for kind, shape in _SHAPES.items():
        for match in re.finditer(shape, text):
            begins = match[0] if kind != "token" else f"{match[0][:6]}..."
            yield kind, begins, match.start()


def _of_data(text: str, examples: Examples) -> Iterator[tuple[Kind, str, int]]:
    for prompt, start in examples.find(text):
        yield "example", f"{prompt[:60]}..." if len(prompt) > 60 else prompt, start


def _text_of(name: str, content: Path | bytes) -> str:
    if not isinstance(content, Path):
        return content.decode("utf-8", errors="replace")
    if not name.endswith(".safetensors"):
        return content.read_text(encoding="utf-8", errors="replace")
    with content.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, _LARGEST_HEADER)).decode("utf-8", errors="replace")


def _words(text: str) -> Iterator[tuple[str, int]]:
    """Words and where they begin; a line break written as `\\n`, as in JSON, divides words too."""
    for match in re.finditer(r"(?:\\[nrt])|(\w+)", text):
        if match[1]:
            yield match[1].lower(), match.start(1)
