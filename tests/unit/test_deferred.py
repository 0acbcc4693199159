"""A deferred tensor is made by what uses it first, and nothing gets around that unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_accel.moe.deferred import Deferred

SHAPE = (4, 6)


class Case:
    """A deferred product, and how often it was made."""

    def __init__(self, *, known: bool = True) -> None:
        self.x = torch.arange(24.0).reshape(SHAPE).requires_grad_()
        self.made = 0
        self.deferred = Deferred(self._make, self.x if known else None, requires_grad=True)

    def _make(self) -> Tensor:
        self.made += 1
        return 2 * self.x


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "use",
    [
        lambda d: d + 1,
        lambda d: 1 - d,
        lambda d: torch.ones(SHAPE) * d,
        lambda d: torch.nn.functional.linear(d, torch.ones(3, 6)),
        lambda d: torch.cat([torch.zeros(SHAPE), d]),
        lambda d: d.view(2, 2, 6).view(24) + 1,
        lambda d: d.reshape(-1) + d.view(-1),
        lambda d: d[1:3],
        lambda d: d.to(torch.float64),
        lambda d: d.clone(),
        lambda d: torch.zeros(SHAPE).index_put((torch.tensor([0, 1, 2, 3]),), d),
    ],
)
def test_a_use_makes_it_once(use: Callable[[Any], Tensor], known: bool) -> None:
    case = Case(known=known)
    used = use(case.deferred)
    assert case.made == 1
    expected_x = case.x.detach().clone().requires_grad_()
    expected = use(2 * expected_x)
    assert type(used) is Tensor
    assert torch.equal(used, expected)
    use(case.deferred)
    assert case.made == 1
    used.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(case.x.grad, expected_x.grad)


def test_written_into_as_the_tensor_itself() -> None:
    case = Case()
    case.deferred += 1
    assert torch.equal(case.deferred, 2 * case.x + 1)


def test_its_outside_does_not_make_it() -> None:
    case = Case()
    shown = case.deferred.view(2, 2, 6)
    for tensor, shape in ((case.deferred, SHAPE), (shown, (2, 2, 6))):
        assert tensor.shape == tensor.size() == shape
        assert (tensor.dim(), tensor.dtype, tensor.device.type) == (len(shape), torch.float32, "cpu")
        assert tensor.requires_grad
        assert tensor._base is None
        assert tensor.to(torch.float32) is tensor
    assert case.made == 0


def test_hooks_that_came_before_run_in_the_backward_pass() -> None:
    case = Case()
    seen: list[Tensor] = []
    case.deferred.register_hook(seen.append)
    case.deferred.register_hook(lambda grad: 3 * grad)
    case.deferred.register_hook(lambda grad: 1 / 0).remove()
    assert case.made == 0
    case.deferred.sum().backward()
    assert torch.equal(seen[0], torch.ones(SHAPE))
    assert torch.equal(case.x.grad, torch.full(SHAPE, 6.0))


def test_nothing_is_made_into_no_graph() -> None:
    deferred = Deferred(lambda: torch.ones(2), torch.ones(2), requires_grad=False)
    assert not deferred.requires_grad
    with torch.inference_mode():
        assert (deferred + 1).tolist() == [2, 2]


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("known", [True, False])
def test_an_autograd_function_that_would_lose_its_gradient_is_refused(known: bool) -> None:
    out = Own.apply(Case(known=known).deferred)
    # torch sees first that a gradient does not fit a tensor of unknown shape.
    with pytest.raises(RuntimeError, match="overlap_chunks=1" if known else "invalid gradient"):
        out.sum().backward()


def test_an_operation_below_autograd_is_refused() -> None:
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="overlap_chunks=1"):
        Case().deferred + 1
