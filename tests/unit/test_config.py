"""The configuration: its checks, and its place beside other configurations on a command line."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from hf_moe_accel import MoEAccelConfig
from hf_moe_accel.dispatch import DISPATCHERS
from hf_moe_accel.experts import EXPERT_BACKENDS

OTHERS = [TrainingArguments, SFTConfig, DPOConfig]
# SFTConfig and DPOConfig ask for bf16 on a GPU.
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.mark.parametrize("other", [*OTHERS, ScriptArguments, ModelConfig])
def test_no_name_collides(other: Any) -> None:
    assert {f.name for f in fields(MoEAccelConfig)}.isdisjoint(f.name for f in fields(other))


def test_every_field_has_help_and_a_default() -> None:
    for field in fields(MoEAccelConfig):
        assert field.metadata["help"].endswith("."), field.name
        assert getattr(MoEAccelConfig(), field.name) == field.default


@pytest.mark.parametrize(
    ("field", "registry"), [("token_dispatcher", DISPATCHERS), ("expert_backend", EXPERT_BACKENDS)]
)
def test_help_names_every_choice(field: str, registry: Any) -> None:
    text = {f.name: f.metadata["help"] for f in fields(MoEAccelConfig)}[field]
    assert all(repr(name) in text for name in ("auto", *registry))


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize("other", OTHERS)
def test_parses_beside_other_configurations(parser_class: Any, other: Any, tmp_path: Path) -> None:
    parser = parser_class((other, MoEAccelConfig))
    common = ["--output_dir", str(tmp_path), *ON_CPU]
    ours = ["--ep_size", "4", "--dp-replicate-size", "2", "--token_dispatcher", "all_to_all"]
    ours += ["--expert_backend", "eager", "--collective_timeout", "12.5", "--overlap_chunks", "2", "--check_tokens"]
    args, config = parser.parse_args_into_dataclasses([*common, *ours])
    assert config == MoEAccelConfig(4, 2, "all_to_all", "eager", 12.5, overlap_chunks=2, check_tokens=True)
    assert type(config.ep_size) is type(config.overlap_chunks) is int
    assert args.output_dir == str(tmp_path)
    _, config = parser.parse_args_into_dataclasses(common)
    assert config == MoEAccelConfig()
    _, config = parser.parse_args_into_dataclasses([*common, "--ep_size", "auto"])
    assert config.ep_size == "auto"


def test_parses_beside_all_that_a_trl_script_parses(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "ep_size": 2, "collective_timeout": 30}
    file.write_text(yaml.safe_dump(values))
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, MoEAccelConfig))
    *_, config = parser.parse_args_and_config(["--config", str(file), "--expert_backend", "eager"])
    assert config == MoEAccelConfig(ep_size=2, expert_backend="eager", collective_timeout=30)
    *_, config = parser.parse_args_and_config(["--config", str(file), "--ep_size", "auto"])
    assert config.ep_size == "auto"


@pytest.mark.parametrize("field", ["ep_size", "overlap_chunks"])
@pytest.mark.parametrize(("value", "parsed"), [("auto", "auto"), (None, "auto"), (1, 1), (8, 8), ("8", 8)], ids=repr)
def test_auto_or_a_number(field: str, value: Any, parsed: Any) -> None:
    assert getattr(MoEAccelConfig(**{field: value}), field) == parsed


@pytest.mark.parametrize("value", [0, -1, "0", "-2", "four", "", "2.0", 2.5, 2.0, math.nan, True, [2]], ids=repr)
@pytest.mark.parametrize(("field", "of_what"), [("ep_size", "ranks"), ("overlap_chunks", "parts")])
def test_neither_auto_nor_a_number(field: str, of_what: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}=.* must be 'auto' or a whole number of {of_what}, 1 or more"):
        MoEAccelConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1, 1.5], ids=repr)
def test_dp_replicate_size_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=f"dp_replicate_size={value} must be a whole number, 1 or more"):
        MoEAccelConfig(dp_replicate_size=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan], ids=repr)
def test_collective_timeout_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=f"collective_timeout={value} must be more than 0 seconds"):
        MoEAccelConfig(collective_timeout=value)


def test_levels_that_are_none() -> None:
    with pytest.raises(ValueError, match="cuda_graphs='on' must be 'auto' or 'off'; to insist.*torch_compile_mode="):
        MoEAccelConfig(cuda_graphs="on")
    with pytest.raises(ValueError, match="expert_checkpointing='none' must be one of 'activation', 'up', 'full'"):
        MoEAccelConfig(expert_checkpointing="none")


@pytest.mark.parametrize("field", ["token_dispatcher", "expert_backend"])
@pytest.mark.parametrize("value", ["", None, 3], ids=repr)
def test_names_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* must be a name"):
        MoEAccelConfig(**{field: value})
