"""The plugin for a Trainer subclass that you cannot change."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_moe_accel.hf.install import keep_liger_off_experts
from hf_moe_accel.runtime import runtime_of


class MoEAccelCallback(TrainerCallback):
    """Goes with `prepare_moe_model`: prepare the model, pass the callback, done.

        model = prepare_moe_model(model, MoEAccelConfig())
        trainer = TheirTrainer(model=model, args=args, callbacks=[MoEAccelCallback()], ...)

    In this form a run saves through the model's own `save_pretrained` (standard files), needs `save_only_model=True`
    or `save_strategy="no"`, and can neither resume nor load the best checkpoint at its end. `AcceleratedMoETrainer`
    knows more. `MoEMetricsCallback` comes with it.

    Raises:
        ValueError: the model was not prepared, the optimizer's state would be saved, the run was resumed, or the best
            checkpoint would be loaded.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what the run will save and load, and add the metrics."""
        if args.save_strategy != "no" and not args.save_only_model:
            raise ValueError(
                "MoEAccelCallback needs save_only_model=True (or save_strategy='no'): the optimizer state of a "
                "prepared model is not saved in this form. Set it in TrainingArguments, or use AcceleratedMoETrainer."
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True is not supported in this form: the Trainer would read the checkpoint "
                "without its experts. Delete it, or use AcceleratedMoETrainer."
            )
        keep_liger_off_experts(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check that the model was prepared, and that the run begins at its beginning."""
        if runtime_of(model) is None:
            raise ValueError(
                "MoEAccelCallback found a model that was not prepared: call prepare_moe_model(model) before the "
                "trainer is made."
            )
        if state.global_step > 0:
            raise ValueError(
                f"the run was resumed at step {state.global_step}, but a prepared model cannot be resumed: call "
                "train() without resume_from_checkpoint."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Give back what the runtime holds."""
        runtime = runtime_of(model)
        if runtime is not None:
            runtime.close()
