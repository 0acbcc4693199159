"""The pictures of a run in one page that needs nothing else, for `hf-moe-accel report` and the demo."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from hf_moe_accel.callbacks import pictures
from hf_moe_accel.callbacks.run_file import METRICS, Run

FOLDER = "report"
PAGE = "index.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
img { max-width: 100%; } pre { background: #f4f6f8; padding: 1rem; overflow-x: auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
tr { border-bottom: 1px solid #e4e7eb; }
td code { overflow-wrap: anywhere; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def write_report(run: Run, run_dir: Path, title: str) -> Path:
    """Draw everything, and return the path of the page. The run has logged a loss and counted tokens."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    drawn = {
        "overview": pictures.overview(run, title),
        "balance": pictures.balance(run),
        "layers": pictures.layers(run),
        "speed": pictures.speed(run) if run.series("moe/time/forward") else None,
        "ranks": pictures.ranks(run) if run.about["world_size"] > 1 else None,
    }
    shown = {name: picture for name, picture in drawn.items() if picture is not None}
    for name, picture in shown.items():
        (folder / f"{name}.png").write_bytes(picture)
    path = folder / PAGE
    path.write_text(_page(run, title, shown), encoding="utf-8")
    return path


def title_of(run: Run) -> str:
    """What was trained, on what, in one line."""
    experts = " or ".join(map(str, sorted(set(run.about["num_experts"]))))
    ranks = f"{run.about['world_size']} rank{'s' * (run.about['world_size'] > 1)}"
    return f"{run.about['model']}, {len(run.about['num_experts'])} MoE layers of {experts} experts, on {ranks}"


def _page(run: Run, title: str, shown: dict[str, bytes]) -> str:
    images = "\n".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>'
        for name, picture in shown.items()
    )
    newest = [(name, run.series(name)[-1][1], meaning) for name, meaning in METRICS.items() if run.series(name)]
    numbers = "\n".join(
        f'<tr><td><code>{name}</code></td><td class="number">{_short(value)}</td><td>{html.escape(meaning)}</td></tr>'
        for name, value, meaning in newest
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{images}
<h2>Numbers at step {run.series("loss")[-1][0]}</h2>
<table><tr><th>name</th><th>value</th><th>meaning</th></tr>
{numbers}
</table>
<h2>What was prepared</h2>
<pre>{html.escape(run.about["prepared"])}</pre>
<h2>MoEAccelConfig</h2>
<table>
{_rows(run.about["config"])}
</table>
</body>
</html>
"""


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rows(values: dict[str, Any]) -> str:
    return "\n".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
