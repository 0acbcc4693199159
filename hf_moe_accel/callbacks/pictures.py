"""The pictures of a run: drawn from what it wrote, by `hf-moe-accel report`, the demo and the W&B callback alike.

Figures are made without pyplot, whose state belongs to the program that trains.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_moe_accel.callbacks.run_file import Run

Series = list[tuple[int, float]]

INK = "#1f2933"
MUTED = "#8492a6"
BLUE = "#2563eb"
RED = "#e4572e"
# Of the parts of a step, from the bottom.
PARTS = {
    "data": "#8492a6",
    "dispatch": "#7c3aed",
    "experts": "#2563eb",
    "combine": "#0ea5a4",
    "other passes": "#93c5fd",
    "optimizer": "#f59e0b",
}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "grid.color": MUTED,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
HEADING = {"x": 0.01, "ha": "left", "weight": "bold", "size": 11}
WIDTH = 11
MAX_COLUMNS = 4
MAX_LAYERS = 16
IDLE = "Share of idle experts"
MAX_POINTS = 200  # of a heatmap, over time
MAX_BARS = 64


def overview(run: Run, title: str) -> bytes:
    """The loss above one heatmap a layer of the load of its experts over time, as a PNG.

    Raises:
        ValueError: the run has logged no loss, or counted no tokens.
    """
    losses, counted = run.series("loss"), run.counted()
    if not losses or not counted:
        raise ValueError("There is nothing to draw: the run has logged no loss, or counted no tokens.")
    rows = _grid_rows(counted)

    def draw(figure: Any) -> None:
        figure.suptitle(title, **(HEADING | {"size": 13}))
        upper, lower = figure.subfigures(2, 1, height_ratios=[3.9, 2.3 * rows + 0.5])
        upper.suptitle("Loss", **HEADING)
        axes = upper.subplots()
        _line(axes, losses, BLUE, f"training: {_ends(losses)}")
        held_out = run.series("eval_loss")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=RED, marker="o", label=f"held out: {_ends(held_out)}")
        axes.set(xlabel="step", ylabel="loss", xlim=(0, run.records[-1]["step"]))
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        _draw_loads(lower, counted)

    return _png(draw, 4.4 + 2.3 * rows)


def load(run: Run) -> bytes:
    """The heatmaps of `overview` alone, as a PNG. The run has counted tokens."""
    counted = run.counted()
    return _png(lambda figure: _draw_loads(figure, counted), 0.6 + 2.3 * _grid_rows(counted))


def speed(run: Run) -> bytes:
    """Tokens a second, and where the time of the measured steps went, as a PNG. The run has counted tokens."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        speeds = run.series("moe/tokens_per_second")
        _line(left, speeds, BLUE, _ends(speeds, ",.0f"))
        left.set(title="Tokens a second, over all ranks", xlabel="step", ylim=(0, None))
        left.legend(loc="lower right")
        steps, parts = _parts(run)
        right.stackplot(steps, parts.values(), labels=parts, colors=[PARTS[name] for name in parts], step="mid")
        right.set(title="Seconds of a step on rank 0", xlabel="step", ylim=(0, None))
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=6, columnspacing=1, handlelength=1)
        for axes in (left, right):
            axes.grid(axis="y")

    return _png(draw, 3.6)


def balance(run: Run) -> bytes:
    """How evenly experts and ranks are used, over time, as a PNG. The run has counted tokens."""
    panels = {
        "Busiest expert, times an equal share": "moe/load_max_over_mean",
        "Busiest rank, times an equal share": "moe/rank_max_over_mean",
        "Deviation of the load, times its mean": "moe/load_cv",
        "Entropy of the routers, 1 is the most": "moe/router_entropy",
        IDLE: "moe/idle_experts",
    }
    found = {name: series for name, key in panels.items() if (series := run.series(key))}

    def draw(figure: Any) -> None:
        for axes, (name, series) in zip(
            np.ravel(figure.subplots(1, len(found), squeeze=False)), found.items(), strict=True
        ):
            _line(axes, series, BLUE, "")
            axes.set_title(name, fontsize=7.5)
            axes.set_xlabel("step")
            axes.grid(axis="y")
            if name == IDLE:
                axes.set_ylim(bottom=0, top=None if any(value for _, value in series) else 1)

    return _png(draw, 2.6)


def layers(run: Run) -> bytes:
    """The same by layer: heatmaps over time, as a PNG. The run has counted tokens."""
    counted = run.counted()
    panels = {
        "Busiest expert / equal share": by_layer(counted, lambda load: load.max() / load.mean()),
        "Deviation of the load / mean": by_layer(counted, lambda load: load.std() / load.mean()),
        IDLE: by_layer(counted, lambda load: np.mean(load == 0)),
    }
    for title, key in {
        "Busiest rank / equal share": "rank_max_over_mean",
        "Entropy, 1 is the most": "router_entropy",
    }.items():
        values = [experts[key] for _, experts in counted if key in experts]
        if len(values) == len(counted) and (key != "rank_max_over_mean" or run.about["world_size"] > 1):
            panels[title] = np.array(values)
    edges = [0, *(step for step, _ in counted)]

    def draw(figure: Any) -> None:
        figure.suptitle("By layer, over time", **HEADING)
        for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            layer_edges = np.arange(values.shape[1] + 1) - 0.5
            image = axes.pcolormesh(edges, layer_edges, values.T, cmap="viridis")
            if title == IDLE:
                image.set_clim(0, max(0.1, float(np.nanmax(values))))
            axes.set_title(title, fontsize=7.5)
            axes.set(xlabel="step", ylabel="layer", ylim=(layer_edges[-1], layer_edges[0]))
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.label_outer(remove_inner_ticks=True)
            figure.colorbar(image, ax=axes, location="bottom", aspect=12).outline.set_visible(False)

    return _png(draw, 3.2 + 0.05 * len(run.about["num_experts"]))


def ranks(run: Run) -> bytes:
    """Tokens that each rank was sent over the whole run, as a PNG: bars, or a histogram where ranks are many."""
    totals = np.sum([experts["rank_tokens"] for _, experts in run.counted()], axis=0)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if len(totals) <= MAX_BARS:
            axes.bar(range(len(totals)), totals, color=BLUE)
            axes.set(xlabel="rank", ylabel="tokens", xticks=range(0, len(totals), -(-len(totals) // 16)))
        else:
            axes.hist(totals, bins=32, color=BLUE)
            axes.set(xlabel="tokens", ylabel="ranks")
        (axes.yaxis if len(totals) <= MAX_BARS else axes.xaxis).set_major_formatter("{x:,.0f}")
        axes.set_title("Tokens sent to each rank's experts, over all layers and steps")
        axes.grid(axis="y")

    return _png(draw, 3.0)


def _png(draw: Callable[[Any], None], height: float) -> bytes:
    # Imported here: a program that trains need not have matplotlib.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
        draw(figure)
        figure.savefig(content, format="png", bbox_inches="tight", pad_inches=0.2)
    return content.getvalue()


def _line(axes: Any, series: Series, color: str, label: str) -> None:
    """Each value thin, and their mean over the neighbours thick."""
    steps, values = zip(*series, strict=True)
    axes.plot(steps, values, color=color, linewidth=1, alpha=0.3)
    axes.plot(steps, smooth(values), color=color, linewidth=2, label=label)


def _ends(series: Series, form: str = ".2f") -> str:
    (first_step, first), (last_step, last) = series[0], series[-1]
    return f"{first:{form}} at step {first_step}, {last:{form}} at step {last_step}"


def smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """The mean of each value and its neighbours, as many on either side as there are, up to `reach`."""
    num = len(values)
    reaches = [min(reach, index, num - 1 - index) for index in range(num)]
    return [float(np.mean(values[index - r : index + r + 1])) for index, r in enumerate(reaches)]


def _parts(run: Run) -> tuple[list[int], dict[str, list[float]]]:
    """The steps that were measured, and seconds of their parts, such that these add up to the step.

    Where layers are CUDA graphs, what happens within them is measured in some of the steps: those are shown then. If
    it never was, passes are shown as they are.
    """
    measured = [record for record in run.records if "moe/time/forward" in record["logs"]]
    measured = [record for record in measured if "moe/time/experts" in record["logs"]] or measured
    within = {
        name: np.array([record["logs"].get(f"moe/time/{name}", 0.0) for record in measured])
        for name in (*PARTS, "forward", "backward")
    }
    inside = within["dispatch"] + within["experts"] + within["combine"]
    within["other passes"] = within["forward"] + within["backward"] - inside
    known = [name for name in PARTS if within[name].any()]
    return [record["step"] for record in measured], {name: within[name].tolist() for name in known}


def _shown_layers(counted: list[tuple[int, dict[str, Any]]]) -> list[int]:
    """All layers, or some of them, evenly spaced."""
    num = len(counted[0][1]["load"])
    return sorted({round(i) for i in np.linspace(0, num - 1, min(num, MAX_LAYERS))})


def _grid_rows(counted: list[tuple[int, dict[str, Any]]]) -> int:
    return -(-len(_shown_layers(counted)) // MAX_COLUMNS)


def _draw_loads(figure: Any, counted: list[tuple[int, dict[str, Any]]]) -> None:
    layers = _shown_layers(counted)
    num_columns = min(len(layers), MAX_COLUMNS)
    grid = list(figure.subplots(_grid_rows(counted), num_columns, sharex=True, squeeze=False).flat)
    total = len(counted[0][1]["load"])
    which = "" if len(layers) == total else f", {len(layers)} of {total} layers"
    figure.suptitle(f"Load of the experts over time{which}", **HEADING)
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    for layer, axes in zip(layers, grid, strict=False):
        steps, shares = relative_load(counted, layer)
        image = _draw_load(axes, shares, steps)
        axes.set(title=f"layer {layer}", xlabel="step", ylabel="expert")
        axes.label_outer(remove_inner_ticks=True)
    rows = _grid_rows(counted)
    bar = figure.colorbar(image, ax=grid, pad=0.015, aspect=18 * rows, extendfrac=0.05 / rows, extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
    bar.minorticks_off()
    bar.set_label("times an equal share")
    bar.outline.set_visible(False)


def relative_load(counted: list[tuple[int, dict[str, Any]]], layer: int) -> tuple[list[int], np.ndarray[Any, Any]]:
    """The load of a layer's experts over time, in times an equal share.

    Args:
        counted: (step, what was counted since the last one).
        layer: which.

    Returns:
        (last step of each point, [points, experts]); neighbours are taken together where there are too many.
    """
    load = np.array([experts["load"][layer] for _, experts in counted], dtype=np.float64)
    starts = np.unique(np.linspace(0, len(load), min(len(load), MAX_POINTS), endpoint=False).astype(int))
    load = np.add.reduceat(load, starts, axis=0)
    ends = [*starts[1:], len(counted)]
    return [counted[end - 1][0] for end in ends], load / load.mean(axis=-1, keepdims=True).clip(min=1)


def by_layer(
    counted: list[tuple[int, dict[str, Any]]], measure: Callable[[np.ndarray[Any, Any]], Any]
) -> np.ndarray[Any, Any]:
    """[points, layers]: a measure of the load [experts] of each layer; nan where a layer got no token."""
    loads = [[np.array(load, dtype=np.float64) for load in experts["load"]] for _, experts in counted]
    return np.array([[measure(load) if load.any() else np.nan for load in point] for point in loads])


def _draw_load(axes: Any, shares: np.ndarray[Any, Any], last_steps: list[int]) -> Any:
    """Draw one layer's load [points, experts] and return the image: white is an equal share, red more, blue less."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    edges_of_experts = np.arange(shares.shape[1] + 1) - 0.5
    image = axes.pcolormesh(
        [0, *last_steps],
        edges_of_experts,
        shares.T.clip(min=1e-6),  # the logarithm of an idle expert's load
        cmap="RdBu_r",
        norm=LogNorm(vmin=0.25, vmax=4),
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_ylim(edges_of_experts[-1], edges_of_experts[0])  # expert 0 on top
    axes.spines[:].set_visible(False)
    return image
