"""Every expert backend equals `eager`, forward and backward, and all of them equal transformers' own experts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_moe_accel.dispatch.local import LocalDispatcher
from hf_moe_accel.experts import EXPERT_BACKENDS, padded_bmm
from hf_moe_accel.experts.base import ExpertBackend, ExpertsSpec, ExpertWeights
from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.moe.forward import forward
from hf_moe_accel.ops.permutation import Dispatched
from hf_moe_accel.runtime import MoERuntime
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.grids import (
    CPU_BACKENDS,
    GATES,
    HIDDEN,
    ROWS,
    RUN_SLOW,
    TRAINED,
    VENDORS,
    Case,
    comparable_on_cpu,
    grid,
    make_batch,
    make_rows,
    make_spec,
    make_weights,
    names_of,
    needed_grads,
)
from tests.helpers.tolerances import assert_close

NUM_EXPERTS = 5
BACKENDS = [name for name in EXPERT_BACKENDS if name != "eager"]
# TransformerEngine, which need not be installed, has tests of its own.
ON_ACCELERATORS = [name for name in BACKENDS if name not in ("padded_bmm", *VENDORS)]
AXES = {
    "rows": ROWS,
    "gate": GATES,
    "trained": ("all", "none", "projections", "vectors"),
    "rows_need": ("x and routing", "x", "routing"),
    "transposed": (False, True),
    "bias": (False, True),
    "post_norm": (False, True),
    "dtype": (torch.float32, torch.bfloat16),
}


def trains_something(case: Case) -> bool:
    return case["trained"] != "vectors" or case["bias"] or case["post_norm"]


CASES = grid(AXES, trains_something)


def test_the_cases_that_always_run_hold_every_pair_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs(parameters: list[Any]) -> set[Any]:
        return {pair for parameter in parameters for pair in combinations(parameter.values[0].items(), 2)}

    monkeypatch.setenv(RUN_SLOW, "1")
    every = grid(AXES, trains_something)
    monkeypatch.delenv(RUN_SLOW)
    always = grid(AXES, trains_something)
    assert [p.id for p in always] == [p.id for p in every if not p.marks]
    assert pairs(always) == pairs(every)
    assert len(always) < len(every) / 50


def backend_of(name: str) -> ExpertBackend:
    return EXPERT_BACKENDS.load(name)()


def inputs_of(case: Case, device: str) -> tuple[ExpertsSpec, ExpertWeights, Dispatched]:
    spec = make_spec(NUM_EXPERTS, **{key: case[key] for key in ("gate", "transposed", "bias", "post_norm")})
    weights = make_weights(spec, case["dtype"])
    rows = make_rows(case["rows"], NUM_EXPERTS, case["dtype"])
    return (
        spec,
        ExpertWeights.of(None if weight is None else weight.to(device) for weight in weights.flat()),
        Dispatched(*(tensor.to(device) for tensor in rows)),
    )


def results(
    backend: ExpertBackend, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, case: Case
) -> dict[str, Tensor | None]:
    """Output and all gradients, by name; None where a gradient was not asked for."""
    needs = needed_grads(case["trained"], weights)
    result, saved = backend.forward(spec, weights, rows)
    out = result()
    # Small enough for the parameters' gradients, sums over rows, to be of the order of one.
    grad_ND = (0.3 * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).to(case["dtype"]).to(out)
    grads = backend.backward_rows(
        spec,
        weights,
        rows,
        saved,
        grad_ND,
        needs,
        need_x="x" in case["rows_need"],
        need_routing="routing" in case["rows_need"],
    )
    of_weights = backend.backward_weights(spec, weights, rows, grads, needs)
    of_names = zip(names_of(weights), of_weights.flat(), strict=True)
    return {"out": out, "x": grads.x_ND, "routing": grads.weights_R} | dict(of_names)


def oracle(spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, case: Case) -> dict[str, Tensor | None]:
    """Eager's results in fp32, of inputs as they are in the case's dtype.

    In bf16 eager itself rounds more often than any other backend: it would be the less exact of the two. What it has
    to round is the pre-activation, which every backend keeps in the case's dtype, for at the edges of a clamp the
    gradient jumps.
    """

    def gate(h: Tensor) -> Tensor:
        return spec.gate(h + (h.to(case["dtype"]).to(h.dtype) - h).detach())

    weights = ExpertWeights.of(None if weight is None else weight.float() for weight in weights.flat())
    rows = rows._replace(x_ND=rows.x_ND.float())
    found = results(backend_of("eager"), replace(spec, gate=gate), weights, rows, case)
    return {key: None if value is None else value.to(case["dtype"]) for key, value in found.items()}


def check_equals_eager(name: str, case: Case, device: str) -> None:
    spec, weights, rows = inputs_of(case, device)
    reason = backend_of(name).why_not(spec, case["dtype"], torch.device(device))
    assert reason is None or (name in ("fused", *VENDORS) and device == "cpu")
    actual = results(backend_of(name), spec, weights, rows, case)
    expected = oracle(spec, weights, rows, case)
    wanted = {"out", *case["rows_need"].split(" and ")}
    needs = needed_grads(case["trained"], weights).flat()
    wanted |= {key for key, need in zip(names_of(weights), needs, strict=True) if need}
    for result in (actual, expected):
        assert {key for key, value in result.items() if value is not None} == wanted
    if "routing" in wanted:
        assert actual["routing"].dtype == torch.float32
        # It is as exact as the products that it is made of.
        actual["routing"] = actual["routing"].to(case["dtype"])
    assert_close({key: actual[key] for key in wanted}, {key: expected[key] for key in wanted}, "backend")
    idle = rows.counts_e == 0
    for key in wanted & {"up", "down", "up_bias", "down_bias"}:
        assert not actual[key][idle].any(), f"{key}: an expert without rows has a gradient"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name in CPU_BACKENDS])
def test_equals_eager(name: str, case: Case) -> None:
    if not comparable_on_cpu(name, case["dtype"]):
        case = case | {"dtype": torch.float32}
    check_equals_eager(name, case, "cpu")


@pytest.mark.parametrize("case", CASES)
def test_padded_bmm_in_several_groups_equals_eager(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded_bmm, "_MAX_ROWS", 48)
    check_equals_eager("padded_bmm", case, "cpu")


def test_padded_bmm_trains_after_inference() -> None:
    """What it keeps for the next call must not come from inference mode, nor be what it has returned."""
    case = dict.fromkeys(("transposed", "bias", "post_norm"), False) | {
        "rows": "ragged",
        "gate": "silu",
        "trained": "all",
        "rows_need": "x and routing",
        "dtype": torch.float32,
    }
    spec, weights, rows = inputs_of(case, "cpu")
    backend = backend_of("padded_bmm")
    with torch.inference_mode():
        inferred = backend.forward(spec, weights, rows)[0]().clone()
    trained = {
        name: tensor for name, tensor in results(backend, spec, weights, rows, case).items() if tensor is not None
    }
    before = {name: tensor.clone() for name, tensor in trained.items()}
    assert_close({"out": inferred}, {"out": trained["out"]}, "exact")
    backend.forward(spec, weights, rows._replace(x_ND=rows.x_ND + 1))[0]()
    assert_close(trained, before, "exact")


def test_padded_bmm_says_why_not() -> None:
    spec = make_spec(4, gate="silu", transposed=False, bias=False, post_norm=False)
    reason = backend_of("padded_bmm").why_not(spec, torch.bfloat16, torch.device("cuda"))
    assert reason is not None and "it is for CPU" in reason


@pytest.mark.parametrize(
    ("trained", "products"), [("none", 0), ("vectors", 0), ("up", 1), ("down", 1), ("projections", 2)]
)
def test_frozen_weights_cost_no_products(trained: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_moe_accel.experts import grouped_mm

    calls = []
    outer = grouped_mm.grouped_outer
    monkeypatch.setattr(grouped_mm, "grouped_outer", lambda *args: calls.append(1) or outer(*args))
    case = {"rows": "ragged", "gate": "clamped", "transposed": True, "bias": True, "post_norm": False}
    case |= {"dtype": torch.float32, "trained": trained, "rows_need": "x and routing"}
    found = results(backend_of("grouped_mm"), *inputs_of(case, "cpu"), case)
    assert len(calls) == products
    trains = TRAINED[trained]._asdict()
    assert all((found[key] is not None) == (trains[key] and key != "post_norm") for key in ExpertWeights._fields[:5])


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", [name for name in ON_ACCELERATORS if name != "fused"])
def test_nothing_is_read_back(name: str, gate: str, bias: bool, post_norm: bool) -> None:
    case = {"rows": "ragged", "gate": gate, "transposed": False, "bias": bias, "post_norm": post_norm}
    case |= {"dtype": torch.bfloat16, "trained": "all", "rows_need": "x and routing"}
    # The meta device holds no values: whatever asked for one would raise. Triton has no such device; tests/gpu has it.
    spec, weights, rows = inputs_of(case, "meta")
    results(backend_of(name), spec, weights, rows, case)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype", "reason"),
    [
        (32, 16, torch.float64, "no kernel for torch.float64"),
        (33, 16, torch.float32, "hidden size 33 in torch.float32"),
        (32, 12, torch.bfloat16, "intermediate size 12 in torch.bfloat16"),
        (32, 12, torch.float32, None),
        (32, 16, torch.bfloat16, None),
    ],
)
def test_grouped_mm_says_why_not(hidden: int, intermediate: int, dtype: torch.dtype, reason: str | None) -> None:
    spec = make_spec(4, gate="silu", transposed=False, bias=False, post_norm=False)
    spec = replace(spec, hidden_size=hidden, pre_activation_size=2 * intermediate, intermediate_size=intermediate)
    found = backend_of("grouped_mm").why_not(spec, dtype, torch.device("cpu"))
    assert found == reason or (reason is not None and found is not None and reason in found)
    assert backend_of("eager").why_not(spec, dtype, torch.device("cpu")) is None


COUNTS = [[0], [1], [17] * 64, [0, 0, 0], [3000, 1, 0, 2], [5, 0, 7, 0, 0, 9, 260, 255, 270, 0, 4], [40] * 7]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_padded_blocks_hold_all_rows(counts: list[int]) -> None:
    counts_e = torch.tensor(counts, dtype=torch.int32)
    num_rows = sum(counts)
    weights_R = 1.0 + torch.arange(num_rows)
    row_of_R = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    unused = torch.empty(0)
    padded = padded_bmm._pad(Dispatched(unused, weights_R, row_of_R, counts_e, unused, unused))
    blocks = [(group.slots.start, block) for group in padded.groups for block in group.blocks]
    assert all(len(group.blocks) == 1 or group.slots.stop - group.slots.start <= 4096 for group in padded.groups)
    assert [i for _, block in blocks for i in range(len(counts))[block.experts]] == list(range(len(counts)))
    assert padded.row_of_S.numel() == padded.weights_S.numel() == padded.groups[-1].slots.stop
    assert torch.equal(padded.row_of_S[padded.slot_of_R], row_of_R)
    assert torch.equal(padded.weights_S[padded.slot_of_R], weights_R)
    assert int((padded.weights_S != 0).sum()) == num_rows, "padding has a weight"
    expert_of_R = torch.arange(len(counts)).repeat_interleave(counts_e)
    for start, block in blocks:
        for place, expert in enumerate(range(len(counts))[block.experts]):
            first = start + block.slots.start + place * block.rows_each
            own = row_of_R[expert_of_R == expert]
            found = padded.row_of_S[first : first + block.rows_each]
            assert torch.equal(found[: own.numel()], own)
            if own.numel():
                assert (found[own.numel() :] == own[-1]).all(), "padding repeats the expert's last row"


def test_padded_numbers_of_rows_recur() -> None:
    """oneDNN compiles a product for each shape: few shapes, for any routing."""
    rounded = [padded_bmm._round_up(count) for count in range(1, 4097)]
    assert all(count <= padded < count + max(16, count / 8 + 1) for count, padded in enumerate(rounded, 1))
    assert len(set(rounded)) < 50
    assert padded_bmm._round_up(0) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The experts of transformers


def real_experts(kind: str) -> Any:
    """A real experts module of 8 experts whose forward is transformers' own loop."""
    if kind == "qwen3_moe":
        module: Any = Qwen3MoeExperts(
            Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=16, num_experts=8, experts_implementation="eager")
        )
    elif kind == "gpt_oss":
        module = GptOssExperts(
            GptOssConfig(
                hidden_size=HIDDEN,
                intermediate_size=16,
                num_local_experts=8,
                swiglu_limit=1.5,
                experts_implementation="eager",
            )
        )
    elif kind == "nemotron_h":
        module = NemotronHExperts(
            NemotronHConfig(
                hidden_size=HIDDEN, moe_intermediate_size=16, n_routed_experts=8, experts_implementation="eager"
            )
        )
    else:
        module = MuseSparkExperts(
            MuseSparkTextConfig(
                moe_hidden_size=HIDDEN, moe_intermediate_size=16, num_local_experts=8, experts_implementation="eager"
            )
        )
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.1, generator=generator)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_equals_the_experts_of_transformers(name: str, kind: str, top_k: int, dtype: torch.dtype) -> None:
    dtype = dtype if comparable_on_cpu(name, dtype) else torch.float32
    module = real_experts(kind).to(dtype)
    assert module.config._experts_implementation == "eager"
    ((x, ids, weights),) = make_batch("uneven", 1, 8, top_k, HIDDEN)
    ids = ids.clamp(max=6)  # the last expert gets nothing
    grad = (0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).to(dtype)

    def run(experts: Any) -> dict[str, Tensor]:
        leaves = [x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        module.zero_grad()
        out = experts(leaves[0], ids, leaves[1])
        out.backward(grad)
        assert all(p.grad is not None for p in module.parameters())
        of_parameters = {key: p.grad for key, p in module.named_parameters()}
        return {"out": out, "x": leaves[0].grad, "routing": leaves[1].grad} | of_parameters

    (found,) = find_experts(nn.ModuleDict({"experts": module}))
    runtime = MoERuntime(ExpertTopology(1, 8), LocalDispatcher(), backend_of(name), [8], 60.0)

    def ours(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        parameters = ExpertWeights.of(key and module.get_parameter(key) for key in found.parameters)
        return forward(found.spec, x_TD, ids_TK, weights_TK, parameters, runtime, 0)

    assert_close(run(ours), run(module), "backend")
