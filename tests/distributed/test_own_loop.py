"""A loop of one's own, written as `prepare_moe_model` says, trains on several ranks as plain torch does on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as PlainAutoModel

from hf_moe_accel import AdamW, MoEAccelConfig, clip_grad_norm_, parameter_groups, prepare_moe_model
from tests.helpers.grids import named
from tests.helpers.large import kernels
from tests.helpers.loops import load_checkpoint, train_loop
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.tolerances import assert_close

STEPS = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp only": (2, {"ep_size": 1}),
    "ep 2": (2, {"ep_size": 2}),
    "ep 2 x efsdp 2": (4, {"ep_size": 2}),
    "ep 2 x replicas 2": (4, {"ep_size": 2, "dp_replicate_size": 2}),
    "replicas 2": (2, {"ep_size": 1, "dp_replicate_size": 2}),
}


def train(name: str, directory: str, choices: dict[str, Any] | None) -> list[tuple[float, float]]:
    model = tiny_model(name)
    if choices is not None:
        prepare_moe_model(model, MoEAccelConfig(**choices))
    values = train_loop(model, STEPS)
    model.save_pretrained(directory)
    return values


@pytest.fixture(scope="module")
def plain_run(ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("plain")
    (values,) = ranks(train, 1, "qwen3_moe", str(directory), None)
    return values, directory


def train_large(name: str, choices: dict[str, Any], clip_in_step: bool) -> tuple[list[tuple[float, float]], set[str]]:
    model = tiny_model(name)
    prepare_moe_model(model, MoEAccelConfig(**choices))
    with kernels() as ran:
        return train_loop(model, STEPS, AdamW, clip_in_step=clip_in_step), set(ran)


@pytest.mark.parametrize("clip_in_step", [False, True])
@pytest.mark.parametrize("layout", named(LAYOUTS, ["fsdp only", "ep 2 x replicas 2", "replicas 2"]))
def test_large_shards_step_as_in_one_process(
    layout: str, clip_in_step: bool, plain_run: tuple[Any, Path], ranks: Callable[..., list[Any]]
) -> None:
    world_size, choices = LAYOUTS[layout]
    for values, ran in ranks(train_large, world_size, "qwen3_moe", choices, clip_in_step):
        assert ran == {"adamw_"} | (set() if clip_in_step else {"shrink_"})
        assert_close(values, plain_run[0], "training")


@pytest.mark.parametrize("layout", named(LAYOUTS, ["replicas 2", "ep 2 x efsdp 2"]))
def test_loop_equals_one_process(
    layout: str, plain_run: tuple[Any, Path], ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    world_size, choices = LAYOUTS[layout]
    expected, directory = plain_run
    values = ranks(train, world_size, "qwen3_moe", str(tmp_path), choices)
    assert all(of_rank == values[0] for of_rank in values), "the ranks disagree"
    assert_close(values[0], expected, "training")
    assert_close(load_checkpoint(tmp_path), load_checkpoint(directory), "training")
    _, info = PlainAutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


def after_backward() -> Any:
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(ep_size=2))
    row = ragged_batch_dataset(2, 16, seed=dist.get_rank())[0]
    model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
    return model


def clip_and_step_as_torch_does() -> dict[str, str]:
    model = after_backward()
    errors = {}
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    except RuntimeError as error:
        errors["clip"] = str(error)
    # As an adapter that was added after sharding.
    plain = torch.nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    try:
        torch.optim.AdamW([*model.parameters(), plain], foreach=True).step()
    except RuntimeError as error:
        errors["step"] = str(error)
    torch.optim.AdamW([*parameter_groups(model), {"params": [plain]}], foreach=True).step()
    return errors


def test_what_torch_has_raises(ranks: Callable[..., list[Any]]) -> None:
    """The reason for `clip_grad_norm_` and `parameter_groups`; when this fails, they may go."""
    for errors in ranks(clip_and_step_as_torch_does, 2):
        assert "must have the same mesh" in errors["clip"]
        assert "mixed torch.Tensor and DTensor" in errors["step"]


def clip_and_group() -> dict[str, Any]:
    model = after_backward()
    before = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    norm = clip_grad_norm_(model, 0.25)
    after = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    model.lm_head.weight.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    assert not isinstance(norm, DTensor)
    torch.optim.AdamW(groups, lr=0.0, foreach=True).step()
    return {
        "before": before,
        "norm": norm,
        "after": after,
        "meshes": [len({p.device_mesh for p in group["params"]}) for group in groups],
        "options": [group["weight_decay"] for group in groups],
        "complete": kept == {id(p) for group in groups for p in group["params"]},
    }


def test_clipping_and_groups(ranks: Callable[..., list[Any]]) -> None:
    for result in ranks(clip_and_group, 2):
        gradients = result["before"].values()
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        assert_close(result["norm"], norm, "training")
        expected = {name: g * (0.25 / (norm + 1e-6)) for name, g in result["before"].items()}
        assert_close(result["after"], expected, "training")
        assert result["meshes"] == [1, 1]
        assert result["options"] == [0.1, 0.1]
        assert result["complete"]


def test_clipping_on_one_process_is_torch_s() -> None:
    models = [prepare_moe_model(tiny_model("qwen3_moe")) for _ in range(2)]
    for model in models:
        row = ragged_batch_dataset(1, 16)[0]
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
    norms = [clip_grad_norm_(models[0], 0.25), torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.25)]
    assert_close(norms[0], norms[1], "training")
    gradients = [[p.grad for p in model.parameters() if p.grad is not None] for model in models]
    assert_close(gradients[0], gradients[1], "training")
    assert len(parameter_groups(models[0])) == 1


def test_clipping_without_gradients() -> None:
    assert float(clip_grad_norm_(tiny_model("llama"), 1.0)) == 0.0
