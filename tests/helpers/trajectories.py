"""The training arguments that runs are compared under, step by step."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments


def trajectory_arguments(
    output_dir: str, batch: int, accumulation: int, steps: int, **arguments: Any
) -> TrainingArguments:
    """Accumulation, clipping and a constant learning rate; every step is logged and nothing is saved.

    Args:
        output_dir: Of the run.
        batch: Rows of a rank and micro-batch.
        accumulation: Micro-batches of a step.
        steps: Of the run.
        arguments: More of TrainingArguments.
    """
    return TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        logging_steps=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        # At the first step nothing is left of a gradient but its sign, however small and inexact it is.
        adam_epsilon=1e-3,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
