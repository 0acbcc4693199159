"""What is measured inside a forward pass, on the steps that are measured: by hooks that do nothing on the others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_accel.callbacks.flops import model_flops
from hf_moe_accel.hf.discover import base_of, find_routers
from hf_moe_accel.moe.timing import PartTimer


class Probes:
    """Hooks on a model. Passes without gradients are left out: they are evaluation, generation or a reference.

    Args:
        model: what the trainer calls.
        timer: of the model's runtime; it is switched on for the forward and backward passes that are measured.
        device: of this rank.
        reads_routers: whether routers get hooks, which would cut the graphs of a compiled model.
    """

    def __init__(self, model: nn.Module, timer: PartTimer, device: torch.device, reads_routers: bool) -> None:
        """Put the hooks on; `remove` takes them off."""
        self.measures = False
        self.flops = model_flops(base_of(model))
        self._timer = timer
        timer.device = device
        self._device = device
        routers = find_routers(base_of(model)) if reads_routers else []
        self._num_routers = len(routers)
        self.clear()
        disable: Any = torch.compiler.disable
        self._hooks = [
            model.register_forward_pre_hook(disable(self._before_forward), with_kwargs=True),
            model.register_forward_hook(disable(self._after_forward)),
        ]
        for number, (router, place) in enumerate(routers):
            self._hooks.append(router.register_forward_hook(disable(self._entropy_hook(number, place))))

    def clear(self) -> None:
        """Forget what was measured."""
        self._entropy_R = torch.zeros(self._num_routers, dtype=torch.float64, device=self._device)
        self._tokens_R = [0] * self._num_routers
        self._aux: list[Tensor] = []
        self._keys: list[Tensor] = []

    def end_passes(self) -> None:
        """The backward pass is over."""
        self._timer.switch(None)
        self._timer.active = False

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def numbers(self) -> Tensor:
        """[2 R + 2] fp64 on the device, which may be added up over ranks; R is the number of routers.

        By router the sum of entropies and the number of tokens; the sum of the auxiliary losses, and how many.
        """
        aux = torch.stack([each.to(self._device) for each in self._aux]).sum(0, keepdim=True) if self._aux else None
        host = torch.tensor([*self._tokens_R, len(self._aux)], dtype=torch.float64).to(self._device)
        aux = torch.zeros_like(host[:1]) if aux is None else aux
        return torch.cat([self._entropy_R, host[:-1], aux, host[-1:]])

    def keys(self) -> list[float]:
        """Mean positions that a token attends to, for each kind of layer of `flops`. May wait for the device."""
        return torch.stack([each.cpu() for each in self._keys]).mean(0).tolist() if self._keys else []

    def _before_forward(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.measures or not torch.is_grad_enabled():
            return
        self._timer.active = True
        self._timer.switch("forward")
        if self.flops is not None:
            inputs = next(
                (kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None
            )
            positions = kwargs.get("position_ids")
            if positions is None and inputs is not None:
                positions = torch.arange(inputs.shape[1])
            if positions is not None:
                self._keys.append(self.flops.keys_of(positions))

    def _after_forward(self, _: nn.Module, args: Any, output: Any) -> None:
        if self._timer.active and torch.is_grad_enabled():
            # The loss may be computed outside of the model; it is backward's.
            self._timer.switch("backward")
            aux_loss = getattr(output, "aux_loss", None)
            if isinstance(aux_loss, Tensor):
                self._aux.append(aux_loss.detach().double())

    def _entropy_hook(self, number: int, place: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if self._timer.active:
                with torch.no_grad():
                    logits = (output if isinstance(output, Tensor) else output[place]).detach().float()
                    logits = logits.reshape(-1, logits.shape[-1])
                    entropy = torch.special.entr(logits.softmax(-1)).sum()
                    # In units of the most that there can be.
                    self._entropy_R[number] += entropy / math.log(logits.shape[-1])
                    self._tokens_R[number] += logits.shape[0]

        return hook
