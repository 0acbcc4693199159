"""A tensor that is made when it is first used.

What a model does between the call that would have made it and its first use then runs ahead of it: there lies the time
in which other work can hide a wait. Whatever uses it, a function of torch or a look at its values, makes it first, so
that a model computes the same in any case. Waiting at the first use follows torch's `AsyncCollectiveTensor`; this one
sits above autograd: its node of the graph is made at the first use too, and the backward pass begins with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

_BYPASSED = (
    "the result of experts or shared experts, still under way, went into something that torch does not tell of it, "
    "such as an autograd function of your own or a full backward hook on the module: pass overlap_chunks=1, which "
    "hands out finished results only."
)
_VIEWS = (Tensor.view, Tensor.reshape)
# What is known before it is made. FSDP2 looks at the outputs of modules.
_OUTSIDE = (
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor._base.__get__,  # type: ignore[union-attr]
    Tensor.size,
    Tensor.dim,
)


class Deferred(Tensor):
    """See the module's docstring.

    Args:
        make: makes the tensor; called once.
        like: a tensor of its shape, dtype and device; None where these are not known before.
        requires_grad: whether it will require a gradient.
    """

    _make: Callable[[], Tensor] | None
    _made: Tensor | None
    _outside: Tensor | None
    _hooks: OrderedDict[int, Callable[[Tensor], Tensor | None]]

    def __new__(cls, make: Callable[[], Tensor], like: Tensor | None, *, requires_grad: bool) -> Deferred:
        """A shell without memory."""
        outside = torch.empty(0) if like is None else like
        shell: Deferred = Tensor._make_wrapper_subclass(
            cls, outside.shape, dtype=outside.dtype, device=outside.device, requires_grad=requires_grad
        )
        shell._outside = None if like is None else like.detach().new_empty(()).expand(like.shape)
        shell._make = make
        shell._made = None
        shell._hooks = OrderedDict()
        if requires_grad:
            # The shell is no part of the graph: a gradient that came to it would be lost.
            with torch._C.DisableTorchFunctionSubclass():
                shell.register_hook(_refuse)  # type: ignore[no-untyped-call]
        return shell

    def __init__(self, *_: Any, **__: Any) -> None:
        """`__new__` has done it."""

    def made(self) -> Tensor:
        """The tensor itself."""
        if self._made is None:
            make, self._make = self._make, None
            assert make is not None, "making a deferred tensor has failed before"
            made = make()
            if self._hooks:
                made.register_hook(partial(_run, self._hooks))
            self._made = made
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make it, unless `func` is content with its outside, or shows it in another shape."""
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], Deferred) else None
        if own is not None and own._made is None:
            if func in _VIEWS:
                outside = None if own._outside is None else func(own._outside, *args[1:], **kwargs)
                with torch._C.DisableTorchFunctionSubclass():
                    requires_grad = own.requires_grad
                return Deferred(lambda: func(own.made(), *args[1:], **kwargs), outside, requires_grad=requires_grad)
            if own._outside is not None:
                if func in _OUTSIDE:
                    return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
                if func is Tensor.to and args[1:] == (own._outside.dtype,) and not kwargs:
                    return own
                if func is Tensor.register_hook:
                    handle = RemovableHandle(own._hooks)
                    own._hooks[handle.id] = args[1]
                    return handle
        args, kwargs = tree_map_only(Deferred, Deferred.made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Below autograd it is too late to make it.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(_BYPASSED)


def may_defer() -> bool:
    """Whether nothing here is compiled: no graph of torch.compile takes a deferred tensor."""
    # Within a compiled model, what is not traced runs under its callback; the parts beside it may be traced.
    return not torch.compiler.is_compiling() and eval_frame.get_eval_frame_callback() is None


def _refuse(_: Tensor) -> None:
    raise RuntimeError(_BYPASSED)


def _run(hooks: dict[int, Callable[[Tensor], Tensor | None]], grad: Tensor) -> Tensor:
    for hook in hooks.values():
        changed = hook(grad)
        grad = grad if changed is None else changed
    return grad
