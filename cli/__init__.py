"""The command line: `loramux train | evaluate | compare | export | routes | methods | tasks | base`."""

from .main import main

__all__ = ["main"]
