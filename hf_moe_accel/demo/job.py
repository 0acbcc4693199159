"""The demo's training job, which every rank runs: data, tokenizer, model, trainer, checkpoint.

`hf-moe-accel demo` launches it; `hf_moe_accel.demo.command` then draws and checks what it left in the output folder.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from hf_moe_accel import AcceleratedMoETrainer, export_checkpoint
from hf_moe_accel.demo import data
from hf_moe_accel.demo.history import History
from hf_moe_accel.demo.options import DemoOptions, OutputFiles

MAX_LENGTH = 128
NUM_SAMPLES = 3
NUM_REFERENCE_SEQUENCES = 4
NUM_POINTS = 100  # of the curves in the picture
NUM_EVALUATIONS = 8
NUM_PRINTED = 20
LORA_RANK = 16


@dataclass(frozen=True)
class Preset:
    """A model and a training schedule that fit a kind of machine.

    Attributes:
        vocab_size: of the tokenizer that is trained for it.
        hidden_size: width of the model.
        num_layers: all of them mixtures of experts.
        num_heads: query heads; there are half as many for keys and values.
        num_experts: experts of a layer.
        experts_per_token: of each layer.
        expert_size: width of one expert.
        dtype: of weights and computation.
        learning_rate: the highest; it rises over the first fifth of the steps and falls as a cosine.
        batch_size: sequences a step, over all ranks.
        num_steps: unless the user asks for another number.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_experts: int
    experts_per_token: int
    expert_size: int
    dtype: torch.dtype
    learning_rate: float
    batch_size: int
    num_steps: int

    def model_config(self, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
        """The Qwen3-MoE configuration; no auxiliary loss: the picture shows how routing goes by itself."""
        return Qwen3MoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads // 2,
            head_dim=self.hidden_size // self.num_heads,
            num_experts=self.num_experts,
            num_experts_per_tok=self.experts_per_token,
            moe_intermediate_size=self.expert_size,
            norm_topk_prob=True,
            max_position_embeddings=2 * MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype=self.dtype,
        )


CPU_PRESET = Preset(
    vocab_size=2048,
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    num_experts=8,
    experts_per_token=2,
    expert_size=128,
    dtype=torch.float32,
    learning_rate=4e-3,
    batch_size=64,
    num_steps=600,
)
GPU_PRESET = Preset(
    vocab_size=4096,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_experts=32,
    experts_per_token=4,
    expert_size=384,
    dtype=torch.bfloat16,
    learning_rate=6e-4,
    batch_size=128,
    num_steps=400,
)


class Progress(TrainerCallback):
    """A progress bar in a terminal, a line now and then everywhere, and the seconds spent in training steps.

    Args:
        print_every: steps between two lines about the training loss, at least.
    """

    def __init__(self, print_every: int) -> None:
        self.print_every = print_every
        self.seconds = 0.0
        self.last_printed = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        hidden = None if state.is_world_process_zero else True  # None: hidden where there is no terminal
        self.bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, disable=hidden)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self.started
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Print a line."""
        step = state.global_step
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            tqdm.write(f"step {step:4d} of {state.max_steps}   held-out loss {logs['eval_loss']:.3f}")
        elif "loss" in logs and (step - self.last_printed >= self.print_every or step == state.max_steps):
            self.last_printed = step
            tqdm.write(f"step {step:4d} of {state.max_steps}   loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


def train(options: DemoOptions) -> None:
    """Train, and leave the checkpoint, the logits it must reproduce and the history. All ranks must call.

    With LoRA the checkpoint is the model with the adapter folded in, and the adapter is left beside it.
    """
    disable_progress_bar()  # of loading and saving; the one of the training is ours
    on_gpu = torch.cuda.is_available()
    preset = GPU_PRESET if on_gpu else CPU_PRESET
    num_steps = options.steps or preset.num_steps
    files = OutputFiles(Path(options.output_dir))
    args = _training_arguments(options, preset, num_steps, use_cpu=not on_gpu)

    tokenizer, train_pairs, held_out_pairs = _prepare_data(preset.vocab_size, is_main=args.process_index == 0)
    train_examples = data.encode_pairs(train_pairs, tokenizer, MAX_LENGTH)
    # Whole batches only: Trainer would weight the last, short one wrongly. Sorted, so that little padding is computed.
    num_whole = len(held_out_pairs) - len(held_out_pairs) % (args.per_device_eval_batch_size * args.world_size)
    held_out_examples = data.encode_pairs(held_out_pairs[:num_whole], tokenizer, MAX_LENGTH)
    held_out_examples.sort(key=lambda example: len(example["input_ids"]))

    set_seed(options.seed)  # every rank draws the same initial weights
    model: Any = Qwen3MoeForCausalLM(preset.model_config(tokenizer)).to(preset.dtype)
    what = f"Qwen3-MoE, {_millions(model.parameters())} parameters"
    if options.lora:
        model = _with_adapter(model)
        what += f", LoRA trains {_millions(each for each in model.parameters() if each.requires_grad)}"
    machine = f"{args.world_size} {'GPU' if on_gpu else 'CPU rank'}{'s' if args.world_size > 1 else ''}"

    trainer = AcceleratedMoETrainer(
        model=model,
        args=args,
        train_dataset=data.order_examples(train_examples, preset.batch_size, num_steps, options.seed),
        eval_dataset=held_out_examples,
        data_collator=data.PadToLongest(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    progress = Progress(math.ceil(num_steps / NUM_PRINTED))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    trainer.train()

    reference = _reference_logits(trainer, held_out_examples[-NUM_REFERENCE_SEQUENCES:])
    if options.lora:
        export_checkpoint(trainer.model, files.checkpoint)
        trainer.save_model(str(files.adapter))
    else:
        trainer.save_model(str(files.checkpoint))
    if args.process_index == 0:
        if options.lora:
            tokenizer.save_pretrained(files.checkpoint)  # export_checkpoint knows of the model only
        save_file(reference, files.reference)
        log = trainer.state.log_history
        History(
            model=f"{what}, {preset.num_experts} experts in each of {preset.num_layers} layers, on {machine}",
            num_steps=num_steps,
            train_loss=[(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
            held_out_loss=[(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry],
            num_tokens=trainer.state.num_input_tokens_seen,
            train_seconds=progress.seconds,
            samples=random.Random(options.seed).sample(_public(held_out_pairs), NUM_SAMPLES),
        ).save(files.history)
    if dist.is_initialized():
        dist.destroy_process_group()


def _with_adapter(model: Qwen3MoeForCausalLM) -> Any:
    """Put LoRA on attention and experts; embeddings and output layer stay trainable, router and norms do not."""
    # Imported here: without --lora the demo needs no PEFT.
    from peft import LoraConfig

    from hf_moe_accel import get_peft_model

    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        # A pretrained model knows its tokens; the random weights of this one have them still to learn.
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _millions(parameters: Iterable[torch.nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.1f} M"


def _training_arguments(options: DemoOptions, preset: Preset, num_steps: int, use_cpu: bool) -> TrainingArguments:
    # Without an account: `wandb sync` uploads what is left in the output folder.
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ |= {"WANDB_DIR": options.output_dir, "WANDB_SILENT": "true"}
    args = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=num_steps,
        learning_rate=preset.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=num_steps // 5,
        weight_decay=0.1,
        adam_beta2=0.95,
        train_sampling_strategy="sequential",  # order_examples has chosen the order
        logging_steps=math.ceil(num_steps / NUM_POINTS),
        eval_strategy="steps",
        eval_steps=math.ceil(num_steps / NUM_EVALUATIONS),
        eval_on_start=True,
        save_strategy="no",
        include_num_input_tokens_seen="non_padding",
        report_to="wandb" if importlib.util.find_spec("wandb") else "none",
        disable_tqdm=True,  # Progress replaces it
        seed=options.seed,
        use_cpu=use_cpu,
    )
    args.per_device_train_batch_size = max(1, preset.batch_size // args.world_size)
    args.per_device_eval_batch_size = args.per_device_train_batch_size
    return args


def _prepare_data(vocab_size: int, is_main: bool) -> tuple[PreTrainedTokenizerFast, list[data.Pair], list[data.Pair]]:
    """Return the tokenizer, the pairs to train on and those held out, as rank 0 made them. All ranks must call."""
    prepared: list[Any] = [None]
    if is_main:
        train_pairs, held_out_pairs = data.split_pairs(data.collect_pairs())
        print(f"{len(train_pairs)} pairs to train on and {len(held_out_pairs)} held out", flush=True)
        prepared = [(data.train_tokenizer(train_pairs, vocab_size), train_pairs, held_out_pairs)]
    if dist.is_initialized():
        dist.broadcast_object_list(prepared)
    result: tuple[PreTrainedTokenizerFast, list[data.Pair], list[data.Pair]] = prepared[0]
    return result


def _reference_logits(trainer: AcceleratedMoETrainer, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The trained model's logits [batch, longest, vocabulary] fp32 and what they answer. All ranks must call."""
    batch = trainer.data_collator(examples)
    inputs = {name: batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask")}
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**inputs).logits
    return {name: tensor.cpu() for name, tensor in inputs.items()} | {"logits": logits.float().cpu()}


def _public(pairs: list[data.Pair]) -> list[data.Pair]:
    return [pair for pair in pairs if "._" not in "." + pair.signature.split("(")[0]]


if __name__ == "__main__":
    train(DemoOptions(**json.loads(sys.argv[1])))
