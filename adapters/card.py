"""The model card of an exported adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard


def write_card(
    folder: Path, report: Mapping[str, Any], base: str, revision: str | None, facts: Mapping[str, Any]
) -> None:
    """Write README.md, with metadata the Hub understands.

    Args:
        report: an `ExportReport` as data.
        facts: `description`, `examples` (rows of `input` and `target`), `scores` (name to number) and the `split` they
            are of, `base_note` (where to get an unusual base) and `recipe` (text).
    """
    sections = [
        f"# {report['task']}\n\n{facts.get('description') or 'A task adapter.'}",
        _examples(facts.get("examples", ())),
        _scores(facts.get("scores", {}), facts.get("split", "test")),
        _fidelity(report),
        _loading(base, revision, facts.get("base_note", "")),
    ]
    if facts.get("recipe"):
        sections.append(f"## How it was trained\n\n```yaml\n{facts['recipe'].strip()}\n```")
    body = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{yaml.safe_dump(metadata(report, base), sort_keys=False)}---\n\n{body}\n").save(
        folder / "README.md"
    )


def import_card(method: str, base: str, revision: str | None, experts: Sequence[Mapping[str, str]]) -> str:
    """The README.md of a mixture of LoRAs that were trained elsewhere.

    Args:
        experts: for each the same facts, `task` among them; they are shown as code, since strangers wrote some.
    """
    head = list(experts[0])
    rows = [" | ".join(_code(expert[fact]) for fact in head) for expert in experts]
    table = "\n".join(f"| {row} |" for row in [" | ".join(head), "|".join("---" for _ in head), *rows])
    return f"""---
{yaml.safe_dump(metadata({"method": method}, base), sort_keys=False)}---

# A mixture of {len(experts)} imported LoRAs

The experts of this `{method}` mixture were trained elsewhere, each alone. `loramux import` put them together as they
are; their own licences hold.

{table}

## Use

```python
import loramux.adapters  # tells PEFT about this kind of adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}"{pin(revision)})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
model.generate(**prompt, routing_tasks="{experts[0]["task"]}")
```
"""


def metadata(report: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What the Hub must know of any adapter of ours; `report` tells the method."""
    return {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loramux", f"loramux:{report['method']}", f"base_model:adapter:{base}"],
    }


def _examples(examples: Any) -> str:
    if not examples:
        return ""
    rows = "\n".join(f"| {cell(row['input'])} | {cell(row['target'])} |" for row in examples)
    return f"| input | answer |\n|---|---|\n{rows}"


def _scores(scores: Mapping[str, float], split: str) -> str:
    if not scores:
        return ""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
    return f"## Scores\n\n| system | {split} metric |\n|---|---|\n{rows}"


def _fidelity(report: Mapping[str, Any]) -> str:
    fidelity = report["fidelity"]
    text = (
        f"## Fidelity\n\nExported from a routed `{report['method']}` mixture ({report['how']}, rank {report['rank']}) "
        f"and compared with it on {fidelity['tokens']} held-out answer tokens:\n\n"
        "| measure | value |\n|---|---|\n"
        f"| divergence, nats per token | {fidelity['token_kl']:.2e} |\n"
        f"| the same for the base alone | {fidelity['base_kl']:.2e} |\n"
        f"| same most likely token | {fidelity['top1_agreement']:.4f} |\n"
        f"| largest logit difference | {fidelity['max_logit_difference']:.2e} |"
    )
    if report["faults"]:
        text += "\n\n**Lossy export:** " + "; ".join(report["faults"]) + "."
    return text


def _loading(base: str, revision: str | None, note: str) -> str:
    note = f"{note}\n\n" if note else ""
    return f"""## Use

{note}```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}"{pin(revision)})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

vLLM: `vllm serve {base} --enable-lora --lora-modules NAME=THIS_FOLDER`"""


def pin(revision: str | None) -> str:
    """The argument of `from_pretrained` that fixes the base's commit."""
    return f', revision="{revision}"' if revision else ""


def _code(text: str) -> str:
    return f"`{cell(text.replace('`', ''))}`" if text else ""


def cell(text: str) -> str:
    """Text as the cell of a Markdown table."""
    return " ".join(str(text).replace("|", "\\|").split())
