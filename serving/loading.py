"""From a PEFT folder to factors in memory. What is no adapter of this base is refused with a stable code."""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..adapters.lora_folder import WEIGHTS, AnotherBase, LoraPlan, LoraReader, PlainLora, TooLarge, all_finite
from ..support.errors import AdapterError
from .errors import ServingError, is_out_of_memory
from .factors import FactorLayout, PackedLora
from .generations import Generation
from .sources import Found


class AdapterLoader:
    """Reads adapters for one base, from several threads if need be.

    Args:
        layout: of the linears that may be adapted.
        base, base_names: as for `LoraReader`.
        most_rank: of an adapter.
        most_bytes: of a weights file.
        dtype: of the factors in memory.
    """

    def __init__(
        self,
        layout: FactorLayout,
        base: nn.Module,
        base_names: Collection[str],
        *,
        most_rank: int,
        most_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        self._layout, self._dtype, self._most_rank = layout, dtype, most_rank
        self._most_bytes = most_bytes
        self._linears = {name for group in layout.groups for name in group.names}
        self._reader = LoraReader(base, base_names=base_names, most_bytes=most_bytes)

    def check(self, found: Found) -> Generation:
        """What the config promises and the header of the weights file; no weights are read.

        Raises:
            ServingError: it cannot be served: `adapter_invalid`, `adapter_of_another_base`, `adapter_too_large`,
                `rank_limit_exceeded`, `adapter_path_forbidden`, `adapter_files_gone`.
        """
        plan = self._plan(found)
        with _with_codes(found):
            self._reader.check_whole(plan)
        return self._generation(found, plan)

    def load(self, found: Found) -> tuple[Generation, PackedLora]:
        """Read an adapter whole.

        Raises:
            ServingError: as `check`; also `adapter_files_changed` while it was read, and `out_of_memory`.
        """
        plan = self._plan(found)
        with _with_codes(found):
            lora = self._reader.read(plan)
            if self._reader.plan(plan.folder).config_sha256 != plan.config_sha256:
                raise ServingError(
                    "adapter_files_changed", f"{found.origin}: changed while it was read; try again", 503
                )
            packed = self._packed(lora, found)
        generation = self._generation(found, plan)
        generation.sha256 = hashlib.sha256(f"{plan.config_sha256} {lora.sha256}".encode()).hexdigest()
        return generation, packed

    def load_again(self, known: Generation) -> tuple[Generation, PackedLora]:
        """Read an adapter that was known before.

        Raises:
            ServingError: as `load`; `adapter_files_gone` or `adapter_files_changed` when its files are not what they
                were.
        """
        if not known.found.is_there:
            raise ServingError("adapter_files_gone", f"{known.found.origin}: its files are not there any more", 503)
        fresh, lora = self.load(known.found)
        if known.sha256 not in (None, fresh.sha256):
            raise ServingError(
                "adapter_files_changed",
                f"{known.found.origin}: its files are not those that were loaded; replace it to serve the new ones",
                503,
            )
        return fresh, lora

    def _plan(self, found: Found) -> LoraPlan:
        found.check()
        with _with_codes(found):
            plan = self._reader.plan(found.folder)
            size = (found.folder / WEIGHTS).stat().st_size
        if size > self._most_bytes:
            raise ServingError(
                "adapter_too_large", f"{found.origin}: {size} bytes; at most {self._most_bytes} are allowed", 413
            )
        if plan.rank > self._most_rank:
            raise ServingError(
                "rank_limit_exceeded", f"{found.origin}: of rank {plan.rank}; at most {self._most_rank} is served here"
            )
        if outside := sorted(set(plan.linears) - self._linears):
            raise ServingError(
                "adapter_invalid",
                f"{found.origin}: it adapts {outside[0]!r}, which this server leaves as it is (only linears below the "
                "output layer are adapted); train it without, or run it under PEFT",
            )
        return plan

    def _generation(self, found: Found, plan: LoraPlan) -> Generation:
        nbytes = plan.rank * self._layout.width * self._dtype.itemsize
        return Generation(found, rank=plan.rank, modules=len(plan.linears), nbytes=nbytes)

    def _packed(self, lora: PlainLora, found: Found) -> PackedLora:
        packed = self._layout.pack(lora.factors, self._dtype)
        if not all_finite(packed.flat):
            raise ServingError("adapter_invalid", f"{found.origin}: its values are too large for {self._dtype}")
        return packed


@contextmanager
def _with_codes(found: Found) -> Iterator[None]:
    try:
        yield
    except AnotherBase as error:
        raise ServingError("adapter_of_another_base", str(error)) from None
    except TooLarge as error:
        raise ServingError("adapter_too_large", str(error), 413) from None
    except AdapterError as error:
        raise ServingError("adapter_invalid", str(error)) from None
    except OSError as error:
        raise ServingError(
            "adapter_files_gone", f"{found.origin}: its files cannot be read ({error.strerror})", 503
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ServingError(
            "out_of_memory", f"{found.origin}: this machine has no memory left for it; try again later", 503
        ) from None
