"""A program whose ranks come to a stop: `python -m tests.distributed.watchdog_job CASE`, under torchrun or without."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from tests.helpers.models import ragged_batch_dataset, tiny_model

TIMEOUT = 2.0


def run(case: str) -> None:
    """Two training steps, and then what `case` says; the process group is there."""
    rank = dist.get_rank()
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(ep_size=2, collective_timeout=TIMEOUT))
    batch = {key: value[None] for key, value in ragged_batch_dataset(1, 16, seed=rank)[0].items()}

    def forever() -> None:
        time.sleep(600)

    for _ in range(2):
        model(**batch).loss.backward()
    if case == "a forward too many":
        model(**batch) if rank == 1 else forever()
    elif case == "asleep before a forward":
        forever() if rank == 1 else model(**batch)
    elif case == "asleep before a backward":
        loss = model(**batch).loss
        forever() if rank == 1 else loss.backward()
    elif case == "asleep between exchanges":
        if rank == 1:
            model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda *_: forever())
        model(**batch)
    elif case == "killed":
        if rank == 1:
            time.sleep(TIMEOUT / 2)  # Time to say where it is.
            os.kill(os.getpid(), signal.SIGKILL)
        model(**batch)
    else:
        assert case == "without trouble"


def main(case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(case)
    print(f"rank {dist.get_rank()} is done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
