"""Who may do what: users, organisations and their members, tokens."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from ...support.errors import ConfigError
from .clock import now
from .database import Database
from .errors import HubError
from .names import check_namespace

Role = Literal["read", "write"]
OPEN_USER = "local"


@dataclass(frozen=True)
class Caller:
    """Who asks: nobody (`name` None), a user with a token, or anybody on a hub that has no tokens.

    Attributes:
        namespaces: the user's own and those of its organisations, in small letters; None stands for all.
    """

    name: str | None
    role: Role | None
    namespaces: frozenset[str] | None
    organizations: tuple[str, ...] = ()

    def belongs_to(self, namespace: str) -> bool:
        return self.namespaces is None or namespace.lower() in self.namespaces

    def require_user(self) -> str:
        if self.name is None:
            raise HubError(401, "Invalid username or password: log in with a token of this hub.")
        return self.name

    def require_writer(self, namespace: str) -> str:
        """The caller's name, if it may write there.

        Raises:
            HubError: 401 without a token; 403 with a token that only reads, or in another's namespace.
        """
        name = self.require_user()
        if self.role != "write":
            raise HubError(403, f"This token of {name!r} only reads: use one with the role 'write'.")
        if not self.belongs_to(namespace):
            raise HubError(
                403, f"{name!r} may not write in {namespace!r}: it is neither its own nor an organisation's."
            )
        return name


NOBODY = Caller(None, None, frozenset())
ANYBODY = Caller(OPEN_USER, "write", None)


@dataclass(frozen=True)
class Token:
    """What is known of a token; its secret is not."""

    id: str
    user: str
    role: str
    note: str
    created: str
    expires: str | None
    revoked: str | None


class Accounts:
    """Users, organisations and tokens. Tokens are kept as hashes and shown once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def is_open(self) -> bool:
        """Whether no token was ever made, so that everybody may do everything."""
        with self._database.read() as connection:
            return connection.execute("SELECT 1 FROM tokens LIMIT 1").fetchone() is None

    def create_token(
        self, user: str, *, read_only: bool = False, note: str = "", lifetime: timedelta | None = None
    ) -> str:
        """Make a token, and its user where there is none.

        Returns:
            the token itself: it is nowhere else.

        Raises:
            HubError: 400, the name is not allowed.
            ConfigError: the name is an organisation's.
        """
        check_namespace(user)
        identity, secret = secrets.token_hex(4), secrets.token_hex(24)
        expires = now(lifetime) if lifetime is not None else None
        role: Role = "read" if read_only else "write"
        with self._database.write() as connection:
            self._add_account(user, is_organization=False)
            connection.execute(
                "INSERT INTO tokens (id, user, role, note, digest, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (identity, user, role, note, _digest(secret), now(), expires),
            )
        return f"hf_{identity}{secret}"

    def tokens(self) -> list[Token]:
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT id, user, role, note, created, expires, revoked FROM tokens ORDER BY created"
            )
            return [Token(**dict(row)) for row in rows]

    def revoke(self, identity: str) -> None:
        with self._database.write() as connection:
            changed = connection.execute(
                "UPDATE tokens SET revoked = ? WHERE id = ? AND revoked IS NULL", (now(), identity)
            ).rowcount
        if not changed:
            raise ConfigError(f"no valid token has the id {identity!r}; `loramux hub token list` shows them")

    def caller(self, token: str | None) -> Caller:
        """Who a token stands for.

        Raises:
            HubError: 401, it is unknown, revoked or expired.
        """
        if self.is_open():
            return ANYBODY
        if token is None:
            return NOBODY
        identity, secret = token.removeprefix("hf_")[:8], token.removeprefix("hf_")[8:]
        with self._database.read() as connection:
            row = connection.execute("SELECT * FROM tokens WHERE id = ?", (identity,)).fetchone()
            known = row["digest"] if row else bytes(32)
            is_valid = hmac.compare_digest(known, _digest(secret)) and row is not None and row["revoked"] is None
            if not is_valid or (row["expires"] is not None and row["expires"] < now()):
                raise HubError(401, "Invalid credentials in Authorization header: unknown, revoked or expired token.")
            organizations = tuple(
                found["organization"]
                for found in connection.execute(
                    "SELECT organization FROM members WHERE user = ? ORDER BY organization", (row["user"],)
                )
            )
        namespaces = frozenset(name.lower() for name in (row["user"], *organizations))
        return Caller(row["user"], row["role"], namespaces, organizations)

    def add_members(self, name: str, members: Sequence[str]) -> None:
        """Add users to an organisation; whatever does not exist yet is made, users without a token."""
        check_namespace(name)
        with self._database.write() as connection:
            self._add_account(name, is_organization=True)
            for user in members:
                check_namespace(user)
                self._add_account(user, is_organization=False)
                connection.execute("INSERT OR IGNORE INTO members VALUES (?, ?)", (name, user))

    def remove_member(self, organization: str, user: str) -> None:
        with self._database.write() as connection:
            where = (organization, user)
            if not connection.execute("DELETE FROM members WHERE organization = ? AND user = ?", where).rowcount:
                raise ConfigError(f"{user!r} is no member of {organization!r}; `loramux hub org list` shows them")

    def organizations(self) -> dict[str, list[str]]:
        """The members of each organisation."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT name, user FROM accounts LEFT JOIN members ON organization = name WHERE is_organization "
                "ORDER BY name, user"
            )
            found: dict[str, list[str]] = {}
            for row in rows:
                found.setdefault(row["name"], []).extend([row["user"]] if row["user"] else [])
        return found

    def _add_account(self, name: str, *, is_organization: bool) -> None:
        with self._database.write() as connection:
            connection.execute("INSERT OR IGNORE INTO accounts VALUES (?, ?)", (name, is_organization))
            row = connection.execute("SELECT is_organization FROM accounts WHERE name = ?", (name,)).fetchone()
        if bool(row["is_organization"]) != is_organization:
            wanted, there = ("organisation", "a user") if is_organization else ("user", "an organisation")
            raise ConfigError(f"{name!r} is the name of {there} already: take another for the {wanted}")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
