"""The demo's picture: how the loss fell, and which experts did the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe_accel.demo.history import History

INK = "#1f2933"
MUTED = "#8492a6"
TRAIN = "#2563eb"
HELD_OUT = "#e4572e"
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "font.size": 9.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
HEADING = {"x": 0.01, "ha": "left", "weight": "bold", "size": 11}
MAX_COLUMNS = 4


def draw_history(history: History, path: Path) -> None:
    """Draw the loss curve above one heatmap a layer of the load of its experts over time, and write it as a PNG.

    Raises:
        ValueError: the history holds no logged loss or no expert load.
    """
    if not history.train_loss or not history.expert_load:
        raise ValueError("There is nothing to draw: the history holds no logged loss or no expert load.")
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt

    load = np.asarray(history.expert_load, dtype=np.float64)  # [points, layers, experts]
    relative_load = load / load.mean(axis=-1, keepdims=True).clip(min=1)  # of an equal share
    num_layers = load.shape[1]
    num_columns = min(num_layers, MAX_COLUMNS)
    num_rows = -(-num_layers // num_columns)

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 4.4 + 2.3 * num_rows), dpi=150, layout="constrained")
        figure.suptitle(history.model, **(HEADING | {"size": 13}))
        upper, lower = figure.subfigures(2, 1, height_ratios=[3.9, 2.3 * num_rows + 0.5])
        upper.suptitle("Loss on the documentation of Python's standard library", **HEADING)
        lower.suptitle("Load of the experts over time", **HEADING)
        _draw_loss(upper.subplots(), history)
        grid = list(lower.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flat)
        for axes in grid[num_layers:]:
            axes.set_visible(False)
        for layer, axes in enumerate(grid[:num_layers]):
            image = _draw_load(axes, relative_load[:, layer], history.load_steps)
            axes.set(title=f"layer {layer}", xlabel="step", ylabel="expert")
            axes.label_outer()
        bar = lower.colorbar(image, ax=grid, pad=0.015, aspect=18, extend="both")
        bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
        bar.minorticks_off()
        bar.set_label("times an equal share")
        bar.outline.set_visible(False)
        figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
        plt.close(figure)


def _draw_loss(axes: Any, history: History) -> None:
    steps, losses = zip(*history.train_loss, strict=True)
    axes.plot(steps, losses, color=TRAIN, linewidth=1, alpha=0.3)
    axes.plot(steps, _smooth(losses), color=TRAIN, linewidth=2, label=f"training: {_ends(history.train_loss)}")
    axes.plot(
        *zip(*history.held_out_loss, strict=True),
        color=HELD_OUT,
        linewidth=1.5,
        marker="o",
        markersize=5,
        clip_on=False,
        label=f"held out: {_ends(history.held_out_loss)}",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_xlim(0, history.num_steps)
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)


def _ends(points: list[tuple[int, float]]) -> str:
    return f"{points[0][1]:.2f} at step {points[0][0]}, {points[-1][1]:.2f} at step {points[-1][0]}"


def _smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """The mean of each value and its neighbours, as many on either side as there are, up to `reach`."""
    num = len(values)
    reaches = [min(reach, index, num - 1 - index) for index in range(num)]
    return [float(np.mean(values[index - r : index + r + 1])) for index, r in enumerate(reaches)]


def _draw_load(axes: Any, relative_load: np.ndarray[Any, Any], last_steps: list[int]) -> Any:
    """Draw one layer's load [points, experts] and return the image: white is an equal share, red more, blue less."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    edges_of_steps = [0, *last_steps]
    edges_of_experts = np.arange(relative_load.shape[1] + 1) - 0.5
    image = axes.pcolormesh(
        edges_of_steps,
        edges_of_experts,
        relative_load.T.clip(min=1e-6),  # the logarithm of an idle expert's load
        cmap="RdBu_r",
        norm=LogNorm(vmin=0.25, vmax=4),
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_ylim(edges_of_experts[-1], edges_of_experts[0])  # expert 0 on top
    axes.spines[:].set_visible(False)
    return image
