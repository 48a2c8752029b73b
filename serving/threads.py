"""Who computes in parallel: the engine's thread, and nobody else."""

import torch


def compute_on(threads: int) -> None:
    """Let the calling thread compute with so many from now on, whatever others are told."""
    torch.get_num_threads()  # at its first look a thread takes what any was told last, which would undo this later
    torch.set_num_threads(threads)


def compute_on_one_thread() -> int:
    """Let the calling thread compute alone from now on; returns with how many it did before, for `EngineOptions`.

    OpenMP keeps a team for every thread that computes in parallel. Where all teams together have more threads than the
    machine has cores, it puts idle ones to sleep at once, and a decoding step takes a third longer. Only the engine's
    thread should have a team.
    """
    before = torch.get_num_threads()
    compute_on(1)
    return before
