"""Which formula a gate computes: found by what it returns, since a torch function cannot be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Far beyond any limit that clamps, and still finite in fp32.
_HUGE = 1e30


class GateFormula(NamedTuple):
    """`act(min(g, limit)) * (clamp(u, -limit, limit) + shift)`, or without a gate `act(g)`.

    Attributes:
        act: "swish" (x * sigmoid(alpha * x); SiLU at alpha 1), "gelu", "gelu_tanh", "relu" or "relu2".
        gated: whether there is u.
        interleaved: g and u are the even and the odd columns of the pre-activation; otherwise its two halves.
        alpha: of "swish".
        limit: infinite where nothing is clamped.
        shift: 1 for GPT-OSS, else 0.
    """

    act: str
    gated: bool
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0

    def __call__(self, h_RM: Tensor) -> Tensor:
        """[R, I] what the formula makes of a pre-activation."""
        if not self.gated:
            return _ACTS[self.act](h_RM, self.alpha)
        g, u = (h_RM[..., ::2], h_RM[..., 1::2]) if self.interleaved else h_RM.chunk(2, dim=-1)
        return _ACTS[self.act](g.clamp(max=self.limit), self.alpha) * (u.clamp(-self.limit, self.limit) + self.shift)


_ACTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "swish": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "gelu": lambda x, alpha: functional.gelu(x),
    "gelu_tanh": lambda x, alpha: functional.gelu(x, approximate="tanh"),
    "relu": lambda x, alpha: functional.relu(x),
    "relu2": lambda x, alpha: functional.relu(x).square(),
}


def find_formula(gate: Callable[[Tensor], Tensor], pre_activation_size: int, size: int) -> GateFormula | None:
    """The formula that agrees with a gate on random rows and beyond its limits; None if none of ours does.

    Runs on the CPU, so that nothing is read back from a device.

    Args:
        gate: [R, pre_activation_size] -> [R, size], elementwise in R, without parameters.
        pre_activation_size: 2 * size for a gate, else size.
        size: I.
    """
    try:
        return _find(gate, pre_activation_size, size)
    except RuntimeError:
        # A gate that reads a buffer of a GPU does not run here.
        return None


@torch.no_grad()
def _find(gate: Callable[[Tensor], Tensor], pre_activation_size: int, size: int) -> GateFormula | None:
    rows = torch.randn(8, pre_activation_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for candidate in _candidates(gate, pre_activation_size, size):
        scales = [0.5, 3.0, 20.0] + ([] if math.isinf(candidate.limit) else [2 * candidate.limit])
        probe = torch.cat([scale * rows for scale in scales])
        # Gates that compute in fp32 whatever they are given are known as well.
        if torch.allclose(gate(probe).double(), candidate(probe), rtol=1e-5, atol=1e-5):
            return candidate
    return None


def _candidates(gate: Callable[[Tensor], Tensor], pre_activation_size: int, size: int) -> list[GateFormula]:
    """All formulas, with the numbers in them that the gate's values at a few points ask for."""

    def at(g: float, u: float, interleaved: bool) -> float:
        halves = torch.full((size,), g, dtype=torch.float64), torch.full((size,), u, dtype=torch.float64)
        row = torch.stack(halves, 1).flatten() if interleaved else torch.cat(halves)
        return float(gate(row[None])[0, 0])

    if pre_activation_size == size:
        value = float(gate(torch.ones(1, size, dtype=torch.float64))[0, 0])
        return [GateFormula(act, False, alpha=_alpha(value)) for act in _ACTS]
    found = []
    for interleaved in (False, True):
        # act(1) * (u + shift) is a line in u between the limits.
        at_zero, at_half, at_huge = (at(1.0, u, interleaved) for u in (0.0, 0.5, _HUGE))
        of_act = 2 * (at_half - at_zero)
        if of_act == 0:
            continue
        shift = _round(at_zero / of_act)
        limit = at_huge / of_act - shift
        limit = math.inf if limit > 0.1 * _HUGE else _round(limit)
        found += [GateFormula(act, True, interleaved, _alpha(of_act), limit, shift) for act in _ACTS]
    return found


def _alpha(of_one: float) -> float:
    """The alpha with which "swish" is this at 1."""
    return _round(math.log(of_one / (1 - of_one))) if 0 < of_one < 1 else 1.0


def _round(value: float) -> float:
    """Without the rounding errors of fp32; should a digit be lost that matters, no formula agrees."""
    return float(f"{value:.5g}")
