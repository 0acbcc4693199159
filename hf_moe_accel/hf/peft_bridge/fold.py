"""What adapters add to which weight, for merging them and for writing them under other names."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_moe_accel.hf.peft_bridge.layers import ParameterLora
from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import LowRank, shards_of


def without_adapters(model: Any) -> tuple[dict[str, Tensor], dict[str, tuple[LowRank, ...]]]:
    """The tensors of the transformers model inside, by their names without PEFT, and what its adapters add to which.

    The active adapters; those of experts have been adopted. All ranks must call: the small factor of each dense
    adapter is gathered.

    Raises:
        ValueError: an adapter is of a kind that cannot be folded in; names it.
    """
    base = model.get_base_model()
    ranks = Ranks.of(base.parameters())
    live = base.state_dict(keep_vars=True)
    names: dict[str, str | None] = {name: name for name in live}
    added: dict[str, tuple[LowRank, ...]] = {}
    for path, module in base.named_modules():
        if not isinstance(module, ParameterLora | LoraLayer | ModulesToSaveWrapper):
            continue
        below = [name for name in live if name.startswith(f"{path}.")]
        if isinstance(module, ParameterLora):
            names |= dict.fromkeys(below)
            experts, _, parameter = path.rpartition(".lora.")
            is_transposed = base.get_submodule(experts).is_transposed
            added[f"{experts}.{parameter}"] = tuple(LowRank(*pair, is_transposed) for pair in module.active_pairs())
        elif isinstance(module, LoraLayer):
            start = f"{path}.base_layer."
            names |= {name: f"{path}.{name[len(start) :]}" if name.startswith(start) else None for name in below}
            added[f"{path}.weight"] = tuple(_of_linear(path, module, adapter, ranks) for adapter in _active(module))
        else:
            kept = (
                f"{path}.modules_to_save.{module.active_adapters[0]}."
                if _active(module)
                else f"{path}.original_module."
            )
            names |= {name: f"{path}.{name[len(kept) :]}" if name.startswith(kept) else None for name in below}
    return {plain: live[name] for name, plain in names.items() if plain is not None}, added


def _active(module: Any) -> list[str]:
    if isinstance(module, LoraLayer):
        adapters = {*module.lora_A, *module.lora_embedding_A}
    else:
        adapters = set(module.modules_to_save)
    return [] if module.disable_adapters else [name for name in module.active_adapters if name in adapters]


def _of_linear(path: str, module: Any, adapter: str, ranks: Ranks) -> LowRank:
    linear = module.get_base_layer()
    if not isinstance(linear, nn.Linear) or adapter in module.lora_variant or module.lora_bias.get(adapter):
        raise ValueError(
            f"the adapter {adapter!r} of {path!r} cannot be folded into its weight here: only plain LoRA of linear "
            "layers, without bias, can. Save the adapter, load it with peft.PeftModel on the plain model, and merge "
            "it there."
        )
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    both = shards_of({"weight": linear.weight, "b": b}, ranks.world_size)
    rows = both["b"].local
    if both["weight"].held != both["b"].held:
        first, end = both["weight"].held[ranks.rank]
        rows = (b.full_tensor() if isinstance(b, DTensor) else b)[first:end]
    return LowRank(a.full_tensor() if isinstance(a, DTensor) else a, rows, module.scaling[adapter])
