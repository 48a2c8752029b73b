"""The exceptions loramux raises for what a user, a file or a machine did wrong.

LoramuxError
├── ConfigError       a recipe, a method option or an override is not valid (also a ValueError)
├── DataError         a task file or an example is not usable (also a ValueError)
├── AdapterError      an adapter cannot be built, routed, merged or loaded (also a ValueError)
├── ExportRefused     an export would lose more than the bound allows
├── RunError          a run folder is missing, incomplete or belongs to another base
├── RemoteError       a hub cannot be reached, refuses, or lacks what was asked for
├── LeakFound         something would be published that looks private
├── TrustError        what came from a hub is not what was published, or not by whom you trust
└── TrainingDiverged  the loss is not finite any more
"""

import difflib
from collections.abc import Iterable


class LoramuxError(Exception):
    """Base of every error loramux raises on purpose; the command line prints its text without a traceback."""


class ConfigError(LoramuxError, ValueError): ...


class DataError(LoramuxError, ValueError): ...


class AdapterError(LoramuxError, ValueError): ...


class ExportRefused(LoramuxError): ...


class RunError(LoramuxError): ...


class RemoteError(LoramuxError): ...


class LeakFound(LoramuxError): ...


class TrustError(LoramuxError): ...


class TrainingDiverged(LoramuxError): ...


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest valid word, or all of them when none is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(options)}" if options else "none is known"
