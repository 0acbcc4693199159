"""TRL's trainers with ours in front: the numbers of stock TRL on as many ranks, with every kind of reference model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from hf_moe_accel import AcceleratedMoESFTTrainer, MoEAccelConfig
from tests.helpers.adapters import config, draw_factors
from tests.helpers.grids import named, slow
from tests.helpers.models import toy_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close
from tests.helpers.trl_runs import data, loaded, make, other, run, write_inputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("trl")
    write_inputs(directory)
    return str(directory)


def adapted(source: str) -> Any:
    """With an adapter that is not zero, which is therefore a reference of its own."""
    model = get_peft_model(loaded(source), config())
    draw_factors(model)
    return model


def without_padding(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How long the padded rows are depends on the batches that the ranks have."""
    return [{key: value for key, value in entry.items() if key != "total_flos"} for entry in log]


LORA: dict[str, Any] = {"load": loaded, "options": {"peft_config": config()}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("SFT", {}),
    "SFT, a loaded model": ("SFT", {"load": loaded}),
    "SFT, LoRA on experts": ("SFT", LORA),
    "DPO, the reference is implied": ("DPO", {}),
    "DPO, the reference is implied by a loaded model": ("DPO", {"load": loaded}),
    "DPO, a reference is given": ("DPO", {"options": {"ref_model": other}}),
    "DPO, the reference is without the adapter": ("DPO", LORA),
    "DPO, the reference is a copy of the adapter": ("DPO", {"load": adapted}),
    "DPO, the reference is computed before": ("DPO", {"precompute_ref_log_probs": True}),
    "DPO, without the adapter, computed before": ("DPO", LORA | {"precompute_ref_log_probs": True}),
    "DPO, the reference follows": ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "KTO": ("KTO", {}),
    "KTO, a reference is given": ("KTO", {"options": {"ref_model": other}}),
    "KTO, LoRA on experts": ("KTO", LORA),
    "KTO, the reference is computed before": ("KTO", {"precompute_ref_log_probs": True}),
    "Reward": ("Reward", {}),
    "Reward, LoRA on experts": ("Reward", {"options": {"peft_config": config(task_type="SEQ_CLS")}}),
}


SLOW_CASES = (
    "DPO, a reference is given",
    "DPO, the reference follows",
    "KTO, LoRA on experts",
    "SFT, a loaded model",
    "DPO, the reference is implied by a loaded model",
    "DPO, without the adapter, computed before",
    "KTO, a reference is given",
    "KTO, the reference is computed before",
    "Reward, LoRA on experts",
)


@pytest.mark.parametrize("case", named(CASES, SLOW_CASES))
def test_equals_stock_trl(case: str, inputs: str) -> None:
    """At a learning rate that moves the loss, so that whatever does not train shows in the next steps."""
    kind, options = CASES[case]
    options = {"learning_rate": 1e-3} | options
    (single,) = run_ranks(run, 1, kind, False, inputs, **options)
    (ours,) = run_ranks(run, 1, kind, True, inputs, **options)
    assert_close(ours, single, "training", "one rank")
    stock, _ = run_ranks(run, 2, kind, False, inputs, **options, init=False)
    for log in run_ranks(run, 2, kind, True, inputs, **options, init=False):
        assert_close(log, stock, "training", "two ranks")
        # KTO pairs the rows of a rank's batch to estimate its KL.
        if kind != "KTO":
            assert_close(*map(without_padding, (log, single)), "training", "two ranks against one")


class FirstGradients(TrainerCallback):
    """Of each parameter."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            for name, parameter in model.named_parameters():
                grad = parameter.grad
                if grad is not None:
                    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                    self.found[name.removeprefix("module.")] = whole.clone()


def first_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, FirstGradients))
    found: dict[str, torch.Tensor] = callback.found
    return found


@pytest.mark.parametrize("kind", ["SFT", "DPO", *slow("KTO", "Reward")])
def test_first_gradients_and_small_steps_equal_stock_trl(kind: str, inputs: str) -> None:
    """At a learning rate as TRL's, 1e-5."""
    options = {"max_grad_norm": 0.0, "options": {"callbacks": [FirstGradients()]}, "after": first_gradients}
    log, gradients = run_ranks(run, 2, kind, False, inputs, **options, init=False)[0]
    assert gradients
    for log_of_rank, of_rank in run_ranks(run, 2, kind, True, inputs, **options, init=False):
        assert_close(of_rank, gradients, "training")
        assert_close(log_of_rank, log, "training")


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("DPO, the reference is implied", {"ep_size": 2, "dp_replicate_size": 2}),
        *slow(("DPO, the reference is computed before", {"ep_size": 2})),
    ],
    ids=str,
)
def test_layouts(case: str, layout: dict[str, Any], inputs: str) -> None:
    kind, options = CASES[case]
    options = {"learning_rate": 1e-3} | options
    (single,) = run_ranks(run, 1, kind, False, inputs, **options)
    options["options"] = {"moe_config": MoEAccelConfig(**layout)}
    for log in run_ranks(run, 4, kind, True, inputs, **options, init=False):
        assert_close(*map(without_padding, (log, single)), "training")


def streamed(directory: str) -> Any:
    return data(directory, "texts", streaming=True)


def held_out(directory: str) -> Any:
    return data(directory, "texts").select(range(6))


def preferred(directory: str) -> Any:
    return data(directory, "preferences").select(range(6))


def with_generation_markers(directory: str) -> Any:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }} {% endgeneration %}"
        "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    )
    return tokenizer


VARIANTS: dict[str, dict[str, Any]] = {
    "packing": {"packing": True, "max_length": 24},
    "wrapped packing": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
    "completion-only": {"name": "completions"},
    "assistant-only": {
        "name": "chats",
        "assistant_only_loss": True,
        "options": {"processing_class": with_generation_markers},
    },
    "dft loss": {"loss_type": "dft"},
    "streaming": {"options": {"train_dataset": streamed}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "auxiliary loss": {"router_aux_loss_coef": 0.01},
    "selective checkpointing": {"gradient_checkpointing_kwargs": {"selective": True}},
    "no checkpointing": {"gradient_checkpointing": False},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "options": {"eval_dataset": held_out}},
    "frozen experts": {"options": {"peft_config": config(target_parameters=None)}},
    "adapters that are copied whole": {"options": {"peft_config": config(modules_to_save=["embed_tokens"])}},
}


SLOW_VARIANTS = (
    "wrapped packing",
    "completion-only",
    "dft loss",
    "streaming",
    "accumulation",
    "auxiliary loss",
    "no checkpointing",
    "evaluation",
    "adapters that are copied whole",
)


@pytest.mark.parametrize("variant", named(VARIANTS, SLOW_VARIANTS))
def test_arguments_of_sft(variant: str, inputs: str) -> None:
    options = {"learning_rate": 1e-3} | VARIANTS[variant]
    stock, _ = run_ranks(run, 2, "SFT", False, inputs, **options, init=False)
    for log in run_ranks(run, 2, "SFT", True, inputs, **options, init=False):
        assert_close(log, stock, "training")


def small_words(completions: list[str], **_: Any) -> list[float]:
    return [sum(int(word[1:]) < 60 for word in text.split() if word.startswith("w")) / 6 for text in completions]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "precompute_ref_log_probs": True, "options": {"ref_model": other}},
        *slow(
            {"router_aux_loss_coef": 0.01},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5},
            {"eval_strategy": "steps", "eval_steps": 1, "options": {"eval_dataset": preferred}},
        ),
    ],
    ids=str,
)
def test_arguments_of_dpo(options: dict[str, Any], inputs: str) -> None:
    options = {"learning_rate": 1e-3} | options
    stock, _ = run_ranks(run, 2, "DPO", False, inputs, **options, init=False)
    for log in run_ranks(run, 2, "DPO", True, inputs, **options, init=False):
        assert_close(log, stock, "training")


def streamed_unevenly(directory: str) -> Any:
    return streamed(directory).take(29)


@pytest.mark.slow
def test_a_stream_that_ends_at_different_times(inputs: str) -> None:
    options = {"options": {"train_dataset": streamed_unevenly}, "max_steps": 6, "per_device_train_batch_size": 1}
    first, second = run_ranks(run, 2, "SFT", True, inputs, **options, gradient_accumulation_steps=4, init=False)
    assert first == second and sum("loss" in entry for entry in first) == 6


def with_more_tokens(directory: str) -> None:
    """TRL takes over another model's template and tokens, for which the model grows before it is sharded."""
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(f"{directory}/template")
    trainer = make("SFT", True, directory, chat_template_path=f"{directory}/template", name="chats")
    trainer.train()
    assert trainer.model.get_input_embeddings().weight.shape[0] > 128
    assert isinstance(trainer.model.get_input_embeddings().weight, DTensor)


def test_a_chat_template_with_more_tokens(inputs: str) -> None:
    run_ranks(with_more_tokens, 2, inputs, init=False)


GENERATION: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 6,
    "per_device_train_batch_size": 8,
    "options": {"reward_funcs": [small_words]},
}


@pytest.mark.parametrize(
    "more",
    [{"beta": 0.1, "load": loaded, "options": LORA["options"]}, *slow({"beta": 0.1})],
    ids=["LoRA on experts", "whole"],
)
def test_grpo_equals_stock_trl(more: dict[str, Any], inputs: str) -> None:
    """Down to the words that are drawn."""
    options = {"learning_rate": 1e-3} | GENERATION | more
    options["options"] = GENERATION["options"] | more.get("options", {})
    stock, _ = run_ranks(run, 2, "GRPO", False, inputs, **options, init=False)
    for log in run_ranks(run, 2, "GRPO", True, inputs, **options, init=False):
        assert_close(*([without_times(entry) for entry in each] for each in (log, stock)), "training")


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if "time" not in key}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_learns(seed: int, inputs: str) -> None:
    options = GENERATION | {"learning_rate": 5e-3, "max_steps": 40, "train_sampling_strategy": "random", "seed": seed}
    log, _ = run_ranks(run, 2, "GRPO", True, inputs, **options, init=False)
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    assert len(rewards) == 40 and sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5 > 0.2


def in_slices(kind: str, directory: str, **options: Any) -> dict[str, Any]:
    """Neither the policy nor its reference is ever whole, and each is prepared."""
    with mock.patch("hf_moe_accel.prepare.shard_in_place", side_effect=AssertionError("read whole")):
        trainer = make(kind, True, directory, **options)
    trainer.train()
    models = [trainer.model] + ([trainer.ref_model] if getattr(trainer, "ref_model", None) else [])
    experts = [p for model in models for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    assert all(isinstance(p, DTensor) for p in experts)
    return {
        "experts": [p.to_local().shape[0] for p in experts],
        "dtypes": {p.dtype for p in experts},
        "kwargs": trainer.args.model_init_kwargs,
    }


@pytest.mark.parametrize(
    ("kind", "options", "models"),
    [
        ("SFT", {"bf16": True}, 1),
        ("SFT", {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}}, 1),
        ("DPO", {}, 2),
        ("DPO", {"options": {"peft_config": config()}}, 1),
        ("Reward", {}, 1),
        *slow(
            ("SFT", {"options": {"peft_config": config()}}, 1),
            ("KTO", {}, 2),
            ("GRPO", GENERATION | {"beta": 0.1}, 2),
        ),
    ],
    ids=str,
)
def test_models_by_name_are_read_in_slices(kind: str, options: dict[str, Any], models: int, inputs: str) -> None:
    given = options.get("model_init_kwargs")
    dtype = torch.bfloat16 if given else torch.float32
    for found in run_ranks(in_slices, 2, kind, inputs, **options, init=False):
        assert found == {"experts": [4, 4] * models, "dtypes": {dtype}, "kwargs": given}


def test_bf16_over_fp32_masters(inputs: str) -> None:
    """Stock TRL under autocast rounds elsewhere, and differs from itself on other numbers of ranks by as much."""
    stock, _ = run_ranks(run, 2, "DPO", False, inputs, bf16=True, init=False)
    for log in run_ranks(run, 2, "DPO", True, inputs, bf16=True, init=False):
        for mine, theirs in zip(log, stock, strict=True):
            for key in mine.keys() & {"loss", "grad_norm"}:
                assert mine[key] == pytest.approx(theirs[key], rel=3e-2), key


def evaluate_first(ours: bool, directory: str) -> Any:
    trainer = make("SFT", ours, directory, learning_rate=1e-2, options={"eval_dataset": held_out})
    trainer.evaluate()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_what_ran_before_training_trains_too(inputs: str) -> None:
    """The optimizer gets the parameters that train, not what FSDP2 has gathered for the pass before."""
    (stock,) = run_ranks(evaluate_first, 1, False, inputs)
    for losses in run_ranks(evaluate_first, 2, True, inputs, init=False):
        assert_close(losses, stock, "training")


def default_arguments(directory: str, kind: str) -> tuple[str, Any]:
    given: Any = None
    if kind != "none":
        given = TrainingArguments(f"{directory}/plain", use_cpu=True, max_steps=1, report_to=[], learning_rate=3e-5)
    trainer = AcceleratedMoESFTTrainer(Path(directory, "model"), given, train_dataset=data(directory, "texts"))
    assert isinstance(trainer.args, SFTConfig)
    return trainer.args.output_dir.rpartition("/")[2], (trainer.args.learning_rate, trainer.model.dtype)


def test_arguments_of_transformers_or_none(inputs: str) -> None:
    assert default_arguments(inputs, "plain") == ("plain", (3e-5, torch.float32))
    # TRL's defaults are for GPUs.
    with mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True):
        assert default_arguments(inputs, "none")[0] == "model-SFT"


def refusals(directory: str) -> list[str]:
    texts = []
    for kind, options in (
        ("GRPO", GENERATION | {"use_vllm": True}),
        ("GRPO", GENERATION | {"use_transformers_continuous_batching": True}),
        ("GRPO", GENERATION | {"cast_lm_head_to_fp32": True}),
        ("SFT", {"model_init_kwargs": {"tp_plan": "auto"}}),
        ("SFT", {"model_init_kwargs": {"device_map": "auto"}}),
        ("SFT", {"model_init_kwargs": {"experts_implementation": "eager"}}),
        ("SFT", {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": True}}),
    ):
        with mock.patch("transformers.PreTrainedModel.from_pretrained", side_effect=AssertionError("too late")):
            with pytest.raises(ValueError) as error:
                make(kind, True, directory, **options)
        texts.append(str(error.value))
    return texts


def test_what_does_not_go_is_refused_before_weights_are_read(inputs: str) -> None:
    names = ("use_vllm", "batching", "cast_lm_head", "tp_plan", "device_map", "experts_implementation", "liger")
    for texts in run_ranks(refusals, 2, inputs, init=False):
        for text, name in zip(texts, names, strict=True):
            assert name in text and "Delete" in text


@pytest.mark.slow
def test_trl_is_imported_only_when_asked_for() -> None:
    code = "import hf_moe_accel, sys; hf_moe_accel.AcceleratedMoETrainer; assert 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def save(directory: str, output_dir: str) -> None:
    trainer = make("DPO", True, directory, output_dir=output_dir, save_strategy="steps", save_steps=2)
    trainer.train()


def resume(directory: str, output_dir: str) -> list[float]:
    trainer = make("DPO", True, directory, output_dir=output_dir, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-2")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_dpo_resumes(inputs: str, tmp_path: Path) -> None:
    """The policy goes on; its reference is the model that it began from."""
    whole, _ = run_ranks(run, 2, "DPO", True, inputs, init=False)
    run_ranks(save, 2, inputs, str(tmp_path), init=False)
    for losses in run_ranks(resume, 2, inputs, str(tmp_path), init=False):
        assert losses == [entry["loss"] for entry in whole if "loss" in entry]
