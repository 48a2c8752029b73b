"""Links that are a right in themselves: clients send large files to the address they were given, without a token."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlencode

from .errors import HubError


class Links:
    """Signs paths and sessions. A link allows its bearer one thing with one object until it expires."""

    def __init__(self, secret: bytes, lifetime_s: int) -> None:
        self._secret, self._lifetime_s = secret, lifetime_s

    def sign(self, path: str, user: str) -> str:
        """The path with a query that proves that it was made here, for this user."""
        expires = self._expiry()
        query = {"user": user, "expires": expires, "signature": self._mac("link", path, user, expires)}
        return f"{path}?{urlencode(query)}"

    def check(self, path: str, query: Mapping[str, str]) -> str:
        """The user that a link was made for.

        Raises:
            HubError: 403, the link was made for something else, was changed, or has expired.
        """
        user, expires = query.get("user", ""), query.get("expires", "")
        if not _equal(query.get("signature", ""), self._mac("link", path, user, expires)):
            raise HubError(403, "Invalid upload link: its signature is for something else. Start the upload again.")
        if int(expires) < time.time():
            raise HubError(403, "This upload link has expired. Start the upload again.")
        return user

    def token(self, user: str) -> tuple[str, int]:
        """A token for the user's Xet uploads, and when it expires (seconds since 1970)."""
        expires = self._expiry()
        return f"{expires}.{self._mac('token', user, expires)}.{user}", int(expires)

    def check_token(self, token: str) -> str:
        """The user that a token was made for.

        Raises:
            HubError: 401, it was not made here, or has expired.
        """
        expires, _, rest = token.partition(".")
        mac, _, user = rest.partition(".")
        if not _equal(mac, self._mac("token", user, expires)) or int(expires) < time.time():
            raise HubError(401, "Invalid or expired Xet token. Start the upload again.")
        return user

    def session(self, user: str) -> str:
        """A new name for an upload of this user."""
        nonce = secrets.token_hex(16)
        return nonce + self._mac("session", nonce, user)

    def check_session(self, session: str, user: str) -> None:
        """Raises:
        HubError: 403, it is not a session of this user.
        """
        if not _equal(session[32:], self._mac("session", session[:32], user)):
            raise HubError(403, "This Xet address was not given to you. Start the upload again.")

    def _expiry(self) -> str:
        return str(int(time.time()) + self._lifetime_s)

    def _mac(self, *parts: str) -> str:
        return hmac.new(self._secret, "\n".join(parts).encode(), hashlib.sha256).hexdigest()


def _equal(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode(), right.encode())
