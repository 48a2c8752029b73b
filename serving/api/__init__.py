"""The HTTP side of the server: OpenAI's routes, the adapters' own, and what operating it takes."""

from .app import build_app

__all__ = ["build_app"]
