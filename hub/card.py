"""The README.md of a published repository: what it holds, what it can do, how to use it, how it was made.

The card is made of parts between markers. Publishing again replaces the parts and keeps every word around them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..adapters import find_method
from ..adapters.card import cell, metadata, pin
from ..bases import BUNDLED
from ..support.errors import ConfigError
from ..training.report import COLUMNS, EXPORT_NOTE, caption, export_table, header, markdown_table, percent, rows
from .source import MIXTURE, Adapter, Source

CARD = "README.md"
_PART = re.compile(r"<!-- loramux:(?P<name>\w+) -->\n.*?<!-- /loramux:(?P=name) -->", re.DOTALL)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LOCAL_BASE = "tiny"
_SHOWN_IN_INDEX = ("exported", "named", "auto", "adapted")
_LISTS = ("tags", "datasets", "metrics")


def write_card(source: Source, repository: str, *, licence: str | None = None, existing: str | None = None) -> str:
    """The card of a repository.

    Args:
        repository: `owner/name`.
        licence: the Hub's name of it, such as `apache-2.0`.
        existing: the card that is there; what people wrote into it stays.

    Raises:
        ConfigError: the licence's name has a form that the Hub does not know, or the existing card cannot be read.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ConfigError(f"licence {licence!r}: give it as the Hub names it, such as apache-2.0, mit or cc-by-4.0")
    before = _read(existing, repository) if existing is not None else None
    licence = licence or (before.data.get("license") if before else None)
    data = _card_data(source, repository, licence, _theirs(before))
    parts = {name: text for name, text in _parts(source, repository, licence).items() if text}
    if before is None:
        return _assembled(data, f"# {repository.partition('/')[2]}\n\n" + _joined(parts))
    kept = {key: value for key, value in before.data.to_dict().items() if key != "model-index"}
    lists = {key: _both(data.get(key), kept[key]) for key in _LISTS if kept.get(key)}
    return _assembled({**kept, **data, **lists}, merged(before.text.strip("\n"), parts))


def _both(ours: list[str] | None, theirs: list[str] | str) -> list[str]:
    """A list of metadata with what people added to it."""
    return list(dict.fromkeys([*(ours or ()), *([theirs] if isinstance(theirs, str) else theirs)]))


def _theirs(before: ModelCard | None) -> list[EvalResult]:
    """The results that people added; ours are named after the columns of our table."""
    if before is None or not isinstance(before.data, ModelCardData):
        return []
    ours = tuple(f" ({COLUMNS[column]})" for column in _SHOWN_IN_INDEX)
    return [result for result in before.data.eval_results or () if not (result.metric_name or "").endswith(ours)]


def merged(text: str, parts: Mapping[str, str]) -> str:
    """Put parts into a text: each in its place where it has one, the others at the end; parts that are gone go."""

    def renewed(match: re.Match[str]) -> str:
        name = match["name"]
        return _marked(name, parts[name]) if name in parts else ""

    there = {match["name"] for match in _PART.finditer(text)}
    new = {name: part for name, part in parts.items() if name not in there}
    return "\n\n".join(part for part in (_PART.sub(renewed, text).strip("\n"), _joined(new).strip("\n")) if part) + "\n"


def _read(existing: str, repository: str) -> ModelCard:
    try:
        return ModelCard(existing.replace("\r\n", "\n"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{repository}: the metadata of the {CARD} that is there cannot be read ({' '.join(str(error).split())}); "
            "mend it there first, so that nothing of it is lost"
        ) from None


def _assembled(data: Mapping[str, Any], body: str) -> str:
    head = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n{body.strip()}\n"


def _joined(parts: Mapping[str, str]) -> str:
    return "\n\n".join(_marked(name, text) for name, text in parts.items())


def _marked(name: str, text: str) -> str:
    return f"<!-- loramux:{name} -->\n{text.strip()}\n<!-- /loramux:{name} -->"


def _card_data(source: Source, repository: str, licence: str | None, theirs: Sequence[EvalResult]) -> dict[str, Any]:
    data = metadata({"method": source.method}, source.base.name)
    if not source.method:
        data["tags"] = [tag for tag in data["tags"] if not tag.startswith("loramux")]
    datasets = list(dict.fromkeys(a.dataset for a in source.adapters if a.dataset))
    metrics = list(dict.fromkeys(a.metric for a in source.adapters if a.metric))
    head = ModelCardData(**data, license=licence, datasets=datasets or None, metrics=metrics or None).to_dict()
    name = repository.partition("/")[2]
    # One by one: together, results of tasks with the same dataset would become one entry.
    groups = [*(_eval_results(adapter) for adapter in source.adapters), *([result] for result in theirs)]
    indices = [eval_results_to_model_index(name, group) for group in groups]
    results = [entry for index in indices for model in index for entry in model["results"]]
    return {**head, "model-index": [{"name": name, "results": results}]} if results else head


def _eval_results(adapter: Adapter) -> list[EvalResult]:
    """What the Hub lists as results: the export's score, and the routed model's beside it."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name=adapter.task,
            dataset_type=adapter.dataset or adapter.task,
            dataset_name=adapter.task,
            dataset_config=adapter.dataset_config,
            dataset_split=adapter.split,
            metric_type=adapter.metric,
            metric_name=f"{adapter.metric} ({COLUMNS[column]})",
            metric_value=round(adapter.scores[column], 6),
        )
        for column in _SHOWN_IN_INDEX
        if column in adapter.scores
    ]


def _parts(source: Source, repository: str, licence: str | None) -> dict[str, str]:
    return {
        "summary": _summary(source, licence),
        "use": _use(source, repository),
        "tasks": _tasks(source.adapters),
        "results": _results(source),
        "routing": _routing(source),
        "training": _training(source),
    }


def _summary(source: Source, licence: str | None) -> str:
    count, base = len(source.adapters), source.base
    revision = f" at revision `{base.revision}`" if base.revision else ""
    where = "It comes with loramux." if base.name == BUNDLED else f"See [its page](https://huggingface.co/{base.name})."
    if count == 1:
        (adapter,) = source.adapters
        what = f"A LoRA adapter for the task `{adapter.task}`: {adapter.description or 'no description was given.'}"
    elif count:
        what = f"LoRA adapters for {count} tasks: {', '.join(f'`{a.task}`' for a in source.adapters)}."
    else:
        what = "A mixture of LoRA experts with its router."
    lines = [f"Base: `{base.name}`{revision}. {where}", *_origin(source, licence)]
    return f"{what}\n\n" + "\n".join(f"- {line}" for line in lines)


def _origin(source: Source, licence: str | None) -> list[str]:
    lines = []
    if source.method:
        together = f"{len(source.adapters)} tasks" if len(source.adapters) > 1 else "several tasks"
        lines.append(f"Method: `{source.method}` ({find_method(source.method).paper}), trained on {together} at once.")
    if any(adapter.report for adapter in source.adapters):
        lines.append("Each task is a plain LoRA that PEFT loads without loramux.")
    if source.mixture:
        lines.append(f"`{MIXTURE}/` holds all experts and their router, for loramux.")
    lines.append(f"Licence: {licence}." if licence else "Licence: none was given; ask the owner before you use it.")
    return lines


def _use(source: Source, repository: str) -> str:
    base, tuned = source.base, f'"{repository}"'
    place, note = base.name, ""
    if base.name == BUNDLED:
        place, note = _LOCAL_BASE, f"The base comes with loramux: `loramux base --to {_LOCAL_BASE}` writes it out.\n\n"
    if not source.adapters:
        return f"## How to use it\n\n{note}{_routed_use(source, repository, place)}"
    in_folders = len(source.adapters) > 1 or source.mixture is not None
    task = source.adapters[0].task
    subfolder = f', subfolder="{task}"' if in_folders else ""
    only = f' --include "{task}/*"' if in_folders else ""
    folder = f"adapter/{task}" if in_folders else "adapter"
    rank = int(source.adapters[0].report.get("rank", 0))
    largest = f" --max-lora-rank {rank}" if rank else ""
    texts = [
        f"## How to use it\n\n{note}With PEFT:\n",
        f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}"{pin(base.revision)})
base = AutoModelForCausalLM.from_pretrained("{place}"{pin(base.revision)})
model = PeftModel.from_pretrained(base, {tuned}{subfolder})
```

With vLLM:

```sh
hf download {repository}{only} --local-dir adapter
vllm serve {place} --enable-lora{largest} --lora-modules {task}={folder}
```""",
    ]
    if source.mixture:
        texts.append("\n" + _routed_use(source, repository, place))
    return "\n".join(texts)


def _routed_use(source: Source, repository: str, place: str) -> str:
    named = f', routing_tasks="{source.tasks[0].name}"' if source.tasks else ""
    return f"""With loramux, all tasks at once; `loramux pull {repository} --to adapter` checks what it fetches:

```python
import loramux.adapters  # tells PEFT about this kind of adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{place}"{pin(source.base.revision)})
model = PeftModel.from_pretrained(base, "adapter/{MIXTURE}")
model.generate(**prompt{named})  # the task is named; a method whose router reads prompts also decides itself
```"""


def _tasks(adapters: Sequence[Adapter]) -> str:
    if not any(adapter.examples or adapter.description for adapter in adapters):
        return ""
    texts = ["## Tasks"]
    for adapter in adapters:
        about = f"\n\n{adapter.description}" if adapter.description else ""
        texts.append(f"### {adapter.task}{about}\n\n{_examples(adapter)}")
    return "\n\n".join(text.strip() for text in texts)


def _examples(adapter: Adapter) -> str:
    if not adapter.examples:
        return ""
    if all(example.answer is None for example in adapter.examples):
        head = ["input", "answer"]
        lines = [[_said(example.prompt), _said(example.wanted)] for example in adapter.examples]
    else:
        head = ["input", "it answers", "right is"]
        lines = [[_said(e.prompt), _said(e.answer or ""), _said(e.wanted)] for e in adapter.examples]
    rule = ["---"] * len(head)
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))
    return f"Examples of its {adapter.split} split:\n\n{table}"


def _results(source: Source) -> str:
    if source.results is not None and len(source.adapters) != 1:
        texts = [
            "## Results",
            caption(source.results)[0].upper() + caption(source.results)[1:] + ".",
            markdown_table(header(source.results), rows(source.results)),
            "![Scores of every task](scores.png)" if "scores.png" in source.files else "",
        ]
        if source.results.exports:
            texts += ["### What the exports lost", EXPORT_NOTE, markdown_table(*export_table(source.results))]
        return "\n\n".join(text for text in texts if text)
    scored = [adapter for adapter in source.adapters if adapter.scores]
    texts = [_scores(adapter) for adapter in scored]
    texts += [_fidelity(adapter) for adapter in source.adapters if adapter.report]
    return "\n\n".join(["## Results", *texts]) if texts else ""


def _scores(adapter: Adapter) -> str:
    lines = [[COLUMNS[column], percent(adapter.scores[column])] for column in COLUMNS if column in adapter.scores]
    table = markdown_table(["system", adapter.metric], lines)
    return f"`{adapter.metric}` of `{adapter.task}` on its {adapter.split} split, in per cent:\n\n{table}"


def _fidelity(adapter: Adapter) -> str:
    report, found = adapter.report, adapter.report["fidelity"]
    text = (
        f"`{adapter.task}` is exported from a routed `{report['method']}` mixture ({report['how']}, rank "
        f"{report['rank']}). On {found['tokens']} held-out answer tokens it is {found['token_kl']:.2e} nats per token "
        f"away from the mixture (the base alone: {found['base_kl']:.2e}), and the most likely token is the same in "
        f"{percent(found['top1_agreement'])} %."
    )
    return text + (f" **Lossy export:** {'; '.join(report['faults'])}." if report["faults"] else "")


def _routing(source: Source) -> str:
    pictures = [name for name in source.files if name == "routing.png"]
    if not pictures:
        return ""
    return "## Routing\n\nWhich expert each task's tokens go to, as the router decides:\n\n![Routing](routing.png)"


def _training(source: Source) -> str:
    texts = []
    if source.recipe:
        texts.append(f"<details>\n<summary>Recipe</summary>\n\n```yaml\n{source.recipe.strip()}\n```\n\n</details>")
    if "losses.png" in source.files:
        texts.append("![Losses](losses.png)")
    if source.environment:
        texts.append(_environment(source.environment))
    return "\n\n".join(["## How it was trained", *texts]) if texts else ""


def _environment(noted: Mapping[str, Any]) -> str:
    versions = {"python": noted.get("python"), **noted.get("packages", {})}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    machine = noted.get("hardware", {})
    where = ", ".join(machine.get("gpus") or ()) or f"{machine.get('cpus')} CPU cores ({machine.get('machine')})"
    return f"Seed {noted.get('seed')}, on {where}. {told}."


def _said(text: str) -> str:
    """Somebody's text in a table: one line, and nothing in it is read as Markdown or HTML."""
    plain = cell(text).replace("`", "'").replace("<!--", "<! --").replace("-->", "-- >")
    return f"`{plain}`" if plain else ""
