"""The two seams of transformers that lead to the token path, and the binding of a model's experts to its runtime.

No EP plan (one process, DDP, FSDP with ep 1): the function registered in `ALL_EXPERTS_FUNCTIONS`.
EP plan: the slot registered in `EPImplementationInterface`, which transformers constructs for each experts module.
Both are adapters of a few lines; DTensors end here (transformers hands over local tensors inside autograd).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_accel.experts.base import ExpertWeights
from hf_moe_accel.hf.compiling import dynamo_plugin
from hf_moe_accel.moe import forward as token_path
from hf_moe_accel.moe.deferred import may_defer

if TYPE_CHECKING:
    from hf_moe_accel.hf.discover import FoundExperts
    from hf_moe_accel.moe.forward import Runtime

NAME = "hf_moe_accel"

_WRAPPED = (
    "peft.get_peft_model was called on a model that hf_moe_accel had prepared: call hf_moe_accel.get_peft_model "
    "instead (same arguments), or prepare_moe_model on the PEFT model."
)
_UNBOUND = (
    "these experts were set up for hf_moe_accel but never bound to a runtime: load the model with "
    "hf_moe_accel.AutoModelForCausalLM, or call hf_moe_accel.prepare_moe_model(model) before its first forward pass."
)


class Binding:
    """Ties one experts module to the runtime of its model; lives on the module as `moe_binding`.

    Args:
        found: the module and how to read it.
        runtime: of the whole model.
        layer: the number of the module among the model's experts.
    """

    def __init__(self, found: FoundExperts, runtime: Runtime, layer: int) -> None:
        """Read nothing yet: parameters are looked up at each call, since FSDP2 swaps them."""
        self._spec = found.spec
        self._getters = [None if name is None else attrgetter(name) for name in found.parameters]
        self._projections = found.parameters[:2]
        self._runtime = runtime
        self.layer = layer
        self.meanwhile: Callable[[], None] | None = None  # what may run while tokens travel: see hf/shared

    def __call__(self, module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run the token path on (.., D) hidden states with (.., K) expert numbers and routing weights."""
        parameters = ExpertWeights.of(None if get is None else get(module) for get in self._getters)
        adapters: Any = module._modules.get("lora")
        if adapters is not None:
            hidden = adapters(hidden)
            up, down = (adapters[name].active_pairs() if name in adapters else () for name in self._projections)
            parameters = parameters._replace(up_lora=up, down_lora=down)
        top_k = ids.size(-1)
        out = token_path.forward(
            self._spec,
            hidden.reshape(-1, hidden.size(-1)),
            ids.reshape(-1, top_k),
            weights.reshape(-1, top_k),
            parameters,
            self._runtime,
            self.layer,
            self.meanwhile if may_defer() else None,
        )
        # FSDP2 warns of outputs that are views, since its hook is lost when they are written into.
        return out if hidden.dim() == 2 else out.reshape(hidden.shape)


# One region that torch.compile leaves alone: its sizes depend on the data.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def experts_forward(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Seam 1, under our name in `ALL_EXPERTS_FUNCTIONS`."""
    binding = module.__dict__.get("moe_binding")
    if binding is None:
        raise RuntimeError(_UNBOUND)
    out: Tensor = binding(module, hidden, ids, weights)
    return out


class ExpertParallelSlot(EPImplementation):
    """Seam 2. Made by transformers when a model is sharded; holds no resource and waits for `bind`."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        """Note the module. The base class is not set up: it would keep the forward that we never call.

        Raises:
            ValueError: tensor parallelism is on.
        """
        if tp_mesh.size() > 1:
            raise ValueError(
                f"expert parallelism with tp_size={tp_mesh.size()} is not supported: use tp_size=1; ranks that shared "
                "a batch under tensor parallelism then train on batches of their own."
            )
        self._experts = experts
        experts.moe_slot = self

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run the token path on this rank's tokens."""
        out: Tensor = experts_forward(self._experts, hidden, ids, weights)
        return out


EPImplementationInterface.register(NAME, ExpertParallelSlot)
ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def is_sharded_by_us(found: Sequence[FoundExperts]) -> bool:
    """Whether transformers has put our slot on every experts module."""
    return all("moe_slot" in experts.module.__dict__ for experts in found)


def bind(model: Any, found: Sequence[FoundExperts], runtime: Runtime) -> None:
    """Lead every experts module of the model to the token path.

    From then on, a forward pass raises where something has taken the place of an experts module.
    """
    for layer, experts in enumerate(found):
        experts.module.moe_binding = Binding(experts, runtime, layer)
    model.register_forward_pre_hook(partial(_check_in_place, [experts.name for experts in found]))
    lead_here(model, found)


def lead_here(model: Any, found: Sequence[FoundExperts]) -> None:
    """From now on experts compute here, and raise until they are bound: what they carry is known to nobody else."""
    if is_sharded_by_us(found):
        return
    model.set_experts_implementation(NAME)
    for experts in found:
        # Where layers differ (the vision tower of dots3_note), each has a configuration of its own.
        experts.module.config._experts_implementation_internal = NAME


def _check_in_place(names: Sequence[str], model: nn.Module, *_: Any) -> None:
    for name in names:
        if "moe_binding" not in model.get_submodule(name).__dict__:
            raise RuntimeError(_WRAPPED)


def keep_liger_off_experts(args: Any) -> None:
    """Let Liger's kernels stand in for norms, rotary embeddings and the loss, never for the experts.

    Args:
        args: `TrainingArguments`; its `liger_kernel_config` is set where `use_liger_kernel` is. Where a model has
            dense MLPs beside its experts, Liger's kernels for those go with the experts' (`swiglu`). Where the model
            is compiled, norms and rotary embeddings are left to the compiler, which joins them with what stands around
            them, unless the arguments name them: with Liger's, compiling a layer failed on an H200.
    """
    if not args.use_liger_kernel:
        return
    left = {} if dynamo_plugin(args) is None else {"rms_norm": False, "rope": False}
    args.liger_kernel_config = {**left, **(args.liger_kernel_config or {}), "swiglu": False}
