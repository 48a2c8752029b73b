"""Who published what, signed: an in-toto statement in a DSSE envelope, with an Ed25519 key.

The statement lists every file but the card, which may be edited afterwards, by its SHA-256, and says which repository
they were published to and which run they come from.
Formats: https://github.com/secure-systems-lab/dsse (v1), https://github.com/in-toto/attestation (Statement v1).
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..support.errors import ConfigError, TrustError

ATTESTATION = "attestation.json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "urn:loramux:publication:v1"
_RAW = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
Key = Ed25519PrivateKey


@dataclass(frozen=True)
class Attestation:
    """A verified statement: the SHA-256 of files by path, where they were published, from what, and by which key."""

    files: Mapping[str, str]
    repository: str
    origin: Mapping[str, Any]
    key_id: str


def attest(hashes: Mapping[str, str], repository: str, origin: Mapping[str, Any], key: Key) -> dict[str, Any]:
    """The signed statement about files, as the data of its JSON file; the same each time.

    Args:
        hashes: SHA-256 by path in the repository.
        origin: which run they come from.
    """
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(hashes.items())],
        "predicateType": _PREDICATE,
        "predicate": {"repository": repository, **origin},
    }
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    signature = {"keyid": key_id(key.public_key()), "sig": _encoded(key.sign(_signed_bytes(payload)))}
    return {"payloadType": _PAYLOAD_TYPE, "payload": _encoded(payload), "signatures": [signature]}


def verify(text: str | None, trusted: Mapping[str, Ed25519PublicKey], where: str) -> Attestation:
    """Read an attestation that one of the trusted keys has signed.

    Args:
        text: of its file; None where there is none.
        trusted: keys by their id.
        where: the repository, for messages.

    Raises:
        TrustError: it is not signed, or not by a trusted key, or was changed.
    """
    if text is None:
        raise TrustError(f"{where}: it is not signed (no {ATTESTATION}); pull it without --trust, or ask its owner")
    try:
        envelope = json.loads(text)
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [(str(s["keyid"]), base64.b64decode(s["sig"], validate=True)) for s in envelope["signatures"]]
        is_statement = envelope["payloadType"] == _PAYLOAD_TYPE
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TrustError(f"{where}/{ATTESTATION}: not a DSSE envelope") from None
    known = [(name, signature) for name, signature in signatures if name in trusted]
    if not known:
        names = ", ".join(name for name, _ in signatures) or "nobody"
        raise TrustError(f"{where}: signed by {names}, which is none of the keys you trust ({', '.join(trusted)})")
    name, signature = known[0]
    try:
        trusted[name].verify(signature, _signed_bytes(payload))
    except InvalidSignature:
        raise TrustError(f"{where}: the signature of {name} does not fit; {ATTESTATION} was changed") from None
    if not is_statement:
        _refuse(where)
    return _statement(payload, name, where)


def read_private_key(path: Path) -> Key:
    """A private key from a PEM file, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        ConfigError: it holds no Ed25519 key without a password.
    """
    try:
        key = serialization.load_pem_private_key(_bytes_of(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: not a private key in PEM without a password ({error}); {_MAKE_ONE}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: a key of another kind than Ed25519; {_MAKE_ONE}")
    return key


def read_trusted_keys(path: Path) -> dict[str, Ed25519PublicKey]:
    """Public keys by their id, from a file with one PEM block or more.

    Raises:
        ConfigError: it holds none, or one of another kind.
    """
    end = b"-----END PUBLIC KEY-----"
    blocks = [block + end for block in _bytes_of(path).split(end)[:-1]]
    keys = {}
    for block in blocks:
        try:
            key = serialization.load_pem_public_key(block[block.index(b"-----BEGIN") :])
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path}: a public key in it cannot be read ({error})") from None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{path}: a key of another kind than Ed25519; {_MAKE_ONE}")
        keys[key_id(key)] = key
    if not keys:
        raise ConfigError(f"{path}: no public key in it; `openssl pkey -in KEY.pem -pubout` writes the one of a key")
    return keys


def key_id(key: Ed25519PublicKey) -> str:
    """`SHA256:` and the hash of the raw public key."""
    return f"SHA256:{hashlib.sha256(key.public_bytes(*_RAW)).hexdigest()}"


_MAKE_ONE = "`openssl genpkey -algorithm ed25519 -out KEY.pem` makes one"


def _statement(payload: bytes, name: str, where: str) -> Attestation:
    try:
        data = json.loads(payload)
        files = {str(subject["name"]): str(subject["digest"]["sha256"]) for subject in data["subject"]}
        predicate = dict(data["predicate"])
        if (data["_type"], data["predicateType"]) != (_STATEMENT, _PREDICATE):
            _refuse(where)
        return Attestation(files, str(predicate.pop("repository")), predicate, name)
    except (ValueError, KeyError, TypeError):
        _refuse(where)


def _refuse(where: str) -> NoReturn:
    raise TrustError(f"{where}/{ATTESTATION}: signed, but not as the publication of a repository")


def _signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = _PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
