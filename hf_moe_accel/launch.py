"""The processes of a run: starting them on this machine, or finding one's place among those that are there.

`python -m hf_moe_accel.launch N MODULE ARGUMENTS...` runs `python -m MODULE ARGUMENTS...` on N ranks.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

# Set for ranks that `hf-moe-accel` has started itself: they read the options again that told it to.
STARTED = "HF_MOE_ACCEL_STARTED"

BAD_INPUT = 2


def launch(num_ranks: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS...` on this machine's ranks, with torchrun, and return the exit code.

    It is 0 if all ranks ended well, `BAD_INPUT` if one of them said so, else 1.
    """
    # Imported here: it takes seconds, and what only joins its ranks needs none of it.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    print(f"Starting {num_ranks} rank{'s' if num_ranks > 1 else ''}", flush=True)
    options = get_args_parser().parse_args(["--standalone", "--nproc-per-node", str(num_ranks), "-m", module])
    # Not parsed with the others: torchrun takes a module's options that begin as its own do for those.
    options.training_script_args = list(arguments)
    try:
        run(options)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return BAD_INPUT if BAD_INPUT in codes else 1
    except SignalException as interruption:  # torchrun has ended the ranks by now
        raise SystemExit(128 + interruption.sigval) from interruption
    return 0


def join() -> str | None:
    """Find this process's place among ranks that a launcher has started; where srun did, say so as torchrun would.

    Returns:
        The launcher, for people; None: there is none.
    """
    if "RANK" in os.environ:
        return f"torchrun or accelerate launch (RANK={os.environ['RANK']})"
    # A batch script has a SLURM_PROCID as well, but is no step of its job: there srun has started nothing.
    if not {"SLURM_PROCID", "SLURM_STEP_ID"} <= os.environ.keys():
        return None
    num_tasks = _of_slurm("STEP_NUM_TASKS", "NTASKS")
    if num_tasks in ("", "1"):
        return None
    rank, step = os.environ["SLURM_PROCID"], os.environ["SLURM_STEP_ID"]
    tasks = tasks_of_nodes(_of_slurm("STEP_TASKS_PER_NODE", "TASKS_PER_NODE") or num_tasks)
    # The same on all ranks, another one for each job and step, and below the ports that systems give out themselves.
    port = 15000 + (int(os.environ.get("SLURM_JOB_ID", "0")) + int(step)) % 15000
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_WORLD_SIZE": str(tasks[int(os.environ.get("SLURM_NODEID", "0"))]),
    }
    os.environ.setdefault("MASTER_ADDR", first_host(_of_slurm("STEP_NODELIST", "JOB_NODELIST")))
    os.environ.setdefault("MASTER_PORT", str(port))
    return f"srun (SLURM_PROCID={rank})"


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: "node[003-005,9],gpu1" -> "node003"."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found.group()) if found else ""


def tasks_of_nodes(tasks: str) -> list[int]:
    """The number of tasks of each node, from a list as Slurm writes it: "4(x2),3" -> [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    return [int(number) for number, times in found for _ in range(int(times or 1))]


def _of_slurm(of_step: str, of_job: str) -> str:
    """A variable of the step, which may have less than its job, or else of the job."""
    return os.environ.get(f"SLURM_{of_step}") or os.environ.get(f"SLURM_{of_job}", "")


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
