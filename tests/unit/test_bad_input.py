"""What cannot work is refused by name, before weights are read and before a process group or an optimizer is made."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers import AutoModelForCausalLM as PlainAutoModel

from hf_moe_accel import AcceleratedMoETrainer, AutoModelForCausalLM, MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.log import warn_once
from hf_moe_accel.prepare import choose_setup
from hf_moe_accel.runtime import runtime_of
from tests.helpers.models import ragged_batch_dataset, tiny_config, tiny_model
from tests.helpers.tolerances import assert_close


def on(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """As torchrun sets it, with no process group yet."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))


def without_weights(directory: Path, config: PreTrainedConfig) -> str:
    """A checkpoint that has lost its weights: whoever reads them raises an `OSError`."""
    config.architectures = [type(PlainAutoModel.from_config(config)).__name__]
    config.save_pretrained(directory)
    with pytest.raises(OSError, match="no file named"):
        PlainAutoModel.from_pretrained(directory)
    return str(directory)


def arguments(directory: Path, **more: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "max_steps": 2}
    return TrainingArguments(output_dir=str(directory), **({"use_cpu": True} | defaults | more))


CHOICES: list[tuple[int, dict[str, Any], str]] = [
    (3, {"ep_size": 3}, r"ep_size=3 does not divide the 8 experts .* one of \[1\]"),
    (4, {"ep_size": 3}, r"ep_size=3 does not divide the 8 experts .* one of \[1, 2, 4\]"),
    (4, {"ep_size": 8}, r"ep_size=8 does not divide the 4 ranks.* one of \[1, 2, 4\].*--nproc-per-node=8"),
    (1, {"ep_size": 2}, r"ep_size=2 does not divide the 1 ranks.* one of \[1\].*--nproc-per-node=2"),
    (4, {"ep_size": 4, "dp_replicate_size": 2}, r"2 ranks of a replica \(4 ranks / dp_replicate_size=2\).*\[1, 2\]"),
    (4, {"dp_replicate_size": 3}, r"dp_replicate_size=3 does not divide the 4 ranks of this run.* one of \[1, 2, 4\]"),
    (1, {"expert_backend": "fast"}, "'fast' is no expert backend: use one of 'auto', 'quack', 'fused', 'padded_bmm'"),
    (4, {"token_dispatcher": "deep"}, "'deep' is no token dispatcher: use one of 'auto', 'deepep', 'all_to_all'"),
    (4, {"token_dispatcher": "deepep"}, "'deepep' cannot serve this run: DeepEP needs CUDA.*'all_to_all', or 'auto'"),
    (4, {"ep_size": 2, "token_dispatcher": "local"}, "'local' moves no tokens.*ep_size=2.*'all_to_all', or ep_size=1"),
    (4, {"ep_size": 1, "token_dispatcher": "all_to_all"}, "'all_to_all' needs ep_size > 1.*ep 1 x efsdp 4"),
    (1, {"token_dispatcher": "all_to_all"}, "'all_to_all' needs ep_size > 1.*start more ranks with torchrun"),
]


@pytest.mark.parametrize(("ranks", "choices", "message"), CHOICES)
def test_choices_that_cannot_be_honoured(
    ranks: int, choices: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = without_weights(tmp_path / "model", tiny_config("qwen3_moe"))
    on(monkeypatch, ranks)
    config = MoEAccelConfig(**choices)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(source, moe_config=config)
    with pytest.raises(ValueError, match=message):
        AcceleratedMoETrainer(source, None, moe_config=config)
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        prepare_moe_model(model, config)
    assert runtime_of(model) is None
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("device_map", "auto"),
        ("distributed_config", {"tp_size": 2, "ep_size": 2}),
        ("experts_implementation", "batched_mm"),
        ("load_in_4bit", True),
        ("load_in_8bit", True),
        ("quantization_config", {"load_in_4bit": True}),
        ("tp_plan", "auto"),
        ("tp_size", 2),
    ],
)
def test_arguments_of_from_pretrained(argument: str, value: Any, tmp_path: Path) -> None:
    source = without_weights(tmp_path, tiny_config("qwen3_moe"))
    with pytest.raises(ValueError, match=f"{argument}=.* is not supported: .*Delete `{argument}=` from the call"):
        AutoModelForCausalLM.from_pretrained(source, **{argument: value})


def test_checkpoint_that_is_quantized(tmp_path: Path) -> None:
    config = tiny_config("gpt_oss")
    source = without_weights(tmp_path, config)
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, AcceleratedMoETrainer):
        with pytest.raises(ValueError, match="quantized models .* are not supported.*dequantize"):
            load(source)


def with_attribute(**attributes: Any) -> PreTrainedModel:
    model = tiny_model("qwen3_moe")
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"is_quantized": True}, "quantized models .* are not supported"),
        ({"hf_device_map": {"model": 0, "lm_head": 1}}, r"split over \['0', '1'\] by device_map"),
        ({"_tp_size": 2}, r"loaded with tp_size=2: tp_size does not carry.*MoEAccelConfig\(ep_size=2\)"),
    ],
)
def test_models_that_were_loaded_otherwise(attributes: dict[str, Any], message: str) -> None:
    model = with_attribute(**attributes)
    with pytest.raises(ValueError, match=message):
        prepare_moe_model(model)
    assert runtime_of(model) is None


def test_adapters_of_another_kind_on_experts(tmp_path: Path) -> None:
    adapted = tiny_model("qwen3_moe")
    for layer in adapted.model.layers:
        wrapper = torch.nn.Module()
        wrapper.base_layer = layer.mlp.experts
        layer.mlp.experts = wrapper
    message = "experts 'model.layers.0.mlp.experts' are wrapped by an adapter other than PEFT's LoRA"
    for use in (prepare_moe_model, lambda model: AcceleratedMoETrainer(model, arguments(tmp_path))):
        with pytest.raises(ValueError, match=message):
            use(adapted)


NOT_STANDARD: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "num_local_experts": 4,
        "head_dim": 16,
        "num_key_value_heads": 2,
    },
    "jetmoe": {"intermediate_size": 32, "num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 4},
}


def not_standard(name: str) -> PreTrainedConfig:
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    return AutoConfig.for_model(name, **(sizes | NOT_STANDARD[name]))


@pytest.mark.parametrize("name", NOT_STANDARD)
def test_experts_that_cannot_be_sharded_when_that_was_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = without_weights(tmp_path, not_standard(name))
    on(monkeypatch, 2)
    with pytest.raises(
        ValueError, match=r"ep_size=2 cannot be honoured: .*is of the kind.*Experts.*Leave ep_size out"
    ):
        AutoModelForCausalLM.from_pretrained(source, moe_config=MoEAccelConfig(ep_size=2))
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", NOT_STANDARD)
def test_experts_that_cannot_be_sharded_train_as_with_trainer(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    losses = []
    for trainer_class in (Trainer, AcceleratedMoETrainer):
        torch.manual_seed(0)
        model = PlainAutoModel.from_config(not_standard(name))
        args = arguments(tmp_path, logging_steps=1)
        with caplog.at_level(logging.WARNING, logger="hf_moe_accel"):
            trainer = trainer_class(model, args, train_dataset=ragged_batch_dataset(16, 16))
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert_close(losses[1], losses[0], "exact")
    warnings = [record.message for record in caplog.records if record.name == "hf_moe_accel"]
    assert len(warnings) == 1, warnings
    assert "It trains as with Trainer" in warnings[0]
    assert "Qwen3-MoE" in warnings[0]


def test_model_without_an_expert_parallel_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 2)
    with torch.device("meta"):
        model = PlainAutoModel.from_config(tiny_config("qwen3_moe"))
    model._ep_plan = {}
    found = find_experts(model)
    with pytest.raises(ValueError, match=r"ep_size=2 cannot be honoured.*no expert-parallel rule.*Use ep_size=1"):
        choose_setup(model, found, MoEAccelConfig(ep_size=2))
    setup = choose_setup(model, found, MoEAccelConfig())
    assert setup is not None
    assert setup.topology.ep_size == 1
    assert any("no expert-parallel rule for 'model.layers.0.mlp.experts'" in note for note in setup.notes)


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_plugins_of_accelerate(variable: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Switched on as `accelerate launch` does, with a configuration file that says so."""
    source = without_weights(tmp_path, tiny_config("qwen3_moe"))
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"accelerate's {name} plugin is.* on.*accelerate config.*torchrun"):
        AcceleratedMoETrainer(source)


def test_arguments_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    source = without_weights(tmp_path / "model", tiny_config("qwen3_moe"))
    args = arguments(tmp_path, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="auto_find_batch_size=True is not supported.*Delete auto_find_batch_size"):
        AcceleratedMoETrainer(source, args)
    assert not dist.is_initialized()


def test_one_process_that_sees_several_gpus(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*torchrun --nproc-per-node 2.*CUDA_VISIBLE_DEVICES=0"):
        AcceleratedMoETrainer(model=tiny_model("qwen3_moe"), args=args)
