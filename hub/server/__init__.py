"""The hub that runs on one's own machine: Hub-compatible, one process, files and SQLite in one folder."""

from .app import Hub, Policy
from .errors import HubError
from .serve import serve
from .storage import Storage

__all__ = ["Hub", "HubError", "Policy", "Storage", "serve"]
