"""Finding one's place among ranks that Slurm has started."""

from __future__ import annotations

import os
from unittest import mock

import pytest

from hf_moe_accel.launch import first_host, join, tasks_of_nodes

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TASK = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "11",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
}


def joined(**variables: str) -> tuple[str | None, dict[str, str]]:
    """The launcher, and the place as torchrun would tell it."""
    with mock.patch.dict(os.environ, variables, clear=True):
        return join(), {name: os.environ[name] for name in PLACE if name in os.environ}


def test_a_task_of_srun() -> None:
    launcher, place = joined(**TASK)
    assert launcher == "srun (SLURM_PROCID=9)"
    assert place.pop("MASTER_PORT") == str(15000 + 1234569 % 15000)
    assert place == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "11",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07",
    }


def test_what_is_set_for_all_ranks_counts() -> None:
    _, place = joined(**TASK, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert place["MASTER_ADDR"] == "10.0.0.1" and place["MASTER_PORT"] == "29500"


def test_a_step_may_have_less_than_its_job() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu09", "SLURM_STEP_TASKS_PER_NODE": "2"}
    _, place = joined(**TASK | step | {"SLURM_PROCID": "1", "SLURM_NODEID": "0"})
    assert place["WORLD_SIZE"] == place["LOCAL_WORLD_SIZE"] == "2"
    assert place["MASTER_ADDR"] == "gpu09"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"},  # a batch script
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["no launcher", "a batch script", "a step of one task"],
)
def test_nobody_has_started_several(variables: dict[str, str]) -> None:
    assert joined(**variables) == (None, {})


def test_torchrun_on_each_node_of_a_job_of_slurm() -> None:
    launcher, place = joined(**TASK, RANK="3")
    assert launcher == "torchrun or accelerate launch (RANK=3)"
    assert place == {"RANK": "3"}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[9,003-005]", "gpu9"),
        ("rack[1-2]node[3-4].site", "rack1node3.site"),
        ("ip-10-0-0-1,ip-10-0-0-2", "ip-10-0-0-1"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_tasks_of_nodes() -> None:
    assert tasks_of_nodes("8") == [8]
    assert tasks_of_nodes("4(x2),3,1(x3)") == [4, 4, 3, 1, 1, 1]
