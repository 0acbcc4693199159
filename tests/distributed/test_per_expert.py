"""An adapter for each expert, under the hub's names: what it adds to the hub's tensors is what merging adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_moe_accel import export_adapter, export_checkpoint, prepare_moe_model
from tests.distributed.test_export import read
from tests.helpers.adapters import Adapted
from tests.helpers.models import tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close


def export_both(name: str, directory: str, more: dict[str, Any]) -> None:
    model = prepare_moe_model(Adapted(name, **more)())
    export_adapter(model, f"{directory}/adapter")
    export_checkpoint(model, f"{directory}/merged")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("mixtral", {}),
    ("deepseek_v3", {}),
    ("nemotron_h", {}),
    ("qwen3_moe", {"rank_pattern": {r".*experts\.down_proj": 2}, "use_rslora": True}),
    ("qwen3_moe", {"target_parameters": None, "target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}),
]


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(("name", "more"), CASES, ids=str)
def test_it_adds_what_merging_adds(name: str, more: dict[str, Any], world_size: int, tmp_path: Path) -> None:
    run_ranks(export_both, world_size, name, str(tmp_path), more)
    tiny_model(name).save_pretrained(tmp_path / "base")
    base, merged = read(tmp_path / "base"), read(tmp_path / "merged")
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    changed = {key for key, value in merged.items() if not torch.equal(value, base[key])}
    stem = "base_model.model.{}.lora_{}.weight"
    assert factors.keys() == {stem.format(key.removesuffix(".weight"), f) for key in changed for f in "AB"}
    for key in changed:
        a, b = (factors[stem.format(key.removesuffix(".weight"), f)] for f in "AB")
        assert a.shape == (config["r"], base[key].shape[1])
        assert_close(base[key] + scaling * b @ a, merged[key], "training", key)
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in changed} == set(config["target_modules"])
    assert any(".experts.7." in key for key in changed)


def test_stacked_experts_of_the_hub_have_no_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for all experts of GptOssForCausalLM together"):
        export_adapter(Adapted("gpt_oss")(), tmp_path)
