"""Signatures and manifests by themselves: what is no key, no statement of ours, no manifest of ours."""

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from loramux.hub.manifest import read_manifest
from loramux.hub.signing import attest, key_id, read_private_key, read_trusted_keys, verify
from loramux.support.errors import ConfigError, TrustError

KEY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
TRUSTED = {key_id(KEY.public_key()): KEY.public_key()}


def test_a_statement_is_the_same_each_time_and_in_the_form_others_read() -> None:
    envelope = attest({"b": "2", "a": "1"}, "mia/three", {"method": "moa"}, KEY)
    assert envelope == attest({"a": "1", "b": "2"}, "mia/three", {"method": "moa"}, KEY)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0] == {"name": "a", "digest": {"sha256": "1"}}
    found = verify(json.dumps(envelope), TRUSTED, "mia/three")
    assert (found.files, found.repository, found.origin) == ({"a": "1", "b": "2"}, "mia/three", {"method": "moa"})


def test_the_signature_is_over_the_encoding_of_dsse() -> None:
    """The bytes that the DSSE specification defines, put together here by hand."""
    envelope = attest({}, "mia/three", {}, KEY)
    payload = base64.b64decode(envelope["payload"])
    signed = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    KEY.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)


@pytest.mark.parametrize("statement", [{}, [], {"_type": "https://in-toto.io/Statement/v1", "subject": []}])
def test_a_trusted_key_may_have_signed_something_else(statement: object) -> None:
    payload = json.dumps(statement).encode()
    kind = b"application/vnd.in-toto+json"
    signature = KEY.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    envelope = {
        "payloadType": kind.decode(),
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": next(iter(TRUSTED)), "sig": base64.b64encode(signature).decode()}],
    }
    with pytest.raises(TrustError, match="signed, but not as the publication of a repository"):
        verify(json.dumps(envelope), TRUSTED, "mia/three")


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    other = X25519PrivateKey.generate()
    private = other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    public = other.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    with pytest.raises(ConfigError, match=r"key.pem: a key of another kind than Ed25519; `openssl genpkey"):
        read_private_key(tmp_path / "key.pem")
    with pytest.raises(ConfigError, match=r"key.pub: a key of another kind than Ed25519"):
        read_trusted_keys(tmp_path / "key.pub")
    locked = KEY.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    (tmp_path / "key.pem").write_bytes(locked)
    with pytest.raises(ConfigError, match=r"not a private key in PEM without a password"):
        read_private_key(tmp_path / "key.pem")


def test_several_trusted_keys_may_stand_in_one_file(tmp_path: Path) -> None:
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key() for n in (1, 2)]
    written = [key.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo) for key in keys]
    (tmp_path / "keys").write_bytes(b"# Mia\n" + b"# Tom\n".join(written))
    assert list(read_trusted_keys(tmp_path / "keys")) == [key_id(key) for key in keys]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "mia/three/loramux.json: not readable as JSON"),
        ("[]", "mia/three/loramux.json: format 'list'; this version of loramux reads 1"),
        ('{"format": 2}', "format 2; this version of loramux reads 1"),
        ('{"format": 1, "base": 3}', "mia/three/loramux.json: "),
        (
            '{"format": 1, "base": "b", "files": {}, '
            '"tasks": [{"name": "a", "folder": "../x", "scores": {}, "examples": []}]}',
            "tasks.0: folder .=.../x.. must be the name of a folder, or empty",
        ),
    ],
)
def test_what_is_no_manifest(text: str, message: str) -> None:
    with pytest.raises(TrustError, match=message):
        read_manifest(text, "mia/three")
    assert read_manifest(None, "mia/three") is None
