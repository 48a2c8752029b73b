"""What adapters may be called, and what is refused of their names: the same on one machine and over replicas."""

import re
from collections.abc import Collection

from .errors import ServingError
from .sources import shortened

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_RESERVED = ("auto", "base")


def check_name(name: str, reserved: Collection[str]) -> None:
    """Raises ServingError where an adapter cannot be called so, or something else is."""
    if not _NAME.fullmatch(name):
        raise ServingError(
            "adapter_name_invalid",
            f"an adapter cannot be called {shortened(name)!r}: 1-128 letters, digits, `_`, `-` and `.`, the first "
            "one no `.` or `-`",
        )
    if name in _RESERVED or name in reserved:
        raise ServingError(
            "adapter_name_reserved", f"{name!r} stands for something else here; choose another name", 409
        )


def check_expected(name: str, now: str | None, expected: str) -> None:
    """Raises ServingError (409) where a name does not stand for the generation that somebody expects."""
    if now != expected:
        raise ServingError(
            "generation_mismatch",
            f"{name!r} stands for generation {now}, not {shortened(expected)}; look what it is now, and decide again",
            409,
        )


def not_found(name: str) -> ServingError:
    return ServingError("adapter_not_found", f"no adapter {shortened(name)!r} is served here", 404)


def exists(name: str) -> ServingError:
    return ServingError(
        "adapter_exists",
        f"{name!r} stands for other files already; to replace them, say which generation you expect there",
        409,
    )
