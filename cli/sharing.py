"""The commands that put adapters on a hub, fetch them, find them and compare them."""

import argparse

from ..bases import load_base
from ..hub.candidates import gather
from ..hub.diff import Difference
from ..hub.diff import diff as compare
from ..hub.find import describe
from ..hub.find import search as list_adapters
from ..hub.publish import Change, PublishConfig, plan_publication
from ..hub.publish import publish as publish_change
from ..hub.pull import pull as fetch
from ..hub.recommend import Recommended
from ..hub.recommend import recommend as order
from ..hub.remote import Remote
from ..hub.signing import read_private_key, read_trusted_keys
from ..support.console import say, show_table
from ..support.errors import ConfigError
from ..tasks import encode_task, load_tasks
from ..training.answers import positions_of
from ..training.run import LONGEST

_SURE = 0.9


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


def pull(arguments: argparse.Namespace) -> None:
    trusted = read_trusted_keys(arguments.trust) if arguments.trust else None
    pulled = fetch(
        arguments.repository,
        Remote(arguments.endpoint),
        to=arguments.to,
        base=arguments.base,
        force_base=arguments.force_base,
        trusted=trusted,
    )
    signed = f", signed by {pulled.signature.key_id}" if pulled.signature else ""
    say(f"{pulled.repository} at commit {pulled.commit}: {len(pulled.files)} files, every hash right{signed}")
    if pulled.left:
        say(f"not fetched (no weights, figures or text): {', '.join(pulled.left)}")
    for adapter in pulled.adapters:
        say(f"  {pulled.folder / adapter}")


def search(arguments: argparse.Namespace) -> None:
    remote = Remote(arguments.endpoint)
    found = list_adapters(
        remote,
        arguments.text,
        base=arguments.base,
        method=arguments.method,
        owner=arguments.owner,
        limit=arguments.limit,
    )
    if not found:
        say(f"{remote.endpoint} has no such adapters")
        return
    rows = [[each.repository, each.base, each.method, str(each.downloads), each.updated] for each in found]
    show_table(f"adapters on {remote.endpoint}", ["repository", "base", "method", "downloads", "changed"], rows)


def info(arguments: argparse.Namespace) -> None:
    found = describe(arguments.repository, Remote(arguments.endpoint))
    facts = {
        "commit": found.commit,
        "changed": found.found.updated,
        "base": found.found.base,
        "method": found.found.method,
        "licence": found.licence,
        "holds": f"{found.files} files, {_size(found.size)}",
        "private": "yes" if found.private else "",
        "signed": "yes; `loramux pull --trust KEYS` checks by whom" if found.is_signed else "no",
    }
    say("\n".join([found.repository, *(f"  {name}: {value}" for name, value in facts.items() if value)]))
    rows = [
        [
            adapter.folder,
            *(adapter.config.facts.get(key, "") for key in ("kind", "rank", "targets")),
            _size(adapter.size),
            "; ".join(f"{name} {100 * value:.1f}" for name, value in adapter.scores.items()),
        ]
        for adapter in found.adapters
    ]
    show_table("adapters", ["folder", "kind", "rank", "targets", "size", "scores, %"], rows)


def diff(arguments: argparse.Namespace) -> None:
    found = compare(arguments.first, arguments.second, Remote(arguments.endpoint))
    for name, only in ((arguments.first, found.only_first), (arguments.second, found.only_second)):
        if only:
            say(f"only in {name}: {', '.join(only)}")
    for pair in found.pairs:
        _show_pair(pair, arguments.first, arguments.second, layers=len(found.pairs) == 1)


def _show_pair(pair: Difference, first: str, second: str, *, layers: bool) -> None:
    rows = [[key, *values] for key, values in pair.settings.items()]
    rows += [[name, *(_percent(value) for value in both)] for name, both in pair.scores.items() if both[0] != both[1]]
    if rows:
        show_table(f"{pair.folder}: what differs (scores in %)", ["", first, second], rows)
    else:
        say(f"{pair.folder}: same settings and scores")
    if pair.layers is None:
        say("weights: only plain LoRAs of one base are compared")
        return
    apart = [layer.apart for layer in pair.layers]
    say(f"weights: {sum(apart) / len(apart):.3g} apart on average, {max(apart):.3g} at most (0 is the same)")
    if layers:
        lines = [
            [layer.name, f"{layer.first:.3g}", f"{layer.second:.3g}", f"{layer.apart:.3g}", _cosine(layer.cosine)]
            for layer in pair.layers
        ]
        show_table("updates by layer", ["layer", "norm", "norm of the other", "apart", "cosine"], lines)


def recommend(arguments: argparse.Namespace) -> None:
    tasks = load_tasks(arguments.task)
    if len(tasks) != 1:
        names = ", ".join(task.name for task in tasks)
        raise ConfigError(f"{arguments.task}: holds {len(tasks)} tasks ({names}); name a file with one")
    choice = gather(arguments.sources, Remote(arguments.endpoint), base=arguments.base, limit=arguments.limit)
    model, tokenizer = load_base(choice.base, revision=choice.revision)
    encoded = encode_task(tasks[0], tokenizer, max_length=positions_of(model) or LONGEST)
    found = order(
        encoded, choice.candidates, model, tokenizer, shots=arguments.shots, trial_steps=arguments.trial_steps
    )
    rows = [
        [
            each.candidate.name,
            f"{each.loss:.3f}",
            f"{each.gain:+.3f}",
            "" if each.similarity is None else f"{each.similarity:.3f}",
            _percent(each.measured),
            f"{each.first:.0%}",
        ]
        for each in found
    ]
    used = min(arguments.shots, len(encoded.splits["train"]))
    against = "a fresh LoRA" if arguments.trial_steps else "the base"
    head = ["adapter", "loss", f"better than {against} by", "prompts alike", "measured, %", "first in"]
    show_table(f"for {tasks[0].name}, from {used} of its examples (loss: nats per answer token)", head, rows)
    say(verdict(found, against))
    if not arguments.trial_steps:
        say("adapters were judged as they are; a short trial of each finds the best more often (--trial-steps 8)")


def verdict(found: list[Recommended], against: str) -> str:
    """What the order comes to, in one sentence."""
    best = found[0]
    if best.helps < _SURE:
        return f"{best.candidate.name} is first, but better than {against} in {best.helps:.0%} of resamples only"
    more = "" if best.first >= _SURE else "; more examples would tell more (--shots)"
    return (
        f"{best.candidate.name} promises most, and stays first in {best.first:.0%} of resamples of the examples{more}"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
