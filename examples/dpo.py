"""Preference training. The reference model, here the one that the policy begins from, is sharded as the policy is.

    python examples/dpo.py                                    # a small random model, here
    torchrun --nproc-per-node 8 examples/dpo.py Qwen/Qwen3-30B-A3B --data trl-lib/ultrafeedback_binarized --steps 1000

With `precompute_ref_log_probs=True` none is kept; with a `peft_config` it is the policy without its adapters.
"""

from small import on_this_machine, parse_arguments, preferences
from trl import DPOConfig

from hf_moe_accel import AcceleratedMoEDPOTrainer  # was: from trl import DPOTrainer

if __name__ == "__main__":
    cli = parse_arguments(__doc__)
    trainer = AcceleratedMoEDPOTrainer(
        model=cli.model,
        args=DPOConfig(cli.output, max_steps=cli.steps, learning_rate=1e-5, **on_this_machine()),
        train_dataset=preferences(cli.data),
    )
    trainer.train()
    trainer.save_model()
