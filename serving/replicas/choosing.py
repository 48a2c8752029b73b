"""The automatic choice as a deployment of its own."""

import asyncio
from collections.abc import Mapping
from typing import Any

from ...bases import BUNDLED, load_tokenizer
from ...support.config import parse
from ..choice import Choice, Chooser
from ..config import ServeConfig
from ..prototypes import Prototypes
from ..runs import served_run
from .front import embedder


class Choosing:
    """Chooses adapters by what replicas make of a prompt.

    Args:
        settings: of `ServeConfig`, as data.
        replicas: the handle of the replicas.
    """

    def __init__(self, settings: dict[str, Any], replicas: Any) -> None:
        config = parse(ServeConfig, settings, where="settings")
        tokenizer = load_tokenizer(config.base or BUNDLED, revision=config.revision)
        run = served_run(config.runs[0]) if config.runs else None
        self._of_run: Mapping[str, tuple[str, ...]] = {} if run is None else run.examples
        self._known: Mapping[str, tuple[str, ...]] = {}
        embed = embedder(replicas)
        self._prototypes = Prototypes(lambda: self._known, lambda text: list(tokenizer(text)["input_ids"]), embed)
        learned = run.router if run is not None and len(config.runs) == 1 else None
        self._chooser = Chooser(
            learned or self._prototypes.start(), lambda: self._known.keys(), embed, threshold=config.threshold
        )

    def examples(self) -> dict[str, tuple[str, ...]]:
        """Prompts of the run's tasks."""
        return dict(self._of_run)

    def know(self, examples: Mapping[str, tuple[str, ...]]) -> None:
        """These adapters there are now, with prompts that tell what each is for."""
        self._known = examples
        self._prototypes.refresh()

    async def choose(self, prompt: list[int]) -> Choice:
        return await asyncio.to_thread(self._chooser.choose, prompt)
