"""The repository root is the package: what that needs to stay sound, and what the wheel and the docs promise."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import loramux.adapters

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]

# What the modules of a folder may import. Nothing may import upwards.
MAY_IMPORT = {
    "support": set(),
    "tasks": {"support"},
    "routing": {"support"},
    "adapters": {"support", "routing"},
    "bases": {"support", "tasks"},
    "training": {"support", "tasks", "routing", "adapters", "bases"},
    "hub": {"support", "tasks", "routing", "adapters", "bases", "training"},
    "serving": {"support", "tasks", "routing", "adapters", "bases", "training", "hub"},
    "cli": {"support", "tasks", "routing", "adapters", "bases", "training", "hub", "serving"},
}
FOLDERS = list(MAY_IMPORT)


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder}/ holds no Python"
    return found


def imports(source: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, inside functions too."""
    package = ["loramux", *source.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            # `from .. import tasks` names its modules after the import, `from ..tasks import Task` before it.
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*base, name]) for name in names)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )


def test_every_package_folder_is_listed() -> None:
    inits = [init for folder in FOLDERS for init in (ROOT / folder).rglob("__init__.py")]
    on_disk = {".".join(["loramux", *init.parent.relative_to(ROOT).parts]) for init in inits}
    assert set(PACKAGES) == {"loramux"} | on_disk
    assert len(PACKAGES) == len(set(PACKAGES))


def test_no_folder_of_the_root_is_a_package_by_accident() -> None:
    assert {init.parent.name for init in ROOT.glob("[!.]*/__init__.py")} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_with_modules_is_a_package(folder: str) -> None:
    assert {path.parent for path in modules(folder)} == {path.parent for path in (ROOT / folder).rglob("__init__.py")}


def test_only_the_programs_are_modules_at_the_root() -> None:
    at_the_root = {path.name for path in ROOT.glob("*.py")}
    assert {"__init__.py", "train.py"} <= at_the_root <= {"__init__.py", "train.py", "serve.py"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_downwards_only(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [
        f"{source.relative_to(ROOT)} imports {name}"
        for source in modules(folder)
        for name in imports(source)
        if name.startswith("loramux.") and name.split(".")[1] in FOLDERS and name.split(".")[1] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_inside_the_folders_are_relative(folder: str) -> None:
    for source in modules(folder):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert not [name for name in names if name.split(".")[0] == "loramux"], source.relative_to(ROOT)


@pytest.mark.parametrize("folder", ["adapters", "routing", "tasks"])
def test_a_folder_found_through_the_checkout_says_what_it_is(folder: str) -> None:
    result = run(sys.executable, "-c", f"import {folder}", cwd=ROOT)
    assert result.returncode == 1
    assert f"ImportError: this is the {folder}/ folder of a loramux checkout" in result.stderr
    assert f"import loramux.{folder}" in result.stderr


def test_the_library_is_loaded_once() -> None:
    """Under pytest, a root that is a package is easily imported a second time, under the name of the checkout."""
    ours = {str(source) for source in [ROOT / "__init__.py", *itertools.chain.from_iterable(map(modules, FOLDERS))]}
    names = [name for name, module in list(sys.modules.items()) if os.path.realpath(_file(module)) in ours]
    assert loramux.adapters.__name__ in names
    assert not [name for name in names if name.split(".")[0] != "loramux"]


def _file(module: object) -> str:
    return getattr(module, "__file__", None) or ""


def test_versions_agree() -> None:
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert {version("loramux"), PYPROJECT["project"]["version"], newest[1]} == {loramux.__version__}


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = re.search(r"^python -m venv .*&& (pip install .*) && pytest$", (ROOT / "README.md").read_text(), re.M)
    assert command
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command[1] in lines
    assert any(line.split()[:1] == ["pytest"] for line in lines)


def test_every_dependency_has_a_tested_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^([\w.-]+)==[\w.]+$", constraints, re.MULTILINE)
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    wanted = [*PYPROJECT["project"]["dependencies"], *itertools.chain.from_iterable(extras)]
    names = {_normal(re.split(r"[<>=!~\[ ]", line)[0]) for line in wanted}
    assert names <= {_normal(name) for name in pinned}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_the_console_script_works_anywhere(flag: str, tmp_path: Path) -> None:
    result = run(Path(sys.executable).parent / "loramux", flag, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = loramux.__version__ if flag == "--version" else "train"
    assert expected in result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel that is built from a copy of the checkout without what earlier builds left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder / "source", ignore=leave_out)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "source", cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next((folder / "dist").glob("loramux-*.whl"))) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_the_wheel_claims_no_name_but_loramux(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"loramux", f"loramux-{loramux.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_is_complete(wheel: list[str]) -> None:
    shipped = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in modules(folder)}
    shipped |= {path.name for path in ROOT.glob("*.py")} | {"py.typed", "tasks/default.yaml"}
    for folder in ("bases/tiny", "hub/server/page", "serving/page"):
        shipped |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir()}
    assert {name.removeprefix("loramux/") for name in wheel if name.startswith("loramux/")} == shipped
    assert "loramux/bases/tiny/model.safetensors" in wheel
