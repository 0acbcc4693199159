"""What the contract suites vary: pairwise grids of cases, experts of every kind, and routings.

Everything is built from plain values, so that a case can be sent to another process and built again there.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.experts.base import ExpertsSpec, ExpertWeights, Factors, LoraPair, NeededGrads
from hf_moe_accel.ops.permutation import Dispatched, order_by_expert

Case = dict[str, Any]

# The environment variable that says to the grids that the slow tests run.
RUN_SLOW = "TESTS_RUN_SLOW"

# ---------------------------------------------------------------------------------------------------------------------
# Grids


def slow(*cases: Any) -> list:
    """Cases for pytest's `parametrize` that only `--run-slow` runs; a tuple holds the values of several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def named(cases: Mapping[str, Any], slowly: Sequence[str]) -> list:
    """The names of cases, of which only `--run-slow` runs those that are given in `slowly`."""
    assert cases.keys() >= set(slowly)
    return [*(name for name in cases if name not in slowly), *slow(*slowly)]


def grid(axes: Mapping[str, Sequence[Any]], valid: Callable[[Case], bool] = lambda case: True, seed: int = 0) -> list:
    """Valid combinations of the values of the axes, as pytest parameters.

    Any two values of two axes that occur together at all do so in a case that always runs. The cases that this does
    not need are marked slow, and are not even made unless `--run-slow` is given: there are tens of thousands.

    Args:
        axes: Name of an axis -> its values, hashable.
        valid: Says whether a combination makes sense.
        seed: Decides between cases that cover equally many pairs.
    """
    cases = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    cases = [case for case in cases if valid(case)]
    chosen = _pairwise(cases, seed)
    return [
        pytest.param(case, id=_name(case), marks=() if i in chosen else pytest.mark.slow)
        for i, case in enumerate(cases)
        if i in chosen or os.environ.get(RUN_SLOW)
    ]


def _pairwise(cases: Sequence[Case], seed: int) -> set[int]:
    """Indices of cases, chosen greedily, that hold each pair of values which any of the cases holds."""
    # Sets of pairs as the bits of integers: every worker of the pool that imports a grid waits for this.
    bits: dict[tuple[Any, ...], int] = {}
    pairs = [
        sum(1 << bits.setdefault(pair, len(bits)) for pair in itertools.combinations(case.items(), 2))
        for case in cases
    ]
    open_pairs = (1 << len(bits)) - 1
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    chosen = set()
    while open_pairs:
        best = max(order, key=lambda i: (pairs[i] & open_pairs).bit_count())
        chosen.add(best)
        open_pairs &= ~pairs[best]
    return chosen


def _name(case: Case) -> str:
    return ",".join(f"{axis}={str(value).removeprefix('torch.')}" for axis, value in case.items())


# ---------------------------------------------------------------------------------------------------------------------
# Backends

# Triton's kernels run on a CPU in its interpreter only, which is chosen once a process. What vendors compute runs on
# none, and what is around it is tested with doubles.
TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_fp8", "transformer_engine_fp8_block")
VENDORS = (*TRANSFORMER_ENGINE, "quack")
CPU_BACKENDS = tuple(
    name
    for name in EXPERT_BACKENDS
    if name not in VENDORS and (name != "fused" or os.environ.get("TRITON_INTERPRET") == "1")
)


def comparable_on_cpu(backend: str, dtype: Any) -> bool:
    """Triton's interpreter cuts digits off where a GPU rounds to bf16, and its bf16 `tl.dot` is wrong: fp32 only."""
    return backend != "fused" or dtype in (torch.float32, "fp32")


# ---------------------------------------------------------------------------------------------------------------------
# Experts

HIDDEN, INTERMEDIATE = 32, 16
GATES = ("silu", "clamped", "relu2")


def silu_gate(h: Tensor) -> Tensor:
    """The usual gate: both halves side by side."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def clamped_gate(h: Tensor) -> Tensor:
    """The gate of GPT-OSS: interleaved columns, clamped; here at a limit that some values do reach."""
    gate, up = h[..., ::2].clamp(max=1.5), h[..., 1::2].clamp(min=-1.5, max=1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def relu2(h: Tensor) -> Tensor:
    """An activation without a gate."""
    return torch.nn.functional.relu(h).square()


def rms_norm(y: Tensor, weight: Tensor) -> Tensor:
    """A norm in fp32, as transformers writes it."""
    scale = torch.rsqrt(y.float().square().mean(-1, keepdim=True) + 1e-6)
    return (y.float() * scale * weight.float()).to(y.dtype)


def make_spec(num_experts: int, *, gate: str, transposed: bool, bias: bool, post_norm: bool) -> ExpertsSpec:
    """Experts of hidden size 32 and intermediate size 16."""
    return ExpertsSpec(
        num_experts=num_experts,
        hidden_size=HIDDEN,
        pre_activation_size=INTERMEDIATE if gate == "relu2" else 2 * INTERMEDIATE,
        intermediate_size=INTERMEDIATE,
        is_transposed=transposed,
        has_bias=bias,
        gate={"silu": silu_gate, "clamped": clamped_gate, "relu2": relu2}[gate],
        post_norm=rms_norm if post_norm else None,
    )


def make_weights(spec: ExpertsSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> ExpertWeights:
    """All experts' parameters, such that rows of order one give results of order one; drawn in fp32, then rounded."""
    generator = torch.Generator().manual_seed(seed)
    e, width = spec.num_experts, spec.pre_activation_size

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    up = draw(e, width, HIDDEN, scale=HIDDEN**-0.5)
    down = draw(e, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5)
    if spec.is_transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = (draw(e, width, scale=0.5), draw(e, HIDDEN, scale=0.5)) if spec.has_bias else (None, None)
    norm = None if spec.post_norm is None else (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).to(dtype)
    return ExpertWeights(up, down, *biases, norm)


TRAINED = {
    "all": NeededGrads(True, True, True, True, True),
    "none": NeededGrads(False, False, False, False, False),
    "factors": NeededGrads(False, False, False, False, False),
    "up": NeededGrads(True, False, True, False, False),
    "down": NeededGrads(False, True, False, True, False),
    "projections": NeededGrads(True, True, False, False, False),
    "vectors": NeededGrads(False, False, True, True, True),
}


def needed_grads(trained: str, weights: ExpertWeights, factors: str = "ab") -> NeededGrads:
    """Which parameters train: the entry of `TRAINED`, without the parameters that these experts lack.

    Of LoRA pairs, the named factors train.
    """
    flat = zip(TRAINED[trained].flat(), weights.flat()[:5], strict=True)
    lora = (weights.up_lora, weights.down_lora)
    return NeededGrads(
        *(need and weight is not None for need, weight in flat),
        *(tuple(Factors("a" in factors, "b" in factors) for _ in pairs) for pairs in lora),
    )


def names_of(weights: ExpertWeights) -> list[str]:
    """Of the parameters, in the order of `ExpertWeights.flat`."""
    pairs = [(name, i) for name in ("up_lora", "down_lora") for i in range(len(getattr(weights, name)))]
    return [*ExpertWeights._fields[:5], *(f"{name}.{i}.{factor}" for name, i in pairs for factor in "ab")]


# Ranks of the pairs of the first and of the second projection.
ADAPTERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "none": ((), ()),
    "up": ((4,), ()),
    "down": ((), (16,)),
    "both": ((16,), (4,)),
    "two": ((4, 16), (16, 6)),
}


def add_adapters(
    weights: ExpertWeights, spec: ExpertsSpec, adapters: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> ExpertWeights:
    """With the pairs of an entry of `ADAPTERS`, such that each adds values of order one half."""
    generator = torch.Generator().manual_seed(100 + seed)
    e = spec.num_experts

    def pairs(ranks: tuple[int, ...], into: int, out: int) -> tuple[LoraPair, ...]:
        found = []
        for i, rank in enumerate(ranks):
            scaling = 0.7 - 0.3 * i
            a = into**-0.5 * torch.randn(e, rank, into, generator=generator)
            b = 0.5 / scaling * rank**-0.5 * torch.randn(e, out, rank, generator=generator)
            found.append(LoraPair(a.to(dtype), b.to(dtype), scaling))
        return tuple(found)

    up, down = ADAPTERS[adapters]
    return weights._replace(
        up_lora=pairs(up, spec.hidden_size, spec.pre_activation_size),
        down_lora=pairs(down, spec.intermediate_size, spec.hidden_size),
    )


# The kinds of experts that transformers has.
KINDS: dict[str, dict[str, Any]] = {
    "gated": {"gate": "silu", "transposed": False, "bias": False, "post_norm": False},
    "gpt_oss": {"gate": "clamped", "transposed": True, "bias": True, "post_norm": False},
    "nemotron_h": {"gate": "relu2", "transposed": False, "bias": False, "post_norm": False},
    "muse_spark": {"gate": "silu", "transposed": False, "bias": False, "post_norm": True},
}

# ---------------------------------------------------------------------------------------------------------------------
# Rows of one rank

ROWS = ("ragged", "top-1", "some experts", "one expert", "one row", "no row")


def make_rows(rows: str, num_experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Dispatched:
    """Rows as a dispatcher hands them to the experts.

    Args:
        rows: One of `ROWS`. "ragged": 1 to 4 experts a row, as under expert parallelism; "some experts": all but the
            first, the last and one between get none; "one expert" takes all rows.
        num_experts: Experts of this rank, 5 or more.
        dtype: Of the rows.
        seed: Seed of rows, experts and routing weights.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = {"one row": 1, "no row": 0}.get(rows, 23)
    usable = {"some experts": [1, num_experts - 2], "one expert": [2]}.get(rows, range(num_experts))
    most = 1 if rows == "top-1" else min(4, len(usable))
    chosen = []
    for _ in range(num_rows):
        num = int(torch.randint(1, most + 1, (), generator=generator))
        chosen.append([usable[i] for i in torch.randperm(len(usable), generator=generator)[:num]])
    sizes = torch.tensor([len(experts) for experts in chosen], dtype=torch.int64)
    return order_by_expert(
        torch.randn(num_rows, HIDDEN, generator=generator).to(dtype),
        torch.tensor([expert for experts in chosen for expert in experts], dtype=torch.int64),
        torch.arange(num_rows).repeat_interleave(sizes),
        torch.rand(int(sizes.sum()), generator=generator),
        torch.cumsum(sizes, 0) - sizes,
        num_experts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens of several ranks

TOKENS = (
    "even",
    "uneven",
    "none on a rank",
    "one on a rank",
    "none at all",
    "all to one rank",
    "only remote",
    "twice",
)


def make_batch(
    tokens: str,
    world_size: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    *,
    exact: bool = False,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens of each rank, in fp32: (x [T, D], experts [T, K] int64, routing weights [T, K]), `world_size` of them.

    Args:
        tokens: One of `TOKENS`. "all to one rank": to the last one; "only remote": no token needs its own rank, where
            there are several; "twice": all slots of a token name the same expert.
        world_size: Ranks, which own `num_experts / world_size` experts each.
        num_experts: Of the model.
        top_k: Slots of a token; its experts differ, unless there are fewer to choose from.
        hidden: D.
        exact: Small integers and, as routing weights, powers of two: their sums are exact in fp32 and in bf16.
        seed: Seed of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    local = num_experts // world_size
    batch = []
    for rank in range(world_size):
        num = 6 if tokens == "even" else 3 + 4 * ((rank + 1) % 3)
        if rank == world_size - 1:
            num = {"none on a rank": 0, "one on a rank": 1}.get(tokens, num)
        if tokens == "none at all":
            num = 0
        experts = list(range(num_experts))
        if tokens == "all to one rank":
            experts = experts[-local:]
        if tokens == "only remote" and world_size > 1:
            experts = [expert for expert in experts if expert // local != rank]
        ids = torch.empty(num, top_k, dtype=torch.int64)
        for token in range(num):
            drawn = torch.randperm(len(experts), generator=generator)[: 1 if tokens == "twice" else top_k]
            ids[token] = torch.tensor([experts[drawn[slot % len(drawn)]] for slot in range(top_k)])
        if exact:
            x = torch.randint(-2, 3, (num, hidden), generator=generator).float()
            weights = 0.5 ** torch.randint(0, 3, (num, top_k), generator=generator)
        else:
            x = torch.randn(num, hidden, generator=generator)
            weights = torch.rand(num, top_k, generator=generator)
        batch.append((x, ids, weights))
    return batch
