"""Who may use a server, and who may change what it serves."""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..support.errors import ConfigError
from .config import ServeConfig
from .errors import ServingError

API_VARIABLE, ADMIN_VARIABLE = "LORAMUX_API_KEYS", "LORAMUX_ADMIN_KEY"
_SHORTEST = 16


@dataclass(frozen=True)
class Keys:
    """The keys of a server; never shown, not even by `repr`.

    Attributes:
        clients: may ask for answers.
        admin: may also load and unload adapters.
        is_open: without any key, whoever is on this machine may do everything.
    """

    clients: tuple[bytes, ...] = field(default=(), repr=False)
    admin: bytes | None = field(default=None, repr=False)
    is_open: bool = True

    @classmethod
    def read(cls, config: ServeConfig, environment: Mapping[str, str], *, is_local: bool | None = None) -> "Keys":
        """Keys from their files or the environment.

        Args:
            is_local: whether only this machine can reach the server; as `config.host` says where not given.

        Raises:
            ConfigError: a file cannot be read or holds no key, a key is short, or others could reach a server without
                keys.
        """
        clients = _lines(config.api_keys_file) or _split(environment.get(API_VARIABLE, ""), ",")
        admin = _lines(config.admin_key_file) or _split(environment.get(ADMIN_VARIABLE, ""), "\n")
        for key in (*clients, *admin):
            if len(key) < _SHORTEST:
                raise ConfigError(f"a key has {len(key)} characters; give at least {_SHORTEST}, drawn at random")
        if len(admin) > 1:
            raise ConfigError(f"there is one admin key, and {len(admin)} are given")
        is_local = config.is_local if is_local is None else is_local
        if not (clients or is_local or config.anyone):
            raise ConfigError(
                f"other machines can reach this server: give api_keys_file (or {API_VARIABLE}), "
                "or set anyone=true where something in front of the server keeps strangers out"
            )
        is_open = not (clients or admin or config.anyone)
        return cls(tuple(key.encode() for key in clients), admin[0].encode() if admin else None, is_open)

    def check_client(self, authorization: str | None) -> None:
        """Raises ServingError (401) where keys are set and this header holds none of them."""
        if self.clients and not self._holds(authorization, (*self.clients, *self._admins)):
            raise _refusal(authorization, "an API key")

    def check_admin(self, authorization: str | None) -> None:
        """Raises ServingError: 401 without the admin key, 403 where the server has none."""
        if self.is_open:
            return
        if self.admin is None:
            raise ServingError(
                "admin_disabled", f"this server has no admin key, so its adapters stay; set {ADMIN_VARIABLE}", 403
            )
        if not self._holds(authorization, self._admins):
            raise _refusal(authorization, "the admin key")

    @property
    def _admins(self) -> tuple[bytes, ...]:
        return () if self.admin is None else (self.admin,)

    @staticmethod
    def _holds(authorization: str | None, keys: Sequence[bytes]) -> bool:
        scheme, _, given = (authorization or "").partition(" ")
        offered = given.strip().encode(errors="replace")
        # Every key is compared, so that the time taken does not tell which one was nearly right.
        matches = [hmac.compare_digest(offered, key) for key in keys]
        return scheme.lower() == "bearer" and any(matches)


def _refusal(authorization: str | None, what: str) -> ServingError:
    said = "is not valid" if authorization else "is missing"
    return ServingError("invalid_api_key", f"{what} {said}; send the header Authorization: Bearer KEY", 401)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        keys = _split(file.read_text(encoding="utf-8"), "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the keys cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not keys:
        raise ConfigError(f"{file}: holds no key; write one a line, or leave the setting out")
    return keys


def _split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]
