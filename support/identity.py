"""The name under which others find a base model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseIdentity:
    """A Hub id or the name of the bundled base, never a path, and the commit where there is one."""

    name: str
    revision: str | None = None
