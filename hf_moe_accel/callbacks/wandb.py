"""What numbers do not show, in Weights & Biases. The one importer of wandb."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from transformers import TrainerCallback

from hf_moe_accel.callbacks import pictures
from hf_moe_accel.callbacks.metrics import MoEMetricsCallback
from hf_moe_accel.callbacks.run_file import read_run
from hf_moe_accel.log import warn_once
from hf_moe_accel.runtime import runtime_of

# Of a run; to draw one takes a second, more or less.
NUM_PICTURES = 10
LOAD, RANK_TOKENS, PREPARED = "moe/expert_load", "moe/tokens_of_ranks", "moe/prepared"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ARTIFACTS = ("adapter", "merged")


class MoEWandbCallback(TrainerCallback):
    """Adds to the run that transformers' own W&B callback opens, on rank 0.

    - `moe/expert_load`: heatmaps of the load of the experts by layer over time, ten times a run and at its end;
    - `moe/tokens_of_ranks`: a histogram of the tokens that ranks were sent, at each log;
    - `moe/prepared`: a table of what was prepared and of `MoEAccelConfig`, which also go into the run's config.

    Added by itself where `report_to` has "wandb". To have checkpoints as artifacts, pass your own:
    `callbacks=[MoEWandbCallback(artifacts=("adapter", "merged"))]`.

    Args:
        artifacts: what of each checkpoint is uploaded: "adapter" (what PEFT reads), "merged" (the whole model with the
            adapter folded in; needs `merge_adapters_on_save=True`).

    Raises:
        ValueError: there is no such kind of artifact; when training begins, artifacts of checkpoints that are written
            in the background.
    """

    def __init__(self, artifacts: Sequence[str] = ()) -> None:
        """Nothing is logged before training begins."""
        unknown = [kind for kind in artifacts if kind not in _ARTIFACTS]
        if unknown:
            raise ValueError(f"artifacts={tuple(artifacts)} has {unknown[0]!r}, which is none of {_ARTIFACTS}.")
        self.artifacts = tuple(artifacts)
        self.metrics: MoEMetricsCallback | None = None  # set by `add_metrics`
        self._drawn_at = 0
        self._new = False  # whether something was counted that is in no picture

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Log what was prepared."""
        runtime = runtime_of(model)
        if runtime is None:
            return
        if self.artifacts and runtime.settings.get("async_save"):
            raise ValueError(
                f"MoEWandbCallback(artifacts={self.artifacts}) reads a checkpoint when it has been saved, but with "
                "async_save=True it is still being written then. Set async_save=False, or leave out artifacts."
            )
        self._drawn_at = state.global_step
        if wandb.run is None:
            return
        rows = [["prepared", runtime.report], *([name, str(value)] for name, value in runtime.settings.items())]
        wandb.run.config.update({"moe": {**runtime.settings, "prepared": runtime.report}}, allow_val_change=True)
        self._log(state, {PREPARED: wandb.Table(columns=["name", "value"], data=rows)})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Log the histogram, and now and then the heatmaps."""
        if wandb.run is None or self.metrics is None or "moe/step_time" not in logs:
            return
        tokens = self.metrics.experts["rank_tokens"]
        if len(tokens) > 1:
            self._log(state, {RANK_TOKENS: wandb.Histogram(tokens)})
        self._new = True
        if (state.global_step - self._drawn_at) * NUM_PICTURES >= state.max_steps:
            self._draw(args, state)
            self.metrics.leave_out_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the heatmaps of the whole run."""
        if wandb.run is not None and self.metrics is not None and self._new:
            self._draw(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upload what was asked for of a checkpoint."""
        if wandb.run is None:
            return
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        for kind in self.artifacts:
            artifact = wandb.Artifact(f"{kind}-{wandb.run.id}", type="model", metadata={"step": state.global_step})
            merged = checkpoint / "merged"
            if kind == "merged" and merged.is_dir():
                artifact.add_dir(str(merged))
            elif kind == "adapter" and all((checkpoint / name).is_file() for name in _ADAPTER_FILES):
                for name in _ADAPTER_FILES:
                    artifact.add_file(str(checkpoint / name))
            else:
                what = "no adapter" if kind == "adapter" else "no merged model: set merge_adapters_on_save=True"
                warn_once(f"hf_moe_accel: no artifact of {checkpoint}: it holds {what}")
                continue
            wandb.run.log_artifact(artifact, aliases=[f"step-{state.global_step}"])

    def _draw(self, args: Any, state: Any) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            warn_once("hf_moe_accel: no heatmaps in W&B without matplotlib: pip install 'hf_moe_accel[wandb]'")
            return
        # Imported here: wandb alone does not bring it.
        from PIL import Image

        picture = Image.open(io.BytesIO(pictures.load(read_run(args.output_dir))))
        self._log(state, {LOAD: wandb.Image(picture, caption=f"up to step {state.global_step}")})
        self._drawn_at, self._new = state.global_step, False

    def _log(self, state: Any, values: dict[str, Any]) -> None:
        # The axis that transformers' callback defines.
        wandb.log({**values, "train/global_step": state.global_step})
