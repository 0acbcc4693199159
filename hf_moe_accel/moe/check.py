"""What cannot be sent is named where it is, under a debug flag: to look at the tokens is a device sync a layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def check_tokens(x_TD: Tensor, ids_TK: Tensor, num_experts: int, where: str) -> None:
    """Look at this rank's tokens before they are sent. Not a collective.

    It raises on the ranks whose tokens are wrong. The others wait for these in the exchange: once the processes that
    raised have ended, gloo fails there too, and with NCCL the watchdog ends the job after `collective_timeout`.

    Args:
        x_TD: [T, D] rows.
        ids_TK: [T, K] integer expert of each top-k slot.
        num_experts: the experts of the model, E.
        where: for example "step 3, layer 1".

    Raises:
        RuntimeError: rows are not finite, or experts do not exist; names where, the rank, how many and the first.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    bad_rows = ~torch.isfinite(x_TD).all(dim=1)
    bad_ids = ((ids_TK < 0) | (ids_TK >= num_experts)).any(dim=1)
    wrong = torch.stack([bad_rows, bad_ids])
    counts = wrong.sum(1)
    if not counts.any():
        return
    num_rows, num_ids = counts.tolist()
    tokens = x_TD.size(0)
    problems = []
    if num_rows:
        token = int(bad_rows.int().argmax())
        values = int((~torch.isfinite(x_TD[token])).sum())
        problems.append(
            f"{num_rows} of {tokens} tokens have values that are not finite, the first of them token {token} "
            f"({values} of {x_TD.size(1)} values). The layers before this one made them: look for the first layer and "
            "step that reports this, and at the learning rate, the data and the dtype there"
        )
    if num_ids:
        token = int(bad_ids.int().argmax())
        problems.append(
            f"{num_ids} of {tokens} tokens chose experts outside 0 to {num_experts - 1}, the first of them token "
            f"{token} ({ids_TK[token].tolist()}). Look at the router"
        )
    raise RuntimeError(f"check_tokens: {where}, rank {rank}: {'; '.join(problems)}.")
