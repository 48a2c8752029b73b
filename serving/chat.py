"""A terminal client: one line in, an answer out as it is made, and the name of the adapter that gave it."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
from rich.console import Console

from ..support.errors import ConfigError, LoramuxError

HELP = """\
/models        what the server has
/model NAME    who answers from now on: an adapter, a mixture, the base, or auto
/new           forget the conversation
/quit          leave (or Ctrl-D)"""
_TIMEOUT = httpx.Timeout(10, read=330)
_BASE = "base"  # what every server calls its base, beside its name


class Refused(LoramuxError):
    """What the server refused, in its own words."""


class Conversation:
    """Talks to one server.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        model: who answers; None for `auto` where the server has it, else the base.
        key: an API key, where the server wants one.
        max_tokens: of an answer; None leaves it to the server.

    Raises:
        ConfigError: there is no such server, or it has no such model.
        Refused: it does not take this key.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        max_tokens: int | None = None,
        temperature: float = 0,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=_TIMEOUT)
        self._options: dict[str, Any] = {"temperature": temperature, "stream": True}
        if max_tokens is not None:
            self._options["max_tokens"] = max_tokens
        self._messages: list[dict[str, str]] = []
        self._models = self._listed()
        self._has_template = any(one.get("has_chat_template") for one in self._models)
        self.model = self.check(model) if model else "auto" if "auto" in self.names else self.names[0]

    @property
    def names(self) -> list[str]:
        """What the server has, as of the last look."""
        return [one["id"] for one in self._models]

    def look(self) -> list[str]:
        """What the server has now."""
        self._models = self._listed()
        return self.names

    def check(self, model: str) -> str:
        if model not in (*self.names, _BASE):
            raise ConfigError(f"the server has no model {model!r}; it has {', '.join(self.names)}")
        return model

    def forget(self) -> None:
        self._messages.clear()

    def ask(self, text: str) -> Iterator[tuple[str, str]]:
        """An answer in pieces, each with who gives it.

        A base without a chat template continues single lines, which is how adapters for it are mostly trained; others
        get the whole conversation.

        Raises:
            Refused: the server refused, or broke off.
        """
        if not self._has_template:
            yield from self._stream("/v1/completions", {"prompt": f"{text}\n"})
            return
        asked = {"role": "user", "content": text}
        answer = ""
        for piece, adapter in self._stream("/v1/chat/completions", {"messages": [*self._messages, asked]}):
            answer += piece
            yield piece, adapter
        self._messages += [asked, {"role": "assistant", "content": answer}]

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
        request = {"model": self.model, **self._options, **body}
        try:
            with self._client.stream("POST", path, json=request) as reply:
                if reply.is_error:
                    reply.read()
                    raise _refusal(reply)
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        yield from _pieces(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise Refused(f"the server is gone: {error}") from None

    def _listed(self) -> list[dict[str, Any]]:
        try:
            reply = self._client.get("/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"no server at {self._client.base_url}: {error}; start one with `loramux serve`"
            ) from None
        if reply.is_error:
            raise _refusal(reply)
        try:
            listed: list[dict[str, Any]] = reply.json()["data"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{reply.url} does not list models; is that a loramux server?") from None
        return listed


def talk(conversation: Conversation, lines: Iterable[str], console: Console) -> None:
    """Answer lines until they end; a slash begins a command."""
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        try:
            if text.startswith("/"):
                console.print(_command(conversation, text), markup=False, highlight=False)
            elif text:
                _answer(conversation, text, console)
        except LoramuxError as error:
            console.print(f"! {error}", markup=False, highlight=False, style="red")


def lines_from(console: Console) -> Iterator[str]:
    """What is typed, until Ctrl-D."""
    while True:
        try:
            yield console.input("[bold]> [/bold]" if console.is_terminal else "")
        except EOFError:
            return


def _answer(conversation: Conversation, text: str, console: Console) -> None:
    named = ""
    for piece, adapter in conversation.ask(text):
        if adapter != named:
            console.print(f"{adapter}: ", end="", markup=False, highlight=False, style="bold cyan")
            named = adapter
        console.print(piece, end="", markup=False, highlight=False)
    console.print()


def _command(conversation: Conversation, text: str) -> str:
    name, _, value = text.partition(" ")
    if name == "/models":
        return ", ".join(conversation.look())
    if name == "/new":
        conversation.forget()
        return "a new conversation"
    if name == "/model" and value:
        conversation.look()
        conversation.model = conversation.check(value.strip())
        return f"{conversation.model} answers from now on"
    return HELP


def _pieces(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "error" in data:
        raise Refused(data["error"]["message"])
    for choice in data["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        sure = "" if choice["adapter_weight"] == 1 else f" ({choice['adapter_weight']:.0%})"
        if text:
            yield text, f"{choice['adapter']}{sure}"


def _refusal(reply: httpx.Response) -> Refused:
    try:
        return Refused(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return Refused(f"{reply.url} answers {reply.status_code}; is that a loramux server?")
