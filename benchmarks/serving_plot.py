"""The picture of docs/serving.md, from what serving_steps.py and serving_throughput.py measured.

    python benchmarks/serving_plot.py --steps steps-float32.json steps-bfloat16.json \\
        --throughput throughput-float32.json throughput-bfloat16.json --to docs/pictures/serving_speed.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"ours": "#2a6f97", "stock": "#c9704b", "PEFT": "#c9704b", "base": "#9aa5b1"}


def bars(axis: Any, title: str, unit: str, series: dict[str, dict[str, float]]) -> None:
    """One group of horizontal bars per measured file, such as float32 and bfloat16."""
    labels, values, colours = [], [], []
    for dtype, figures in series.items():
        for name, value in figures.items():
            labels.append(f"{name} ({dtype})")
            values.append(value)
            colours.append(next(colour for start, colour in COLOURS.items() if name.startswith(start)))
    axis.barh(labels, values, color=colours)
    axis.bar_label(axis.containers[0], fmt="%.4g", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def read(files: list[Path], key: str) -> dict[str, dict[str, float]]:
    return {file.stem.rsplit("-", 1)[-1]: json.loads(file.read_text())[key] for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, nargs="+", required=True)
    parser.add_argument("--throughput", type=Path, nargs="+", required=True)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(3, 1, figsize=(8, 8.5), layout="constrained")
    bars(axes[0], "a decoding step, 32 rows", "ms, less is better", read(options.steps, "decode"))
    bars(axes[1], "prefill, 32 x 64 tokens", "ms, less is better", read(options.steps, "prefill"))
    tokens = read(options.throughput, "tokens per second, 8 clients")
    bars(axes[2], "8 clients, 8 adapters", "tokens per second, more is better", tokens)
    figure.savefig(options.to, dpi=130)


if __name__ == "__main__":
    main()
