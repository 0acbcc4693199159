"""Compiles a model's `KeyPlan` by running transformers' own save-time conversions on tensors that hold no numbers.

`save_pretrained` renames, splits, transposes and merges weights back to the keys that the hub uses, with converters
that differ between models. Here they run on tracers: stand-ins of the true shape and dtype which write down how they
are viewed. What comes out under each hub key says where its elements came from, without one of them being read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_moe_accel.weights.plan import ConvertedGroup, HubTensor, KeyPlan, View

aten = torch.ops.aten
_INSTEAD = "PreTrainedModel.save_pretrained(model, directory) gathers the whole model and saves it."


def compile_key_plan(model: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> KeyPlan:
    """Where every tensor that `model.save_pretrained` would write comes from.

    Args:
        model: a model, without adapters.
        state: the live tensors by the names of the plain model, where the model's own differ, as with PEFT's wrappers.

    Holds no collective. Reads names, shapes and dtypes only, so all ranks of a sharded model compile the same plan.

    Raises:
        RuntimeError: weights share memory in a way that the model does not declare (as `save_pretrained` raises).
        ValueError: a converter of the model writes in place, depends on the weights' values, or returns what it did
            not make from the weights.
    """
    if state is None:
        state = model.state_dict(keep_vars=True)
    tracers = {name: _Tracer.of(name, state[name]) for name in _saved_names(model, state)}
    with torch.no_grad():
        hub = to_hub_keys(model, tracers)

    tensors, groups = [], list[ConvertedGroup]()
    for key, tracer in hub.items():
        if not isinstance(tracer, _Tracer):
            raise ValueError(
                f"{key!r} cannot be exported shard by shard: its converter returns values that it did not make from "
                f"the model's weights. {_INSTEAD}"
            )
        tensor = HubTensor(key, tuple(tracer.shape), tracer.dtype, tracer.views or (), tracer.cat_dim)
        if tracer.views:
            tensors.append(tensor)
        else:
            groups = _join(groups, ConvertedGroup(tuple(sorted(tracer.sources)), (tensor,)))
    parameters = {id(value): value for value in state.values() if isinstance(value, nn.Parameter)}
    return KeyPlan(tuple(tensors), tuple(groups), sum(value.numel() for value in parameters.values()))


def to_hub_keys(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their hub keys, converted as `model.save_pretrained` does."""
    with original_classes(model):
        hub: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return hub


@contextmanager
def original_classes(model: nn.Module) -> Iterator[None]:
    """Take back the classes that `fully_shard` generates.

    Transformers looks conversions up by the name and the package of a model's class, and finds none for `FSDP<Class>`
    in torch's package: a model built from a config and then sharded would be saved in its internal layout.
    """
    sharded = [(module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module, generated in sharded:
            original: Any = next(cls for cls in generated.__mro__ if not issubclass(cls, FSDPModule))
            module.__class__ = original
        yield
    finally:
        for module, generated in sharded:
            module.__class__ = generated


def _saved_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[str]:
    """The names in `state` that are saved: none that the model ignores, and one of each set of tied weights."""
    ignored = set(model._keys_to_ignore_on_save or ())
    # Upstream finds tied weights by shared memory, but a DTensor's shard may be empty: stand-ins share it instead.
    stand_ins: dict[Any, Tensor] = {}
    tied = {
        name: stand_ins.setdefault(_identity(tensor), torch.empty(1))
        for name, tensor in state.items()
        if name not in ignored
    }
    return list(remove_tied_weights_from_state_dict(tied, model))


def _identity(tensor: Tensor) -> Any:
    if isinstance(tensor, DTensor) or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.nbytes


def _join(groups: Sequence[ConvertedGroup], new: ConvertedGroup) -> list[ConvertedGroup]:
    """The groups and the new one, those that share a source made one: a converter needs all its sources at once."""
    apart = [group for group in groups if not set(group.sources) & set(new.sources)]
    for group in groups:
        if group not in apart:
            new = ConvertedGroup(tuple(sorted({*group.sources, *new.sources})), group.tensors + new.tensors)
    return [*apart, new]


class _Tracer(Tensor):
    """A tensor of true shape and dtype without numbers, which knows the views of live tensors that it stands for.

    An operation that only moves elements gives tracers with new views. After any other one the views are None: the
    element order is no longer known, only shape, dtype and the sources.
    """

    views: tuple[View, ...] | None  # concatenated along `cat_dim`
    cat_dim: int
    sources: frozenset[str]

    @staticmethod
    def make(
        shape: Sequence[int],
        dtype: torch.dtype,
        sources: frozenset[str],
        views: tuple[View, ...] | None,
        cat_dim: int = 0,
    ) -> _Tracer:
        # Always contiguous to torch: `reshape` then asks for a view instead of a copy, and `View` knows better.
        tracer = Tensor._make_wrapper_subclass(_Tracer, shape, dtype=dtype, device=torch.device("cpu"))
        tracer.sources, tracer.views, tracer.cat_dim = sources, views, cat_dim
        return tracer

    @staticmethod
    def of(name: str, tensor: Tensor) -> _Tracer:
        """The stand-in of live tensor `name`."""
        views = (View.of(name, tensor.shape),) if tensor.numel() else None
        return _Tracer.make(tensor.shape, tensor.dtype, frozenset([name]), views)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"_Tracer({tuple(self.shape)}, {self.dtype}, {self.views or sorted(self.sources)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise ValueError(
                f"This model cannot be exported shard by shard: its converter calls {func} in place. {_INSTEAD}"
            )
        rule = _RULES.get(func)
        traced = rule(*args, **kwargs) if rule else None
        return _opaque(func, args, kwargs) if traced is None else traced


def _opaque(func: Any, args: Any, kwargs: Any) -> Any:
    """The results of an operation that is more than a move of elements: shapes and dtypes, found on meta tensors."""
    leaves, _ = tree_flatten((args, kwargs))
    sources = frozenset().union(*(leaf.sources for leaf in leaves if isinstance(leaf, _Tracer)))
    args, kwargs = tree_map(
        lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x, (args, kwargs)
    )
    try:
        results = func(*args, **kwargs)
    except RuntimeError as error:
        raise ValueError(
            f"This model cannot be exported shard by shard: its converter calls {func}, whose result is not known "
            f"without the weights' values ({error}). {_INSTEAD}"
        ) from error
    return tree_map(lambda x: _Tracer.make(x.shape, x.dtype, sources, None) if isinstance(x, Tensor) else x, results)


# What converters do to weights without computing on them, by the operation that torch breaks it down to. A rule
# returns None where the result is no view.


def _same(x: _Tracer, **_: Any) -> _Tracer:
    return x


def _cast(x: _Tracer, dtype: torch.dtype | None = None, **_: Any) -> _Tracer:
    return x if dtype in (None, x.dtype) else _Tracer.make(x.shape, dtype, x.sources, None)


def _reshape(x: _Tracer, shape: Sequence[int]) -> _Tracer | None:
    known = math.prod(size for size in shape if size != -1)
    return _of_view(x, lambda view: view.reshape([x.numel() // known if size == -1 else size for size in shape]))


def _squeeze(x: _Tracer, dims: int | Sequence[int]) -> _Tracer | None:
    gone = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return _reshape(x, [size for dim, size in enumerate(x.shape) if dim not in gone or size != 1])


def _unsqueeze(x: _Tracer, dim: int) -> _Tracer | None:
    shape = list(x.shape)
    shape.insert(dim % (x.ndim + 1), 1)
    return _reshape(x, shape)


def _permute(x: _Tracer, dims: Sequence[int]) -> _Tracer | None:
    return _of_view(x, lambda view: view.permute([dim % x.ndim for dim in dims]))


def _transpose(x: _Tracer, dim0: int, dim1: int) -> _Tracer | None:
    dims = list(range(x.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(x, dims)


def _narrow(x: _Tracer, dim: int, start: int, length: int) -> _Tracer | None:
    return _of_view(x, lambda view: view.narrow(dim % x.ndim, start, length) if length else None)


def _slice(
    x: _Tracer, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> _Tracer | None:
    indices = range(*slice(start, end, step).indices(x.shape[dim]))
    return _narrow(x, dim, indices.start, len(indices)) if step == 1 else None


def _select(x: _Tracer, dim: int, index: int) -> _Tracer | None:
    row = _narrow(x, dim, index % x.shape[dim], 1)
    return None if row is None else _squeeze(row, dim)


def _split_with_sizes(x: _Tracer, sizes: Sequence[int], dim: int = 0) -> list[_Tracer] | None:
    return _all([_narrow(x, dim, sum(sizes[:i]), size) for i, size in enumerate(sizes)])


def _split(x: _Tracer, size: int, dim: int = 0) -> list[_Tracer] | None:
    whole = x.shape[dim]
    return _split_with_sizes(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


def _unbind(x: _Tracer, dim: int = 0) -> list[_Tracer] | None:
    return _all([_select(x, dim, index) for index in range(x.shape[dim])])


def _cat(tensors: Sequence[_Tracer], dim: int = 0) -> _Tracer | None:
    first, dim = tensors[0], dim % tensors[0].ndim
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    views: list[View] = []
    for x in tensors:
        if (
            not isinstance(x, _Tracer)
            or x.dtype != first.dtype
            or not x.views
            or (len(x.views) > 1 and x.cat_dim != dim)
        ):
            return None
        views += x.views
    sources = frozenset().union(*(x.sources for x in tensors))
    return _Tracer.make(shape, first.dtype, sources, tuple(views), dim)


def _stack(tensors: Sequence[_Tracer], dim: int = 0) -> _Tracer | None:
    parts = _all([_unsqueeze(x, dim) if isinstance(x, _Tracer) else None for x in tensors])
    return None if parts is None else _cat(parts, dim)


def _of_view(x: _Tracer, change: Callable[[View], View | None]) -> _Tracer | None:
    """The change of a tracer that stands for one view; a concatenation is not taken apart again."""
    view = change(x.views[0]) if x.views and len(x.views) == 1 else None
    return None if view is None else _Tracer.make(view.shape, x.dtype, x.sources, (view,))


def _all(tracers: Sequence[_Tracer | None]) -> list[_Tracer] | None:
    known = [tracer for tracer in tracers if tracer is not None]
    return known if len(known) == len(tracers) else None


_RULES: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten._to_copy.default: _cast,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
}
