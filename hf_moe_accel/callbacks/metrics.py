"""The numbers of a run: into the trainer's log, and with it to everything that `report_to` names.

[Note: what is measured when]
Where tokens go is counted in every training pass, on the device. At a step that logs, one collective adds the counts
up over the ranks; it is launched at the end of the step and read after the trainer has read the loss, for which it
waits for the device anyway. Parts of the step, entropies, the auxiliary loss and the positions attended to are
measured on the steps that log only (with `logging_strategy="epoch"`, on every tenth). Where layers are replayed as
CUDA graphs, what happens within them is measured at most once in 50 steps: such a step runs without graphs.
Evaluation, generation, reference models and what checkpointing computes again do not count.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DefaultFlowCallback, TrainerCallback

from hf_moe_accel.callbacks.flops import peak_flops
from hf_moe_accel.callbacks.probes import Probes
from hf_moe_accel.callbacks.run_file import RunFile
from hf_moe_accel.hf.discover import base_of, class_name
from hf_moe_accel.log import warn_once
from hf_moe_accel.moe.stats import Routed
from hf_moe_accel.runtime import MoERuntime, runtime_of

# Steps from one in which layers are measured to the next one, where they are CUDA graphs.
_IN_LAYERS_EVERY = 50


class MoEMetricsCallback(TrainerCallback):
    """Adds the numbers of `run_file.METRICS` to the log, and writes what `hf-moe-accel report` reads to `output_dir`.

    Trainers of this library add it themselves, and `MoEAccelConfig(expert_metrics=False)` leaves it out; others get it
    by `add_metrics`, since it has to stand before the callbacks that report. All ranks must have it.

    Attributes:
        experts: what was counted, of the newest log; on all ranks. The keys are those of the run's file.
    """

    def __init__(self) -> None:
        """Nothing is measured before a training begins."""
        self.experts: dict[str, Any] = {}
        self._runtime: MoERuntime | None = None
        self._probes: Probes | None = None
        self._file: RunFile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put hooks on the model, and start the clock."""
        self._end()
        runtime = runtime_of(model)
        if runtime is None or runtime.stats is None:
            return
        self._runtime = runtime
        runtime.stats.take()
        self._probes = Probes(model, runtime.timer, args.device, not args.torch_compile)
        self._window: _Window | None = None
        self._clock = _Clock()
        self._last_step = self._next_in_layers = state.global_step
        if state.is_world_process_zero:
            self._file = RunFile(args.output_dir, _about(base_of(model), runtime), state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step that will log is measured."""
        if self._probes is None:
            return
        self._clock.begin_step()
        step = state.global_step + 1
        if args.logging_strategy == "no":
            return
        every = state.logging_steps if args.logging_strategy == "steps" else 10
        if step % every == 0 or (step == 1 and args.logging_first_step):
            self._probes.clear()
            self._probes.measures = True
            assert self._runtime is not None
            self._runtime.timer.clear()
            if step >= self._next_in_layers:
                self._runtime.timer.in_layers = True
                self._next_in_layers = step + _IN_LAYERS_EVERY

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A backward pass has ended."""
        if self._probes is not None:
            self._probes.end_passes()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last backward pass has ended."""
        if self._probes is not None and self._runtime is not None and self._probes.measures:
            self._probes.end_passes()
            self._runtime.timer.switch("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        if self._probes is not None and self._probes.measures:
            self._probes.end_passes()
            self._probes.measures = False
            if self._runtime is not None:
                self._runtime.timer.in_layers = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Launch the sum over the ranks, if this step logs. All ranks must call."""
        if self._probes is None:
            return
        if (control.should_evaluate or control.should_save) and args.device.type != "cpu":
            # What follows is no training, and shall not wait for the rest of it.
            torch.accelerator.synchronize()
        self._clock.end_step()
        self._launch(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Launch the sum over the ranks, if the end of an epoch logs. All ranks must call."""
        if self._probes is not None:
            self._launch(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation is over, and its time does not count."""
        if self._probes is not None:
            self._clock.restart()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saving is over, and its time does not count."""
        if self._probes is not None:
            self._clock.restart()

    def leave_out_time(self) -> None:
        """What another callback has just done, after a log, is not training."""
        self._clock.restart()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Add the numbers to a log of the training."""
        if self._probes is None or self._runtime is None:
            return
        record: dict[str, Any] = {"step": state.global_step, "logs": logs}
        if self._window is not None and "loss" in logs:
            window, self._window = self._window, None
            self._clock.end_step()
            numbers, self.experts = self._read(window)
            logs.update(numbers)
            # The trainer has put a copy of `logs` there.
            state.log_history[-1].update(numbers)
            record["experts"] = self.experts
        if self._file is not None:
            try:
                self._file.append(record)
            except OSError as error:
                self._file = None
                warn_once(f"hf_moe_accel: no more metrics for `hf-moe-accel report` are written: {error}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        self._end()

    def _end(self) -> None:
        if self._probes is not None:
            self._probes.end_passes()
            self._probes.remove()
        self._runtime = self._probes = self._file = None

    def _launch(self, args: Any, state: Any, control: Any) -> None:
        if not control.should_log or state.global_step == self._last_step:
            return
        assert self._runtime is not None and self._runtime.stats is not None and self._probes is not None
        routed = self._runtime.stats.take()
        self._window = _Window(self._runtime, routed, self._probes.numbers(), args.device)
        self._steps, self._last_step = state.global_step - self._last_step, state.global_step

    def _read(self, window: _Window) -> tuple[dict[str, float], dict[str, Any]]:
        """The numbers to log, and what was counted."""
        assert self._runtime is not None and self._probes is not None
        world_size = self._runtime.topology.world_size
        counted = window.read()
        data, seconds = self._clock.take()
        numbers = {"moe/step_time": seconds / self._steps, "moe/time/data": data / self._steps}
        numbers |= {f"moe/time/{name}": spent for name, spent in self._runtime.timer.take().items()}
        speed = counted["tokens"] / seconds
        numbers |= {"moe/tokens_per_second": speed, "moe/tokens_per_second_per_device": speed / world_size}
        keys = self._probes.keys()
        if self._probes.flops is not None and keys:
            flops = self._probes.flops.per_token(keys, window.top_k) * speed / world_size
            numbers["moe/tflops_per_device"] = flops / 1e12
            peak = peak_flops(window.device)
            if peak is not None:
                numbers["moe/mfu"] = flops / peak
        return numbers | _summary(counted, world_size), counted


class _Window:
    """What all ranks counted since the last log, on its way. All ranks must construct, and read, it.

    Args:
        runtime: of the model.
        routed: counted on this rank.
        probed: [2 R + 2] from `Probes.numbers`.
        device: of this rank.
    """

    def __init__(self, runtime: MoERuntime, routed: Routed, probed: Tensor, device: torch.device) -> None:
        """Launch the sum."""
        self.device = device
        self.top_k = routed.top_k
        self._num_experts = runtime.num_experts
        self._world_size = runtime.topology.world_size
        self._shape = routed.choices_LE.shape
        layers = self._shape[0]
        rank = dist.get_rank() if self._world_size > 1 else 0
        # A rank fills a line of the table, so that the sum holds those of all.
        table = torch.zeros(self._world_size, 2 * layers + 2, dtype=torch.float64, device=device)
        table[rank, :layers] = routed.rows_L
        host = [*routed.received_L, routed.tokens_L[0], _peak_memory(device)]
        table[rank, layers:] = torch.tensor(host, dtype=torch.float64)
        parts = [routed.choices_LE.to(device, torch.float64).flatten(), table.flatten(), probed]
        self._sum = torch.cat(parts)
        self._work = dist.all_reduce(self._sum, async_op=True) if self._world_size > 1 else None

    def read(self) -> dict[str, Any]:
        """What was counted, in plain numbers."""
        if self._work is not None:
            self._work.wait()
        layers, experts = self._shape
        ends = (layers * experts, layers * experts + self._world_size * (2 * layers + 2))
        choices, table, probed = self._sum.cpu().tensor_split(ends)
        load_LE = choices.view(layers, experts)
        table = table.view(self._world_size, -1)
        rows_WL, tokens_WL = table[:, :layers], table[:, layers : 2 * layers]
        entropy, routed = probed[:-2].view(2, -1)
        aux_sum, num_aux = probed[-2:].tolist()
        counted = {
            "tokens": int(table[:, -2].sum()),
            "load": [row[:num].long().tolist() for row, num in zip(load_LE, self._num_experts, strict=True)],
            "rank_rows": rows_WL.sum(1).long().tolist(),
            "rank_tokens": tokens_WL.sum(1).long().tolist(),
            "rank_max_over_mean": [float(rows.max() / rows.mean().clamp(min=1e-9)) for rows in rows_WL.T],
            "dropped": int(load_LE.sum() - rows_WL.sum()),
            "peak_memory_gib": float(table[:, -1].max()) / 2**30,
        }
        if routed.any():
            counted["router_entropy"] = (entropy / routed.clamp(min=1)).tolist()
        if num_aux:
            counted["aux_loss"] = aux_sum / num_aux
        return counted


class _Clock:
    """Seconds that steps take, on this host; what lies between them counts, evaluation and saving do not."""

    def __init__(self) -> None:
        """Start."""
        self._since = time.perf_counter()
        self._data = self._spent = 0.0

    def begin_step(self) -> None:
        """The batches of a step are there."""
        self._data += time.perf_counter() - self._since

    def end_step(self) -> None:
        """Count the time up to here."""
        now = time.perf_counter()
        self._spent += now - self._since
        self._since = now

    def restart(self) -> None:
        """Do not count the time up to here."""
        self._since = time.perf_counter()

    def take(self) -> tuple[float, float]:
        """(seconds in which there were no batches yet, seconds in all) since the last call."""
        taken = self._data, self._spent
        self._data = self._spent = 0.0
        return taken


def add_metrics(trainer: Any) -> None:
    """Put the metrics where they belong in a trainer's list of callbacks, and the pictures for W&B at its end.

    The place of the metrics is after what decides whether a step logs, and before those that report what is logged.
    Trainers of this library do it themselves. All ranks must call.

    Args:
        trainer: a `transformers.Trainer`, of a model that `prepare_moe_model` has prepared.
    """
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, MoEMetricsCallback) for callback in callbacks):
        return
    metrics = MoEMetricsCallback()
    if "wandb" in trainer.args.report_to:
        # Imported here: wandb need not be installed.
        from hf_moe_accel.callbacks.wandb import MoEWandbCallback

        given = [callback for callback in callbacks if isinstance(callback, MoEWandbCallback)]
        callbacks = callbacks if given else [*callbacks, MoEWandbCallback()]
        for callback in given or callbacks[-1:]:
            callback.metrics = metrics
    place = 1 + max((i for i, each in enumerate(callbacks) if isinstance(each, DefaultFlowCallback)), default=-1)
    trainer.callback_handler.callbacks = [*callbacks[:place], metrics, *callbacks[place:]]


def _summary(counted: dict[str, Any], world_size: int) -> dict[str, float]:
    loads = [torch.tensor(load, dtype=torch.float64) for load in counted["load"] if any(load)]
    numbers = {"moe/peak_memory_gib": counted["peak_memory_gib"], "moe/dropped": float(counted["dropped"])}
    if loads:
        numbers |= {
            "moe/load_max_over_mean": max(float(load.max() / load.mean()) for load in loads),
            "moe/load_cv": _mean([float(load.std(correction=0) / load.mean()) for load in loads]),
            "moe/idle_experts": _mean([float((load == 0).double().mean()) for load in loads]),
        }
    if world_size > 1:
        numbers |= {
            "moe/rank_max_over_mean": max(counted["rank_max_over_mean"]),
            "moe/rank_tokens_max": float(max(counted["rank_tokens"])),
            "moe/rank_tokens_min": float(min(counted["rank_tokens"])),
        }
    if "router_entropy" in counted:
        numbers["moe/router_entropy"] = _mean(counted["router_entropy"])
    if "aux_loss" in counted:
        numbers["moe/aux_loss"] = counted["aux_loss"]
    return numbers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _about(model: Any, runtime: MoERuntime) -> dict[str, Any]:
    return {
        "model": class_name(model),
        "num_experts": list(runtime.num_experts),
        "world_size": runtime.topology.world_size,
        "layout": runtime.topology.describe(),
        "prepared": runtime.report,
        "config": runtime.settings,
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated(device)
