"""A training loop of one's own, written as the docstring of `prepare_moe_model` says, and its one-process original."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_moe_accel import clip_grad_norm_, parameter_groups
from tests.helpers.models import ragged_batch_dataset

GLOBAL_BATCH = 8
LENGTH = 16
MAX_NORM = 0.5


def train_loop(
    model: PreTrainedModel,
    steps: int,
    optimizer_class: type[torch.optim.AdamW] = torch.optim.AdamW,
    *,
    clip_in_step: bool = False,
) -> list[tuple[float, float]]:
    """Trains on this rank's rows of `steps` global batches with ragged labels.

    A model on one process takes the stock path: torch's clipping and one group of all parameters.

    Returns:
        The global loss (the mean over the tokens of all ranks) and the gradient norm before clipping, by step.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    alone = world_size == 1
    groups = list(model.parameters()) if alone else parameter_groups(model)
    # At the first step nothing is left of a gradient but its sign, however small and inexact it is: hence the epsilon.
    optimizer = optimizer_class(groups, lr=3e-3, eps=1e-3, fused=optimizer_class is not torch.optim.AdamW)
    rows = ragged_batch_dataset(GLOBAL_BATCH * steps, LENGTH, seed=5)
    values = []
    for step in range(steps):
        batch = rows[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        num_tokens = sum(int((row["labels"][1:] != -100).sum()) for row in batch)
        mine = batch[rank::world_size]
        loss = model(
            input_ids=torch.stack([row["input_ids"] for row in mine]),
            labels=torch.stack([row["labels"] for row in mine]),
            num_items_in_batch=num_tokens,
        ).loss
        (loss * world_size).backward()
        if alone:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        else:
            norm = clip_grad_norm_(model, MAX_NORM, optimizer=optimizer if clip_in_step else None)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if not alone:
            dist.all_reduce(total)
        values.append((float(total), float(norm)))
    return values


def load_checkpoint(directory: str | Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a saved model."""
    return {key: value for file in Path(directory).glob("*.safetensors") for key, value in load_file(file).items()}
