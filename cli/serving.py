"""`loramux serve` and `loramux chat`."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError

KEY_VARIABLE = "LORAMUX_API_KEY"


def add_serve(parser: argparse.ArgumentParser) -> None:
    """What `loramux serve` takes; the function that runs it is left in `run`."""
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="finished runs; their exports are served")
    parser.add_argument("--base", metavar="MODEL", help="a Hub id or a folder (default: that of the first run)")
    parser.add_argument("--adapters", action="append", type=Path, metavar="DIR", help="PEFT LoRAs, one folder each")
    parser.add_argument("--host", help="default: 127.0.0.1; others need keys")
    parser.add_argument("--port", type=int, metavar="N", help="default: 8000; 0 takes a free one")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML; docs/serving.md lists them")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one more setting, such as limits.queue=64 (may be repeated)",
    )
    parser.set_defaults(run=_serve)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """What `loramux chat` takes; the function that runs it is left in `run`."""
    parser.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="default: port 8000 here"
    )
    parser.add_argument("--model", metavar="NAME", help="who answers (default: auto, or the base)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help=f"an API key (or {KEY_VARIABLE})")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: as the server says)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest answer")
    parser.set_defaults(run=_chat)


def _serve(arguments: argparse.Namespace) -> None:
    from ..serving.config import load_serve_config
    from ..serving.launch import open_service
    from ..serving.server import serve
    from ..serving.threads import compute_on_one_thread
    from .commands import quieten_libraries

    quieten_libraries()
    named: dict[str, Any] = {
        "runs": arguments.runs,
        "adapters": arguments.adapters,
        "base": arguments.base,
        "host": arguments.host,
        "port": arguments.port,
    }
    given = {key: value for key, value in named.items() if value not in (None, [])}
    config = load_serve_config(arguments.config, arguments.set, given)
    service, engine = open_service(config, os.environ, threads=compute_on_one_thread())
    serve(service, engine)


def _chat(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from ..serving.chat import Conversation, lines_from, talk

    conversation = Conversation(
        arguments.url,
        model=arguments.model,
        key=_key(arguments.key_file),
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
    )
    console = Console(soft_wrap=True)
    if console.is_terminal:
        console.print(f"{conversation.model} answers; /help tells more", markup=False, style="dim")
    talk(conversation, lines_from(console), console)


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the key cannot be read: {getattr(error, 'strerror', None) or error}") from None
