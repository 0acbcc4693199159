"""What DeepEP cannot carry is said in a sentence, before anything is loaded; its double is as strict as it is."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM as PlainAutoModel

from hf_moe_accel import MoEAccelConfig
from hf_moe_accel.dispatch.base import Traffic
from hf_moe_accel.dispatch.deepep import DeepEPDispatcher
from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.ops import deep_ep as library
from hf_moe_accel.prepare import Setup, choose_setup
from tests.helpers import deep_ep_double as double
from tests.helpers.models import tiny_config

GOOD: dict[str, Any] = {
    "hidden": 2048,
    "num_experts": 128,
    "top_k": 8,
    "dtype": torch.bfloat16,
    "ep_size": 8,
    "ranks_per_node": 8,
    "device": torch.device("cpu"),
}


def why_not(**changes: Any) -> str | None:
    return DeepEPDispatcher.why_not(Traffic(**(GOOD | changes)))


@pytest.mark.parametrize(
    ("version", "changes", "reason"),
    [
        ("v1", {}, None),
        ("v2", {}, None),
        ("v1", {"dtype": torch.float32}, "DeepEP sums rows in bf16 only, and these are float32"),
        ("v2", {"dtype": torch.float16}, "DeepEP sums rows in bf16 only, and these are float16"),
        ("v1", {"top_k": 32}, None),
        ("v1", {"top_k": None}, None),
        ("v2", {"top_k": 33}, "DeepEP takes at most 32 experts a token, and this model has 33"),
        ("v1", {"ep_size": 2}, None),
        ("v1", {"ep_size": 4}, None),
        ("v1", {"ep_size": 3, "ranks_per_node": 6}, "DeepEP V1 serves 2, 4 or 8 ranks of a node, and ep_size is 3"),
        ("v2", {"ep_size": 3, "ranks_per_node": 6}, None),
        ("v2", {"ep_size": 16}, "within a node only, and ep_size 16 does not divide the 8 ranks of one"),
        ("v1", {"ep_size": 4, "ranks_per_node": 6}, "within a node only, and ep_size 4 does not divide the 6 ranks"),
        ("v1", {"hidden": 2880}, None),
        ("v1", {"hidden": 2888}, "hidden sizes up to 8176 that are multiples of 16, not 2888"),
        ("v1", {"hidden": 8176}, None),
        ("v1", {"hidden": 8192}, "hidden sizes up to 8176 that are multiples of 16, not 8192"),
        ("v2", {"hidden": 8192}, None),
        ("v2", {"hidden": 2880}, None),  # by V1, which the package of V2 holds as well
        ("v2", {"hidden": 2888}, "DeepEP V2 takes hidden .* multiples of 256, not 2888, and DeepEP V1 .* not 2888"),
        ("v1", {"num_experts": 256, "ep_size": 2}, None),
        ("v1", {"num_experts": 512, "ep_size": 2}, "at most 128 experts a rank, and ep_size 2 makes 256"),
        ("v2", {"num_experts": 512, "ep_size": 2}, None),
        ("v2", {"num_experts": 1024, "ep_size": 2}, "at most 2048 experts and 256 a rank, and ep_size 2 makes 512 of"),
    ],
)
def test_limits(version: str, changes: dict[str, Any], reason: str | None) -> None:
    with double.installed(version):
        found = why_not(**changes)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found), found
        assert "\n" not in found and not found.endswith(".")


def test_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with double.installed("v1"):
        assert "refuses torch.use_deterministic_algorithms with" in str(why_not())
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        assert why_not() is None


def test_an_older_build_takes_multiples_of_128() -> None:
    with double.installed("v1"):
        del sys.modules["deep_ep"].topk_idx_t
        assert why_not(hidden=2944) is None
        assert "multiples of 128, not 2880" in str(why_not(hidden=2880))


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not_device", lambda device: None)
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder(ModuleNotFoundError("No module", name="deep_ep")), *sys.meta_path])
    assert why_not() == "DeepEP (the module deep_ep) is not installed; it is built from source"
    monkeypatch.setattr(sys, "meta_path", [finder(AssertionError("Duplicate NCCL runtime found")), *sys.meta_path])
    assert why_not() == "DeepEP cannot be imported: AssertionError: Duplicate NCCL runtime found"


def finder(error: BaseException) -> Any:
    """An importer of `deep_ep` that fails."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name == "deep_ep":
                raise error

    return Finder


@pytest.mark.parametrize(
    ("capability", "peers", "reason"),
    [
        ((9, 0), True, None),
        ((10, 0), True, None),
        ((8, 0), True, "DeepEP needs a GPU of compute capability 9.0, and this one has 8.0"),
        ((9, 0), False, "DeepEP needs GPUs that reach each other's memory, and 1 does not reach 0"),
    ],
)
def test_devices(
    capability: tuple[int, int], peers: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, peer: peers)
    assert library.why_not_device(torch.device("cuda")) == reason
    assert library.why_not_device(torch.device("cpu")) == "DeepEP needs CUDA devices, and this run is on cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def set_up(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mixed_precision: bool = False, **choices: Any
) -> Setup:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with torch.device("meta"):
        model = PlainAutoModel.from_config(tiny_config("qwen3_moe"), dtype=dtype)
    setup = choose_setup(model, find_experts(model), MoEAccelConfig(**choices), mixed_precision=mixed_precision)
    assert setup is not None
    return setup


def test_auto_takes_deepep_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    with double.installed("v1"):
        assert set_up(monkeypatch, torch.bfloat16).dispatcher == "deepep"
        assert set_up(monkeypatch, torch.float32, mixed_precision=True).dispatcher == "deepep"
        assert set_up(monkeypatch, torch.bfloat16, ep_size=1).dispatcher == "local"
        setup = set_up(monkeypatch, torch.float32)
        assert setup.dispatcher == "all_to_all"
        assert "deepep: DeepEP sums rows in bf16 only" in "".join(setup.notes)
    setup = set_up(monkeypatch, torch.bfloat16)
    assert setup.dispatcher == "all_to_all" and not setup.notes  # on a CPU there is nothing to explain


def test_deepep_is_honoured_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "token_dispatcher='deepep' cannot serve this run: DeepEP needs CUDA.*Use token_dispatcher='all_to_all'"
    with pytest.raises(ValueError, match=sentence):
        set_up(monkeypatch, torch.bfloat16, token_dispatcher="deepep")
    with pytest.raises(ValueError, match="token_dispatcher='deepep' needs ep_size > 1.*start more ranks"):
        set_up(monkeypatch, torch.bfloat16, token_dispatcher="deepep", ep_size=1)
    with double.installed("v2"):
        assert set_up(monkeypatch, torch.bfloat16, token_dispatcher="deepep").dispatcher == "deepep"
        sentence = "sums rows in bf16 only, and these are float32.*bf16 mixed precision.*Use token_dispatcher="
        with pytest.raises(ValueError, match=sentence):
            set_up(monkeypatch, torch.float32, token_dispatcher="deepep")


# ---------------------------------------------------------------------------------------------------------------------
# The double: a call of the library that the vendor would refuse fails here as well


@pytest.fixture
def group() -> Any:
    """Two ranks, of which the other one never answers: only for checks that come before anything is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


def layout(tokens: int = 4, experts: int = 8) -> dict[str, Any]:
    return {
        "topk_idx": torch.zeros(tokens, 2, dtype=torch.int64),
        "topk_weights": torch.zeros(tokens, 2),
        "num_tokens_per_rank": torch.tensor([tokens, 0], dtype=torch.int32),
        "num_tokens_per_expert": torch.zeros(experts, dtype=torch.int32),
        "is_token_in_rank": torch.zeros(tokens, 2, dtype=torch.bool),
    }


X = torch.zeros(4, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "changes", "error"),
    [
        (X.t(), {}, RuntimeError),
        (X[:, :8].contiguous(), {}, RuntimeError),  # 16 bytes
        (X, {"topk_idx": torch.zeros(4, 2, dtype=torch.int32)}, RuntimeError),
        (X, {"topk_weights": torch.zeros(4, 2, dtype=torch.bfloat16)}, RuntimeError),
        (X, {"topk_weights": None}, RuntimeError),
        (X, {"num_tokens_per_rank": torch.zeros(2, dtype=torch.int64)}, RuntimeError),
        (X, {"num_tokens_per_rank": None}, AssertionError),
        (X, {"num_tokens_per_expert": torch.zeros(258, dtype=torch.int32)}, RuntimeError),
        (X, {"config": double.Config(19, 6, 256)}, RuntimeError),
        (X, {"allocate_on_comm_stream": True, "async_finish": True}, RuntimeError),
        (X, {"allocate_on_comm_stream": True, "previous_event": double.Buffer.capture()}, RuntimeError),
        (
            X,
            {"allocate_on_comm_stream": True, "async_finish": True, "previous_event": double.EventHandle()},
            RuntimeError,
        ),
        (torch.zeros(4, 4096, dtype=torch.bfloat16), {}, RuntimeError),  # the buffer is smaller
        (X, {"handle": (None,) * 6}, AssertionError),
    ],
)
def test_the_double_refuses_what_v1_refuses(x: torch.Tensor, changes: Any, error: Any, group: Any) -> None:
    made = double.module("v1", double.Record())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(double, "gather", lambda group, value: [value])
        size = made.Buffer.get_dispatch_config(2).get_nvl_buffer_size_hint(256, 2)
        buffer = made.Buffer(group, size, explicitly_destroy=True)
    with pytest.raises(error):
        buffer.dispatch(x, **(layout() | changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"x": torch.zeros(9, 256, dtype=torch.bfloat16)}, RuntimeError),  # more than the most
        ({"topk_idx": torch.zeros(4, 2, dtype=torch.int32)}, RuntimeError),
        ({"topk_weights": torch.zeros(4, 2).double()}, RuntimeError),
        ({"num_experts": 7}, AssertionError),
        ({"num_experts": 1024}, RuntimeError),
        ({"num_sms": -1}, RuntimeError),
        ({"previous_event": double.EventHandle()}, RuntimeError),
        ({"previous_event": double.EventOverlap(), "allocate_on_comm_stream": True}, RuntimeError),
        ({"do_zero_padding": True}, RuntimeError),
    ],
)
def test_the_double_refuses_what_v2_refuses(changes: Any, error: Any, group: Any) -> None:
    made = double.module("v2", double.Record())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(double, "gather", lambda group, value: [value])
        buffer = made.ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=256, num_topk=2)
    arguments = {
        "x": torch.zeros(4, 256, dtype=torch.bfloat16),
        "topk_idx": torch.zeros(4, 2, dtype=torch.int64),
        "num_experts": 8,
    }
    with pytest.raises(error):
        buffer.dispatch(**(arguments | changes))
    with pytest.raises(AssertionError):
        buffer.destroy()  # it was not made to be destroyed explicitly


def test_the_double_reports_what_is_left(group: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(double, "gather", lambda group, value: [value])
        with pytest.raises(AssertionError, match="not destroyed before the process group"):
            with double.installed("v1") as record:
                sys.modules["deep_ep"].Buffer(group, 128, explicitly_destroy=True)
                assert len(record.alive) == 1
