"""Memory that is handed out again: only when nothing uses it, by whatever name."""

from __future__ import annotations

import gc

import pytest
import torch

from hf_moe_accel.ops.reuse import ReusedMemory

LIKE = torch.empty(1024, 512)  # 2 MiB


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("like", [LIKE, LIKE.bfloat16().new_empty(2048, 4, 128)], ids=["float32", "bfloat16"])
def test_memory_comes_back(like: torch.Tensor) -> None:
    memory = ReusedMemory()
    first = memory.empty_like(like)
    assert (first.shape, first.dtype, first.stride()) == (like.shape, like.dtype, like.stride())
    place = address(first)
    assert place % 64 == 0
    second = memory.empty_like(like)
    assert address(second) != place
    del first
    assert address(memory.empty_like(like)) == place


def test_another_dtype_takes_it_up() -> None:
    memory = ReusedMemory()
    place = address(memory.empty_like(LIKE))
    assert address(memory.empty_like(LIKE.new_empty(2048, 512, dtype=torch.bfloat16))) == place
    assert address(memory.empty_like(LIKE.new_empty(1024, 513))) != place


@pytest.mark.parametrize(
    "kept", [lambda t: t[3:5, 7], lambda t: t.detach(), lambda t: t.numpy(), lambda t: t.untyped_storage()]
)
def test_what_shares_it_keeps_it(kept) -> None:
    memory = ReusedMemory()
    tensor = memory.empty_like(LIKE)
    place, still = address(tensor), kept(tensor)
    del tensor
    gc.collect()
    other = memory.empty_like(LIKE)
    assert address(other) != place
    del still, other
    assert place in {address(each) for each in [memory.empty_like(LIKE), memory.empty_like(LIKE)]}


def test_a_gradient_keeps_it() -> None:
    memory = ReusedMemory()

    class Gives(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(ctx, grad):
            return memory.empty_like(LIKE).fill_(grad.item())

    weight = LIKE.clone().requires_grad_()
    Gives.apply(weight).backward()
    place = address(weight.grad)
    (2 * Gives.apply(weight)).backward()
    assert address(weight.grad) == place and weight.grad.unique().tolist() == [3]
    weight.grad = None
    (4 * Gives.apply(weight)).backward()
    assert weight.grad.unique().tolist() == [4]
    assert len(memory._pieces) == 2, "beside a gradient that is kept, the one that is added to it"


def test_small_and_strided_tensors_are_plain() -> None:
    memory = ReusedMemory()
    for like in (LIKE[:2], LIKE.t(), LIKE[:0]):
        assert memory.empty_like(like).stride() == torch.empty_like(like).stride()
    assert not memory._pieces
