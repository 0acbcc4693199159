"""LoRA on the experts for PEFT: its wrappers become a child of the experts module; its files stay as it knows them.

PEFT's `target_parameters` wraps the experts module once for each parameter, builds W + BA in every forward, and stands
between transformers' expert parallelism and the experts. Here PEFT makes the wrappers, with its own matching of names,
ranks and initial values; then each becomes a `ParameterLora` below `experts.lora`, and the experts module is what it
was. PEFT still finds them as tuner layers, so that `set_adapter`, `disable_adapter` and `delete_adapter` work.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_moe_accel.experts.base import LoraPair
from hf_moe_accel.hf.loading import reshard
from hf_moe_accel.log import say, warn_once
from hf_moe_accel.lora import peft_layout
from hf_moe_accel.weights.gather import gather_rows
from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import LowRank, shards_of

FILE_NAME = "adapter_model.safetensors"


class Factor(nn.Module):
    """One factor of one adapter; the name of its parameter is what PEFT looks for: `lora_A.<adapter>.weight`."""

    def __init__(self, weight: Tensor, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=requires_grad)


class ParameterLora(nn.Module, LoraLayer):
    """All adapters of one parameter of the experts: A [E, r, in] and B [E, out, r], each sharded as the experts are.

    Its forward is never called: `hf/install` hands `active_pairs` to the token path. It is a `LoraLayer` for PEFT to
    find, without the base layer of one: the experts are above it.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling")

    def __init__(self, num_experts: int, depth: int) -> None:
        """No adapter yet.

        Args:
            num_experts: E.
            depth: how many other wrappers PEFT puts around this parameter's, of which its keys speak.
        """
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.keys_prefix = "base_layer." * depth
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_variant: dict[str, Any] = {}
        self.merged_adapters: list[str] = []

    def take(self, wrapper: Any) -> None:
        """Take the adapters of PEFT's `ParamWrapper` over, values and state."""
        for name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            self.lora_A[name] = Factor(_own(peft_layout.a_from_peft(a, self.num_experts)), a.requires_grad)
            self.lora_B[name] = Factor(_own(peft_layout.b_from_peft(b, self.num_experts)), b.requires_grad)
        for kept in self.other_param_names:
            getattr(self, kept).update(getattr(wrapper, kept))
        self._active_adapter = wrapper._active_adapter
        self._disable_adapters = wrapper._disable_adapters

    def active_pairs(self) -> tuple[LoraPair, ...]:
        """What the token path adds: this rank's factors of each active adapter, inside autograd."""
        if self._disable_adapters:
            return ()
        active: Any = self.active_adapters
        return tuple(
            LoraPair(_local(_weight(self.lora_A, name)), _local(_weight(self.lora_B, name)), self.scaling[name])
            for name in active
            if name in self.lora_A
        )

    def factors(self, adapter: str) -> Iterator[tuple[str, nn.Parameter, Any, Any]]:
        """("lora_A" or "lora_B", the live factor, its way into PEFT's layout, its way out of it)."""
        for kind, factors, into, out in (
            ("lora_A", self.lora_A, peft_layout.a_to_peft, peft_layout.a_from_peft),
            ("lora_B", self.lora_B, peft_layout.b_to_peft, peft_layout.b_from_peft),
        ):
            if adapter in factors:
                yield kind, _weight(factors, adapter), into, partial(out, num_experts=self.num_experts)


class ExpertsLora(nn.ModuleDict):
    """The child of an experts module: parameter name -> its adapters."""


def get_peft_model(model: Any, peft_config: Any, **kwargs: Any) -> Any:
    """`peft.get_peft_model`, with experts: the result can be prepared, sharded, saved and resumed.

    Call it before `prepare_moe_model`, on an unsharded model. Works with the spellings that PEFT knows for experts:
    `target_parameters=["mlp.experts.gate_up_proj", ...]`, and for most models v4's
    `target_modules=["gate_proj", "up_proj", "down_proj"]`. `lora_dropout` acts on the other targets only.

    Args:
        model: a transformers model.
        peft_config: `LoraConfig`.
        kwargs: of `peft.get_peft_model`.

    Raises:
        ValueError: the model is sharded already, or a target is the experts' and none of them was hit.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "adapters come before sharding: call get_peft_model on the model as it was loaded, then "
            "prepare_moe_model (a trainer does both when it is given the model and peft_config)."
        )
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    named = [name for name in peft_config.target_parameters or () if "experts" in name]
    if dropout and named:
        warn_once(f"hf_moe_accel: lora_dropout={dropout} acts on the other targets; on experts it is 0")
        peft_config.lora_dropout = 0.0
    wrapped = peft.get_peft_model(model, peft_config, **kwargs)
    if dropout and named:
        peft_config.lora_dropout = dropout
        for module in wrapped.modules():
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
                for adapter in module.lora_dropout:
                    module.lora_dropout[adapter] = nn.Dropout(dropout)
    if not adopt_expert_adapters(wrapped) and named:
        raise ValueError(
            f"target_parameters={named} hit no experts of {type(model).__name__}: give the end of a parameter's name, "
            "for example 'mlp.experts.gate_up_proj' (model.named_parameters() lists them)."
        )
    return wrapped


def adopt_expert_adapters(model: Any) -> bool:
    """Turn PEFT's wrappers of experts into children of the experts. Returns whether the model has adapters on experts.

    Does nothing to a model without them. All adapters and their values are kept.

    Raises:
        ValueError: the experts were sharded before PEFT wrapped them.
    """
    if not isinstance(model, peft.PeftModel):
        return False
    base = model.get_base_model()
    modules = dict(base.named_modules())
    for name, module in modules.items():
        parent, _, key = name.rpartition(".")
        if not isinstance(module, ParamWrapper) or isinstance(modules[parent], ParamWrapper):
            continue
        experts = module.get_base_layer()
        if "down_proj" not in experts._parameters or not hasattr(experts, "has_gate"):
            continue
        if any(isinstance(parameter, DTensor) for parameter in experts._parameters.values()):
            raise ValueError(
                f"PEFT has wrapped the experts {name!r} of a model that was sharded already: use "
                "hf_moe_accel.get_peft_model on the model as it was loaded, and prepare it then."
            )
        setattr(modules[parent], key, experts)
        if "lora" not in experts._modules:
            experts.lora = ExpertsLora()
        depth = 0
        while isinstance(module, ParamWrapper):
            if module.parameter_name not in experts.lora:
                experts.lora[module.parameter_name] = ParameterLora(module.num_experts, depth)
            experts.lora[module.parameter_name].take(module)
            module, depth = module.base_layer, depth + 1
    if not any(isinstance(module, ParameterLora) for module in model.modules()):
        return False
    if "moe_accel_adapters" not in model.__dict__:
        model.moe_accel_adapters = True
        model.save_pretrained = MethodType(_save_pretrained, model)
        model.merge_and_unload = MethodType(_merge_and_unload, model)
        _say_what_trains(model)
    return True


def expert_parallel_rules(model: nn.Module) -> dict[str, str]:
    """The rules by which transformers shards the factors by expert, to be added to the model's own."""
    return {
        re.sub(r"\.\d+\.", ".*.", f"{name}.{parameter}"): "grouped_gemm"
        for name, module in model.named_modules()
        if isinstance(module, ParameterLora)
        for parameter, _ in module.named_parameters()
    }


def load_adapter(model: Any, directory: str | os.PathLike[str], adapter: str) -> None:
    """Read a saved adapter into the live, possibly sharded one of that name, in place. All ranks must call.

    Raises:
        ValueError: the file is not there, or holds other tensors than the adapter has; names them.
    """
    path = Path(directory, FILE_NAME)
    if not path.exists():
        path = Path(directory, adapter, FILE_NAME)
    if not path.exists():
        raise ValueError(f"{directory} holds no {FILE_NAME} of the adapter {adapter!r}.")
    wanted = {each.file_key: each for each in _tensors(model, adapter)}
    ranks = Ranks.of(model.parameters())
    with safe_open(path, framework="pt") as file, torch.no_grad():
        saved = set(file.keys())
        if saved != set(wanted):
            raise ValueError(
                f"{path} does not fit the adapter {adapter!r}: only there {sorted(saved - set(wanted))[:3]}, "
                f"only here {sorted(set(wanted) - saved)[:3]}."
            )
        for key, each in wanted.items():
            (shard,) = shards_of({key: each.parameter}, ranks.world_size).values()
            first, end = shard.held[ranks.rank] if isinstance(each.parameter, DTensor) else (0, shard.num_rows)
            shard.local.copy_(each.out(file.get_tensor(key))[first:end])


def without_adapters(model: Any) -> tuple[dict[str, Tensor], dict[str, tuple[LowRank, ...]]]:
    """The tensors of the transformers model inside, by their names without PEFT, and what its adapters add to which.

    The active adapters. All ranks must call: the small factor of each dense adapter is gathered.

    Raises:
        ValueError: an adapter is of a kind that cannot be folded in; names it.
    """
    adopt_expert_adapters(model)
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


class _Saved(NamedTuple):
    """One tensor of an adapter: its live name, its key in the file, the parameter, its way into the file and out."""

    name: str
    file_key: str
    parameter: Tensor
    into: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]


def _tensors(model: Any, adapter: str) -> Iterator[_Saved]:
    """All that PEFT saves of an adapter."""
    reshard(model)
    prefixes = {}
    for name, module in model.named_modules():
        if isinstance(module, ParameterLora):
            experts = name.rpartition(".lora.")[0]
            for kind, parameter, into, out in module.factors(adapter):
                prefixes[id(parameter)] = (f"{experts}.{module.keys_prefix}{kind}.weight", into, out)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if id(parameter) in prefixes:
            yield _Saved(name, prefixes[id(parameter)][0], parameter, *prefixes[id(parameter)][1:])
        elif "lora_" in name and f".{adapter}." in name:
            yield _Saved(name, name.replace(f".{adapter}.", "."), parameter, _same, _same)
        elif f".modules_to_save.{adapter}." in name:
            yield _Saved(name, name.replace(f".modules_to_save.{adapter}.", "."), parameter, _same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """`save_pretrained` of a PEFT model with adapters on experts: the files of stock PEFT. All ranks must call.

    Gathers the adapters, tensor by tensor, and nothing else.
    """
    ranks = Ranks.of(model.parameters())
    state: dict[str, Tensor] = {}
    file_keys: dict[str, str] = {}
    for adapter in kwargs.get("selected_adapters") or list(model.peft_config):
        for each in _tensors(model, adapter):
            (shard,) = shards_of({each.name: each.parameter}, ranks.world_size).values()
            whole = gather_rows(shard, (0, shard.num_rows), 0, ranks)
            if whole is not None:
                state[each.name] = each.into(whole.reshape(shard.shape)).contiguous().cpu()
                file_keys[each.name.replace(f".{adapter}.", ".")] = each.file_key
    with ranks.same_outcome(f"Saving the adapter to {save_directory}"):
        if ranks.rank == 0:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("state_dict", "is_main_process")}
            os.makedirs(save_directory, exist_ok=True)
            # PEFT writes our own names; they get its own before a file takes its place.
            with tempfile.TemporaryDirectory(dir=save_directory) as folder, _loadable_by_stock_peft(model):
                type(model).save_pretrained(model, folder, state_dict=state, **kwargs)
                for path in Path(folder).rglob("*"):
                    target = Path(save_directory, path.relative_to(folder))
                    if path.name == FILE_NAME:
                        tensors = {file_keys.get(key, key): value for key, value in load_file(path).items()}
                        path.write_bytes(save(tensors, metadata={"format": "pt"}))
                    if path.is_dir():
                        target.mkdir(exist_ok=True)
                    else:
                        os.replace(path, target)


@contextmanager
def _loadable_by_stock_peft(model: Any) -> Iterator[None]:
    """PEFT's wrappers of experts refuse a configuration with dropout, which only training needs."""
    dropouts = {name: config.lora_dropout for name, config in model.peft_config.items()}
    try:
        for config in model.peft_config.values():
            config.lora_dropout = 0.0
        yield
    finally:
        for name, config in model.peft_config.items():
            config.lora_dropout = dropouts[name]


def _merge_and_unload(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "merge_and_unload of a model with adapters on experts: hf_moe_accel.export_checkpoint(model, directory) "
        "writes the merged model, from which it can be loaded."
    )


def _say_what_trains(model: Any) -> None:
    parts = {"experts": 0, "other adapters": 0, "other weights": 0}
    layers = (module for module in model.modules() if isinstance(module, ParameterLora))
    ours = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "experts" if id(parameter) in ours else "other adapters" if "lora_" in name else "other weights"
            parts[kind] += parameter.numel()
    total = sum(parts.values())
    if not total:
        return
    shown = ", ".join(f"{number:,} {kind}" for kind, number in parts.items() if number)
    say(f"hf_moe_accel: LoRA trains {total:,} parameters: {shown}")


def _weight(factors: nn.ModuleDict, adapter: str) -> nn.Parameter:
    weight = factors[adapter].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def saved_adapter(model: Any, directory: str | os.PathLike[str]) -> dict[str, list[Callable[[], LowRank | Tensor]]]:
    """What a saved LoRA adapter does to the parameters of a model; its values are read when they are asked for.

    Args:
        model: a transformers model on the meta device, which PEFT changes in place.
        directory: with the adapter's configuration and its file.

    Returns:
        By the names of the model's parameters and buffers, what reads the tensor that takes its place (of
        `modules_to_save`, or an embedding that PEFT has saved too), and then the factors to fold in.

    Raises:
        ValueError: the adapter does not fit the model, or does more than to add products of factors.
    """
    path = Path(directory, FILE_NAME)
    config = peft.LoraConfig.from_pretrained(directory)
    for option in config.__dataclass_fields__.values():
        if option.metadata.get("is_lora_variant") and getattr(config, option.name):
            raise ValueError(f"its {option.name} makes it a variant of LoRA, which is not folded in here")
    # What only training needs: PEFT's wrappers of experts refuse dropout, and the first values never count.
    config.lora_dropout, config.init_lora_weights, config.inference_mode = 0.0, False, True
    with torch.device("meta"):
        wrapped = peft.get_peft_model(model, config)
    _, added = without_adapters(wrapped)

    prefix, kept = "base_model.model.", ".modules_to_save.default."
    state = wrapped.state_dict()
    factors = {each.name.removeprefix(prefix): each for each in _tensors(wrapped, "default") if kept not in each.name}
    replaced = {name.replace(kept, "."): tensor.shape for name, tensor in state.items() if kept in name}
    wanted = {each.file_key: each.into(each.parameter).shape for each in factors.values()} | replaced
    with safe_open(path, framework="pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    # PEFT saves embeddings with the adapter where it takes them for changed.
    replaced |= {key: state[key].shape for key in saved if key in state and key not in wanted}
    wanted |= replaced
    for key, shape in saved.items():
        if key not in wanted:
            raise ValueError(f"it holds {key!r}, for which {type(model).__name__} with its configuration has no place")
        if shape != tuple(wanted[key]):
            raise ValueError(f"its {key!r} is {list(shape)}, where {list(wanted[key])} fits the model")
    if missing := sorted(wanted.keys() - saved.keys()):
        raise ValueError(f"it lacks {missing[0]!r}, which its configuration asks for")

    def read(key: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def low_rank(target: str, a: _Saved, b: _Saved) -> LowRank:
        (adapter,) = added[target]
        return adapter._replace(a=a.out(read(a.file_key)), b=b.out(read(b.file_key)))

    found: dict[str, list[Callable[[], LowRank | Tensor]]] = {}
    for key in replaced:
        found[key.removeprefix(prefix).replace(".base_layer.", ".")] = [partial(read, key)]
    for name, a in factors.items():
        layer, is_a, rest = name.rpartition(".lora_A.")
        if is_a:
            linear = f"{layer}.weight"
            target = linear if linear in added else ".".join(layer.rsplit(".lora.", 1))
            found.setdefault(target, []).append(partial(low_rank, target, a, factors[f"{layer}.lora_B.{rest}"]))
    return found
