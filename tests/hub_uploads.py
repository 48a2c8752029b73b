"""Uploads made by hand, to see what a hub does with good ones and bad ones: plain requests, xorbs, shards."""

import base64
import hashlib
import json
import struct
from typing import Any

import httpx

SHARD_TAG = b"HFRepoMetaData\0".ljust(32, b"U") + struct.pack("<QQ", 2, 200)
END = b"\xff" * 32 + bytes(16)


def commit_lines(*operations: tuple[str, dict[str, Any]], parent: str | None = None) -> bytes:
    """The body of a commit."""
    header = {"summary": "by hand", "description": "", **({"parentCommit": parent} if parent else {})}
    lines = [("header", header), *operations]
    return b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)


def small(path: str, data: bytes) -> tuple[str, dict[str, Any]]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def large(path: str, data: bytes) -> tuple[str, dict[str, Any]]:
    return "lfsFile", {"path": path, "algo": "sha256", "oid": sha256(data), "size": len(data)}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lfs_link(client: httpx.Client, repo: str, data: bytes) -> dict[str, Any]:
    """What a hub answers who wants to send this by LFS."""
    objects = [{"oid": sha256(data), "size": len(data)}]
    body = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": objects}
    answer = client.post(f"/{repo}.git/info/lfs/objects/batch", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["objects"][0]


def send_lfs(client: httpx.Client, repo: str, data: bytes) -> None:
    link = lfs_link(client, repo, data)
    if "actions" in link:
        assert client.put(link["actions"]["upload"]["href"], content=data).status_code == 200


def words(hash_: str) -> bytes:
    """A hash as shards hold it."""
    return struct.pack("<4Q", *(int(hash_[at : at + 16], 16) for at in range(0, 64, 16)))


def xorb(*chunks: bytes, scheme: int = 0, raw_sizes: list[int] | None = None) -> bytes:
    sizes = raw_sizes or [len(chunk) for chunk in chunks]
    head = [
        bytes([0]) + struct.pack("<I", len(chunk))[:3] + bytes([scheme]) + struct.pack("<I", size)[:3]
        for chunk, size in zip(chunks, sizes, strict=True)
    ]
    return b"".join(h + chunk for h, chunk in zip(head, chunks, strict=True))


def shard(xorb_name: str, size: int, chunks: int, content: str) -> bytes:
    """One file of one segment: `chunks` chunks of a xorb, `size` bytes in all, with this sha256."""
    file = words("ab" * 32) + struct.pack("<II", 1 << 30, 1) + bytes(8)
    segment = words(xorb_name) + struct.pack("<IIII", 0, size, 0, chunks)
    return SHARD_TAG + file + segment + words(content) + bytes(16) + END


def xet_session(client: httpx.Client, repo: str) -> tuple[str, dict[str, str]]:
    """The address for Xet uploads and the headers they need."""
    answer = client.get(f"/api/models/{repo}/xet-write-token/main").json()
    return answer["casUrl"], {"Authorization": f"Bearer {answer['accessToken']}"}
