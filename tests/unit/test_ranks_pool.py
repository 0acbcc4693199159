import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from tqdm import tqdm
from transformers.utils import logging

from tests.helpers import ranks as pool
from tests.helpers.grids import slow
from tests.helpers.ranks import LaunchTimeout, RanksError, launch, run_ranks

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# What the ranks run


def pid():
    return os.getpid()


def sum_of_ranks():
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), dist.get_backend(), total


def variables(*names):
    return [os.environ.get(name) for name in names]


def world():
    return dist.is_initialized(), torch.get_num_threads(), torch.cuda.is_available()


def initialize_through_accelerate():
    before = dist.is_initialized()
    state = PartialState(cpu=True)
    return before, state.num_processes, state.process_index, dist.get_backend()


def make_a_mess():
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    sys.path.insert(0, "/left/behind")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("error")
    Accelerator(cpu=True)
    logging.set_verbosity_error()
    init_device_mesh("cpu", (dist.get_world_size(),)).__enter__()


def state():
    return {
        "LEFT_BEHIND": os.environ.get("LEFT_BEHIND"),
        "cwd": os.getcwd(),
        "path": list(sys.path),
        "tensor": torch.empty(()).dtype == torch.float32 and torch.empty(()).device == torch.device("cpu"),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": [entry[:3] for entry in warnings.filters],
        "accelerate": AcceleratorState._shared_state | PartialState._shared_state,
        "verbosity": logging.get_verbosity(),
        "mesh": len(torch.distributed.device_mesh._mesh_resources.mesh_stack),
        "random": (random.random(), torch.rand(()).item()),
    }


def warn_once():
    logging.get_logger("transformers").warning_once("said once")


def redistribute_on_a_late_mesh(num_earlier_groups):
    for _ in range(num_earlier_groups):
        dist.new_group()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    x = torch.arange(16.0).reshape(4, 4)
    sharded = distribute_tensor(x, mesh, [Shard(0), Shard(1)])
    used = {name for result in (sharded @ sharded, sharded.sum(0)) for name in result.device_mesh._dim_group_names}
    full = (sharded @ sharded).redistribute(mesh, [Replicate(), Replicate()]).to_local()
    return bool(torch.equal(full, x @ x)), used == set(mesh._dim_group_names)


def leave(kind):
    if kind == "thread":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    elif kind == "group":
        os.environ["GLOO_SOCKET_IFNAME"] = "no_such_interface"
        with pytest.raises(RuntimeError):
            dist.init_process_group("gloo")
    else:
        bars.append(tqdm(range(3)))


bars = []


def different_kinds_of_tensors(x):
    parameter = torch.nn.Parameter(x)
    return {"parameter": parameter, "computed": parameter * 2, "part": torch.zeros(1000)[:2], "bf16": x.bfloat16()}


def return_a_dtensor():
    return DTensor.from_local(torch.ones(2), DeviceMesh("cpu", list(range(dist.get_world_size()))), [Shard(0)])


def speak(text):
    print(text, dist.get_rank())
    subprocess.run([sys.executable, "-S", "-c", "import sys; print('from a child', file=sys.stderr)"], check=True)
    return dist.get_rank()


def fail_on(rank, then):
    """Raises on one rank, after it has written something, while the others go on to `then`."""
    if dist.get_rank() == rank:
        print("x" * 10_000 + "the last words")
        raise KeyError("the cause")
    wait(then)


def wait(how):
    if how == "collective":
        dist.barrier()
    elif how == "asleep":
        time.sleep(600)
    else:
        raise RuntimeError(f"later, on rank {dist.get_rank()}")


def fail_everywhere():
    raise RuntimeError("the same on all")


def fail_an_assertion():
    some_number = 41
    assert some_number == 42


def exit_with_zero():
    sys.exit(0)


def die_on(rank, how):
    if dist.get_rank() == rank:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def die_with_a_child():
    child = os.fork()
    if child == 0:
        time.sleep(600)
    Path("child").write_text(str(child))
    os._exit(7)


# ---------------------------------------------------------------------------------------------------------------------


def alive(process_id):
    return psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(process_ids, seconds=5):
    deadline = time.monotonic() + seconds
    while (left := [one for one in process_ids if alive(one)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.mark.parametrize("world_size", [2, 4, 2])
def test_each_case_has_a_group_of_its_size(world_size):
    results = run_ranks(sum_of_ranks, world_size)
    assert results == [(rank, world_size, "gloo", sum(range(world_size))) for rank in range(world_size)]


def test_several_ranks_have_the_variables_of_torchrun():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert run_ranks(variables, 2, *names) == [[str(rank), str(rank), "2", "2", "127.0.0.1"] for rank in range(2)]
    assert int(run_ranks(variables, 2, "MASTER_PORT")[0][0]) > 0


def test_one_rank_is_a_plain_process(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run_ranks(variables, 1, "RANK", "WORLD_SIZE", "MASTER_PORT") == [[None, None, None]]
    assert run_ranks(world, 1) == [(False, 1, False)]


def test_the_case_may_initialize_the_group_itself():
    for world_size in (2, 4, 2):
        assert run_ranks(initialize_through_accelerate, world_size, init=False) == [
            (False, world_size, rank, "gloo") for rank in range(world_size)
        ]
    assert run_ranks(sum_of_ranks, 2)[0][1] == 2


def test_the_workers_stay():
    four = run_ranks(pid, 4)
    assert len(set(four)) == 4
    assert run_ranks(pid, 4) == four
    assert run_ranks(pid, 2) == four[:2]
    assert run_ranks(pid, 1) == four[:1]


def test_environment_and_directory_are_the_callers(monkeypatch, tmp_path):
    monkeypatch.setenv("FROM_THE_TEST", "1")
    monkeypatch.chdir(tmp_path)
    names = ("FROM_THE_TEST", "ADDED")
    assert run_ranks(variables, 2, *names, env={"ADDED": "2"}) == [["1", "2"]] * 2
    assert run_ranks(variables, 2, *names, env={"FROM_THE_TEST": None}) == [[None, None]] * 2
    assert run_ranks(state, 1)[0]["cwd"] == str(tmp_path)


def test_a_case_leaves_nothing_behind():
    before = run_ranks(state, 2)
    run_ranks(make_a_mess, 2)
    after = run_ranks(state, 2)
    assert after == before
    assert before[0]["tensor"] and before[0]["grad"] and before[0]["threads"] == 1


@pytest.mark.parametrize(("kind", "replaced"), [("thread", True), ("group", True), ("progress bar", False)])
def test_a_worker_that_keeps_something_is_replaced(kind, replaced):
    before = run_ranks(pid, 2)
    run_ranks(leave, 2, kind, init=False)
    assert [old != new for old, new in zip(before, run_ranks(pid, 2), strict=True)] == [replaced] * 2


def test_a_warning_given_once_is_given_once_a_case():
    for _ in range(2):
        [(_, text)] = run_ranks(warn_once, 1, capture=True)
        assert "said once" in text


def test_no_mesh_of_an_earlier_case_is_used():
    # The earlier groups shift the names of the mesh's groups, so that a mesh of the last case would be told apart.
    for num_earlier_groups in (0, 1, 2):
        assert run_ranks(redistribute_on_a_late_mesh, 4, num_earlier_groups) == [(True, True)] * 4


def test_tensors_travel_as_plain_values():
    x = torch.arange(4.0)
    [result] = run_ranks(different_kinds_of_tensors, 1, x)
    assert {type(tensor) for tensor in result.values()} == {torch.Tensor}
    assert not any(tensor.requires_grad for tensor in result.values())
    assert torch.equal(result["computed"], x * 2)
    assert result["part"].untyped_storage().nbytes() == 8
    assert result["bf16"].dtype == torch.bfloat16


def test_a_dtensor_cannot_be_returned():
    with pytest.raises(RanksError, match=r"return its \.full_tensor\(\) or \.to_local\(\)"):
        run_ranks(return_a_dtensor, 2)


def test_what_the_ranks_write_can_be_had():
    assert run_ranks(speak, 2, "hello", capture=True) == [(rank, f"hello {rank}\nfrom a child\n") for rank in range(2)]


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="world_size is 3"):
        run_ranks(pid, 3)
    with pytest.raises(Exception, match="lambda"):
        run_ranks(lambda: None, 1)


def test_a_failure_names_rank_traceback_and_output():
    workers = run_ranks(pid, 4)
    with pytest.raises(RanksError) as error:
        run_ranks(fail_on, 4, 2, then="collective")
    text = str(error.value)
    first_part, *others = text.split("--- rank ")[1:]
    assert "fail_on: rank 2 of 4 failed" in text
    assert first_part.startswith("2 after ")
    assert 'raise KeyError("the cause")' in first_part and "KeyError: 'the cause'" in first_part
    others = "".join(others).partition("--- output of")[0]
    assert all(f"{rank} after" in others for rank in (0, 1, 3))
    assert "(consequence)" in others and "Traceback" not in others
    output = text.partition("--- output of rank 2 ---\n")[2]
    assert output.endswith("the last words") and output.count("x") == pool.SHOWN_OUTPUT - len("the last words")
    assert wait_until_gone(workers) == []


def test_of_several_failures_the_first_comes_first():
    with pytest.raises(RanksError) as error:
        run_ranks(fail_late_first, 4)
    text = str(error.value)
    positions = [text.index(f"failed on rank {rank}") for rank in (3, 2, 1, 0)]
    assert positions == sorted(positions)


def fail_late_first():
    dist.barrier()  # nobody is still joining the group when the first one fails
    time.sleep(0.05 * (4 - dist.get_rank()))
    raise RuntimeError(f"failed on rank {dist.get_rank()}")


def test_the_same_failure_is_shown_once():
    with pytest.raises(RanksError) as error:
        run_ranks(fail_everywhere, 4)
    assert str(error.value).count("Traceback") == 1
    assert all(f"rank {rank} after" in str(error.value) for rank in range(4))


def test_a_failed_assertion_shows_its_variables():
    with pytest.raises(RanksError, match="some_number = 41"):
        run_ranks(fail_an_assertion, 1)


def test_sys_exit_is_a_failure():
    with pytest.raises(RanksError, match="SystemExit: 0"):
        run_ranks(exit_with_zero, 1)


def test_a_failure_does_not_wait_for_ranks_that_hang(monkeypatch):
    monkeypatch.setattr(pool, "FAILURE_GRACE", 0.5)
    workers = run_ranks(pid, 2)
    start = time.monotonic()
    with pytest.raises(RanksError) as error:
        run_ranks(fail_on, 2, 0, then="asleep", timeout=60)
    assert time.monotonic() - start < 10
    first, second = str(error.value).partition("--- output")[0].split("--- rank ")[1:]
    assert "KeyError: 'the cause'" in first
    assert "no answer within 0.5 s of the first failure" in second
    assert "in wait\n" in second and "in fail_on\n" in second and "rank_worker.py" not in second
    assert wait_until_gone(workers) == []
    assert run_ranks(sum_of_ranks, 2)[1][1] == 2


def test_a_case_that_takes_too_long_shows_where_it_is():
    workers = run_ranks(pid, 4)
    with pytest.raises(RanksError) as error:
        run_ranks(wait_on_one_rank, 2, timeout=1)
    text = str(error.value)
    assert text.count("no answer within 1 s") == 2
    assert "in barrier\n" in text and "time.sleep" not in text
    assert "in wait_on_one_rank" in text
    assert wait_until_gone(workers[:2]) == []
    after = run_ranks(pid, 4)
    assert after[2:] == workers[2:]


def wait_on_one_rank():
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize(("how", "said"), [("exit", "exited with code 3"), ("kill", "was killed by SIGKILL")])
def test_a_rank_that_dies_fails_its_case(how, said):
    with pytest.raises(RanksError) as error:
        run_ranks(die_on, 4, 1, how)
    first, *others = str(error.value).split("--- rank ")[1:]
    assert first.startswith("1 after ") and f"the process {said}" in first
    assert all("(consequence)" in other for other in others)
    assert run_ranks(sum_of_ranks, 4)[1][1] == 4


def test_a_worker_that_died_between_cases_is_replaced():
    workers = run_ranks(pid, 2)
    process = psutil.Process(workers[1])
    process.kill()
    process.wait(10)
    after = run_ranks(pid, 2)
    assert after[0] == workers[0] and after[1] != workers[1]


def test_the_children_of_a_dead_rank_die_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RanksError, match="exited with code 7"):
        run_ranks(die_with_a_child, 1, timeout=20)
    assert wait_until_gone([int((tmp_path / "child").read_text())]) == []


POOL_PROGRAM = """
    import os, signal, sys, time
    import psutil
    from tests.helpers import ranks

    ranks.PRELOAD = ("torch.distributed.tensor",)  # quicker, where nothing is trained
    if __name__ == "__main__":
        ranks.run_ranks(os.getpid, 1)
        print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
        if sys.argv[1] == "killed":
            if os.fork() == 0:
                time.sleep(0.5)
                os.kill(os.getppid(), signal.SIGKILL)
                os._exit(0)
            ranks.run_ranks(time.sleep, 4, 600)
"""


@pytest.mark.slow
def test_no_process_survives_the_session(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(POOL_PROGRAM))
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    # Not through `launch`, which would kill the workers itself.
    sessions = {
        how: subprocess.Popen([sys.executable, program, how], env=environ, stdout=subprocess.PIPE, text=True)
        for how in ("ends", "killed")
    }
    for how, session in sessions.items():
        output, _ = session.communicate(timeout=60)
        assert session.returncode == (0 if how == "ends" else -signal.SIGKILL)
        processes = [int(word) for word in output.splitlines()[-1].split()]
        assert len(processes) == 6  # four workers, the server that they come from, and Python's resource tracker
        assert wait_until_gone(processes) == []


def test_launch_runs_a_plain_program():
    done = launch(
        ["-c", "import os, sys; print(os.environ['A']); print('b', file=sys.stderr); sys.exit(4)"], env={"A": "a"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, "a\n", "b\n")


def test_launch_kills_what_takes_too_long(tmp_path):
    with pytest.raises(LaunchTimeout) as error:
        launch(["-c", "import time\nprint('started', flush=True)\ndef f(): time.sleep(600)\nf()"], timeout=1)
    assert "still ran after 1 s" in str(error.value) and "started" in str(error.value)
    assert 'line 3 in f\n  File "<string>", line 4' in str(error.value)


TORCHRUN_PROGRAM = r"""
    import os, pathlib, signal, sys, time
    pathlib.Path(f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    os.write(1, f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n".encode())
    if sys.argv[1] == "hangs":
        time.sleep(600)
    if sys.argv[1] == "loses its launcher":
        while len(list(pathlib.Path().glob("pid*"))) < 2:
            time.sleep(0.01)
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
"""


@pytest.mark.parametrize("how", ["ends", *slow("hangs", "loses its launcher")])
def test_launch_runs_torchrun_and_leaves_no_process(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(textwrap.dedent(TORCHRUN_PROGRAM))
    if how == "hangs":
        with pytest.raises(LaunchTimeout, match="rank 0 of 2"):
            launch(["program.py", how], world_size=2, timeout=15)
    else:
        done = launch(["program.py", how], world_size=2, timeout=60)
        assert done.returncode == (0 if how == "ends" else -signal.SIGKILL), done.stderr
        assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]
    started = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    assert len(started) == 2
    assert wait_until_gone(started) == []
