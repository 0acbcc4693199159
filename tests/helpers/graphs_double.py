"""Stands for `torch.cuda.make_graphed_callables` where there is no GPU, with its documented contract at its strictest.

A graph reads its inputs, writes its results and the gradients of inputs and parameters at fixed places, and all graphs
share their memory: what one pass wrote may be overwritten as soon as the next one begins. `tests/gpu` runs the same
cases on the real function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class Graphs:
    """All graphs of a call: `forward` of each module is replaced by one that replays.

    Attributes:
        replays: how many forward passes of modules were replayed.
        replaying: whether one is being replayed. Here that runs Python, of which a graph keeps nothing.
    """

    def __init__(self) -> None:
        self.replays = 0
        self.replaying = False
        self._gradients: list[Tensor] = []

    def make_graphed_callables(
        self, modules: tuple[nn.Module, ...], sample_args: tuple[Any, ...], *, allow_unused_input: bool
    ) -> None:
        assert allow_unused_input
        assert not torch.is_autocast_cache_enabled() or not torch.is_autocast_enabled("cpu")
        for module, args in zip(modules, sample_args, strict=True):
            assert all(isinstance(each, Tensor) for each in args)
            # The warm-up.
            outputs = [each for each in tree_flatten(module(*args))[0] if each.requires_grad]
            trained = [each for each in (*args, *module.parameters()) if each.requires_grad]
            torch.autograd.grad(outputs, trained, [torch.ones_like(each) for each in outputs], allow_unused=True)
        for module, args in zip(modules, sample_args, strict=True):
            module.forward = self._graphed(module, module.forward, args, module.training)

    def _graphed(self, module: nn.Module, plain: Any, buffers: tuple[Tensor, ...], training: bool) -> Any:
        parameters = tuple(module.parameters())
        with torch.no_grad():
            results, spec = tree_flatten(plain(*buffers))
        surface = (*buffers, *parameters)
        gradients = [torch.empty_like(each) if each.requires_grad else None for each in surface]
        self._gradients += [each for each in gradients if each is not None]
        under_way: list[Any] = []
        graphs = self

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
                graphs.replays += 1
                for gradient in graphs._gradients:
                    gradient.fill_(torch.nan)
                with torch.no_grad():
                    for buffer, given in zip(buffers, inputs, strict=False):
                        buffer.copy_(given)
                graphs.replaying = True
                with torch.enable_grad():
                    outputs = tree_flatten(plain(*buffers))[0]
                graphs.replaying = False
                under_way[:] = outputs
                with torch.no_grad():
                    for result, output in zip(results, outputs, strict=True):
                        result.copy_(output)
                return tuple(result.detach() for result in results)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
                wanted = [each for each in surface if each.requires_grad]
                found = torch.autograd.grad(under_way, wanted, grads, allow_unused=True, retain_graph=True)
                of_input = {id(each): grad for each, grad in zip(wanted, found, strict=True)}
                for each, gradient in zip(surface, gradients, strict=True):
                    if gradient is not None and of_input[id(each)] is not None:
                        gradient.copy_(of_input[id(each)])
                return tuple(
                    None if gradient is None or of_input[id(each)] is None else gradient.detach()
                    for each, gradient in zip(surface, gradients, strict=True)
                )

        def forward(*args: Tensor) -> Any:
            if module.training != training:
                return plain(*args)
            return tree_unflatten(list(Graphed.apply(*args, *parameters)), spec)  # type: ignore[no-untyped-call]

        return forward
