"""How PEFT lays the experts' factors out in two dims: A with the expert slowest, B with the expert FASTEST.

ours            PEFT (`lora.ParamWrapper`)
A [E, r, in]    [r * E, in]      row    e * r + i
B [E, out, r]   [out, r * E]     column i * E + e
"""

from __future__ import annotations

from torch import Tensor


def a_from_peft(flat: Tensor, num_experts: int) -> Tensor:
    """[r * E, in] -> [E, r, in]."""
    return flat.reshape(num_experts, -1, flat.size(1))


def b_from_peft(flat: Tensor, num_experts: int) -> Tensor:
    """[out, r * E] -> [E, out, r]."""
    return flat.reshape(flat.size(0), -1, num_experts).permute(2, 0, 1)


def a_to_peft(factor: Tensor) -> Tensor:
    """[E, r, in] -> [r * E, in]."""
    return factor.reshape(-1, factor.size(2))


def b_to_peft(factor: Tensor) -> Tensor:
    """[E, out, r] -> [out, r * E]."""
    return factor.permute(1, 2, 0).reshape(factor.size(1), -1)


def swap(a_flat: Tensor, b_flat: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Exchange the roles of inputs and outputs, in PEFT's layout.

    Args:
        a_flat: [r * E, m]
        b_flat: [n, r * E]
        num_experts: E.

    Returns:
        [r * E, n] and [m, r * E], of the transposed products.
    """
    a = b_from_peft(b_flat, num_experts).transpose(1, 2)
    b = a_from_peft(a_flat, num_experts).transpose(1, 2)
    return a_to_peft(a), b_to_peft(b)
