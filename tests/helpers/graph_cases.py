"""Training loops that graphs of layers must not change: on CPU for a double, in `tests/gpu` for the real thing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from hf_moe_accel import prepare_moe_model
from hf_moe_accel.hf.compiling import compile_layers
from hf_moe_accel.hf.cuda_graphs import LayerGraphs, why_not
from hf_moe_accel.hf.discover import base_of
from hf_moe_accel.runtime import runtime_of
from tests.helpers.adapters import Adapted
from tests.helpers.models import tiny_model


class Case(NamedTuple):
    """A training loop.

    Attributes:
        script: one letter for each thing done, see `Loop`.
        replayed: how many passes graphs are to replay.
        adapted: whether the model has adapters on attention and experts, which train alone.
        model: the type of the model.
        checkpoints: arguments of `activation_checkpointing_enable`, if it is called.
    """

    script: str
    replayed: int
    adapted: bool = False
    model: str = "qwen3_moe"
    checkpoints: dict[str, Any] | None = None


# With biases and windows of attention, shared experts, layers without experts, layers of several kinds.
OTHER_MODELS = ("mixtral", "gpt_oss", "deepseek_v3", "olmoe", "nemotron_h", "glm4_moe")
NOT_REENTRANT, REENTRANT = (
    {"activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}} for use_reentrant in (False, True)
)
CASES = {
    # Two passes are noted; the third one and those after it are replayed.
    "full": Case("tttttt", 4),
    "adapters": Case("tttttt", 4, adapted=True),
    "gradients add up": Case("tttpptpppt", 8, adapted=True),
    "gradients add up in full": Case("ttptppt", 5),
    "two passes before a backward pass": Case("ttt2t2t", 5),
    "a pass that is never ended": Case("ttxtxxt", 5),
    "evaluation in between": Case("ttetete", 2, adapted=True),
    "another length in between": Case("tttstst", 3),
    "adapters are switched off in between": Case("tttotot", 5, adapted=True),
    "no two passes are alike": Case("tststst", 0),
    "checkpointing": Case("tttttt", 4, checkpoints=NOT_REENTRANT),
    "checkpointing, gradients add up": Case("tttpptpetppt", 9, adapted=True, checkpoints=NOT_REENTRANT),
    "every second layer is checkpointed": Case(
        "tttttt", 4, adapted=True, checkpoints=NOT_REENTRANT | {"every_n_layers": 2}
    ),
    "reentrant checkpointing": Case("ttt2t2t", 5, checkpoints=REENTRANT),
    **{name: Case("ttpptt", 4, model=name) for name in OTHER_MODELS},
}


class Loop:
    """Does what a script says, and notes losses, gradients and weights.

    Args:
        model: prepared.
        device: of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model.train(), device
        self.numbers: list[float] = []
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self._drawn = 0

    def run(self, script: str) -> None:
        for letter in script:
            getattr(self, f"_{letter}")()

    def _t(self) -> None:
        """A training step."""
        self._p()
        self._step()

    def _p(self) -> None:
        """A pass whose gradients add up to those that are there."""
        self._loss().backward()

    def _s(self) -> None:
        """A training step on shorter sequences."""
        self._loss(length=5).backward()
        self._step()

    def _2(self) -> None:
        """A training step of two passes with one backward pass."""
        (self._loss() + self._loss()).backward()
        self._step()

    def _x(self) -> None:
        """A pass without its backward pass."""
        self._loss()

    def _e(self) -> None:
        """An evaluation."""
        with torch.no_grad():
            self._loss()
        self.model.eval()
        self._loss()
        self.model.train()

    def _o(self) -> None:
        """A pass without adapters, then a training step."""
        with self.model.disable_adapter():
            self._loss()
        self._t()

    def _loss(self, length: int = 8) -> Any:
        self._drawn += 1
        rows = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(self._drawn))
        ids = rows.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.numbers.append(loss.item())
        return loss

    def _step(self) -> None:
        self.numbers.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
        self._optimizer.step()
        self._optimizer.zero_grad()


def run(case: Case, device: torch.device, *, graphs: bool, **kwargs: Any) -> tuple[list[float], list[Any], int]:
    """(losses and norms of gradients, what was counted of routing, passes that were replayed).

    Args:
        case: what to do.
        device: where.
        graphs: whether layers are replayed; without, they are compiled only.
        kwargs: of `torch.compile`.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made: Any = Adapted(case.model, dtype)() if case.adapted else tiny_model(case.model, dtype=dtype)
    made.to(device)
    model = prepare_moe_model(made)
    if case.checkpoints is not None:
        model.activation_checkpointing_enable(**case.checkpoints)
        model.enable_input_require_grads()
    base, runtime = base_of(model), runtime_of(model)
    assert runtime is not None and runtime.stats is not None
    if graphs:
        assert why_not(base, runtime) is None or device.type == "cpu"
        LayerGraphs(base, runtime, device, **kwargs)
    else:
        compile_layers(base, **kwargs)
    loop = Loop(model, device)
    loop.run(case.script)
    found = LayerGraphs.of(base)
    routed = runtime.stats.take()
    counted = [routed.choices_LE.tolist(), routed.rows_L.tolist(), routed.tokens_L, routed.received_L, routed.top_k]
    return loop.numbers, counted, 0 if found is None else found.replayed
