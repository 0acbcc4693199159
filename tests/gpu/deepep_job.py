"""The dispatch contract on the installed DeepEP, as one rank of torchrun.

With fewer GPUs than ranks, ranks share them over gloo: for correctness only, never for speed.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from tests.distributed import test_dispatch_contract as contract


def main(name: str) -> None:
    rank, world_size, devices = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
    device = torch.device("cuda", rank % devices)
    torch.cuda.set_device(device)
    if world_size <= devices:
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=120))
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for parameter in contract.BF16_CASES:
        if parameter.marks:
            continue  # those that only --run-slow would run
        (case,) = parameter.values
        result = contract.exchange(name, case, "cuda")
        results: list[Any] = [None] * world_size
        dist.all_gather_object(results, tree_map_only(torch.Tensor, torch.Tensor.cpu, result))
        contract.check(name, world_size, case, results)
    dist.destroy_process_group()
    print(f"rank {rank} of {world_size}: the contract holds for {name}")


if __name__ == "__main__":
    main(sys.argv[1])
