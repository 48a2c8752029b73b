"""Cards as HTML. Whoever may publish writes them, so nothing of them runs, and nothing of them reaches elsewhere."""

from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt

from .metadata import split_card

_MAX_CHARACTERS = 200_000
_MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
_SCHEMES = {"http", "https", "mailto"}


def render_card(text: str, files: str) -> str:
    """The text of a README.md, without its metadata, as sanitised HTML.

    Args:
        files: the path that relative links and pictures are relative to, with a `/` at its end.
    """
    _, body = split_card(text)
    if len(body) > _MAX_CHARACTERS:
        body = f"{body[:_MAX_CHARACTERS]}\n\n(The rest is too long to be shown here.)"

    def address(tag: str, attribute: str, value: str) -> str | None:
        if attribute not in ("src", "href"):
            return value
        try:
            parts = urlsplit(value)
        except ValueError:
            return None
        if parts.scheme or parts.netloc or value.startswith(("/", "\\")):
            return value if tag == "a" and parts.scheme in _SCHEMES else None
        return value if value.startswith("#") else files + value

    return nh3.clean(
        _MARKDOWN.render(body), attribute_filter=address, url_schemes=_SCHEMES, link_rel="noopener noreferrer nofollow"
    )
