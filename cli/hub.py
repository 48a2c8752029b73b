"""`loramux hub`: a hub of one's own, its tokens and organisations, and copies of hubs."""

import argparse
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..support.console import say, show_table
from ..support.errors import RunError

if TYPE_CHECKING:
    from ..hub.server import Storage

Commands = argparse._SubParsersAction
DEFAULT_ROOT = Path.home() / ".loramux" / "hub"
DEFAULT_PORT = 8765


def add_parsers(commands: Commands) -> None:
    """The commands of `loramux hub`; each leaves the function that runs it in `run`."""
    for add in (_add_serve, _add_token, _add_org, _add_mirror, _add_clean):
        add(commands)


def _add_serve(commands: Commands) -> None:
    parser = _command(commands, "serve", "serve a hub", _serve)
    _add_root(parser)
    parser.add_argument("--host", default="127.0.0.1", help="other than this machine only with tokens (127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"default: {DEFAULT_PORT}")
    parser.add_argument("--max-file-gib", type=int, default=64, metavar="N", help="the largest file (default: 64)")


def _add_token(commands: Commands) -> None:
    parser = commands.add_parser("token", help="make, list and revoke tokens")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    create = _command(actions, "create", "make a token, and its user where there is none", _create_token)
    create.add_argument("user", metavar="USER")
    create.add_argument("--read-only", action="store_true", help="it may download private repos, and change nothing")
    create.add_argument("--days", type=_days, metavar="N", help="it expires then (default: never)")
    create.add_argument("--note", default="", help="what it is for, shown by `list`")
    revoke = _command(actions, "revoke", "make a token invalid", _revoke_token)
    revoke.add_argument("id", metavar="ID", help="see `loramux hub token list`")
    for action in (create, revoke, _command(actions, "list", "show the tokens, without their secrets", _list_tokens)):
        _add_root(action)


def _add_org(commands: Commands) -> None:
    parser = commands.add_parser("org", help="make and list organisations, add and remove members")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add = _command(actions, "add", "make an organisation, or add members to one", _add_members)
    add.add_argument("name", metavar="ORG")
    add.add_argument("users", nargs="*", metavar="USER")
    remove = _command(actions, "remove", "take a member out of an organisation", _remove_member)
    remove.add_argument("name", metavar="ORG")
    remove.add_argument("user", metavar="USER")
    for action in (add, remove, _command(actions, "list", "show organisations and their members", _list_orgs)):
        _add_root(action)


def _add_mirror(commands: Commands) -> None:
    parser = _command(commands, "mirror", "copy all repos of one hub to another; again brings what is new", _mirror)
    parser.add_argument("source", metavar="FROM", help="such as http://127.0.0.1:8765")
    parser.add_argument("target", metavar="TO", help="such as https://huggingface.co")
    parser.add_argument("--author", metavar="NAME", help="only repos of this user or organisation")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="only this repo")
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-token-file",
            type=Path,
            metavar="FILE",
            help=f"holds a token for the {side} hub; no other is sent",
        )


def _add_clean(commands: Commands) -> None:
    parser = _command(commands, "clean", "free what deleted repos and given-up uploads left", _clean)
    _add_root(parser)
    parser.add_argument("--older-than-hours", type=float, default=24.0, metavar="H", help="default: 24")


def _command(
    commands: Commands, name: str, help_: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _days(text: str) -> int:
    days = int(text)
    if days < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}; leave it out for a token without end")
    return days


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, default=DEFAULT_ROOT, metavar="DIR", help="the hub's folder (default: ~/.loramux/hub)"
    )


# What the commands do. Each imports what it needs: the server needs no torch, and should start at once.


def _serve(arguments: argparse.Namespace) -> None:
    from ..hub.server import Policy, serve

    policy = Policy(max_file_bytes=arguments.max_file_gib << 30)
    serve(arguments.root, host=arguments.host, port=arguments.port, policy=policy)


def _storage(arguments: argparse.Namespace, *, make: bool = False) -> "Storage":
    """The hub in the folder that was named; where there is none, `make` tells whether one is made."""
    from ..hub.server import Storage

    root: Path = arguments.root
    if not make and not (root / "hub.sqlite").is_file():
        raise RunError(f"{root}: no hub there; name the folder that `loramux hub serve` has (--root DIR)")
    return Storage(root)


def _create_token(arguments: argparse.Namespace) -> None:
    lifetime = timedelta(days=arguments.days) if arguments.days is not None else None
    token = _storage(arguments, make=True).accounts.create_token(
        arguments.user, read_only=arguments.read_only, note=arguments.note, lifetime=lifetime
    )
    say(f"{token}\nThis is the only time it is shown: export HF_TOKEN=... where clients run.")
    say(f"It is for the hub in {arguments.root}.")


def _list_tokens(arguments: argparse.Namespace) -> None:
    rows = [
        [token.id, token.user, token.role, token.created[:10], _until(token.expires, token.revoked), token.note]
        for token in _storage(arguments).accounts.tokens()
    ]
    show_table(f"tokens of {arguments.root}", ["id", "user", "role", "made", "valid", "note"], rows)


def _until(expires: str | None, revoked: str | None) -> str:
    if revoked is not None:
        return f"revoked {revoked[:10]}"
    return "for ever" if expires is None else f"until {expires[:16]}"


def _revoke_token(arguments: argparse.Namespace) -> None:
    _storage(arguments).accounts.revoke(arguments.id)
    say(f"{arguments.id} is invalid from now on")


def _add_members(arguments: argparse.Namespace) -> None:
    _storage(arguments, make=True).accounts.add_members(arguments.name, arguments.users)
    _list_orgs(arguments)


def _remove_member(arguments: argparse.Namespace) -> None:
    _storage(arguments).accounts.remove_member(arguments.name, arguments.user)
    _list_orgs(arguments)


def _list_orgs(arguments: argparse.Namespace) -> None:
    organizations = _storage(arguments).accounts.organizations()
    rows = [[name, ", ".join(users)] for name, users in organizations.items()]
    show_table(f"organisations of {arguments.root}", ["organisation", "members"], rows)


def _mirror(arguments: argparse.Namespace) -> None:
    from ..hub.mirror import mirror
    from ..hub.remote import Remote

    source = Remote(arguments.source, _token(arguments.source_token_file))
    target = Remote(arguments.target, _token(arguments.target_token_file))
    done = mirror(source, target, author=arguments.author, only=arguments.repo)
    say(f"{done.repos} repos looked at, {done.commits} commits made at {arguments.target}")
    if done.failed:
        names = ", ".join(done.failed)
        raise RunError(f"not copied: {names}; the same command goes on where it stopped")


def _token(file: Path | None) -> str | Literal[False]:
    """A token is no argument: other users of a machine see the arguments of its programs.

    Without a file there is none: the one that the user is logged in with may be for neither of the two hubs.
    """
    if file is None:
        return False
    token = file.read_text(encoding="utf-8").strip()
    if not token:
        raise RunError(f"{file}: holds no token; write one, or leave the file out")
    return token


def _clean(arguments: argparse.Namespace) -> None:
    from ..hub.server.clean import clean

    cleaned = clean(_storage(arguments), timedelta(hours=arguments.older_than_hours))
    say(f"{cleaned.files} files removed, {cleaned.size / 2**20:.1f} MiB freed")
