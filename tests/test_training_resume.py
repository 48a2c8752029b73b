"""Killed at any moment, a run that is resumed ends with the weights of one that was left alone, bit for bit."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_cases import make_recipe, write_base, write_tasks

from loramux.training.run import train_run

# Processes are forked from one that has imported everything, so that a kill costs no new import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["training_cases", "loramux.training.run"])
METHODS = {
    "moa": ["method.name=moa"],
    "smora": ["method.name=smora", "method.options={rank: 8, top_k: 3, dropout: 0.1, balance_rate: 0.01}"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    write_base(root / "base")
    write_tasks(root / "tasks")
    return root


def work(root: Path, method: str, name: str) -> None:
    """A run that saves after every step and measures now and then, in a process of its own."""
    torch.set_num_threads(1)
    settings = ["train.steps=16", "train.save_every=1", "train.log_every=3", "train.eval_every=5"]
    recipe = make_recipe(root / "base", root / "tasks" / "tasks.yaml", *METHODS[method], *settings)
    train_run(recipe, root / name, resume=True)


def start(root: Path, method: str, name: str) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=work, args=(root, method, name))
    process.start()
    return process


def finish(root: Path, method: str, name: str) -> Path:
    process = start(root, method, name)
    process.join()
    assert process.exitcode == 0
    return root / name


def kill_when(process: multiprocessing.process.BaseProcess, due: Iterator[bool]) -> bool:
    """Kill the process at the first true moment; False when it ended before."""
    for now in due:
        if process.exitcode is not None:
            return False
        if now:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return process.exitcode == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def writing(folder: Path, step: int) -> Iterator[bool]:
    """True as soon as the checkpoint of a step is half written."""
    while True:
        yield any((folder / "checkpoints").glob(f".step-{step:08d}.*.partial/optimizer.safetensors"))


def reaching(folder: Path, step: int, delay: float) -> Iterator[bool]:
    """True some seconds after the checkpoint of a step is there."""
    while not (folder / "checkpoints" / f"step-{step:08d}").exists():
        yield False
    end = time.monotonic() + delay
    while True:
        yield time.monotonic() > end


def assert_same_run(calm: Path, killed: Path) -> None:
    for file in ("mixture/adapter_model.safetensors", "mixture/adapter_config.json", "metrics.jsonl"):
        assert (calm / file).read_bytes() == (killed / file).read_bytes(), file
    for file in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        last = f"checkpoints/step-00000016/{file}"
        assert (calm / last).read_bytes() == (killed / last).read_bytes(), file


def test_a_run_killed_while_it_saves_resumes_to_the_same_end(root: Path) -> None:
    calm = finish(root, "moa", "calm")
    killed = root / "killed"
    for step in (2, 13):  # in the first stage and in the second
        assert kill_when(start(root, "moa", "killed"), writing(killed, step))
        assert list((killed / "checkpoints").glob(".*.partial"))
    finish(root, "moa", "killed")
    assert_same_run(calm, killed)
    assert not list(killed.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_resumes_to_the_same_end(root: Path, method: str) -> None:
    calm = finish(root, method, f"{method}-calm")
    draw = random.Random(method)
    kills = 0
    for trial in range(6):
        name = f"{method}-{trial}"
        for step in sorted(draw.sample(range(1, 16), 4)):
            moment = reaching(root / name, step, draw.uniform(0, 0.2))
            kills += kill_when(start(root, method, name), moment)
        assert_same_run(calm, finish(root, method, name))
    assert kills >= 16
