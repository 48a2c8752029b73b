"""The ground everything stands on: configs that check themselves, files that are whole or absent."""

import json
import stat
from dataclasses import field
from pathlib import Path

import pytest

from loramux.support import files
from loramux.support.config import apply_overrides, config, load_yaml, parse, to_data
from loramux.support.console import say, show_table
from loramux.support.errors import ConfigError, did_you_mean


@config
class Inner:
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate (={self.rate}) must not be negative")


@config
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()


def test_a_config_and_its_plain_data_are_the_same_thing():
    outer = parse(Outer, {"name": "x", "inner": {"rate": 1}, "many": [{"rate": 2}]}, where="a.yaml")
    assert outer.many == (Inner(rate=2.0),)
    assert parse(Outer, to_data(outer), where="again") == outer
    with pytest.raises(AttributeError):
        outer.name = "y"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nam": "x"}, "a.yaml: nam: unknown key; did you mean 'name'"),
        ({"name": "x", "inner": {"rat": 1}}, "a.yaml: inner.rat: unknown key; did you mean 'rate'"),
        ({"name": "x", "many": [{"rates": 1}]}, r"a.yaml: many.0.rates: unknown key; did you mean 'rate'"),
        ({"name": "x", "inner": {"rate": -1}}, r"a.yaml: inner: rate \(=-1.0\) must not be negative"),
        ({"name": 3}, r"a.yaml: name: Input should be a valid string \(got 3\)"),
        ({}, "a.yaml: name: this key is required"),
    ],
)
def test_every_fault_names_the_file_and_the_key(data, message):
    with pytest.raises(ConfigError, match=message):
        parse(Outer, data, where="a.yaml")


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as raised:
        parse(Outer, {"nam": "x", "inner": {"rat": 1}}, where="a.yaml")
    assert str(raised.value).count("unknown key") == 2


def test_overrides_reach_into_a_copy():
    data = {"train": {"steps": 1}}
    assert apply_overrides(data, ["train.steps=5", "train.tasks=[a, b]", "new.key=null"]) == {
        "train": {"steps": 5, "tasks": ["a", "b"]},
        "new": {"key": None},
    }
    assert data == {"train": {"steps": 1}}
    for wrong, message in (
        ("steps", "write it as key=value"),
        ("train.steps.x=1", "'steps' has no keys"),
        ("a=[", "a="),
    ):
        with pytest.raises(ConfigError, match=message):
            apply_overrides(data, [wrong])


def test_unreadable_yaml_names_the_file_and_the_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: 1\nb: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml, line \d+"):
        load_yaml(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        load_yaml(tmp_path / "binary.yaml")
    (tmp_path / "code.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_yaml(tmp_path / "code.yaml")


def test_a_near_word_is_offered_and_else_all_are():
    assert did_you_mean("stpes", ["steps", "seed"]) == "did you mean 'steps'?"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", []) == "none is known"


def interrupted_write(target: Path) -> None:
    with files.atomic_folder(target) as staging:
        (staging / "two").write_text("2")
        raise KeyboardInterrupt


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "folder"
    with files.atomic_folder(target) as staging:
        (staging / "one").write_text("1")
    (target / "one").chmod(0o600)
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(target)
    assert [path.name for path in target.iterdir()] == ["one"]
    with files.atomic_folder(target) as staging:
        (staging / "three").write_text("3")
        (staging / "three").chmod(0o600)
    assert [path.name for path in target.iterdir()] == ["three"]
    assert stat.S_IMODE((target / "three").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_keeps_its_old_text_when_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch):
    path = tmp_path / "state.json"
    files.write_json(path, {"step": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path):
    target = tmp_path / "folder"
    with files.atomic_folder(target) as staging:
        (staging / "one").write_text("1")
    aside = tmp_path / ".folder.abc.partial"
    aside.mkdir()
    target.rename(aside / files._REPLACED)
    files.remove_partials(tmp_path)
    assert [path.name for path in target.iterdir()] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_leftovers_of_a_killed_process_are_swept_away(tmp_path: Path):
    (tmp_path / ".x.abc.partial").mkdir()
    (tmp_path / ".y.abc.partial").write_text("half")
    (tmp_path / "kept").write_text("whole")
    files.remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_strangers_wrote_neither_steers_the_terminal_nor_counts_as_markup(capsys):
    show_table("found", ["name"], [["[/x] \x1b[31mred"]])
    say("also \x1b]0;title\x07 here")
    told = capsys.readouterr().out
    assert "[/x] ?[31mred" in told
    assert "also ?]0;title? here" in told
