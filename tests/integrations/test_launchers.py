"""What starts ranks: torchrun's and SLURM's scripts, accelerate's configurations, SkyPilot's task.

They run as they stand. Where a program is not here (srun) or has too much to do (torchrun), one that prints its
arguments stands in its place, and its arguments are parsed by the real parser.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType, prepare_multi_gpu_env
from torch.distributed.run import get_args_parser

from hf_moe_accel import MoEAccelConfig
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.ranks import launch

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "integrations"
ACCELERATE = sorted((LAUNCHERS / "accelerate").glob("*.yaml"))
SBATCH = sorted((LAUNCHERS / "slurm").glob("*.sbatch"))
SCRIPTS = [*sorted((LAUNCHERS / "torchrun").glob("*.sh")), *SBATCH]
QWEN3_EXPERTS = 128
# https://slurm.schedmd.com/sbatch.html
SBATCH_OPTIONS = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "output"),
}
# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
SKYPILOT_FIELDS = {
    *("name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run"),
    *("config", "service"),
}
BASH = "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])"


@pytest.fixture
def stand_ins(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment in which named programs are bash scripts, by default ones that print their arguments."""

    def make(**programs: str) -> dict[str, str]:
        directory = tmp_path / "bin"
        directory.mkdir()
        for name, body in programs.items():
            (directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (directory / name).chmod(0o755)
        return {"PATH": f"{directory}:{os.environ['PATH']}"}

    return make


# bf16 is TRL's default, and an error on a machine that has no GPU unless it says so.
ON_CPU = ("--use_cpu", "true")
PRINT = "printf '%s\\n' \"$@\""


def arguments_of(script: Path, *arguments: str, env: Mapping[str, str]) -> list[str]:
    done = subprocess.run(
        ["bash", script, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_sft(arguments: list[str], nodes: int) -> Any:
    """Of torchrun: checks the command that it starts, and returns its own parsed options."""
    options = get_args_parser().parse_args(arguments)
    assert options.module and options.training_script == "hf_moe_accel.cli"
    command, *flags = options.training_script_args
    assert command == "sft"
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, MoEAccelConfig))
    script, training, model, _, moe = parser.parse_args_and_config(flags, fail_with_unknown_args=True)
    assert script.dataset_name and model.model_name_or_path
    assert training.packing and training.max_length == 4096
    topology = ExpertTopology(nodes * int(options.nproc_per_node), QWEN3_EXPERTS, moe.ep_size, moe.dp_replicate_size)
    assert (topology.ep_size, topology.efsdp_size, topology.dp_replicate_size) == (8, 1, nodes)
    return options


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_torchrun_one_node(stand_ins: Callable[..., dict[str, str]]) -> None:
    script = LAUNCHERS / "torchrun/one_node.sh"
    env = stand_ins(torchrun=PRINT)
    assert check_sft(arguments_of(script, *ON_CPU, env=env), nodes=1).standalone
    own = arguments_of(script, "train.py", "--flag", env={**env, "NPROC": "2"})
    assert own == ["--standalone", "--nproc-per-node", "2", "train.py", "--flag"]


def test_torchrun_several_nodes(stand_ins: Callable[..., dict[str, str]]) -> None:
    script = LAUNCHERS / "torchrun/several_nodes.sh"
    env = stand_ins(torchrun=PRINT)
    options = check_sft(arguments_of(script, *ON_CPU, env={**env, "HEAD": "node0"}), nodes=2)
    assert (options.nnodes, options.rdzv_backend, options.rdzv_endpoint) == ("2", "c10d", "node0:29500")
    done = subprocess.run(["bash", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "HEAD: is not set" in done.stderr


def example(name: str, output: Path) -> list[str]:
    return [str(ROOT / f"examples/{name}.py"), "--output", str(output), "--steps", "3"]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """For real launches: the programs beside this Python, and an address of torchrun's that needs no name server."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "cache"),
        "PET_LOCAL_ADDR": "127.0.0.1",
        **more,
    }


@pytest.mark.slow
def test_torchrun_one_node_runs(tmp_path: Path) -> None:
    script = str(LAUNCHERS / "torchrun/one_node.sh")
    env = environment(tmp_path, NPROC="2")
    done = launch(["-c", BASH, script, *example("swap_import", tmp_path / "out")], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ep 2 x efsdp 1" in done.stderr + done.stdout
    assert (tmp_path / "out/model.safetensors.index.json").exists()


@pytest.mark.slow
def test_torchrun_several_nodes_meet(tmp_path: Path) -> None:
    script = str(LAUNCHERS / "torchrun/several_nodes.sh")
    env = environment(tmp_path, NNODES="2", NPROC="1", HEAD="127.0.0.1", PORT="29411", JOB_ID=tmp_path.name)
    command = ["-c", BASH, script, *example("swap_import", tmp_path / "out")]
    with ThreadPoolExecutor() as threads:
        nodes = [threads.submit(launch, command, env=env) for _ in range(2)]
    for node in nodes:
        assert node.result().returncode == 0, node.result().stderr[-3000:]
    assert (tmp_path / "out/model.safetensors.index.json").exists()


@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.name)
def test_sbatch(script: Path, stand_ins: Callable[..., dict[str, str]]) -> None:
    text = script.read_text()
    directives = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.M)
    assert len(directives) == text.count("#SBATCH"), "a directive that sbatch would not read"
    assert text.rindex("#SBATCH") < text.index("\nset "), "sbatch stops reading at the first command"
    options = dict(directives)
    assert options.keys() <= SBATCH_OPTIONS and len(options) == len(directives)
    assert options["ntasks-per-node"] == "1", "torchrun starts the ranks"
    nodes = int(options["nodes"])
    env = stand_ins(
        torchrun=PRINT,
        scontrol='[[ "$*" == "show hostnames node[3-4]" ]] && printf "node3\\nnode4\\n"',
        srun='[[ $1 == --kill-on-bad-exit=1 ]] && shift && exec "$@"',
    )
    env |= {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[3-4]"}
    env |= {"SLURM_NNODES": options["nodes"], "SLURM_GPUS_ON_NODE": options["gpus-per-node"]}
    parsed = check_sft(arguments_of(script, *ON_CPU, env=env), nodes)
    if nodes > 1:
        assert (parsed.nnodes, parsed.rdzv_endpoint, parsed.rdzv_id) == (str(nodes), "node3:23456", "123456")
    assert arguments_of(script, "train.py", env=env)[-1] == "train.py"


def launched(config: Path, *arguments: str) -> Any:
    """What `accelerate launch` makes of a configuration, without starting it."""
    arguments = ("--config_file", str(config), *arguments, "train.py", "--ep_size", "8")
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


@pytest.mark.parametrize(("name", "nodes"), [("one_node_ep8", 1), ("two_nodes_ep8_x2", 2)])
def test_accelerate(name: str, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = LAUNCHERS / f"accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.compute_environment is ComputeEnvironment.LOCAL_MACHINE
    assert config.distributed_type is DistributedType.MULTI_GPU
    assert config.num_machines == nodes and config.num_processes == 8 * nodes
    # What the trainer refuses, and what is not accelerate's to choose.
    assert not config.fsdp_config and not config.deepspeed_config and not config.parallelism_config
    assert config.mixed_precision == "no"
    ExpertTopology(config.num_processes, QWEN3_EXPERTS, 8, nodes)
    flags = ("--machine_rank", "1", "--main_process_ip", "node0") if nodes > 1 else ()
    assert all(flag in path.read_text() for flag in flags if flag.startswith("--")), "the file tells what to add"
    arguments = launched(path, *flags)
    assert arguments.training_script_args == ["--ep_size", "8"]
    monkeypatch.setattr("os.environ", dict(os.environ))  # it is written to
    env = prepare_multi_gpu_env(arguments)
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert int(arguments.nproc_per_node) == 8
    if nodes > 1:
        assert (arguments.nnodes, arguments.node_rank, arguments.rdzv_endpoint) == ("2", 1, "node0:29500")


def test_accelerate_runs(tmp_path: Path) -> None:
    config = yaml.safe_load((LAUNCHERS / "accelerate/one_node_ep8.yaml").read_text())
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True}))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(small)]
    done = launch([*command, *example("swap_trainer", tmp_path / "out")], env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ep 2 x efsdp 1" in done.stderr + done.stdout
    assert (tmp_path / "out/model.safetensors.index.json").exists()


def test_skypilot(stand_ins: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCHERS / "skypilot/task.yaml").read_text())
    assert {"resources", "setup", "run"} <= task.keys() <= SKYPILOT_FIELDS
    assert re.fullmatch(r"H100:8", task["resources"]["accelerators"])
    assert task["secrets"] == {"HF_TOKEN": None}, "taken from the caller's environment, never written here"
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[name], text=True, check=True)
    run = tmp_path / "run.sh"
    run.write_text(f"set -e\n{task['run']}")
    env = stand_ins(torchrun=PRINT) | {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    env |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-1", **task["envs"]}
    options = check_sft([*arguments_of(run, env=env), *ON_CPU], nodes=2)
    assert (options.rdzv_endpoint, options.rdzv_id) == ("10.0.0.1:29500", "sky-1")


def test_skypilot_by_its_own_schema() -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="needs skypilot, which no test installs")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(yaml.safe_load((LAUNCHERS / "skypilot/task.yaml").read_text()), schemas.get_task_schema())


def test_no_launcher_is_left_out() -> None:
    here = {"accelerate", "torchrun", "slurm", "skypilot"}
    files = {path for name in here for path in (LAUNCHERS / name).rglob("*") if path.is_file()}
    assert files == {*ACCELERATE, *SCRIPTS, LAUNCHERS / "skypilot/task.yaml"}
