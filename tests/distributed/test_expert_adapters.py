"""LoRA on experts: as stock PEFT in one process, on any number of ranks, and in files that stock PEFT reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft import get_peft_model as stock_get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_moe_accel import (
    AcceleratedMoEMixin,
    AcceleratedMoETrainer,
    MoEAccelConfig,
    export_checkpoint,
    get_peft_model,
    prepare_moe_model,
)
from hf_moe_accel.hf.peft_bridge import load_adapter
from hf_moe_accel.log import warn_once
from hf_moe_accel.weights.manifest import check_manifest
from tests.checkpoints.test_resume import only
from tests.distributed.test_training_arguments import log_of, make_trainer
from tests.helpers.adapters import Adapted, config, draw_factors
from tests.helpers.grids import slow
from tests.helpers.models import ragged_batch_dataset, tiny_model, toy_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.resumable import make_trainer as make_resumable
from tests.helpers.resumable import numbered_rows
from tests.helpers.resumable import run as run_resumable
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

MODELS = ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"]
STEPS = 6


def train(
    trainer_class: type[Trainer], output_dir: str, model: Any, options: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    arguments = {"max_steps": STEPS} | arguments
    trainer = make_trainer(trainer_class, output_dir, model=model, arguments=arguments, options=options)
    trainer.train()
    trainer.save_model(f"{output_dir}/adapter")
    return log_of(trainer)


def logits_of(name: str, directory: str | Path) -> torch.Tensor:
    """Of the stock model with the saved adapter, by stock PEFT in this process."""
    model = PeftModel.from_pretrained(tiny_model(name), directory).eval()
    rows = ragged_batch_dataset(2, 8, seed=9)
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in rows])).logits


@pytest.mark.parametrize("name", MODELS)
def test_as_stock_peft_on_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    (expected,) = run_ranks(train, 1, Trainer, str(tmp_path / "stock"), Adapted(name))
    stock = load_file(tmp_path / "stock/adapter/adapter_model.safetensors")
    for world_size in (1, 2, 4):
        directory = tmp_path / str(world_size)
        for log in run_ranks(train, world_size, AcceleratedMoETrainer, str(directory), Adapted(name), init=False):
            assert_close(log, expected, "training", "log")
        ours = load_file(directory / "adapter/adapter_model.safetensors")
        assert_close(ours, stock, "training", "adapter")
    assert_close(logits_of(name, tmp_path / "4/adapter"), logits_of(name, tmp_path / "stock/adapter"), "training")


@pytest.mark.parametrize(
    ("world_size", "layout", "arguments"),
    [
        (4, {"ep_size": 2, "dp_replicate_size": 2}, {}),
        (2, {"ep_size": 1}, {"gradient_accumulation_steps": 2}),
        (2, {}, {"gradient_checkpointing": True}),
        *slow(
            (4, {"ep_size": 2}, {"gradient_accumulation_steps": 2}),
            (2, {}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ),
    ],
    ids=str,
)
def test_layouts(world_size: int, layout: dict[str, Any], arguments: dict[str, Any], tmp_path: Path) -> None:
    case = Adapted("qwen3_moe")
    (expected,) = run_ranks(train, 1, Trainer, str(tmp_path / "stock"), case, **arguments)
    options = {"moe_config": MoEAccelConfig(**layout)}
    ours = run_ranks(
        train, world_size, AcceleratedMoETrainer, str(tmp_path / "ours"), case, options, **arguments, init=False
    )
    for log in ours:
        assert_close(log, expected, "training", "log")
    saved = [load_file(tmp_path / each / "adapter/adapter_model.safetensors") for each in ("ours", "stock")]
    assert_close(*saved, "training", "adapter")


class OverBf16(Adapted):
    """As PEFT does it: fp32 adapters over weights in bf16."""

    def __call__(self) -> nn.Module:
        model = super().__call__()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        return model


def test_adapters_in_fp32_over_weights_in_bf16(tmp_path: Path) -> None:
    case = OverBf16("qwen3_moe", torch.bfloat16)
    (expected,) = run_ranks(train, 1, Trainer, str(tmp_path / "stock"), case, bf16=True)
    for log in run_ranks(train, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), case, bf16=True, init=False):
        losses, stock = ([entry["loss"] for entry in each if "loss" in entry] for each in (log, expected))
        assert losses == pytest.approx(stock, rel=1e-2)
    saved = load_file(tmp_path / "ours/adapter/adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.parametrize(
    "more",
    [
        {"target_parameters": ["experts.down_proj"], "target_modules": []},
        {"rank_pattern": {r".*experts\.down_proj": 2}, "use_rslora": True},
        {"target_parameters": None, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        {"modules_to_save": ["gate"]},
        *slow(
            {"target_parameters": ["experts.gate_up_proj"]},
            {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]},
        ),
    ],
    ids=str,
)
def test_spellings(more: dict[str, Any], tmp_path: Path) -> None:
    case = Adapted("qwen3_moe", **more)
    (expected,) = run_ranks(train, 1, Trainer, str(tmp_path / "stock"), case)
    for log in run_ranks(train, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), case, init=False):
        assert_close(log, expected, "training", "log")
    stock, ours = (load_file(tmp_path / each / "adapter/adapter_model.safetensors") for each in ("stock", "ours"))
    assert_close(ours, stock, "training", "adapter")


@pytest.mark.parametrize("settings", [{}, *slow({"async_save": True})], ids=["now", "in the background"])
def test_adapters_go_on_bit_for_bit_and_on_another_layout(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = run_ranks(run_resumable, 2, str(tmp_path / "whole"), model=Adapted("qwen3_moe"), **settings, init=False)
    checkpoint = only(tmp_path / "whole", 4, tmp_path / "resumed")
    same = run_ranks(
        run_resumable, 2, str(tmp_path / "same"), checkpoint, model=Adapted("qwen3_moe"), **settings, init=False
    )
    for mine, theirs in zip(same, whole, strict=True):
        assert mine.log == theirs.log
        assert all(torch.equal(value, theirs.weights[name]) for name, value in mine.weights.items())
    for world_size in (1, 4):
        other = run_ranks(
            run_resumable,
            world_size,
            str(tmp_path / f"on {world_size}"),
            checkpoint,
            model=Adapted("qwen3_moe"),
            init=False,
        )
        assert_close(other[0].log, whole[0].log, "training", "log")


def test_what_is_trained_beside_the_adapter_goes_on_too(tmp_path: Path) -> None:
    """Evaluated, saved and read back right after a forward pass, when FSDP2 still holds the gathered output layer."""
    settings: dict[str, Any] = {
        "model": Adapted("qwen3_moe", modules_to_save=["lm_head"]),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "max_steps": 6,
        "options": {"train_dataset": numbered_rows(), "eval_dataset": numbered_rows(4)},
    }
    whole = run_ranks(run_resumable, 2, str(tmp_path / "whole"), **settings, init=False)
    checkpoint = only(tmp_path / "whole", 4, tmp_path / "resumed")
    resumed = run_ranks(run_resumable, 2, str(tmp_path / "resumed"), checkpoint, **settings, init=False)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine.log == theirs.log
    saved = load_file(tmp_path / "whole/checkpoint-6/adapter_model.safetensors")
    head = next(value for name, value in whole[0].weights.items() if "lm_head.modules_to_save" in name)
    assert torch.equal(saved["base_model.model.lm_head.weight"], head)


def switch_adapters() -> dict[str, Any]:
    """What each choice of adapters computes, on a prepared model with two of them."""
    model = stock_get_peft_model(tiny_model("qwen3_moe"), config())
    model.add_adapter("other", config(r=2))
    draw_factors(model)
    model.eval()
    rows = torch.stack([row["input_ids"] for row in ragged_batch_dataset(4, 8)])

    def outputs() -> dict[str, torch.Tensor]:
        found = {}
        with torch.no_grad():
            for name in ("default", "other"):
                model.set_adapter(name)
                found[name] = model(input_ids=rows).logits
            with model.disable_adapter():
                found["none"] = model(input_ids=rows).logits
            found["again"] = model(input_ids=rows).logits
        return found

    stock = outputs()
    prepare_moe_model(model, MoEAccelConfig())
    names = [name for name, _ in model.named_parameters() if ".lora." in name]
    assert any(".lora_A.default." in name for name in names) and any(".lora_B.other." in name for name in names)
    ours = outputs()
    model.set_adapter("other")
    trains = {name.rpartition("lora_")[2] for name, p in model.named_parameters() if p.requires_grad}
    model.delete_adapter("default")
    left = {name for name, _ in model.named_parameters() if ".default." in name}
    return {"stock": stock, "ours": ours, "trains": trains, "left": left}


@pytest.mark.parametrize("world_size", [1, 2])
def test_peft_switches_adapters(world_size: int) -> None:
    for result in run_ranks(switch_adapters, world_size):
        assert_close(result["ours"], result["stock"], "training")
        assert not torch.allclose(result["ours"]["default"], result["ours"]["none"])
        assert result["trains"] == {"A.other.weight", "B.other.weight"}
        assert not result["left"]


def train_by_config(output_dir: str, kind: str, source: str | None, **adapter: Any) -> dict[str, Any]:
    """A trainer that is given `peft_config`: ours on Trainer, or on TRL's, which knows the argument."""
    model = source or tiny_model("qwen3_moe")
    peft_config = config(**adapter)
    more: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    if kind == "Trainer":
        args = TrainingArguments(output_dir=output_dir, **more)
        data: Any = ragged_batch_dataset(16, 12)
        trainer: Any = AcceleratedMoETrainer(model=model, args=args, train_dataset=data, peft_config=peft_config)
    else:
        args = SFTConfig(output_dir=output_dir, bf16=False, max_length=16, **more)
        data = Dataset.from_list([{"text": " ".join(f"w{(i * 7 + j) % 100}" for j in range(12))} for i in range(16)])
        trainer = SFT(
            model=model, args=args, train_dataset=data, processing_class=toy_tokenizer(), peft_config=peft_config
        )
    trainer.train()
    trainer.save_model(output_dir)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    drops = {module.p for module in trainer.model.modules() if isinstance(module, nn.Dropout) and module.p}
    held = trainer.model.get_base_model().model.layers[0].mlp.experts.lora["down_proj"].lora_A["default"].weight
    experts = sum(".experts.lora." in name for name in trained)
    return {"experts": experts, "held": held.to_local().shape[0], "drops": drops}


def in_slices(*args: Any) -> dict[str, Any]:
    """Each rank reads its slices: the model is never whole, to be sharded in place."""
    with mock.patch("hf_moe_accel.prepare.shard_in_place", side_effect=AssertionError("read whole")):
        return train_by_config(*args)


class SFT(AcceleratedMoEMixin, SFTTrainer):
    """What issue 7 gives a name."""


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "loaded"])
def test_trainers_take_peft_config(kind: str, by_name: bool, tmp_path: Path) -> None:
    source = None
    if by_name:
        source = str(tmp_path / "model")
        tiny_model("qwen3_moe").save_pretrained(source)
        toy_tokenizer().save_pretrained(source)
    results = run_ranks(in_slices if by_name else train_by_config, 2, str(tmp_path / "out"), kind, source, init=False)
    # 2 layers, 2 projections, A and B; half of the 8 experts
    assert results == [{"experts": 8, "held": 4, "drops": set()}] * 2
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.mlp.experts.lora_B.weight"].shape == (64, 4 * 8)
    assert saved["base_model.model.model.layers.0.mlp.experts.lora_B.weight"].any()
    logits_of("qwen3_moe", tmp_path / "out")


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_trainers_take_any_spelling_and_dropout(kind: str, tmp_path: Path) -> None:
    more = {"target_modules": "all-linear", "target_parameters": None, "lora_dropout": 0.25}
    for result in run_ranks(train_by_config, 2, str(tmp_path / "out"), kind, None, **more, init=False):
        assert result == {"experts": 8, "held": 4, "drops": {0.25}}
    PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path / "out")


def test_a_model_by_name_with_what_is_copied_whole(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    source, out = str(tmp_path / "model"), str(tmp_path / "out")
    for result in run_ranks(train_by_config, 2, out, "Trainer", source, modules_to_save=["lm_head"], init=False):
        assert result["experts"] == 8
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "out/adapter_model.safetensors")


def save_both_forms(name: str, directory: str) -> None:
    settings = MoEAccelConfig(per_expert_adapter_on_save=True)
    saving = {"max_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    train(AcceleratedMoETrainer, directory, Adapted(name), {"moe_config": settings}, **saving)


def test_both_forms_of_an_adapter_at_each_save(tmp_path: Path) -> None:
    run_ranks(save_both_forms, 2, "qwen3_moe", str(tmp_path), init=False)
    for folder in ("checkpoint-2", "adapter"):
        expected = logits_of("qwen3_moe", tmp_path / folder)
        assert_close(logits_of("qwen3_moe", tmp_path / folder / "per_expert"), expected, "training")
    assert not check_manifest(tmp_path / "checkpoint-2").problems
    with pytest.raises(ValueError, match="for all experts of GptOssForCausalLM together"):
        save_both_forms("gpt_oss", str(tmp_path / "never"))


def refusals() -> list[str]:
    texts = []
    for make in (
        lambda: get_peft_model(tiny_model("qwen3_moe"), config(target_parameters=["experts.w1"])),
        lambda: get_peft_model(tiny_model("qwen3_moe"), config(use_dora=True)),
        lambda: get_peft_model(tiny_model("qwen3_moe"), config(init_lora_weights="pissa")),
        lambda: get_peft_model(tiny_model("qwen3_moe"), config(lora_bias=True)),
        lambda: get_peft_model(tiny_model("llama"), config()),
        lambda: get_peft_model(tiny_model("qwen3_moe"), config(exclude_modules=r".*experts.*")),
        lambda: get_peft_model(tiny_model("qwen3_moe"), config(layers_to_transform=[1])),
    ):
        with pytest.raises(ValueError) as error:
            make()
        texts.append(str(error.value))
    return texts


def test_what_cannot_be_adapted_is_said() -> None:
    nothing_hit, dora, pissa, bias, dense, excluded, layers = refusals()
    assert "experts.w1" in nothing_hit and "mlp.experts.gate_up_proj" in nothing_hit
    for text, option in ((dora, "use_dora=True"), (pissa, "init_lora_weights='pissa'"), (bias, "lora_bias=True")):
        assert f"{option} does not work on experts" in text and "leave the experts out" in text
    assert "LlamaForCausalLM: it has none" in dense
    for text, option in ((excluded, "exclude_modules=.*experts.*"), (layers, "layers_to_transform=[1]")):
        assert option in text and "target_parameters=['model.layers.0.mlp.experts.down_proj', ...]" in text


def test_dropout_acts_on_the_other_targets(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_moe_accel"):
        model = get_peft_model(tiny_model("qwen3_moe"), config(lora_dropout=0.25))
    assert "lora_dropout=0.25 acts on the other targets; on experts it is 0" in caplog.text
    assert model.peft_config["default"].lora_dropout == 0.25
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].lora_dropout == 0.25
    PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path)  # whose wrappers of experts refuse dropout
    drops = {module.p for module in model.modules() if isinstance(module, nn.Dropout) and module.p}
    assert drops == {0.25}


def test_a_second_adapter_before_the_model_is_prepared(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("qwen3_moe"), config())
    model.add_adapter("other", config(r=2))
    prepare_moe_model(model)
    layer = model.get_base_model().model.layers[0].mlp.experts.lora["gate_up_proj"]
    assert sorted(layer.lora_A) == ["default", "other"] and layer.lora_A["other"].weight.shape == (8, 2, 64)
    draw_factors(model)
    model.save_pretrained(tmp_path)
    for name, rank in (("", 4), ("other", 2)):
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert saved["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"].shape == (rank * 8, 64)


def test_a_model_inside_adapters_is_not_exported_by_itself(tmp_path: Path) -> None:
    model = prepare_moe_model(get_peft_model(tiny_model("qwen3_moe"), config()))
    with pytest.raises(ValueError, match="carries PEFT's adapters: export_checkpoint of the PEFT model"):
        export_checkpoint(model.get_base_model(), tmp_path)


def export_merged(name: str, directory: str, dtype: torch.dtype) -> None:
    model = prepare_moe_model(Adapted(name, dtype)())
    export_checkpoint(model, directory, max_shard_size="100KB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_is_stock_pefts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit in fp32 up to the order of the sum; in bf16, stock rounds the product before it adds."""
    stock = Adapted(name, dtype)().merge_and_unload()
    for world_size in (1, 2, 4):
        directory = tmp_path / str(world_size)
        run_ranks(export_merged, world_size, name, str(directory), dtype)
        merged, info = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager", dtype=dtype
        )
        assert not any(info.values()), info
        assert_close(dict(merged.named_parameters()), dict(stock.named_parameters()), "training", "weights")


def train_and_merge(output_dir: str, async_save: bool) -> torch.Tensor:
    trainer = make_resumable(
        output_dir, model=Adapted("qwen3_moe"), async_save=async_save, merge_adapters_on_save=True, max_steps=2
    )
    trainer.train()
    rows = torch.stack([row["input_ids"] for row in ragged_batch_dataset(2, 8, seed=9)])
    with torch.no_grad():
        return trainer.model.eval()(input_ids=rows).logits


@pytest.mark.parametrize("async_save", [True, *slow(False)])
def test_merging_at_each_save(async_save: bool, tmp_path: Path) -> None:
    expected, _ = run_ranks(train_and_merge, 2, str(tmp_path), async_save, init=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2/merged", attn_implementation="eager").eval()
    rows = torch.stack([row["input_ids"] for row in ragged_batch_dataset(2, 8, seed=9)])
    with torch.no_grad():
        assert_close(merged(input_ids=rows).logits, expected, "training")
    assert_close(logits_of("qwen3_moe", tmp_path / "checkpoint-2"), expected, "training")
    assert not check_manifest(tmp_path / "checkpoint-2").problems


def test_modules_to_save_with_buffers(tmp_path: Path) -> None:
    model = prepare_moe_model(Adapted("deepseek_v3", modules_to_save=["gate"])())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    gate = model.get_base_model().model.layers[1].mlp.gate.modules_to_save["default"]
    key = "base_model.model.model.layers.1.mlp.gate."
    assert torch.equal(saved[f"{key}weight"], gate.weight)
    assert torch.equal(saved[f"{key}e_score_correction_bias"], gate.e_score_correction_bias)
    PeftModel.from_pretrained(tiny_model("deepseek_v3"), tmp_path)
    with torch.no_grad():
        gate.weight.zero_()
    load_adapter(model, tmp_path, "default")
    assert torch.equal(saved[f"{key}weight"], gate.weight)


@pytest.mark.parametrize("more", [{"target_modules": ["embed_tokens"]}, {"alora_invocation_tokens": [5]}], ids=str)
def test_what_cannot_be_folded_in_is_said(more: dict[str, Any], tmp_path: Path) -> None:
    model = stock_get_peft_model(tiny_model("qwen3_moe"), config(**({"target_parameters": None} | more)))
    with pytest.raises(ValueError, match="cannot be folded into its weight here"):
        export_checkpoint(prepare_moe_model(model), tmp_path)
