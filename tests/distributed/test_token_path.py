"""The token path on several ranks equals one process on the concatenated batch, and keeps nothing it should not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from hf_moe_accel.config import EXPERT_CHECKPOINTING
from hf_moe_accel.dispatch import DISPATCHERS
from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.experts.base import ExpertsSpec, ExpertWeights
from hf_moe_accel.experts.eager import EagerBackend
from hf_moe_accel.moe.forward import forward
from hf_moe_accel.moe.replay import keep_exchanges
from hf_moe_accel.runtime import MoERuntime
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.grids import (
    CPU_BACKENDS,
    HIDDEN,
    KINDS,
    TOKENS,
    Case,
    add_adapters,
    comparable_on_cpu,
    grid,
    make_batch,
    make_spec,
    make_weights,
    names_of,
    needed_grads,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close

NUM_EXPERTS, TOP_K = 8, 3
TIMEOUT = 60.0
Batch = Sequence[tuple[Tensor, Tensor, Tensor]]


def make_runtime(
    backend: Any,
    group: dist.ProcessGroup | None = None,
    num_layers: int = 1,
    chunks: int | str = "auto",
    level: str = "activation",
) -> MoERuntime:
    """`backend` is a name or an instance; without a group all experts are on this rank."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ep_size = 1 if group is None else group.size()
    topology = ExpertTopology(world_size, NUM_EXPERTS, ep_size)
    make: Any = DISPATCHERS.load("local" if ep_size == 1 else "all_to_all")
    backend = EXPERT_BACKENDS.load(backend)() if isinstance(backend, str) else backend
    dispatcher = make() if ep_size == 1 else make(group)
    return MoERuntime(topology, dispatcher, backend, [NUM_EXPERTS] * num_layers, TIMEOUT, chunks, level)


def concatenated(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    x, ids, weights = (torch.cat(parts) for parts in zip(*batch, strict=True))
    return x, ids, weights


def draw(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """A gradient, small enough for the gradients of parameters, sums over tokens, to be of the order of one."""
    return (0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def gradients(batch: Batch, dtype: torch.dtype) -> list[Tensor]:
    """One a rank, such that their concatenation is the gradient of the concatenated batch."""
    return [draw(x.shape, dtype, 10 + rank) for rank, (x, _, _) in enumerate(batch)]


def assert_equal_where_present(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit; None where None is expected."""
    assert {key for key, value in actual.items() if value is None} == {k for k, v in expected.items() if v is None}
    present = {key: value for key, value in expected.items() if value is not None}
    assert_close({key: actual[key] for key in present}, present, "exact")


def assert_equal_but_for_rounding(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    """Both are as exact as the products that they are made of, in `dtype`, whatever they are stored in."""
    if dtype == torch.bfloat16:
        # Sums may cancel, but their rounding errors do not: those are relative to the largest value.
        largest = expected.abs().max() if expected.any() else 1.0
        actual, expected = actual / largest, expected / largest
    assert_close(actual.to(dtype), expected.to(dtype), "backend", name)


def leaves_of(weights: ExpertWeights, trained: str) -> ExpertWeights:
    needs = needed_grads(trained, weights)
    flat = (
        None if weight is None else weight.clone().requires_grad_(need)
        for weight, need in zip(weights.flat(), needs.flat(), strict=True)
    )
    return ExpertWeights.of(flat, weights.scalings)


def part_of(weights: ExpertWeights, rank: int, world_size: int) -> ExpertWeights:
    """The parameters of a rank's experts."""
    local = NUM_EXPERTS // world_size
    flat = (w if w is None or w.dim() == 1 else w[rank * local : (rank + 1) * local] for w in weights.flat())
    return ExpertWeights.of(flat, weights.scalings)


# ---------------------------------------------------------------------------------------------------------------------
# Expert parallelism alone

CASES = grid(
    {
        "tokens": TOKENS,
        "kind": tuple(KINDS),
        "trained": ("all", "none", "projections", "factors"),
        "backend": CPU_BACKENDS,
        "dtype": (torch.float32, torch.bfloat16),
        "top_k": (TOP_K, 1),
        "world_size": (2, 4),
        "chunks": (1, 2, 3, 4),  # some ranks of some of these cases have fewer tokens
        "level": EXPERT_CHECKPOINTING,
    },
    # Triton's interpreter takes its time: four ranks of it show no more than two.
    valid=lambda case: (
        comparable_on_cpu(case["backend"], case["dtype"]) and (case["backend"] != "fused" or case["world_size"] == 2)
    ),
)


def adapters_of(case: Case) -> str:
    return "two" if case["trained"] == "factors" else "none"


def run_path(
    spec: ExpertsSpec,
    weights: ExpertWeights,
    runtime: MoERuntime,
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    needs: str = "x and routing",
) -> dict[str, Any]:
    """One forward and backward pass: the output and all gradients."""
    x, ids, routing = inputs
    x, routing = x.clone().requires_grad_("x" in needs), routing.clone().requires_grad_("routing" in needs)
    out = forward(spec, x, ids, routing, weights, runtime, 0)
    assert out.dtype == x.dtype
    if out.requires_grad:
        out.backward(grad)
    flat = zip(names_of(weights), weights.flat(), strict=True)
    of_weights = {f"d {name}": None if w is None else w.grad for name, w in flat}
    return {"out": out, "d x": x.grad, "d routing": routing.grad} | of_weights


def path_on_ranks(case: Case) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    spec = make_spec(NUM_EXPERTS, **KINDS[case["kind"]])
    full = add_adapters(make_weights(spec, case["dtype"]), spec, adapters_of(case))
    mine = part_of(full, rank, world_size)
    batch = make_batch(case["tokens"], world_size, NUM_EXPERTS, case["top_k"], HIDDEN)
    x, ids, routing = batch[rank]
    inputs = x.to(case["dtype"]), ids, routing
    grad = gradients(batch, case["dtype"])[rank]
    options = {"chunks": case["chunks"], "level": case["level"]}
    with closing(make_runtime(case["backend"], dist.group.WORLD, **options)) as runtime:
        return run_path(spec, leaves_of(mine, case["trained"]), runtime, inputs, grad)


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(case: Case) -> None:
    spec = make_spec(NUM_EXPERTS, **KINDS[case["kind"]])
    batch = make_batch(case["tokens"], case["world_size"], NUM_EXPERTS, case["top_k"], HIDDEN)
    x, ids, routing = concatenated(batch)
    full = add_adapters(make_weights(spec, case["dtype"]), spec, adapters_of(case))
    weights = leaves_of(full, case["trained"])
    runtime = make_runtime(case["backend"])
    grad = torch.cat(gradients(batch, case["dtype"]))
    expected = run_path(spec, weights, runtime, (x.to(case["dtype"]), ids, routing), grad)
    assert_trained(expected, weights, case["trained"])
    # On an idle rank as well: FSDP reduces what is there, and a gradient that is missing would shift the others.
    results = run_ranks(path_on_ranks, case["world_size"], case)
    for key, value in expected.items():
        parts = [result[key] for result in results]
        if value is None:
            assert parts == [None] * len(parts), key
        elif key == "d post_norm":
            for part in parts:
                assert_equal_but_for_rounding(part, value, case["dtype"], key)
        else:
            assert_equal_but_for_rounding(torch.cat(parts), value, case["dtype"], key)


def assert_trained(result: dict[str, Any], weights: ExpertWeights, trained: str) -> None:
    """Exactly the parameters that train have a gradient; `result` is of `run_path`."""
    for name, need in zip(names_of(weights), needed_grads(trained, weights).flat(), strict=True):
        assert (result[f"d {name}"] is not None) == need, name


GRADIENT_LAYOUTS = {
    "expanded": lambda num, size: torch.tensor(0.3).expand(num, size),
    "transposed": lambda num, size: draw((size, num), torch.float32, 1).t(),
    "strided": lambda num, size: draw((num, 2 * size), torch.float32, 1)[:, ::2],
}


def path_with_layout(layout: str, backend: str) -> None:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    spec = make_spec(NUM_EXPERTS, **KINDS["gated"])
    mine = part_of(make_weights(spec), rank, world_size)
    inputs = make_batch("uneven", world_size, NUM_EXPERTS, TOP_K, HIDDEN)[rank]
    grad = GRADIENT_LAYOUTS[layout](*inputs[0].shape)
    assert not grad.is_contiguous()
    with closing(make_runtime(backend, dist.group.WORLD if world_size > 1 else None)) as runtime:
        actual, expected = (
            run_path(spec, leaves_of(mine, "all"), runtime, inputs, g) for g in (grad, grad.contiguous())
        )
    assert_equal_where_present(actual, expected)


@pytest.mark.parametrize("layout", list(GRADIENT_LAYOUTS))
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_any_layout(world_size: int, backend: str, layout: str) -> None:
    run_ranks(path_with_layout, world_size, layout, backend)


# ---------------------------------------------------------------------------------------------------------------------
# With FSDP2 around it

LAYOUTS = {"ep 2, efsdp 2": (4, 2), "ep 4": (4, 4), "ep 2": (2, 2), "ep 1, efsdp 2": (2, 1)}  # (ranks, ep)
NUM_LAYERS = 2
ACCUMULATION = 2
FSDP_CASES = grid(
    {
        "layout": tuple(LAYOUTS),
        "tokens": ("uneven", "none on a rank", "all to one rank"),
        "kind": ("gated", "gpt_oss", "muse_spark"),
        "trained": ("all", "none"),
        "backend": CPU_BACKENDS,
        "sync": ("each", "last"),  # whether each micro-batch is reduced, or the sum of all
        "mixed_precision": (False, True),
        "chunks": (1, 3),
        "level": EXPERT_CHECKPOINTING,
    },
    # Rounding to bf16 carries values over the edges of the clamp, where its gradient jumps.
    valid=lambda case: (
        not (case["mixed_precision"] and (case["kind"] == "gpt_oss" or case["backend"] == "fused"))
        and (case["backend"] != "fused" or case["layout"] == "ep 2")
    ),
)


class Layer(nn.Module):
    """Experts whose parameters may be DTensors, on the "ep" axis."""

    def __init__(self, kind: str, trained: str, layer: int, runtime: MoERuntime, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.spec, self.layer, self.runtime = make_spec(NUM_EXPERTS, **KINDS[kind]), layer, runtime
        weights = make_weights(self.spec, seed=layer)
        needs = needed_grads(trained, weights).flat()
        for name, weight, need in zip(names_of(weights), weights.flat(), needs, strict=True):
            if mesh is not None and weight is not None and weight.dim() > 1:
                weight = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, None if weight is None else nn.Parameter(weight, requires_grad=need))

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        parameters = (getattr(self, name) for name in ExpertWeights._fields[:5])
        local = ExpertWeights.of(p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        return forward(self.spec, x, ids, routing, local, self.runtime, self.layer)


class Model(nn.Module):
    """Two layers of experts and a dense parameter."""

    def __init__(self, case: Case, runtime: MoERuntime, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN))
        self.layers = nn.ModuleList(Layer(case["kind"], case["trained"], i, runtime, mesh) for i in range(NUM_LAYERS))

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = x + layer(x, ids, routing)
        return x


def sum_gradients_over(module: Any, ranks: int) -> None:
    """Gradients become sums over the ranks, which divided by nothing are those of the concatenated batch."""
    module.set_gradient_divide_factor(1.0)
    # As transformers does: gloo knows no sum that divides, and without a reduction there is nothing to force.
    if ranks > 1:
        module.set_force_sum_reduction_for_comms(True)


def train(model: Any, micro_batches: Sequence[Any], dtype: torch.dtype, sync: str = "each") -> dict[str, Any]:
    """A step's forward and backward passes; (x, ids, routing, gradient) a micro-batch."""
    results: dict[str, list[Any]] = {"out": [], "d x": [], "d routing": []}
    for i, (x, ids, routing, grad) in enumerate(micro_batches):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(sync == "each" or i == len(micro_batches) - 1)
        x, routing = x.to(dtype).requires_grad_(), routing.clone().requires_grad_()
        out = model(x, ids, routing)
        assert_resharded(model)
        out.backward(grad.to(out.dtype))
        for key, value in zip(results, (out, x.grad, routing.grad), strict=True):
            results[key].append(value.detach())
    return results | {"parameters": dict(gradients_of(model))}


def assert_resharded(model: Any) -> None:
    """Whatever FSDP gathered for a layer is gone again before its backward pass."""
    for layer in model.layers if hasattr(model, "set_requires_gradient_sync") else ():
        assert all(isinstance(parameter, DTensor) for parameter in layer.parameters())


def gradients_of(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        grad = parameter.grad
        yield name, grad.full_tensor() if isinstance(grad, DTensor) else grad


def micro_batches_of(case: Case, world_size: int) -> list[tuple[Batch, list[Tensor]]]:
    batches = [
        make_batch(case["tokens"], world_size, NUM_EXPERTS, TOP_K, HIDDEN, seed=20 + i) for i in range(ACCUMULATION)
    ]
    return [(batch, gradients(batch, torch.float32)) for batch in batches]


def fsdp_on_ranks(case: Case) -> dict[str, Any]:
    world_size, ep_size = LAYOUTS[case["layout"]]
    efsdp_size = world_size // ep_size
    mesh = init_device_mesh("cpu", (efsdp_size, ep_size), mesh_dim_names=("efsdp", "ep"))
    group = mesh["ep"].get_group() if ep_size > 1 else None
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if case["mixed_precision"] else MixedPrecisionPolicy()
    with closing(make_runtime(case["backend"], group, NUM_LAYERS, case["chunks"], case["level"])) as runtime:
        model = Model(case, runtime, mesh["ep"] if ep_size > 1 else None)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["efsdp"], reshard_after_forward=True, mp_policy=policy)
            sum_gradients_over(layer, efsdp_size)
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), mp_policy=policy)
        sum_gradients_over(model, world_size)
        rank, dtype = dist.get_rank(), torch.bfloat16 if case["mixed_precision"] else torch.float32
        mine = [(*batch[rank], grads[rank]) for batch, grads in micro_batches_of(case, world_size)]
        return train(model, mine, dtype, case["sync"])


@pytest.mark.parametrize("case", FSDP_CASES)
def test_sharded_equals_one_process(case: Case) -> None:
    world_size, _ = LAYOUTS[case["layout"]]
    dtype = torch.bfloat16 if case["mixed_precision"] else torch.float32
    whole = [(*concatenated(batch), torch.cat(grads)) for batch, grads in micro_batches_of(case, world_size)]
    model = Model(case, make_runtime(case["backend"], num_layers=NUM_LAYERS)).to(dtype)
    expected = train(model, whole, dtype)
    results = run_ranks(fsdp_on_ranks, world_size, case)
    for key in ("out", "d x", "d routing"):
        for i in range(ACCUMULATION):
            actual = torch.cat([result[key][i] for result in results])
            assert_equal_but_for_rounding(actual, expected[key][i], dtype, f"{key} {i}")
    for name, grad in expected["parameters"].items():
        for result in results:
            actual = result["parameters"][name]
            assert (actual is None) == (grad is None), name
            if grad is not None:
                assert actual.dtype == torch.float32, "masters and their gradients are fp32"
                assert_equal_but_for_rounding(actual, grad, dtype, name)


# ---------------------------------------------------------------------------------------------------------------------
# One process


def simple_call(kind: str = "gated", dtype: torch.dtype = torch.float32, trained: str = "all") -> Any:
    spec = make_spec(NUM_EXPERTS, **KINDS[kind])
    ((x, ids, routing),) = make_batch("uneven", 1, NUM_EXPERTS, TOP_K, HIDDEN)
    return spec, leaves_of(make_weights(spec, dtype), trained), (x.to(dtype), ids, routing)


@pytest.mark.parametrize("needs", ["x", "routing", "nothing"])
@pytest.mark.parametrize("trained", ["all", "none"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_inputs_without_a_gradient(backend: str, trained: str, needs: str) -> None:
    spec, weights, inputs = simple_call()
    grad = draw(inputs[0].shape, torch.float32, 1)
    expected = run_path(spec, weights, make_runtime(backend), inputs, grad)
    spec, weights, inputs = simple_call(trained=trained)
    actual = run_path(spec, weights, make_runtime(backend), inputs, grad, needs)
    assert_trained(actual, weights, trained)
    for key in ("d x", "d routing"):
        assert (actual[key] is not None) == (key[2:] in needs), key
    assert_equal_where_present(
        actual, {key: expected[key] if found is not None else None for key, found in actual.items()}
    )


class Spy(EagerBackend):
    """Notes the dtypes that it is called with."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def forward(self, spec: Any, weights: Any, rows: Any) -> Any:
        self.seen |= {rows.x_ND.dtype, *(w.dtype for w in weights.flat() if w is not None)}
        return super().forward(spec, weights, rows)

    def backward_rows(
        self, spec: Any, weights: Any, rows: Any, saved: Any, grad_ND: Tensor, *others: Any, **needs: bool
    ) -> Any:
        self.seen |= {grad_ND.dtype, rows.x_ND.dtype, *(w.dtype for w in weights.flat() if w is not None)}
        return super().backward_rows(spec, weights, rows, saved, grad_ND, *others, **needs)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_autocast_with_fp32_masters_computes_in_bf16(kind: str, x_dtype: torch.dtype) -> None:
    spec, masters, (x, ids, routing) = simple_call(kind)
    spy = Spy()
    grad = draw(x.shape, x_dtype, 1)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_path(spec, masters, make_runtime(spy), (x.to(x_dtype), ids, routing), grad)
    assert spy.seen == {torch.bfloat16}
    assert actual["out"].dtype == actual["d x"].dtype == x_dtype
    assert actual["d up"].dtype == torch.float32

    spec, weights, _ = simple_call(kind, torch.bfloat16)
    expected = run_path(spec, weights, make_runtime("eager"), (x.bfloat16(), ids, routing), grad.bfloat16())
    assert_equal_where_present(
        actual, {key: None if value is None else value.to(actual[key].dtype) for key, value in expected.items()}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_other_dtypes_alone(dtype: torch.dtype) -> None:
    spec, weights, inputs = simple_call(dtype=dtype)
    spy = Spy()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        run_path(spec, weights, make_runtime(spy), inputs, draw(inputs[0].shape, dtype, 1))
    assert spy.seen == {dtype}


def test_choices_are_counted_in_training_only() -> None:
    spec, weights, (x, ids, routing) = simple_call()
    runtime = make_runtime("eager", num_layers=2)
    forward(spec, x, ids, routing, weights, runtime, 1)
    with torch.no_grad():
        forward(spec, x, ids, routing, weights, runtime, 0)
    counts = torch.bincount(ids.reshape(-1), minlength=NUM_EXPERTS)
    assert runtime.stats.take().choices_LE.tolist() == [[0] * NUM_EXPERTS, counts.tolist()]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recompute_is_not_counted(use_reentrant: bool) -> None:
    spec, weights, (x, ids, routing) = simple_call()
    runtime = make_runtime("eager")
    context = {} if use_reentrant else {"context_fn": keep_exchanges}
    x.requires_grad_()
    for _ in range(2):
        out = checkpoint(forward, spec, x, ids, routing, weights, runtime, 0, use_reentrant=use_reentrant, **context)
        out.sum().backward()
    counts = torch.bincount(ids.reshape(-1), minlength=NUM_EXPERTS)
    assert runtime.stats.take().choices_LE.tolist() == [(2 * counts).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# What is kept between forward and backward


def path_with_hooks(kind: str, adapters: str, backend: str, autocast: bool, chunks: int, level: str) -> None:
    """Packs each saved tensor as a copy and then spoils the original: nothing else may carry the backward pass."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    spec = make_spec(NUM_EXPERTS, **KINDS[kind])
    mine = part_of(add_adapters(make_weights(spec), spec, adapters), rank, world_size)
    batch = make_batch("uneven", world_size, NUM_EXPERTS, TOP_K, HIDDEN)
    grad = gradients(batch, torch.float32)[rank]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
        saved.append(tensor)
        return tensor, tensor.clone()

    def run(weights: ExpertWeights, hooked: bool) -> dict[str, Any]:
        x, ids, routing = (tensor.clone() for tensor in batch[rank])
        x.requires_grad_()
        routing.requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1])
        group = dist.group.WORLD if world_size > 1 else None
        with closing(make_runtime(backend, group, chunks=chunks, level=level)) as runtime:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if hooked:
                    with hooks:
                        out = forward(spec, x, ids, routing, weights, runtime, 0)
                    result = out.detach().clone()
                    with torch.no_grad():
                        for tensor in (*saved, x, ids, routing, out):
                            tensor.fill_(-1)
                else:
                    out = forward(spec, x, ids, routing, weights, runtime, 0)
                    result = out.detach().clone()
            out.backward(grad)
        flat = zip(names_of(weights), weights.flat(), strict=True)
        of_weights = {name: None if w is None else w.grad for name, w in flat}
        return {"out": result, "x": x.grad, "routing": routing.grad} | of_weights

    expected = run(leaves_of(mine, "all"), hooked=False)
    weights = leaves_of(mine, "all")
    parameters = [w for w in weights.flat() if w is not None]
    actual = run(weights, hooked=True)
    assert_equal_where_present(actual, expected)
    storages = [tensor.untyped_storage().data_ptr() for tensor in saved]
    for parameter in parameters:
        assert storages.count(parameter.untyped_storage().data_ptr()) == 1, "saved once, as the parameter itself"
        # A cast or transposed copy would have its size.
        copies = [t for t in saved if t.is_floating_point() and sorted(t.shape) == sorted(parameter.shape)]
        assert all(
            t.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in parameters} for t in copies
        )


@pytest.mark.parametrize(
    "case",
    grid(
        {
            "path": ((1, 1, "activation"), (2, 1, "full"), (2, 2, "activation")),  # ranks, chunks, checkpointing
            "experts": (*((kind, "none") for kind in KINDS), ("gated", "both"), ("gated", "two")),
            "backend": CPU_BACKENDS,
            "autocast": (False, True),
        }
    ),
)
def test_saved_tensors_are_all_that_is_kept(case: Case) -> None:
    world_size, chunks, level = case["path"]
    run_ranks(path_with_hooks, world_size, *case["experts"], case["backend"], case["autocast"], chunks, level)


def kept_bytes(level: str, backend: str) -> tuple[int, int, int]:
    """What a pass keeps beyond its inputs; of that, the pre-activations and the received rows."""
    num_tokens, spec = 512, make_spec(NUM_EXPERTS, **KINDS["gated"])
    weights = leaves_of(part_of(make_weights(spec), dist.get_rank(), 2), "all")
    x = draw((num_tokens, HIDDEN), torch.float32, 1).requires_grad_()
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(1)).topk(TOP_K).indices
    routing = torch.rand(num_tokens, TOP_K)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with closing(make_runtime(backend, dist.group.WORLD, chunks=1, level=level)) as runtime:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward(spec, x, ids, routing, weights, runtime, 0)
        out.sum().backward()
        assert runtime.stats is not None
        routed = runtime.stats.take()
    for tensor in (x, ids, routing, *(w for w in weights.flat() if w is not None)):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    of_pairs = int(routed.rows_L[0]) * spec.pre_activation_size * x.element_size()
    return sum(kept.values()), of_pairs, routed.received_L[0] * HIDDEN * x.element_size()


@pytest.mark.parametrize("backend", ["grouped_mm", "padded_bmm"])
def test_what_levels_keep(backend: str) -> None:
    activation, up, full = (run_ranks(kept_bytes, 2, level, backend) for level in ("activation", "up", "full"))
    for (most, of_pairs, of_rows), (less, _, _), (least, _, _) in zip(activation, up, full, strict=True):
        assert most - less >= of_pairs and less - least == of_rows
