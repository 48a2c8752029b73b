"""A hub in a process of its own, as `loramux hub serve` runs it, and the memory it has taken."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


class HubProcess:
    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "loramux.cli", "hub", "serve", "--root", str(root), "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError("the hub did not start")

    def peak_mib(self) -> float:
        """The most memory it ever held (Linux)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@contextlib.contextmanager
def hub_process(root: Path) -> Iterator[HubProcess]:
    hub = HubProcess(root)
    try:
        yield hub
    finally:
        hub.process.terminate()
        hub.process.wait(20)
