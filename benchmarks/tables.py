"""The tables of `README.md`, made of the files in `results/`.

    python benchmarks/tables.py            # write them anew
    python benchmarks/tables.py --check    # say whether they are as the files say

A table stands between the line `<!-- results/FILE.json -->`, with one file or more, and the line `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = re.compile(r"(<!-- (results/[^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Row = dict[str, str]


def of_stock(values: dict[str, float], stock: dict[str, float] | None, name: str) -> str:
    """A number as a share of stock's."""
    return f"{values[name] / stock[name]:.2f}" if stock else ""


def best_stock(arms: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """The fastest arm of stock, if one has run."""
    stock = [values for arm, values in arms.items() if arm.startswith("stock")]
    return min(stock, key=lambda values: values["ms"]) if stock else None


def settings_of(arm: str, cell: dict[str, Any], found: dict[str, Any]) -> str:
    """What was switched on in an arm, beside what is the same in all files."""
    own = {**found, **cell.get("best", {}).get(arm, {})}
    said = ["checkpointing"] if own["checkpointing"] == "on" else []
    if own.get("accumulation", 1) > 1:
        said.append(f"{own['accumulation']} passes a step")
    said += {"on": ["compiled"], "reduce-overhead": ["CUDA graphs"]}.get(own.get("compile", "off"), [])
    if own.get("compile", "off") == "off" and cell["median"].get(arm, {}).get("replayed"):
        said.append("CUDA graphs by itself")
    if own.get("liger", "off") == "on":
        said.append("Liger")
    if own.get("expert_checkpointing", "activation") != "activation" and arm.startswith("ours"):
        said.append(f"experts' {own['expert_checkpointing']}")
    return ", ".join(said)


def train_step(found: dict[str, Any]) -> Iterator[Row]:
    """A row for each arm of each cell."""
    for cell in found["results"]:
        what, arms = cell["cell"], cell["median"]
        stock = best_stock(arms)
        for arm in [*arms, *cell.get("failed", {})]:
            row = {
                "model": what["model"],
                "trains": "all" if what["training"] == "full" else "LoRA",
                "tokens a pass": f"{what['tokens']:,}",
                "arm": arm,
                "with": settings_of(arm, cell, found),
            }
            values = arms.get(arm)
            if values is None:
                yield row | {"tokens/s": "out of memory" if "out of memory" in cell["failed"][arm] else "failed"}
                continue
            yield row | {
                "tokens/s": f"{values['tokens_per_s']:,.0f}",
                "of stock": of_stock(values, stock, "tokens_per_s"),
                "peak MiB": f"{values['peak_mib']:,.0f}",
                "of stock's": of_stock(values, stock, "peak_mib"),
            }


def expert_block(found: dict[str, Any]) -> Iterator[Row]:
    """A row for each arm of each cell."""
    for cell in found["results"]:
        what = cell["cell"]
        for arm, values in cell.get("median", {}).items():
            yield {
                "trains": {"full": "all", "lora": "LoRA", "none": "nothing"}[what["training"]],
                "tokens": f"{what['tokens']:,}",
                "experts": str(what["experts"]),
                "routing": what["routing"],
                "arm": arm,
                "forward ms": f"{values['forward_ms']:.2f}",
                "backward ms": f"{values['backward_ms']:.2f}",
                "both ms": f"{values['ms']:.2f}",
                "TFLOP/s": f"{values['tflops']:.0f}",
                "peak MiB": f"{values['peak_mib']:,.0f}",
            }


def expert_lora(found: dict[str, Any]) -> Iterator[Row]:
    """A row for each arm of each size."""
    for size, cell in found["results"].items():
        frozen = cell["median"]["frozen"]["ms_per_step"]
        for arm, values in cell["median"].items():
            yield {
                "size and dtype": size,
                "arm": arm,
                "ms a step": f"{values['ms_per_step']:.1f}",
                "of frozen": f"{values['ms_per_step'] / frozen:.2f}",
                "peak MiB": f"{values['peak_mib']:.0f}",
                "MiB kept for backward": f"{values['kept_mib']:.1f}",
            }


KINDS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    each.__name__: each for each in (train_step, expert_block, expert_lora)
}


def table(rows: list[Row]) -> str:
    """Markdown; what a row repeats of the one before is left out up to the first difference."""
    names = list(max(rows, key=len))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    before: Row = {}
    for row in rows:
        shown, same = dict(row), True
        for name in names[: names.index("arm")]:
            same = same and row[name] == before.get(name)
            shown[name] = "" if same else row[name]
        lines.append(f"| {' | '.join(shown.get(name, '') for name in names)} |".replace("  |", " |"))
        before = row
    return "\n".join(lines) + "\n"


def made(match: re.Match[str]) -> str:
    """What stands between the two lines."""
    head, files, _, end = match.groups()
    rows: list[Row] = []
    for file in files.split(", "):
        kind = next(kind for kind in KINDS if Path(file).name.startswith(kind))
        rows += KINDS[kind](json.loads((HERE / file).read_text()))
    return f"{head}{table(rows)}{end}"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is another")
    options = parser.parse_args()
    readme = HERE / "README.md"
    text = readme.read_text()
    anew, count = TABLE.subn(made, text)
    print(f"{count} tables")
    if options.check and anew != text:
        raise SystemExit("benchmarks/README.md is not as benchmarks/results say: run python benchmarks/tables.py")
    if not options.check:
        readme.write_text(anew)


if __name__ == "__main__":
    main()
