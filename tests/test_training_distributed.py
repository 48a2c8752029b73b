"""Two processes give the weights of one process at the same global batch, with copies (DDP) and with shards (FSDP)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_child import EVALUATIONS
from safetensors.torch import load_file
from training_cases import ANSWERS, make_recipe, write_base, write_tasks

from loramux.training.assess import encode_tasks, read_results
from loramux.training.evaluate import evaluate_tasks
from loramux.training.run import load_run, train_run
from loramux.training.run_folder import RunFolder

# Answers differ in length, a batch of 5 gives the processes 3 and 2 rows, and one of 6 gives micro-batches of 2 and 1.
MOA = ["method.name=moa", "train.accumulation=2"]
SMORA = ["method.name=smora", "method.options={rank: 8, top_k: 3, balance_rate: 0.01}", "train.batch_size=5"]
LORA = ["method.name=lora", "train.gradient_checkpointing=true", "train.steps=4"]
JOBS = {"moa": MOA, "smora": SMORA, "lora": LORA}
# Experts that start anew between stages (one, so that its router draws nothing), and prototypes that are fitted.
AFTER = {
    "task_moe": ["method.name=task_moe", "method.options={rank: 2, experts: 1, route_share: 0.5}"],
    "router_retriever": ["method.name=router_retriever"],
}
REFUSED = ["method.name=arrow", "train.distributed=fsdp"]
KINDS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of two processes in `two/` and the same runs of one process in `one/`."""
    root = tmp_path_factory.mktemp("distributed")
    base, tasks = write_base(root / "base"), write_tasks(root / "tasks")
    jobs = [
        f"{name}-{kind}={';'.join([*settings, f'train.distributed={kind}'])}"
        for name, settings in JOBS.items()
        for kind in KINDS
    ]
    looked_at = [*LORA, "train.log_gradients=2"]
    jobs += [f"{name}={';'.join(settings)}" for name, settings in {**AFTER, "refused": REFUSED}.items()]
    run_in_two_processes(base, tasks, root / "two", *jobs, f"lora-gradients={';'.join(looked_at)}")
    train_run(make_recipe(base, tasks, *looked_at), root / "one" / "lora-gradients", evaluate=None)
    for name, settings in {**JOBS, **AFTER}.items():
        train_run(make_recipe(base, tasks, *settings), root / "one" / name, evaluate=EVALUATIONS.get(name))
    return root


def run_in_two_processes(base: Path, tasks: Path, out: Path, *jobs: str, timeout: float | None = None) -> None:
    child = Path(__file__).with_name("distributed_child.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(child)]
    command += [str(base), str(tasks), str(out), *jobs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "mixture" / "adapter_model.safetensors")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_the_weights_of_one(root: Path, name: str, kind: str) -> None:
    assert json.loads((root / "two" / f"{name}-{kind}" / "environment.json").read_text())["processes"] == 2
    assert_close(weights_of(root / "one" / name), weights_of(root / "two" / f"{name}-{kind}"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_log_the_losses_and_metrics_of_one(root: Path, name: str, kind: str) -> None:
    """And with FSDP each of them holds half of all weights while it does."""
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (root / "one" / name, root / "two" / f"{name}-{kind}")
    ]
    assert len(lines[0]) == len(lines[1]) > 2
    for one, two in zip(*lines, strict=True):
        for label in ("stage", "routing/fewest_experts_in"):
            assert one.pop(label, None) == two.pop(label, None)
        if "eval/held" in one:
            assert one.pop("eval/held") == 1.0
            assert two.pop("eval/held") == pytest.approx(0.5 if kind == "fsdp" else 1.0, abs=0.01)
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_two_processes_find_the_gradient_cosines_of_one(root: Path) -> None:
    one, two = (RunFolder(root / number / "lora-gradients") for number in ("one", "two"))
    for expected, found in zip(one.gradients(), two.gradients(), strict=True):
        assert found["step"] == expected["step"]
        for row, other in zip(expected["cosine"], found["cosine"], strict=True):
            assert other == pytest.approx(row, abs=1e-3)
    weights = weights_of(root / "two" / "lora-ddp")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(two.path).items())


@pytest.mark.parametrize("name", AFTER)
def test_two_processes_come_out_of_a_stage_as_one_does(root: Path, name: str) -> None:
    assert_close(weights_of(root / "one" / name), weights_of(root / "two" / name))


def test_shards_of_experts_that_a_stage_rearranges_are_refused_before_any_step(root: Path) -> None:
    assert "use train.distributed: ddp" in (root / "two" / "refused.txt").read_text()
    assert not (root / "two" / "refused" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_resumes_on_one(root: Path, kind: str) -> None:
    """Whatever wrote it, a checkpoint holds whole tensors."""
    source, run = root / "two" / f"moa-{kind}", root / "two" / f"resumed-{kind}"
    shutil.copytree(source, run)
    shutil.rmtree(run / "mixture")
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    recipe = make_recipe(root / "base", root / "tasks" / "tasks.yaml", *MOA, f"train.distributed={kind}")
    train_run(recipe, run, resume=True)
    assert_close(weights_of(source), weights_of(run))


def test_two_processes_finish_a_job_whose_exports_are_fitted(tmp_path: Path) -> None:
    """One process exports alone while the other waits; validation examples judge what it writes."""
    base, tasks = write_base(tmp_path / "base"), write_tasks(tmp_path / "tasks")
    listed = [{"name": n, "source": {"path": n}, "choices": choices} for n, choices in ANSWERS.items()]
    tasks.write_text(json.dumps({"tasks": listed}))
    for name in ANSWERS:
        held_out = tmp_path / "tasks" / name / "test.jsonl"
        held_out.write_text(held_out.read_text().splitlines(keepends=True)[0])  # its accuracy is 0 or 1
    settings = ["method.name=smora", "method.options={rank: 4, top_k: 2}", "train.steps=2", "baseline.enabled=false"]
    settings += ["base.known_as=someone/tiny", "export.allow_lossy=true"]
    run_in_two_processes(base, tasks, tmp_path / "two", f"job={';'.join(settings)}", timeout=300)
    folder = tmp_path / "two" / "job"
    assert "exported" in read_results(folder).columns
    run = load_run(folder)
    scores = evaluate_tasks(run.model, run.tokenizer, encode_tasks(run), split="validation")
    assert any(0 < found["accuracy"] < 1 for found in scores.values())
    for name, found in scores.items():
        report = json.loads((folder / "exports" / name / "export.json").read_text())
        assert report["routed_score"] == pytest.approx(found["accuracy"])
