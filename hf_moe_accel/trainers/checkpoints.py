"""How a trainer of mixture-of-experts models saves its checkpoints, and goes on from them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, has_length, rotate_checkpoints

from hf_moe_accel.config import MoEAccelConfig
from hf_moe_accel.hf.export import MAX_SHARD_SIZE, prepare_export
from hf_moe_accel.hf.loading import load_weights, reshard
from hf_moe_accel.log import say, warn_once
from hf_moe_accel.runtime import MoERuntime
from hf_moe_accel.trainers.position import Position
from hf_moe_accel.trainers.streams import StartedLoader, StreamPlace
from hf_moe_accel.weights.checkpoint import (
    STATE_FOLDER,
    STATE_NAME,
    CheckpointSave,
    check_run_directory,
    newest_intact,
    recover,
    saved_runs,
    unusable,
)
from hf_moe_accel.weights.files import read_json, write_json
from hf_moe_accel.weights.manifest import check_manifest
from hf_moe_accel.weights.optimizer import OptimizerSave, load_optimizer
from hf_moe_accel.weights.random import derive_random_state, load_random_state, save_random_state
from hf_moe_accel.weights.ranks import Ranks

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class CheckpointMixin(_Base):
    """Checkpoints that are whole or not there, and exact resume from them, on any number of ranks.

    A checkpoint holds the standard model, Trainer's own state, and `training_state/`: the optimizer (through DCP), the
    scheduler, each rank's random state and the place in the data. A dense model keeps Trainer's own ways.
    """

    moe_config: MoEAccelConfig
    _saving: CheckpointSave | None = None  # being filled
    _unfinished: CheckpointSave | None = None  # in the background
    _background_group: Any = None
    _unsent: str | None = None  # the checkpoint to upload once it is complete
    _resume: Position | None = None  # the saved place of the run that this one goes on from
    _position: Position | None = None  # now
    _stream: StreamPlace | None = None

    @property
    def _moe_runtime(self) -> MoERuntime | None:
        raise NotImplementedError

    @property
    def _ranks(self) -> Ranks:
        return Ranks.of(self.model.parameters())

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint. All ranks must call.

        Raises:
            AllRanksError: it could not be saved, or, with `async_save`, the one before; checkpoints that are there
                stay. One process raises the error itself.
        """
        if self._moe_runtime is None:
            super()._save_checkpoint(model, trial)
            return
        self._finish_save()
        run = Path(super()._get_output_dir(trial))
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        saving = CheckpointSave(final, self._ranks, self._background())
        saving.begin()
        self._saving = self._moe_runtime.saving = saving
        try:
            with self._ranks.same_outcome(f"Saving {final}"):
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(saving.directory):
                    # Trainer has recorded where it was written, which is not where it will lie.
                    self.state.best_model_checkpoint = str(final)
                    if self.args.should_save:
                        self.state.save_to_json(str(saving.directory / TRAINER_STATE_NAME))
            best = self.state.best_model_checkpoint
            saving.complete(then=lambda: self._rotate(run, best))
        except BaseException:
            saving.discard()
            raise
        finally:
            self._saving = self._moe_runtime.saving = None
        self._unfinished = saving
        if not self.moe_config.async_save:
            self._finish_save()

    def _rotate(self, run: Path, best: str | None) -> None:
        rotate_checkpoints(str(run), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)

    def _background(self) -> Ranks | None:
        """The ranks as the saving thread needs them; None where saving is to be waited for. All ranks must call."""
        if not self.moe_config.async_save:
            return None
        if self._background_group is None and self._ranks.world_size > 1:
            self._background_group = dist.new_group(backend="gloo")
        return Ranks(self._background_group, "cpu")

    def _finish_save(self) -> None:
        """Wait for the checkpoint in flight, and raise what went wrong with it. All ranks must call."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.wait()
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            super()._push_from_checkpoint(unsent)

    def _end_saves(self) -> None:
        """Let the checkpoint in flight end where training has failed, as far as it can without the other ranks."""
        unfinished, self._unfinished, self._unsent = self._unfinished, None, None
        if unfinished is not None:
            try:
                unfinished.wait(self.moe_config.collective_timeout)
            except Exception:
                pass  # It was logged when it happened, and there is an error to be raised already.
        group, self._background_group = self._background_group, None
        if group is not None:
            dist.destroy_process_group(group)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_save()
        return super()._finalize_training(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving.directory.parent) if self._saving is not None else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._moe_runtime is None:
            super()._save(output_dir, state_dict)
            return
        output_dir = output_dir or self.args.output_dir
        with self._ranks.same_outcome(f"Saving to {output_dir}"):
            super()._save(output_dir, state_dict)
            if self.moe_config.merge_adapters_on_save and hasattr(self.model, "peft_config"):
                merged = prepare_export(self.model, Path(output_dir, "merged"), max_shard_size=MAX_SHARD_SIZE)
                merged.finish(self._saving)
            if self.moe_config.per_expert_adapter_on_save and hasattr(self.model, "peft_config"):
                from hf_moe_accel.hf.peft_bridge import export_adapter

                export_adapter(self.model, Path(output_dir, "per_expert"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._saving is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir, STATE_FOLDER)
        with self._ranks.same_outcome(f"Saving to {output_dir}"):
            optimizer = OptimizerSave.of(_plain(self.optimizer), self._parameters(), folder, self._ranks)
            if self._ranks.rank == 0:
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        self._saving.add(optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        if self._saving is None or self._position is None:
            super()._save_rng_state(output_dir)
            return
        folder, runtime = Path(output_dir, STATE_FOLDER), self._moe_runtime
        assert runtime is not None
        with self._ranks.same_outcome(f"Saving to {output_dir}"):
            save_random_state(folder / _rank_file(self._ranks.rank, "safetensors"))
            stream = None if self._stream is None else self._stream.to_json(self._position.batches_in_epoch)
            mine = {"stream": stream, "unlogged_loss": float(self._tr_loss)}
            write_json(folder / _rank_file(self._ranks.rank, "json"), mine)
            if self._ranks.rank == 0:
                topology = runtime.topology
                layout = {"world_size": topology.world_size, "ep_size": topology.ep_size}
                steps = {"global_step": self.state.global_step, "last_logged": self._globalstep_last_logged}
                state = self._position.to_json() | layout | steps | {"format": 1}
                write_json(folder / STATE_NAME, state)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._unsent = str(self._saving.final)

    # Resuming

    def _resolve_resume(self, wanted: str | os.PathLike[str] | None) -> str:
        """The checkpoint to go on from, verified; None is the newest one of the run. All ranks must call.

        Raises:
            ValueError: there is none, or it is not as it was saved; names each file, and the newest intact checkpoint.
        """
        ranks = self._ranks
        run = Path(self.args.output_dir) if wanted is None else Path(wanted).absolute().parent
        with ranks.same_outcome(f"Looking for a checkpoint in {run}"):
            if ranks.rank == 0 and run.is_dir():
                recover(run)
        if wanted is None:
            saved, others = ranks.share((saved_runs(run), unusable(run)) if ranks.rank == 0 else None)
            if not saved:
                found = "".join(f"\n  {line}" for line in others) or f"\n  {run} holds no checkpoint at all"
                raise ValueError(
                    f"resume_from_checkpoint=True: there is no checkpoint in {run} to go on from:{found}\nStart "
                    "without resume_from_checkpoint, or give a checkpoint's path."
                )
            for line in others:
                say(f"hf_moe_accel: not resumed from: {line}")
            wanted = saved[0].directory
        directory = Path(wanted)
        verdict = check_manifest(directory, ranks)
        problems = ranks.share(list(verdict.problems))
        if not problems and not (directory / STATE_FOLDER / STATE_NAME).exists():
            problems = [
                "it holds a model and no training state (save_only_model=True). To go on from its weights with a new "
                "optimizer, load it as the model"
            ]
        if problems:
            intact = ranks.share(str(newest_intact(run, but=directory) or "") if ranks.rank == 0 else "")
            offer = (
                f"The newest intact checkpoint is {intact}: resume_from_checkpoint={intact!r}."
                if intact
                else f"There is no other intact checkpoint in {run}."
            )
            raise ValueError(f"{directory} cannot be resumed from: {'; '.join(problems)}. {offer}")
        for name in verdict.foreign:
            say(f"hf_moe_accel: {directory / name} was not saved with the checkpoint and is not read")
        return str(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._moe_runtime is None or not self._load_saved(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Read the best checkpoint into the live model. All ranks must call."""
        if self._moe_runtime is None or not self._load_saved(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_saved(self, directory: str) -> bool:
        """Read what a checkpoint holds into the live model, or return False where Trainer's own way does."""
        if not hasattr(self.model, "peft_config"):
            load_weights(self.model, directory)
            return True
        if "moe_accel_adapters" not in self.model.__dict__:
            return False
        from hf_moe_accel.hf.peft_bridge import load_adapter

        for adapter in self.model.active_adapters:
            load_adapter(self.model, directory, adapter)
        return True

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        runtime = self._moe_runtime
        if runtime is None:
            return epochs, batches
        if self.args.save_strategy != SaveStrategy.NO:
            check_run_directory(Path(self.args.output_dir), self._ranks)
        self._resume = None
        self._position = here = Position(
            global_step=0,
            per_device_batch=self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            num_ranks=runtime.topology.world_size,
            steps_per_epoch=num_update_steps_per_epoch if has_length(self.train_dataset) else None,
        )
        if checkpoint is None:
            return epochs, batches
        saved = self._resume = Position.from_json(read_json(Path(checkpoint, STATE_FOLDER, STATE_NAME)))
        there = here.after(saved)
        if there.global_batch != saved.global_batch:
            say(
                f"hf_moe_accel: the global batch was {saved.describe_batch()} and is {here.describe_batch()} now: the "
                f"run goes on after the samples that it has seen, at step {there.global_step} (was "
                f"{saved.global_step}), as if it had had the new batch from its start",
                level=logging.WARNING,
            )
        self.state.global_step = there.global_step
        return there.epoch, 0 if self.args.ignore_data_skip else there.batches_in_epoch

    def _run_epoch(self, **kwargs: Any) -> None:
        here = self._position
        if here is None:
            super()._run_epoch(**kwargs)
            return
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: Trainer would train one step more
            self.control.should_training_stop = True
            return
        checkpoint, epoch, loader = kwargs["resume_from_checkpoint"], kwargs["epoch"], kwargs["train_dataloader"]
        resumes = checkpoint is not None and epoch == kwargs["epochs_trained"]
        if resumes:
            self._load_unlogged_loss(Path(checkpoint, STATE_FOLDER))
        skip = kwargs["steps_trained_in_current_epoch"] if resumes else 0
        self._position = here.begin_epoch(epoch, skip)
        if not isinstance(getattr(loader, "dataset", None), IterableDataset):
            super()._run_epoch(**kwargs)
            return
        self._stream = StreamPlace(loader)
        if not skip:
            super()._run_epoch(**kwargs)
            return
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        done = self._stream.restore(self._stream_place(checkpoint))
        started = StartedLoader(loader, skip - done)
        if any(self._ranks.gather(started.is_at_end)):
            self._load_rng_state(checkpoint)
            return
        offset = _EpochOffset(epoch, skip, kwargs["steps_in_epoch"])
        self.add_callback(offset)
        try:
            # It is at its place: Trainer has nothing left to skip.
            super()._run_epoch(**kwargs | {"train_dataloader": started, "steps_trained_in_current_epoch": 0})
        finally:
            self.remove_callback(offset)

    def _load_unlogged_loss(self, folder: Path) -> None:
        """Take up the losses since the last one that was logged, so that the next one is the mean of all its steps."""
        assert self._resume is not None and self._position is not None
        if self._resume.global_batch != self._position.global_batch:
            return  # those were other steps
        losses = [
            read_json(folder / _rank_file(rank, "json"))["unlogged_loss"] for rank in range(self._resume.num_ranks)
        ]
        mean = sum(losses) / len(losses)
        same = self._resume.num_ranks == self._ranks.world_size
        self._tr_loss += losses[self._ranks.rank] if same else mean
        self._globalstep_last_logged = read_json(folder / STATE_NAME)["last_logged"]
        # Trainer adds what it logs to the loss of this call's steps, which these are not.
        self._total_loss_scalar -= mean

    def _stream_place(self, checkpoint: str) -> Any:
        """This rank's saved place in a stream, where the ranks read as they did when it was saved."""
        here, saved = self._position, self._resume
        assert here is not None and saved is not None
        same = (here.per_device_batch, here.num_ranks) == (saved.per_device_batch, saved.num_ranks)
        path = Path(checkpoint, STATE_FOLDER, _rank_file(self._ranks.rank, "json"))
        return read_json(path)["stream"] if same else None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As in the trainer; counts what training has been given."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        here = self._position
        if here is not None and self.is_in_train:
            self._position = here.read(len(batches))
            if self._stream is not None:
                self._stream.read(self._position.batches_in_epoch)
        return batches, num_items

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._moe_runtime is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint, STATE_FOLDER)
        origins = load_optimizer(_plain(self.optimizer), self._parameters(), folder, self._ranks)
        state = torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(_for_groups(state, origins))
        if self._resume is not None and self.state.global_step != self._resume.global_step:
            _move_to(self.lr_scheduler, self.state.global_step)

    def _parameters(self) -> dict[str, Any]:
        """Those that the optimizer has, by name."""
        reshard(self.model)
        return dict(self.model.named_parameters())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._moe_runtime is None or checkpoint is None:
            super()._load_rng_state(checkpoint)
            return
        path = Path(checkpoint, STATE_FOLDER, _rank_file(self._ranks.rank, "safetensors"))
        if path.exists():
            load_random_state(path)
        else:
            derive_random_state(self.args.seed, self._ranks.rank, self.state.global_step)


class _EpochOffset(TrainerCallback):
    """Counts the batches that a stream has skipped into the fraction of the epoch that Trainer reports."""

    def __init__(self, epoch: int, skipped: int, steps_in_epoch: int) -> None:
        self._epoch = epoch
        self._skipped = skipped
        self._steps_in_epoch = steps_in_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = round((state.epoch - self._epoch) * self._steps_in_epoch) + self._skipped
        state.epoch = self._epoch + steps / self._steps_in_epoch


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return plain


def _rank_file(rank: int, kind: str) -> str:
    return f"rank-{rank:05d}.{kind}"


def _for_groups(state: Any, origins: list[int]) -> Any:
    """A scheduler's saved state for other groups of the optimizer: what it keeps for each group follows the group."""
    if not isinstance(state, dict):
        return state
    num_saved = len(state.get("base_lrs") or state.get("_last_lr") or ())
    return {
        key: [value[origin] for origin in origins]
        if isinstance(value, list) and len(value) == num_saved and key != "_schedulers"
        else [_for_groups(each, origins) for each in value]
        if key == "_schedulers"
        else value
        for key, value in state.items()
    }


def _move_to(scheduler: Any, step: int) -> None:
    """Let a schedule go on from another step than the one that it was saved at."""
    if not isinstance(scheduler, LambdaLR):
        warn_once(
            f"hf_moe_accel: {type(scheduler).__name__} goes on from the step that it was saved at, since it does not "
            "follow the number of steps"
        )
        return
    scheduler.last_epoch = step
    scheduler._last_lr = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
