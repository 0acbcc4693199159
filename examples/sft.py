"""Supervised fine-tuning of all weights: TRL's script with one import changed.

python examples/sft.py                                    # a small random model, here
torchrun --nproc-per-node 8 examples/sft.py Qwen/Qwen3-30B-A3B --data trl-lib/Capybara --steps 1000
"""

from small import completions, on_this_machine, parse_arguments
from trl import SFTConfig

from hf_moe_accel import AcceleratedMoESFTTrainer  # was: from trl import SFTTrainer

if __name__ == "__main__":
    cli = parse_arguments(__doc__)
    trainer = AcceleratedMoESFTTrainer(
        model=cli.model,
        args=SFTConfig(cli.output, max_steps=cli.steps, learning_rate=1e-4, **on_this_machine()),
        train_dataset=completions(cli.data),
    )
    trainer.train()
    trainer.save_model()  # a standard checkpoint, in the original hub keys
