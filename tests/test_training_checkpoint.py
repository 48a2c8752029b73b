"""Checkpoints and run folders: whole or absent, verified, and never mistaken for one another."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from full_disk import files_limited_to

from loramux.support.errors import RunError
from loramux.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    DamagedCheckpoint,
    check_tensors,
    read_checkpoint,
    save_tensors,
    write_checkpoint,
)


def a_checkpoint(step: int, best: int | None = None) -> Checkpoint:
    adapter = {"down": torch.randn(2, 3), "bias": torch.tensor([-0.0, float("nan")])}
    return Checkpoint(adapter, {"down/step": torch.tensor(3.0)}, {"step": step, "best_step": best})


def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    written = a_checkpoint(3)
    write_checkpoint(tmp_path / "c", written)
    read = read_checkpoint(tmp_path / "c")
    for name, tensor in written.adapter.items():
        assert torch.equal(read.adapter[name].view(torch.int32), tensor.view(torch.int32))
    assert read.optimizer["down/step"].shape == ()
    assert read.state == {"format": 1, "step": 3, "best_step": None}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in range(1, 7):
        folder.write(a_checkpoint(step, best=2 if step >= 2 else None))
    assert folder.steps() == [2, 5, 6]
    folder.drop_after(5)
    assert folder.steps() == [2, 5]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def tamper(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"{file}: \d+ bytes, \d+ were written \(truncated\?\); going back to the checkpoint before it"),
        (tamper, r"{file}: its content was changed since it was written"),
        (Path.unlink, r"{file}: missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage, message: str
) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.write(a_checkpoint(1))
    folder.write(a_checkpoint(2))
    damage(folder.at(2) / file)
    found = folder.read_latest()
    assert found is not None
    assert found.state["step"] == 1
    with pytest.raises(DamagedCheckpoint, match=message.split(";")[0].format(file=file)):
        read_checkpoint(folder.at(2))
    assert f"{file}: " in capsys.readouterr().out.replace("\n", "")


def test_when_all_are_damaged_it_is_said(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.write(a_checkpoint(1))
    (folder.at(1) / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"no usable checkpoint is left:\n.*manifest.json: missing or not readable"):
        folder.read_latest()


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "none", keep=1).read_latest() is None


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", Checkpoint({}, {}, {"step": 1, "format": 99}))
    with pytest.raises(DamagedCheckpoint, match="format 99; this version reads 1"):
        read_checkpoint(tmp_path / "c")


def test_a_file_with_a_pickle_in_it_is_never_read(tmp_path: Path) -> None:
    torch.save({"down": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"adapter.safetensors: not a whole safetensors file"):
        check_tensors(tmp_path / "adapter.safetensors", {})


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a": torch.zeros(2)}, "tensor 'b' was not written"),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, "holds a tensor 'c' the model does not have"),
        ({"a": torch.zeros(2), "b": torch.ones(1)}, r"tensor 'b' differs from the model"),
        ({"a": torch.zeros(1, 2), "b": torch.zeros(1)}, r"tensor 'a' differs from the model \(\(1, 2\)\)"),
        ({"a": torch.zeros(2), "b": -torch.zeros(1)}, r"tensor 'b' differs from the model"),
    ],
)
def test_a_written_file_is_compared_with_the_model(tmp_path: Path, held: dict, message: str) -> None:
    save_tensors(tmp_path / "t.safetensors", held)
    with pytest.raises(RunError, match=message):
        check_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2), "b": torch.zeros(1)})


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    folder.write(a_checkpoint(1))
    large = Checkpoint({"down": torch.zeros(100_000)}, {}, {"step": 2})
    message = r"could not write .*step-00000002: .*; what was there before is untouched"
    with files_limited_to(50_000), pytest.raises(RunError, match=message):
        folder.write(large)
    assert [path.name for path in folder.root.iterdir()] == ["step-00000001"]
    found = folder.read_latest()
    assert found is not None
    assert found.state["step"] == 1


def test_an_interrupt_during_a_save_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    class Interrupting(dict):
        def items(self):
            raise KeyboardInterrupt

    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    folder.write(a_checkpoint(1))
    with pytest.raises(KeyboardInterrupt):
        folder.write(Checkpoint(a_checkpoint(2).adapter, Interrupting(), {"step": 2}))
    assert [path.name for path in folder.root.iterdir()] == ["step-00000001"]


def test_files_are_safetensors_and_json_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", a_checkpoint(1))
    for path in (tmp_path / "c").iterdir():
        if path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
        else:
            json.loads(path.read_text())
