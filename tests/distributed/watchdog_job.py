"""A program that comes to a stop: `python -m tests.distributed.watchdog_job CASE`, under torchrun with 2 ranks."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from tests.helpers.models import ragged_batch_dataset, tiny_model

TIMEOUT = 3.0


def main(case: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(ep_size=2, collective_timeout=TIMEOUT))
    row = ragged_batch_dataset(1, 16, seed=rank)[0]
    batch = {key: value[None] for key, value in row.items()}
    for step in range(3):
        if rank == 1 and step == 2:
            print("BEGIN", time.time(), flush=True)
            if case == "extra forward":
                model(**batch)
            elif case == "sleep":
                time.sleep(100)
            elif case == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        loss = model(**batch).loss
        if rank == 1 and step == 2 and case == "sleep before backward":
            print("BEGIN", time.time(), flush=True)
            time.sleep(100)
        loss.backward()
    print("done", rank, flush=True)
    if case != "trouble free":
        time.sleep(100)


if __name__ == "__main__":
    main(sys.argv[1])
