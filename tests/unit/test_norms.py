"""Norms in one kernel: the formula that a module has, the kernels in Triton's interpreter, models that run in them."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_moe_accel import prepare_moe_model
from hf_moe_accel.hf import norms as library
from hf_moe_accel.hf.norms import fuse_norms
from hf_moe_accel.ops.norms import NormFormula, find_formula, rms_norm, takes
from tests.helpers.models import tiny_config, tiny_model
from tests.helpers.tolerances import assert_close
from tests.unit.test_triton_ops import draw, interpreted

LLAMA, IN_FP32, SHIFTED = NormFormula(1e-5), NormFormula(1e-5, rounds=False), NormFormula(1e-5, 1.0, rounds=False)
FORMULAS = [LLAMA, IN_FP32, SHIFTED]
KNOWN = {
    "qwen3_moe.Qwen3MoeRMSNorm": LLAMA,
    "olmoe.OlmoeRMSNorm": LLAMA,
    "mixtral.MixtralRMSNorm": LLAMA,
    "deepseek_v3.DeepseekV3RMSNorm": LLAMA,
    "gpt_oss.GptOssRMSNorm": IN_FP32,
    "flex_olmo.FlexOlmoRMSNorm": IN_FP32,
    "qwen3_next.Qwen3NextRMSNorm": SHIFTED,
    "gemma3.Gemma3RMSNorm": SHIFTED,
    # None of ours: it multiplies with a gate, has no weight, or rounds in between.
    "qwen3_next.Qwen3NextRMSNormGated": None,
    "deepseek_v4.DeepseekV4UnweightedRMSNorm": None,
    "idefics.IdeficsRMSNorm": None,
}


@pytest.mark.parametrize("name", KNOWN)
def test_formulas_are_found(name: str) -> None:
    file, kind = name.split(".")
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    expected = KNOWN[name]
    norm = getattr(module, kind)() if "Unweighted" in kind else getattr(module, kind)(64, eps=1e-5)
    assert find_formula(norm) == expected
    # It is the same on a device without memory, and where models are made on another one, in another dtype.
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert find_formula(norm.to("meta")) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_others_are_none_of_ours() -> None:
    class OnGPUs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-5

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("found no NVIDIA driver")

    assert find_formula(OnGPUs()) is None
    assert find_formula(nn.LayerNorm(64)) is None
    assert find_formula(nn.GroupNorm(2, 64)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. In fp32: of bf16, Triton's interpreter cuts digits off.


def check(formula: NormFormula, x: Tensor, weight: Tensor, grad: Tensor, kind: str = "training") -> None:
    """The kernels against the formula, operation by operation, as exactly as rows are."""
    expected, actual = [], []
    for found, function in ((expected, formula), (actual, lambda x, weight: rms_norm(x, weight, formula))):
        out = function(x, weight)
        wanted = [each for each in (x, weight) if each.requires_grad]
        found += [each.to(x.dtype) for each in (out, *torch.autograd.grad(out, wanted, grad.to(out.dtype)))]
    assert takes(x.detach(), weight)
    assert_close(actual, expected, kind)


@interpreted
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", [(1, 64), (3, 307, 48), (2, 5000)], ids=str)
@pytest.mark.parametrize("formula", FORMULAS, ids=["llama", "fp32", "shifted"])
def test_the_kernels_compute_the_formula(formula: NormFormula, shape: tuple[int, ...], trained: bool) -> None:
    weight = draw(shape[-1], seed=1).requires_grad_(trained)
    check(formula, draw(*shape).requires_grad_(), weight, draw(*shape, seed=2))


@interpreted
def test_rows_may_lie_anyhow() -> None:
    x, grad = draw(6, 5, 96).transpose(0, 1)[..., :48], draw(6, 5, 48).transpose(0, 1)
    check(LLAMA, x.requires_grad_(), draw(48, seed=1).requires_grad_(), grad)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if Triton's interpreter were a GPU; holds the rows of each call of the kernel."""
    rows: list[int] = []
    monkeypatch.setattr(library, "_has_kernels", lambda hidden: True)

    def counted(x: Tensor, *args: Any) -> Tensor:
        rows.append(x.numel() // x.size(-1))
        return rms_norm(x, *args)

    monkeypatch.setattr(library, "rms_norm", counted)
    return rows


IDS = torch.arange(3, 19).view(2, 8)


@interpreted
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_a_model_trains_as_before(name: str, calls: list[int]) -> None:
    torch.manual_seed(0)
    model = prepare_moe_model(tiny_model(name))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    expected = step(copy.deepcopy(model), IDS)
    assert calls == []
    names = list(model.state_dict())
    count = fuse_norms(model)
    assert count == sum(type(each).__name__.endswith("RMSNorm") for each in model.modules())
    assert_close(step(model, IDS), expected, "training")
    assert len(calls) == count and list(model.state_dict()) == names
    assert fuse_norms(model) == 0, "they are in place"


@interpreted
def test_checkpointing_frozen_weights_and_evaluation(calls: list[int]) -> None:
    model = prepare_moe_model(tiny_model("qwen3_moe"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    expected = step(copy.deepcopy(model), IDS)
    count = fuse_norms(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_close(step(model, IDS), expected, "training")
    assert len(calls) == 2 * count - 1, "all but the last one once more"
    calls.clear()
    with torch.no_grad():
        assert_close(model.eval()(input_ids=IDS, labels=IDS).loss, expected["loss"], "training")
    assert len(calls) == count


@interpreted
def test_a_copy_has_weights_of_its_own(calls: list[int]) -> None:
    model = tiny_model("qwen3_moe")
    fuse_norms(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = model(input_ids=IDS).logits
        with torch.no_grad():
            other.model.norm.weight.zero_()
        calls.clear()
        assert_close(other(input_ids=IDS).logits, torch.zeros_like(before), "exact")
        assert_close(model(input_ids=IDS).logits, before, "exact")
        assert len(calls) == 2 * 9


@interpreted
def test_what_stays_with_the_module(calls: list[int]) -> None:
    """Hooks, other arguments, other kernels, and what torch's compiler sees."""
    model = tiny_model("qwen3_moe")
    layers = model.model.layers
    layers[0].input_layernorm.forward = theirs = layers[0].input_layernorm.forward  # as Liger's are bound
    assert fuse_norms(model) == 8
    assert layers[0].input_layernorm.forward is theirs
    norm, seen, x = model.model.norm, [], draw(3, 64)
    norm.register_forward_hook(lambda *args: seen.append(args))
    assert_close(norm(x), type(norm).forward(norm, x), "training")
    assert len(seen) == len(calls) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'gate'"):
        norm(x, gate=x)
    calls.clear()
    graph = torch.compile(layers[1].input_layernorm, backend="eager", fullgraph=True)
    assert_close(graph(x), type(norm).forward(layers[1].input_layernorm, x), "exact")
    assert calls == []


@pytest.mark.parametrize(
    "x", [draw(3, 63), torch.empty(0, 64), torch.empty(3, 64, dtype=torch.float64), nn.Parameter(torch.empty(3, 64))]
)
def test_what_the_kernels_leave_alone(x: Tensor) -> None:
    weight = torch.ones(64)
    assert not takes(x, weight)
    assert takes(torch.empty(3, 64), weight) and not takes(torch.empty(1, 32768), torch.ones(32768))
    assert not takes(torch.empty(3, 64), torch.ones(128)[::2])


def test_nothing_changes_on_a_cpu() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    assert fuse_norms(model) == 9, "before there are weights"
    model = tiny_model("qwen3_moe")
    expected = model(input_ids=IDS).logits
    fuse_norms(model)
    assert_close(model(input_ids=IDS).logits, expected, "exact")
