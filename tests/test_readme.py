"""What the README and CONTRIBUTING show works as it stands there."""

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loramux.cli.main import build_parser
from loramux.support.config import parse
from loramux.tasks import read_task_configs
from loramux.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLISHING = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = [block for name, block in fenced if name == language]
    assert found, f"no {language} block"
    return found


def yaml_block(name: str) -> object:
    return yaml.safe_load(next(block for block in blocks("yaml") if block.startswith(f"# {name}")))


def test_the_recipe_is_valid() -> None:
    recipe = parse(Recipe, yaml_block("recipe.yaml"), where="README")
    assert (recipe.method.name, recipe.tasks) == ("smora", "tasks.yaml")


def test_the_task_file_is_valid(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(yaml_block("tasks.yaml")), encoding="utf-8")
    assert [task.name for task in read_task_configs(tmp_path / "tasks.yaml")] == ["intent", "sentiment"]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`loramux (\w+)", README + CONTRIBUTING))))
def test_every_command_named_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: loramux {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (README, {"train", "evaluate", "export", "compare", "publish"}),
        (PUBLISHING, {"publish", "pull", "search", "info", "diff", "recommend"}),
    ],
    ids=["README", "publishing"],
)
def test_every_command_line_shown_is_understood(text: str, named: set[str]) -> None:
    lines = [shlex.split(line, comments=True) for block in blocks("sh", text) for line in block.splitlines()]
    shown = [words[1:] for words in lines if words[:1] == ["loramux"]]
    assert {words[0] for words in shown} >= named
    for words in shown:
        assert build_parser().parse_args(words).command == words[0]


def test_the_tree_names_every_folder_and_only_what_is_there() -> None:
    tree = next(block for block in blocks("") if block.startswith("adapters/"))
    named = [line.split()[0] for line in tree.splitlines() if not line.startswith(" ")]
    assert not [name for name in named if not (ROOT / name).exists()]
    assert {f"{init.parent.name}/" for init in ROOT.glob("[!.]*/__init__.py")} <= set(named)


def test_the_method_shown_in_contributing_is_the_real_one() -> None:
    (shown,) = (block for block in blocks("python", CONTRIBUTING) if "@register_method" in block)
    assert shown in (ROOT / "adapters" / "presets" / "hydralora.py").read_text(encoding="utf-8")
    rows = [line[1:] for line in blocks("diff", CONTRIBUTING)[0].splitlines() if line.startswith("+")]
    cases = (ROOT / "tests" / "cases.py").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    assert set(rows) <= set(cases)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_python_shown_is_python(text: str) -> None:
    for block in blocks("python", text):
        ast.parse(block)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_train_publish_and_use_as_written(tmp_path: Path) -> None:
    """The commands of the section on sharing, in a shell; only the port is a free one."""
    served, commands = (block for block in blocks("sh") if "hub serve" in block or "loramux publish" in block)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "use.py").write_text(next(block for block in blocks("python") if block.startswith("# use.py")))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    subprocess.run(["bash", "-c", "loramux base --to tiny"], check=True, cwd=tmp_path, env=environment)
    hub = subprocess.Popen(["bash", "-c", f"exec {served.strip()} --port {port}"], cwd=tmp_path, env=environment)
    try:
        script = "set -e\n" + commands.replace("8765", port)
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "3 7 12 19"
    finally:
        hub.terminate()
        hub.wait(30)
