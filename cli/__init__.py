"""The command line: `loramux train | evaluate | compare | export | methods | tasks | base`."""

from .main import main

__all__ = ["main"]
