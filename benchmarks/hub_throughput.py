"""How fast large files go to the local hub and back, against a plain copy through loopback, and the server's memory.

    python benchmarks/hub_throughput.py [MEGABYTES] [--folder DIR] [--repeats N] [--json]

The plain copy is a socket on this machine: one process reads the file and sends it, the other writes it to the same
disk and waits until it is there (fsync), as the hub does. The hashed copy also does what both ends of an upload must:
the sender hashes the file before it starts, the receiver while it writes. `client alone` is what the stock client needs
to hash the file and to send it to a server that throws it away: no hub takes less. `download` is one GET written to the
disk, `snapshot` is the stock client's. Times but those of uploads are the best of N.
"""

import argparse
import hashlib
import http.client
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hub_process import HubProcess, hub_process

PIECE = 1 << 20
REPO = "someone/copy"
UPLOAD = """
import sys, time
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(sys.argv[1], exist_ok=True)
start = time.perf_counter()
api.upload_file(repo_id=sys.argv[1], path_or_fileobj=sys.argv[2], path_in_repo="model.safetensors")
print(time.perf_counter() - start)
"""
CLIENT_ALONE = """
import sys, time
from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import http_backoff
start = time.perf_counter()
operation = CommitOperationAdd("model.safetensors", sys.argv[2])
assert operation.upload_info.sha256
with operation.as_file() as file:
    http_backoff("PUT", sys.argv[1], data=file)
print(time.perf_counter() - start)
"""
SNAPSHOT = """
import sys, time
from huggingface_hub import snapshot_download
start = time.perf_counter()
snapshot_download(sys.argv[1])
print(time.perf_counter() - start)
"""


def make_file(path: Path, megabytes: int) -> None:
    """Random, so that nothing is saved by compression or by chunks that repeat."""
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(PIECE))


def receive(listener: socket.socket, target: Path, hashes: bool) -> None:
    connection, _ = listener.accept()
    digest = hashlib.sha256()
    with connection, target.open("wb") as file:
        while piece := connection.recv(PIECE):
            file.write(piece)
            if hashes:
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        connection.sendall(digest.digest())


def copy(source: Path, target: Path, *, hashes: bool) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = multiprocessing.Process(target=receive, args=(listener, target, hashes))
        receiver.start()
        start = time.perf_counter()
        if hashes:
            with source.open("rb") as file:
                hashlib.file_digest(file, "sha256")
        with socket.create_connection(listener.getsockname()) as connection, source.open("rb") as file:
            while piece := file.read(PIECE):
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(32)
        seconds = time.perf_counter() - start
        receiver.join()
    target.unlink()
    return seconds


def swallow(listener: socket.socket) -> None:
    """Answer one PUT, keeping nothing of it."""
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as request:
        headers = http.client.parse_headers(request) if request.readline() else {}
        left, piece = int(headers["Content-Length"]), memoryview(bytearray(PIECE))
        while left:
            left -= request.readinto(piece[:left])
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def client_alone(source: Path, home: Path) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = multiprocessing.Process(target=swallow, args=(listener,))
        receiver.start()
        url = "http://{}:{}".format(*listener.getsockname())
        seconds = client(CLIENT_ALONE, url, home, f"{url}/file", str(source))
        receiver.join()
    return seconds


def client(code: str, url: str, home: Path, *arguments: str, xet: bool = True) -> float:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_ENDPOINT": url, "HF_TOKEN": "any", "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    clean["HF_HUB_DISABLE_XET"] = "0" if xet else "1"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=clean, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    shutil.rmtree(home, ignore_errors=True)
    return float(done.stdout.splitlines()[-1])


def download(hub: HubProcess, target: Path) -> float:
    """One GET, written to the disk."""
    piece = memoryview(bytearray(PIECE))
    start = time.perf_counter()
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    connection.request("GET", f"/{REPO}/resolve/main/model.safetensors")
    answer = connection.getresponse()
    with target.open("wb") as file:
        while count := answer.readinto(piece):
            file.write(piece[:count])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    connection.close()
    target.unlink()
    return seconds


def measure(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    source, target, home = folder / "source.bin", folder / "copy.bin", folder / "home"
    make_file(source, megabytes)
    plain, hashed = (min(copy(source, target, hashes=hashes) for _ in range(repeats)) for hashes in (False, True))
    alone = min(client_alone(source, home) for _ in range(repeats))
    ways = []
    for name, xet in (("Xet", True), ("LFS", False)):
        with hub_process(folder / name) as hub:
            # Only the first upload sends all of it: later ones would find it there.
            upload = client(UPLOAD, hub.url, home, REPO, str(source), xet=xet)
            peak = hub.peak_mib()
            fetch = min(download(hub, target) for _ in range(repeats))
            snapshot = min(client(SNAPSHOT, hub.url, home, REPO) for _ in range(repeats))
        shutil.rmtree(folder / name)
        seconds = {"upload": upload, "download": fetch, "snapshot": snapshot}
        ways.append({"way": name, "seconds": seconds, "server_peak_mib": round(peak, 1)})
    copies = {"plain_copy": plain, "hashed_copy": hashed, "client_alone": alone}
    return {"megabytes": megabytes, **copies, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", nargs="?", type=int, default=400)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the system's for temporary files)"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = measure(Path(folder), arguments.megabytes, arguments.repeats)
    if arguments.json:
        print(json.dumps(measured))
        return
    size, plain, hashed = measured["megabytes"], measured["plain_copy"], measured["hashed_copy"]
    alone = measured["client_alone"]
    print(f"{size} MiB; plain copy {plain:.2f} s ({size / plain:.0f} MiB/s), hashed copy {hashed:.2f} s", end="")
    print(f", client alone {alone:.2f} s ({plain / alone:.2f} x plain copy)\n")
    print("| way | step | s | MiB/s | x plain copy | x hashed copy |\n|---|---|---:|---:|---:|---:|")
    for way in measured["ways"]:
        for step, seconds in way["seconds"].items():
            ratios = f"{plain / seconds:.2f} | {hashed / seconds:.2f}"
            print(f"| {way['way']} | {step} | {seconds:.2f} | {size / seconds:.0f} | {ratios} |")
        print(f"| {way['way']} | server's peak memory: {way['server_peak_mib']:.0f} MiB | | | | |")


if __name__ == "__main__":
    main()
