"""Every experts class of transformers is read off rightly, or named with the reason why it cannot be."""

from __future__ import annotations

import ast
import functools
import importlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_accel.dispatch.local import LocalDispatcher
from hf_moe_accel.experts.base import ExpertWeights
from hf_moe_accel.experts.eager import EagerBackend
from hf_moe_accel.hf import discover
from hf_moe_accel.hf.discover import find_experts, why_not_standard
from hf_moe_accel.hf.install import bind, experts_forward
from hf_moe_accel.moe import forward as token_path
from hf_moe_accel.prepare import _without_ep_plan
from hf_moe_accel.runtime import MoERuntime
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.models import tiny_model
from tests.helpers.tolerances import assert_close

MODELS = Path(transformers.__file__).parent / "models"
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 4, 12, 8
# What the constructors of experts read from their configurations, under all names.
SIZES = {
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE,
    "moe_num_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
}


class Marked(NamedTuple):
    """A class that transformers' decorator marks, as the sources have it."""

    package: str
    module: str
    name: str
    flags: dict[str, bool]
    reads: frozenset[str]

    @property
    def experts_class(self) -> type[nn.Module]:
        return getattr(importlib.import_module(f"{self.package}.{self.module}"), self.name)

    def make(self) -> Any:
        """The experts module, tiny, from the first of its package's configurations that has what it reads."""
        configurations = importlib.import_module(f"{self.package}.{self.module.replace('modeling', 'configuration')}")
        for config_class in vars(configurations).values():
            if not (isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)):
                continue
            config = config_class()
            # Layers of one configuration may differ, and it then has no value for all of them.
            config.allow_global_per_layer_attribute_access = True
            if not all(hasattr(config, name) for name in self.reads):
                continue
            for name, size in SIZES.items():
                if name in self.reads:
                    setattr(config, name, [size, size] if isinstance(getattr(config, name), list) else size)
            several = isinstance(getattr(config, "moe_intermediate_size", None), list)
            config._experts_implementation = "eager"
            return self.experts_class(config, *([INTERMEDIATE] if several else []))
        raise AssertionError(f"no configuration of {self.package} has {sorted(self.reads)}")


@functools.cache
def marked_classes() -> tuple[Marked, ...]:
    """Read from the sources, without importing a model."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        if "@use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            decorators = getattr(node, "decorator_list", [])
            marks = [item for item in decorators if "use_experts_implementation" in ast.unparse(item)]
            if not marks:
                continue
            flags = {k.arg: ast.literal_eval(k.value) for k in getattr(marks[0], "keywords", [])}
            (init,) = (item for item in node.body if getattr(item, "name", "") == "__init__")
            attributes = [item for item in ast.walk(init) if isinstance(item, ast.Attribute)]
            reads = {item.attr for item in attributes if ast.unparse(item.value) == "config"}
            package = f"transformers.models.{path.parent.name}"
            found.append(Marked(package, path.stem, node.name, flags, frozenset(reads)))
    return tuple(found)


def test_transformers_marks_as_many_classes_as_we_think() -> None:
    assert len(marked_classes()) >= 65


@pytest.mark.parametrize("marked", marked_classes(), ids=lambda marked: marked.name)
def test_spec_computes_what_the_module_computes(marked: Marked) -> None:
    module = marked.make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    (found,) = find_experts(nn.ModuleDict({"experts": module}))
    spec = found.spec

    defaults = {"is_transposed": False, "has_bias": False, "has_gate": True, "has_post_expert_norm": False}
    flags = defaults | marked.flags
    assert spec.is_transposed == flags["is_transposed"]
    assert spec.has_bias == flags["has_bias"]
    assert (spec.post_norm is not None) == flags["has_post_expert_norm"]
    assert (spec.num_experts, spec.hidden_size, spec.intermediate_size) == (NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    assert spec.pre_activation_size == INTERMEDIATE * (2 if flags["has_gate"] else 1)
    assert {name for name in found.parameters if name is not None} == {name for name, _ in module.named_parameters()}

    # Large enough for the gates that clamp.
    x_TD = 5 * torch.randn(7, HIDDEN, generator=generator)
    # The last expert gets no token.
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS - 1, generator=generator)[:2] for _ in range(7)])
    weights_TK = torch.rand(7, 2, generator=generator)
    parameters = [None if name is None else module.get_parameter(name) for name in found.parameters]
    runtime = MoERuntime(ExpertTopology(1, NUM_EXPERTS), LocalDispatcher(), EagerBackend(), [NUM_EXPERTS], 600.0)

    def ours(x: Tensor, weights: Tensor) -> Tensor:
        return token_path.forward(spec, x, ids_TK, weights, ExpertWeights.of(parameters), runtime, 0)

    def theirs(x: Tensor, weights: Tensor) -> Tensor:
        return module(x, ids_TK, weights)

    results = []
    for compute in (ours, theirs):
        leaves = [x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
        out = compute(*leaves)
        wanted = [*leaves, *(parameter for parameter in parameters if parameter is not None)]
        results.append((out, *torch.autograd.grad(out.square().sum() / out.numel(), wanted)))
    assert_close(results[0], results[1], "backend")


def configurations_with_experts() -> list[str]:
    """Model types of the packages that have a marked class and whose base model its default configuration makes."""
    packages = {marked.package for marked in marked_classes()}
    types = transformers.CONFIG_MAPPING
    return sorted(t for t in types if types[t].__module__.rpartition(".")[0] in packages)


@pytest.mark.slow
def test_experts_of_whole_models_are_found_have_a_rule_and_lead_to_the_token_path() -> None:
    """Default configurations on the meta device, without those that make no model there, or none with experts."""
    classes = {marked.name for marked in marked_classes()}
    seen: set[str] = set()
    for model_type in configurations_with_experts():
        try:
            with torch.device("meta"):
                model = AutoModel.from_config(transformers.CONFIG_MAPPING[model_type]())
        except Exception:
            continue  # Not our business: many defaults are placeholders.
        names = {name for name, module in model.named_modules() if type(module).__name__ in classes}
        if not names:
            continue
        found = find_experts(model)
        assert {experts.name for experts in found} == names, model_type
        assert _without_ep_plan(model, found) is None, model_type
        num_experts = [experts.spec.num_experts for experts in found]
        topology = ExpertTopology(1, math.gcd(*num_experts))
        bind(model, found, MoERuntime(topology, LocalDispatcher(), EagerBackend(), num_experts, 600.0))
        for experts in found:
            chosen = experts.module.config._experts_implementation
            assert ALL_EXPERTS_FUNCTIONS.get_interface(chosen, None) is experts_forward, (model_type, experts.name)
        seen |= {type(experts.module).__name__ for experts in found}
    assert len(seen) >= 50, sorted(classes - seen)


def test_kinds_that_cannot_be_served_exist() -> None:
    names = set()
    for path in MODELS.glob("*/modeling_*.py"):
        text = path.read_text()
        names |= {name for name in discover._NOT_STANDARD if f"\nclass {name}(" in text}
    assert names == set(discover._NOT_STANDARD)
    assert not names & {marked.name for marked in marked_classes()}


NOT_STANDARD_MODELS: dict[str, dict[str, Any]] = {
    "doge": {"is_moe": True, "num_experts": 4, "num_hidden_layers": 1},
    "jetmoe": {"num_hidden_layers": 1, "vocab_size": 16},
    "llama4_text": {"num_hidden_layers": 1, "vocab_size": 16},
    "longcat_flash": {"num_layers": 1, "vocab_size": 16},
    "nllb-moe": {"vocab_size": 16},
    "switch_transformers": {"vocab_size": 16},
}


@pytest.mark.parametrize("model_type", NOT_STANDARD_MODELS)
def test_kinds_that_cannot_be_served_are_named(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type](**NOT_STANDARD_MODELS[model_type])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert find_experts(model) == []
    sentence = why_not_standard(model)
    assert sentence is not None
    kind = next(name for name in discover._NOT_STANDARD if name in sentence)
    assert discover._NOT_STANDARD[kind] in sentence
    assert "Qwen3-MoE" in sentence


def test_kinds_that_cannot_be_served_are_named_when_fsdp_has_renamed_them() -> None:
    renamed = type("FSDPDbrxExperts", (nn.Module,), {})()
    assert "DbrxExperts" in str(why_not_standard(nn.ModuleDict({"ffn": renamed})))


def test_dense_model_has_no_experts_and_no_reason() -> None:
    model = tiny_model("llama")
    assert find_experts(model) == []
    assert why_not_standard(model) is None


def test_activation_with_parameters_is_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts.act_fn = nn.PReLU()
    with pytest.raises(ValueError, match="PReLU.*'model.layers.0.mlp.experts'.*trainable parameters"):
        find_experts(model)
