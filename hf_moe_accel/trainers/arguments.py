"""TrainingArguments that do not go with our sharding: refused by name before any weight is read."""

from __future__ import annotations

from typing import Any


def refuse_arguments(args: Any) -> None:
    """Refuse arguments that would break a mixture-of-experts run.

    Args:
        args: `TrainingArguments`, or None for the defaults.

    Raises:
        ValueError: names the argument, the reason and the line to delete.
    """
    if args is None:
        return
    if args.auto_find_batch_size:
        _refuse(
            "auto_find_batch_size=True",
            "one rank running out of memory would retry alone while the others wait for its tokens",
        )
    if args.fp16:
        _refuse("fp16=True", "the gradient scaler does not see the gradients of sharded experts; use bf16=True")
    if args.fsdp:
        _refuse(f"fsdp={args.fsdp!r}", "the model is sharded by FSDP2 already, experts included")
    if args.deepspeed:
        _refuse("deepspeed=...", "the model is sharded by FSDP2 already, experts included")
    if args.parallelism_config is not None:
        _refuse("parallelism_config=...", "the layout is chosen by MoEAccelConfig(ep_size=..., dp_replicate_size=...)")
    optimizer = str(args.optim.value if hasattr(args.optim, "value") else args.optim)
    reason = _optimizer_reason(optimizer)
    if reason is not None:
        _refuse(f"optim={optimizer!r}", reason)


def refuse_plugins(accelerator: Any) -> None:
    """Refuse accelerate's own sharding, which `accelerate launch` may have switched on.

    Raises:
        ValueError: names the plugin and where to switch it off.
    """
    for name, field in (("FSDP", "fsdp_plugin"), ("DeepSpeed", "deepspeed_plugin")):
        if getattr(accelerator.state, field, None) is not None:
            raise ValueError(
                f"accelerate's {name} plugin is on, but the model is sharded by hf_moe_accel: take the {name} section "
                "out of the accelerate configuration (`accelerate config`), or start with torchrun."
            )


def _refuse(argument: str, reason: str) -> None:
    raise ValueError(f"{argument} is not supported for mixture-of-experts models: {reason}. Delete {argument}.")


# Families of transformers' OptimizerNames that cannot step a sharded model, each with what was seen or read.
_OPTIMIZERS: dict[str, str] = {}


def _optimizer_reason(name: str) -> str | None:
    return next((reason for part, reason in _OPTIMIZERS.items() if part in name), None)
