"""What the server refuses, with a code that programs can rely on."""

from ..support.errors import LoramuxError


class ServingError(LoramuxError):
    """A request that is refused.

    Attributes:
        code: stable, such as `adapter_not_found`; docs/serving.md lists them.
        message: what is wrong, with which value, what is allowed, what to do.
        status: the HTTP status it is answered with.
    """

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(code, message, status)  # what it is made of again in another process
        self.code, self.message, self.status = code, message, status

    def __str__(self) -> str:
        return self.message


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a machine had no memory left; torch says so of the CPU in words alone."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))
