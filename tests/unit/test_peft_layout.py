"""PEFT's order of the experts' factors: A with the expert slowest, B with the expert fastest."""

from __future__ import annotations

import torch

from hf_moe_accel.lora.peft_layout import a_from_peft, a_to_peft, b_from_peft, b_to_peft

E, R, IN, OUT = 3, 2, 5, 4


def test_rows_and_columns() -> None:
    """Written out by index, as PEFT's `ParamWrapper` reads them."""
    a, b = torch.randn(R * E, IN), torch.randn(OUT, R * E)
    for expert in range(E):
        for rank in range(R):
            assert torch.equal(a_from_peft(a, E)[expert, rank], a[expert * R + rank])
            assert torch.equal(b_from_peft(b, E)[expert, :, rank], b[:, rank * E + expert])
    # Read with the expert slowest, B would be another one.
    assert not torch.equal(b_from_peft(b, E), b.reshape(OUT, E, R).permute(1, 0, 2))


def test_there_and_back() -> None:
    a, b = torch.randn(E, R, IN), torch.randn(E, OUT, R)
    assert torch.equal(a_from_peft(a_to_peft(a), E), a)
    assert torch.equal(b_from_peft(b_to_peft(b), E), b)
