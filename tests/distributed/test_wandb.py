"""What a run leaves in W&B, read back from the files of the real package in offline mode."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig, MoEWandbCallback, prepare_moe_model
from hf_moe_accel.callbacks.run_file import METRICS
from tests.distributed.test_metrics import (
    ONLY_ON_GPU,
    ONLY_WITH_AUX_LOSS,
    TOKENS,
    arguments,
    known_routing,
)
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.wandb_files import OfflineRun, read_offline_run

Ranks = Callable[..., list[Any]]


def train(output_dir: str, artifacts: tuple[str, ...] | None, choices: dict[str, Any], **more: Any) -> str:
    """The class names of the callbacks, once the run is on the disk."""
    os.environ |= {"WANDB_DIR": output_dir, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    adapter = {"peft_config": LoraConfig(target_parameters=["mlp.experts.down_proj"])} if artifacts else {}
    callbacks = [] if artifacts is None else [MoEWandbCallback(artifacts)]
    with known_routing():
        ours = AcceleratedMoETrainer(
            model=tiny_model("qwen3_moe"),
            args=arguments(output_dir, report_to=["wandb"], **more),
            moe_config=MoEAccelConfig(**choices),
            train_dataset=ragged_batch_dataset(64, 16),
            callbacks=callbacks,
            **adapter,
        )
        ours.train()
    wandb.finish()
    callback_list: str = ours.callback_handler.callback_list
    return callback_list


@pytest.fixture(scope="module")
def offline(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    folder = tmp_path_factory.mktemp("wandb")
    for callbacks in ranks(train, 2, str(folder), None, {"ep_size": 2}, init=False):
        order = callbacks.split("\n")
        assert order.index("MoEMetricsCallback") < order.index("WandbCallback") < order.index("MoEWandbCallback")
        assert order.count("MoEWandbCallback") == 1
    return read_offline_run(folder)


def test_every_number_is_logged(offline: OfflineRun) -> None:
    for name in set(METRICS) - ONLY_ON_GPU - ONLY_WITH_AUX_LOSS:
        assert len(offline.logged(f"train/{name}")) == 2, name
    assert offline.logged("train/moe/rank_max_over_mean") == [1.5, 1.5]


def test_the_heatmap_is_a_picture_and_the_histogram_counts_ranks(offline: OfflineRun) -> None:
    heatmaps = offline.logged("moe/expert_load")
    assert [each["caption"] for each in heatmaps] == ["up to step 2", "up to step 4"]
    for each in heatmaps:
        with Image.open(offline.files / each["path"]) as picture:
            assert picture.size == (each["width"], each["height"]) and picture.width > 1000
            # White stands for an equal share, blue for less, red for more: this routing has 1 and 2 and idle experts.
            colors = {color for _, color in picture.convert("RGB").getcolors(maxcolors=1 << 24)}
            assert any(red > 150 and blue < 100 for red, _, blue in colors)
            assert any(blue > 80 and red < 30 for red, _, blue in colors)
    first, second = offline.logged("moe/tokens_of_ranks")
    assert first["_type"] == "histogram" and sum(first["values"]) == 2
    # Over two layers one rank was sent all tokens, the other every second one.
    assert (first["bins"][0], first["bins"][-1]) == (TOKENS, 2 * TOKENS)
    assert first == second


def test_what_was_prepared_is_in_the_config_and_in_a_table(offline: OfflineRun) -> None:
    config = offline.config["moe"]
    assert config["ep_size"] == 2 and config["expert_backend"] == "auto"
    assert "2 MoE layers of 8 experts" in config["prepared"] and "ep 2" in config["prepared"]
    (table,) = offline.logged("moe/prepared")
    assert (table["_type"], table["ncols"], table["nrows"]) == ("table-file", 2, len(config))
    rows = json.loads((offline.files / table["path"]).read_text())["data"]
    assert rows[0] == ["prepared", config["prepared"]] and ["ep_size", "2"] in rows


def test_an_axis_goes_with_everything(offline: OfflineRun) -> None:
    for key, steps in {"moe/expert_load": [2, 4], "moe/tokens_of_ranks": [2, 4], "moe/prepared": [0]}.items():
        assert [entry["train/global_step"] for entry in offline.history if key in entry] == steps


def test_checkpoints_become_artifacts_on_request(ranks: Ranks, tmp_path: Path) -> None:
    choices = {"ep_size": 2, "merge_adapters_on_save": True}
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    for callbacks in ranks(train, 2, str(tmp_path), ("adapter", "merged"), choices, **saves, init=False):
        assert callbacks.count("MoEWandbCallback") == 1
    found = read_offline_run(tmp_path).artifacts
    paths = {name.split("-")[0]: set(paths) for name, paths in found.items() if not name.startswith("run-")}
    assert paths["adapter"] == {"adapter_config.json", "adapter_model.safetensors"}
    assert paths["merged"] == {path.name for path in (tmp_path / "checkpoint-2" / "merged").iterdir()}
    assert "config.json" in paths["merged"]
    assert all(
        torch.isfinite(t).all() for t in load_file(tmp_path / "checkpoint-2/adapter_model.safetensors").values()
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"artifacts=\('model',\) has 'model', which is none of"):
        MoEWandbCallback(("model",))
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(async_save=True))
    with pytest.raises(ValueError, match="Set async_save=False, or leave out artifacts"):
        MoEWandbCallback(("adapter",)).on_train_begin(None, None, None, model=model)
