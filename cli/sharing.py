"""The commands that put adapters on a hub, fetch them, find them and compare them."""

import argparse

from ..hub.publish import Change, PublishConfig, plan_publication
from ..hub.publish import publish as publish_change
from ..hub.remote import Remote
from ..hub.signing import read_private_key
from ..support.console import say, show_table


def publish(arguments: argparse.Namespace) -> None:
    remote = Remote(arguments.endpoint)
    settings = PublishConfig(
        split=arguments.split,
        revision=arguments.revision,
        private=arguments.private,
        licence=arguments.licence,
        examples=arguments.examples,
        allow=tuple(arguments.allow),
    )
    key = read_private_key(arguments.sign) if arguments.sign else None
    changes = plan_publication(arguments.place, arguments.repository, settings, remote, key=key)
    for change in changes:
        _show_change(change, remote.endpoint)
    if arguments.dry_run:
        say("nothing was sent (--dry-run)")
        return
    for change in changes:
        address = publish_change(change, remote, private=settings.private)
        say(f"published: {address}" if address else f"{change.repository}: nothing new, so no commit")


def _show_change(change: Change, endpoint: str) -> None:
    shown = [entry for entry in change.entries if entry.state != "unchanged"]
    kept, total = len(change.entries) - len(shown), sum(entry.size for entry in change.sent)
    rows = [[entry.path, entry.state, _size(entry.size) if entry.state != "removed" else ""] for entry in shown]
    title = f"{change.repository} at {change.revision} on {endpoint}"
    show_table(f"{title}: {_size(total)} to send, {kept} files unchanged", ["file", "", "size"], rows)


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"
