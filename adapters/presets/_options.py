"""What several presets say in the same way."""

from collections.abc import Iterable, Mapping, Sequence

from ...routing import FixedTable, Identity, RouterConfig, identity_rows
from ...support.errors import did_you_mean


def scale(alpha: float | None, rank: int) -> float:
    """LoRA's factor on the delta; without an alpha it is 1."""
    return 1.0 if alpha is None else alpha / rank


def to_own_expert(tasks: Sequence[str], *, shared: bool = False) -> RouterConfig:
    """Every task has the expert of its own number, and a blend of tasks mixes those."""
    return RouterConfig(scorer=FixedTable(rows=identity_rows(len(tasks))), normaliser=Identity(), shared=shared)


def require_at_most(small_name: str, small: int, large_name: str, large: int) -> None:
    if small > large:
        raise ValueError(
            f"{small_name} (={small}) must be at most {large_name} (={large}); lower it or add {large_name}"
        )


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Both ends are out."""
    if not low < value < high:
        raise ValueError(f"{name} (={value}) must be between {low:g} and {high:g}")


def require_known(option: str, named: Iterable[str], tasks: Sequence[str]) -> None:
    """Check that an option names tasks there are.

    Raises:
        ValueError: naming the first there is not, and what was meant.
    """
    for name in named:
        if name not in tasks:
            raise ValueError(f"{option}: unknown task {name!r}; {did_you_mean(name, tasks)}")


def per_task(option: str, given: Mapping[str, object], tasks: Sequence[str]) -> None:
    """Check that an option which says something of every task names each of them and no other.

    Raises:
        ValueError: naming the task, with the lines a recipe wants.
    """
    lines = f"write method: {{options: {{{option}: {{{', '.join(f'{task}: ...' for task in tasks)}}}}}}}"
    try:
        require_known(option, given, tasks)
    except ValueError as error:
        raise ValueError(f"{error} ({lines})") from None
    missing = [task for task in tasks if task not in given]
    if missing:
        raise ValueError(f"{option}: nothing said of {', '.join(missing)} ({lines})")


def numbered(option: str, given: Mapping[str, str], tasks: Sequence[str]) -> tuple[int, ...]:
    """What an option says of every task as numbers, in the order of the tasks; equal words have equal numbers.

    A task that comes last changes the numbers of none before it.

    Raises:
        ValueError: as `per_task` does.
    """
    per_task(option, given, tasks)
    words = list(dict.fromkeys(given[task] for task in tasks))
    return tuple(words.index(given[task]) for task in tasks)
