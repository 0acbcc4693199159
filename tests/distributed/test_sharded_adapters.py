"""Adapters given to a model that is sharded already: as those that were there before, and as stock PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer

from hf_moe_accel import (
    AcceleratedMoETrainer,
    AutoModelForCausalLM,
    MoEAccelConfig,
    PeftModel,
    clip_grad_norm_,
    get_peft_model,
    parameter_groups,
    prepare_moe_model,
)
from tests.checkpoints.test_resume import only
from tests.distributed.test_expert_adapters import logits_of, train
from tests.helpers.adapters import Adapted, config
from tests.helpers.grids import slow
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.resumable import run as run_resumable
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Loaded:
    """Loads a model by name, each rank its slices, and then a saved adapter."""

    def __init__(self, directory: Path, mixed: bool = False, **layout: Any) -> None:
        self.directory, self.mixed, self.layout = str(directory), mixed, layout

    def __call__(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            f"{self.directory}/model",
            moe_config=MoEAccelConfig(**self.layout),
            fsdp_mixed_precision=self.mixed,
            dtype=torch.float32,
        )
        model = PeftModel.from_pretrained(model, f"{self.directory}/adapter", is_trainable=True)
        model.train()
        factors = [(name, p) for name, p in model.named_parameters() if ".experts.lora." in name]
        assert factors and all(isinstance(p, DTensor) for _, p in factors)
        return model


def save_both(name: str, directory: Path, **more: Any) -> None:
    tiny_model(name).save_pretrained(directory / "model")
    Adapted(name, **more)().save_pretrained(directory / "adapter")


@pytest.mark.parametrize(
    ("name", "world_size", "layout", "arguments"),
    [
        ("qwen3_moe", 2, {}, {}),
        ("gpt_oss", 2, {}, {"gradient_checkpointing": True}),
        ("nemotron_h", 2, {"ep_size": 1}, {"gradient_accumulation_steps": 2}),
        ("qwen3_moe", 4, {"ep_size": 2, "dp_replicate_size": 2}, {"gradient_checkpointing": True}),
        *slow(("qwen3_moe", 4, {"ep_size": 2}, {"gradient_accumulation_steps": 2})),
    ],
    ids=str,
)
def test_it_trains_as_stock_peft(
    name: str, world_size: int, layout: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    save_both(name, tmp_path)
    (expected,) = run_ranks(train, 1, Trainer, str(tmp_path / "stock"), Adapted(name), **arguments)
    ours = run_ranks(
        train,
        world_size,
        AcceleratedMoETrainer,
        str(tmp_path / "ours"),
        Loaded(tmp_path, **layout),
        {"moe_config": MoEAccelConfig(**layout)},
        **arguments,
        init=True,
    )
    for log in ours:
        assert_close(log, expected, "training", "log")
    saved = [load_file(tmp_path / each / "adapter/adapter_model.safetensors") for each in ("ours", "stock")]
    assert_close(*saved, "training", "adapter")
    assert_close(logits_of(name, tmp_path / "ours/adapter"), logits_of(name, tmp_path / "stock/adapter"), "training")


def test_fp32_masters_that_compute_in_bf16(tmp_path: Path) -> None:
    save_both("qwen3_moe", tmp_path)
    (expected,) = run_ranks(train, 1, Trainer, str(tmp_path / "stock"), Adapted("qwen3_moe"), bf16=True)
    for log in run_ranks(
        train, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), Loaded(tmp_path, mixed=True), bf16=True
    ):
        losses, stock = ([entry["loss"] for entry in each if "loss" in entry] for each in (log, expected))
        assert losses == pytest.approx(stock, rel=1e-2)
    saved = load_file(tmp_path / "ours/adapter/adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_and_on_another_layout(tmp_path: Path) -> None:
    save_both("qwen3_moe", tmp_path)
    loaded = Loaded(tmp_path)
    whole = run_ranks(run_resumable, 2, str(tmp_path / "whole"), model=loaded)
    checkpoint = only(tmp_path / "whole", 4, tmp_path / "resumed")
    same = run_ranks(run_resumable, 2, str(tmp_path / "same"), checkpoint, model=loaded)
    for mine, theirs in zip(same, whole, strict=True):
        assert mine.log == theirs.log
        assert all(torch.equal(value, theirs.weights[name]) for name, value in mine.weights.items())
    other = run_ranks(run_resumable, 4, str(tmp_path / "other"), checkpoint, model=loaded)
    assert_close(other[0].log, whole[0].log, "training", "log")


def loop(directory: str, late: bool) -> dict[str, Any]:
    """A loop of one's own on this rank's part of 4 rows a step; `late`: the adapter comes after a first forward."""
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if late is not None else (0, 1)
    rows = torch.stack([row["input_ids"] for row in ragged_batch_dataset(12, 8)])
    if late is None:
        model: Any = PeftModel.from_pretrained(tiny_model("qwen3_moe"), f"{directory}/adapter", is_trainable=True)
        with pytest.raises(RuntimeError, match="call hf_moe_accel.prepare_moe_model"):
            model(input_ids=rows)  # it would leave the adapters of experts out
        prepare_moe_model(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32)
        if late:
            out = model(input_ids=rows[:1], labels=rows[:1])
            out.loss.backward()
            model.zero_grad()
        model = PeftModel.from_pretrained(model, f"{directory}/adapter", is_trainable=True)
    optimizer = torch.optim.SGD(parameter_groups(model), lr=0.5)
    log = []
    for step in range(3):
        mine = rows[4 * step : 4 * step + 4].tensor_split(ranks)[rank]
        for part in mine.split(1):  # accumulated
            loss = model(input_ids=part, labels=part).loss / len(mine)
            loss.backward()
        norm = clip_grad_norm_(model, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        log.append(float(norm))
    plain = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(f"{directory}/{late}")
    return {"norms": log, "plain": {n: p for n, p in plain.items() if not isinstance(p, DTensor)}}


@pytest.mark.parametrize("late", [True, *slow(False)], ids=["after one", "before any forward"])
def test_a_loop_of_ones_own(late: bool, tmp_path: Path) -> None:
    save_both("qwen3_moe", tmp_path)
    expected = loop(str(tmp_path), None)
    first, second = run_ranks(loop, 2, str(tmp_path), late)
    assert first["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert first["norms"][0] > 0.05  # so it was clipped
    assert first["plain"] and all(torch.equal(p, second["plain"][name]) for name, p in first["plain"].items())
    saved = [load_file(tmp_path / str(each) / "adapter_model.safetensors") for each in (late, None)]
    assert_close(*saved, "training", "adapter")


def copy_as_trl_does(before: bool) -> dict[str, Any]:
    """What DPOTrainer does with a model that has an adapter: a frozen copy named `ref`, found by its names."""
    model = tiny_model("qwen3_moe")
    if before:
        model = prepare_moe_model(get_peft_model(model, config()))
    else:
        model = get_peft_model(prepare_moe_model(model), config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.fill_(0.1)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    rows = torch.stack([row["input_ids"] for row in ragged_batch_dataset(2, 8)])
    found: dict[str, Any] = {"trains": {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}}
    found["copied"] = sum(".experts.lora." in name and ".ref." in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for name in ("default", "ref"):
            model.set_adapter(name)
            found[name] = model(input_ids=rows).logits
        with model.disable_adapter():
            found["none"] = model(input_ids=rows).logits
    model.set_adapter("default")
    model.delete_adapter("ref")
    found["left"] = [name for name, _ in model.named_parameters() if ".ref." in name]
    return found


@pytest.mark.parametrize("before", [True, False], ids=["adapted, then prepared", "prepared, then adapted"])
@pytest.mark.parametrize("world_size", [2, *slow(1)])
def test_trls_copy_of_an_adapter(world_size: int, before: bool) -> None:
    for found in run_ranks(copy_as_trl_does, world_size, before):
        assert found["trains"] == {"default"} and found["copied"] == 8 and not found["left"]
        assert torch.equal(found["default"], found["ref"]) and not torch.allclose(found["default"], found["none"])


def use_stock_peft_on_a_sharded_model() -> str:
    from peft import get_peft_model as stock_get_peft_model

    model = stock_get_peft_model(prepare_moe_model(tiny_model("qwen3_moe")), config())
    with pytest.raises(RuntimeError) as error:
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    prepare_moe_model(model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    return str(error.value)


@pytest.mark.parametrize("world_size", [2, *slow(1)])
def test_stock_get_peft_model_after_preparing_is_one_line(world_size: int) -> None:
    for message in run_ranks(use_stock_peft_on_a_sharded_model, world_size):
        assert "hf_moe_accel.get_peft_model" in message and "\n" not in message


def load_another(directory: str) -> dict[str, Any]:
    model = get_peft_model(prepare_moe_model(tiny_model("qwen3_moe")), config())
    model.load_adapter(f"{directory}/adapter", "other")
    trains = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    model.set_adapter("other")
    rows = torch.stack([row["input_ids"] for row in ragged_batch_dataset(2, 8, seed=9)])
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=rows).logits, "trains": trains}


def test_load_adapter_into_a_sharded_model(tmp_path: Path) -> None:
    save_both("qwen3_moe", tmp_path)
    for found in run_ranks(load_another, 2, str(tmp_path)):
        assert_close(found["logits"], logits_of("qwen3_moe", tmp_path / "adapter"), "training")
        assert found["trains"] == {"default"}


def refusals() -> list[str]:
    texts = []
    sharded = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig())
    for more in (
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "target_parameters": None},
        {"init_lora_weights": "pissa", "target_parameters": None},
        {"target_parameters": ["gate.weight"]},
    ):
        with pytest.raises(ValueError) as error:
            get_peft_model(sharded, config(**more))
        texts.append(str(error.value))
    return texts


def test_what_needs_whole_weights_is_refused() -> None:
    for texts in run_ranks(refusals, 2):
        for text, named in zip(texts, ("modules_to_save", "use_dora", "pissa", "gate.weight"), strict=True):
            assert named in text and "before prepare_moe_model" in text
