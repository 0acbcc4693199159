"""Large parameters and gradients take the same step in our kernels as in torch's; tests/gpu has more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as torch_clip
from transformers import Trainer, TrainerCallback

from hf_moe_accel import AcceleratedMoETrainer, AdamW, clip_grad_norm_, optim
from tests.helpers.large import LARGE, kernels
from tests.helpers.models import tiny_model
from tests.helpers.tolerances import assert_close
from tests.unit.test_compiling import given, train
from tests.unit.test_triton_ops import draw, interpreted

# Several blocks and a part of one; one block; one that is small; one whose elements are not in order.
SHAPES = {"blocks": (5, 3333), "block": (64, 64), "small": (7,), "turned": (96, 64)}


@pytest.fixture
def here() -> Iterator[list[str]]:
    """Kernels for all that is large here, on the CPU as well: those that ran."""
    with kernels() as ran:
        yield ran


def parameters(dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    made = {name: draw(*shape, seed=seed).to(device, dtype) for seed, (name, shape) in enumerate(SHAPES.items())}
    made["turned"] = made["turned"].t()
    return [nn.Parameter(value) for value in made.values()]


def fill_grads(of: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    for number, parameter in enumerate(of):
        grad = draw(*parameter.shape, seed=100 * step + number, scale=scale).to(parameter)
        parameter.grad = grad.t().contiguous().t() if not parameter.is_contiguous() else grad


def make(cls: type[torch.optim.AdamW], of: list[nn.Parameter], **more: Any) -> torch.optim.AdamW:
    groups = [{"params": of[:1], "weight_decay": 0.1}, {"params": of[1:], "weight_decay": 0.0}]
    return cls(groups, **({"lr": 1e-2, "betas": (0.9, 0.98), "fused": True} | more))


def of_state(optimizer: torch.optim.AdamW, of: list[nn.Parameter]) -> list[dict[str, Tensor]]:
    return [{name: value.cpu() for name, value in optimizer.state[each].items()} for each in of]


def check_steps(dtype: torch.dtype, device: str, kind: str) -> None:
    ours, theirs = parameters(dtype, device), parameters(dtype, device)
    mine, other = make(AdamW, ours), make(torch.optim.AdamW, theirs)
    for step in range(3):
        for group in (*mine.param_groups, *other.param_groups):
            group["lr"] = 1e-2 / (1 + step)  # as schedulers do
        for parameters_, optimizer in ((ours, mine), (theirs, other)):
            fill_grads(parameters_, step)
            optimizer.step()
    assert_close([p.data for p in ours], [p.data for p in theirs], kind)
    assert_close(of_state(mine, ours), of_state(other, theirs), kind)


@interpreted
def test_adamw_steps_as_torch(here: list[str]) -> None:
    check_steps(torch.float32, "cpu", "training")
    assert here == ["adamw_"] * 6  # two that are large and in order, three times


@interpreted
def test_adamw_corrects_young_means_exactly(here: list[str]) -> None:
    """In fp32 1 - 0.999 is off by 5e-5 of itself, and so would the first step be."""
    value, grad = nn.Parameter(torch.zeros(LARGE)), torch.full((LARGE,), 1e-3)
    value.grad = grad
    AdamW([value], lr=1.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, fused=True).step()
    assert here and (value + 1).abs().max() < 1e-6


@interpreted
def test_state_goes_both_ways(here: list[str]) -> None:
    """What ours saved torch resumes, and the other way around."""
    ends = []
    for classes in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)):
        values = parameters(torch.float32, "cpu")
        saved: dict[str, Any] = {}
        for step, cls in enumerate(classes):
            optimizer = make(cls, values)
            if saved:
                optimizer.load_state_dict(saved)
            fill_grads(values, step)
            optimizer.step()
            saved = optimizer.state_dict()
        ends.append([value.data for value in values])
    assert len(here) == 4
    assert_close(*ends, "training")


LEFT = {
    "not fused": {"fused": False},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "learning rate on the device": {"lr": torch.tensor(1e-2)},
}


@interpreted
@pytest.mark.parametrize("name", LEFT)
def test_the_rest_is_torchs(name: str, here: list[str]) -> None:
    ends = []
    for cls in (AdamW, torch.optim.AdamW):
        values = parameters(torch.float32, "cpu")
        fill_grads(values, 0)
        make(cls, values, **LEFT[name]).step()
        ends.append([value.data for value in values])
    assert not here
    assert_close(*ends, "exact")


@interpreted
def test_a_scaler_may_skip_the_step(here: list[str]) -> None:
    values = parameters(torch.float32, "cpu")
    before = [value.detach().clone() for value in values]
    optimizer, scaler = make(AdamW, values), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    fill_grads(values, 0, scale=float("inf"))
    scaler.step(optimizer)
    assert not here
    assert_close([value.data for value in values], before, "exact")


@interpreted
def test_hooks_run_once_and_autograd_sees_the_step(here: list[str]) -> None:
    values, seen = parameters(torch.float32, "cpu"), []
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # its step runs hooks, too, from here on
    optimizer = make(AdamW, values)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    fill_grads(values, 0)
    loss = (values[0] ** 2).sum()
    optimizer.step()
    assert here and seen == [1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Holder(nn.Module):
    """A model that is nothing but parameters."""

    def __init__(self, of: list[nn.Parameter]) -> None:
        super().__init__()
        self.of = nn.ParameterList(of)


def check_clipping(dtype: torch.dtype, device: str, max_norm: float, scale: float = 1.0) -> None:
    ours, theirs = parameters(dtype, device), parameters(dtype, device)
    for each in (ours, theirs):
        fill_grads(each, 0, scale)
    found, expected = clip_grad_norm_(Holder(ours), max_norm), torch_clip(theirs, max_norm)
    # torch rounds the norm to the dtype of the gradients.
    assert_close(found.to(expected.dtype) / 100, expected / 100, "training")
    kind = "exact" if max_norm > 1e3 else "training"
    assert_close([p.grad for p in ours], [p.grad for p in theirs], kind)


@interpreted
@pytest.mark.parametrize("max_norm", [1.0, 1e4])
def test_clipping_as_torch(max_norm: float, here: list[str]) -> None:
    check_clipping(torch.float32, "cpu", max_norm)
    assert here == ["shrink_"] * 2


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_clipping_spreads_what_is_not_finite(value: float, here: list[str]) -> None:
    ours, theirs = parameters(torch.float32, "cpu"), parameters(torch.float32, "cpu")
    for each in (ours, theirs):
        fill_grads(each, 0)
        each[0].grad[0, 0] = value  # type: ignore[index]
    clip_grad_norm_(Holder(ours), 1.0), torch_clip(theirs, 1.0)
    assert here
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, equal_nan=True, rtol=0, atol=0)


def clip_for(optimizer: torch.optim.AdamW, of: list[nn.Parameter], max_norm: float) -> None:
    """As the optimizer's own kind has it: ours in its next step, torch's now."""
    if isinstance(optimizer, AdamW):
        clip_grad_norm_(Holder(of), max_norm, optimizer=optimizer)
    else:
        torch_clip(of, max_norm)


def clip_and_step(cls: type[torch.optim.AdamW], max_norm: float, **more: Any) -> list[Any]:
    """Two steps, each with gradients of its own."""
    values = parameters(torch.float32, "cpu")
    optimizer = make(cls, values, **more)
    for step in range(2):
        fill_grads(values, step)
        clip_for(optimizer, values, max_norm)
        optimizer.step()
    return [[value.data for value in values], of_state(optimizer, values)]


# What is done where to the two large gradients in order.
CLIPPED = {
    "in the step": ({}, 0),
    "by torch's step": ({"amsgrad": True}, 4),
    "not fused": ({"fused": False}, 4),
}


@interpreted
@pytest.mark.parametrize("max_norm", [1.0, 1e4])
@pytest.mark.parametrize("name", CLIPPED)
def test_a_step_clips_as_torch(name: str, max_norm: float, here: list[str]) -> None:
    more, shrunk = CLIPPED[name]
    assert_close(
        clip_and_step(AdamW, max_norm, **more), clip_and_step(torch.optim.AdamW, max_norm, **more), "training"
    )
    assert here.count("shrink_") == shrunk
    assert here.count("adamw_") == 4 - shrunk


@interpreted
def test_a_step_spreads_what_is_not_finite(here: list[str]) -> None:
    ends = []
    for cls in (AdamW, torch.optim.AdamW):
        values = parameters(torch.float32, "cpu")
        fill_grads(values, 0)
        values[0].grad[0, 0] = float("nan")  # type: ignore[index]
        optimizer = make(cls, values)
        clip_for(optimizer, values, 1.0)
        optimizer.step()
        ends.append([value.data for value in values])
    assert set(here) == {"adamw_"}
    assert all(value.isnan().all() for value in ends[0])
    torch.testing.assert_close(*ends, equal_nan=True)


@interpreted
@pytest.mark.parametrize("hooked", [False, True])
def test_whoever_looks_sees_clipped_gradients(hooked: bool, here: list[str]) -> None:
    values = parameters(torch.float32, "cpu")
    optimizer = make(AdamW, values)
    norms = []
    if hooked:
        optimizer.register_step_pre_hook(lambda *_: norms.append(torch_clip(values, 1e9)))
    fill_grads(values, 0)
    clip_grad_norm_(Holder(values), 1.0, optimizer=optimizer)
    optimizer.step()
    assert ("shrink_" in here) == hooked
    assert all(norm == pytest.approx(1, rel=1e-4) for norm in norms)


@interpreted
def test_only_what_was_clipped_is_clipped(here: list[str]) -> None:
    """A step that was left out, with gradients written into after it, or of another optimizer's parameters."""
    values = parameters(torch.float32, "cpu")
    mine = make(AdamW, values)
    other = make(AdamW, values[:1] + [nn.Parameter(torch.zeros(1))])
    fill_grads(values, 0)
    clip_grad_norm_(Holder(values), 1.0, optimizer=other)
    assert here == ["shrink_"], "the second is none of the other's"
    assert values[0].grad is not None
    values[0].grad.zero_().add_(1.0)
    mine.step()
    assert (mine.state[values[0]]["exp_avg"] - 0.1).abs().max() < 1e-6


def test_nothing_is_large_without_a_device_for_kernels() -> None:
    with mock.patch.object(optim, "_LARGE", 1):
        assert not optim._is_large(torch.zeros(8))


class Looks(TrainerCallback):  # type: ignore[misc]
    """Takes the norm of the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.norms.append(torch_clip(model.parameters(), 1e9).item())


def run(trainer_class: type[Trainer], directory: Path, callbacks: Any = None, **more: Any) -> Trainer:
    # Without the epsilon a gradient's sign is all that the first step takes of it, however small and inexact it is.
    args = given(directory, learning_rate=1e-3, adam_epsilon=1e-3, **more)
    _, trainer = train(tiny_model("qwen3_moe"), args, trainer_class, callbacks=callbacks)
    return trainer


def logs_of(trainer: Trainer) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@interpreted
def test_the_trainer_takes_it(here: list[str], tmp_path: Path) -> None:
    """With the model's experts as large parameters, clipped at every step."""
    more = {"optim": "adamw_torch_fused", "max_grad_norm": 0.5}
    stock = run(Trainer, tmp_path, **more)
    assert not here
    ours = run(AcceleratedMoETrainer, tmp_path, **more)
    assert set(here) == {"adamw_"}, "which clips as well"
    seen = Looks()
    watched = run(AcceleratedMoETrainer, tmp_path, callbacks=[seen], **more)
    assert set(here) == {"adamw_", "shrink_"}
    assert seen.norms and all(norm == pytest.approx(0.5, rel=1e-3) for norm in seen.norms)
    for trainer in (ours, watched):
        assert_close(logs_of(trainer), logs_of(stock), "training")
        assert_close(trainer.model.state_dict(), stock.model.state_dict(), "training")


def test_the_trainer_leaves_other_optimizers(tmp_path: Path) -> None:
    for name, expected in (("adamw_torch", torch.optim.AdamW), ("adamw_torch_fused", AdamW), ("sgd", torch.optim.SGD)):
        trainer = run(AcceleratedMoETrainer, tmp_path, optim=name)
        assert type(trainer.optimizer.optimizer) is expected  # type: ignore[union-attr]
