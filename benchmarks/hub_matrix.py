"""Unchanged clients of several versions against the local hub: every step, or where it broke.

    python benchmarks/hub_matrix.py [--versions 2.4.0,1.20.0,1.0.1,0.36.0] [--megabytes 30] [--venvs DIR]

Each version gets a virtual environment of its own in DIR (kept for the next time; pip needs an index) and a hub of its
own, and runs `hub_client.py` in a fresh process, with hf_xet and without. Prints a table in Markdown, seconds for each
step; fails if anything did.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from hub_process import hub_process

STEPS = (
    *("create", "upload_folder", "list", "snapshot_download", "commit", "revisions", "read_parts"),
    "move_and_delete",
)
CLIENT = Path(__file__).with_name("hub_client.py")


def python_of(version: str, venvs: Path) -> str:
    folder = venvs / f"hf-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "-q", "install", f"huggingface_hub=={version}", "hf_xet"], check=True)
    return str(python)


def try_client(python: str, megabytes: float, xet: bool) -> tuple[dict[str, float], str]:
    """Seconds of each step, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder, hub_process(Path(folder) / "hub") as hub:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
        clean |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "any", "HF_HOME": f"{folder}/home"}
        clean["HF_HUB_DISABLE_XET"] = "0" if xet else "1"
        command = [python, str(CLIENT), str(megabytes)]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or ["?"])[-1]
    return json.loads(done.stdout.splitlines()[-1])["seconds"], ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default="2.4.0,1.20.0,1.0.1,0.36.0")
    parser.add_argument("--megabytes", type=float, default=30)
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "hub-matrix")
    arguments = parser.parse_args()
    print(f"| client | large files | {' | '.join(STEPS)} |\n|---|---|{'---:|' * len(STEPS)}")
    failures = []
    for version in arguments.versions.split(","):
        python = python_of(version, arguments.venvs)
        for xet in (True, False):
            seconds, error = try_client(python, arguments.megabytes, xet)
            cells = [f"{seconds[step]:.2f}" if step in seconds else "FAILED" for step in STEPS]
            print(f"| {version} | {'as it likes' if xet else 'no Xet'} | {' | '.join(cells)} |", flush=True)
            failures += [f"{version}: {error}"] if error else []
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
