"""A run that goes on where it stopped: start it again, also on another number of ranks or with more steps.

python examples/resume.py; python examples/resume.py --steps 40     # a small random model, here: 20 steps, 20 more
torchrun --nproc-per-node 8 examples/resume.py Qwen/Qwen3-30B-A3B --data trl-lib/Capybara --steps 1000

A checkpoint is there whole or not at all, whenever a rank dies, and is verified before it is read.
"""

import os
from pathlib import Path

from small import completions, on_this_machine, parse_arguments
from trl import SFTConfig

from hf_moe_accel import AcceleratedMoESFTTrainer, MoEAccelConfig

GLOBAL_BATCH = 16  # rows of a step, on any number of ranks: the same steps then

if __name__ == "__main__":
    cli = parse_arguments(__doc__)
    trainer = AcceleratedMoESFTTrainer(
        model=cli.model,
        args=SFTConfig(
            cli.output,
            max_steps=cli.steps,
            per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
            save_steps=5,
            save_total_limit=2,
            learning_rate=1e-4,
            lr_scheduler_type="constant",  # others follow max_steps, which may differ from run to run here
            **on_this_machine(),
        ),
        train_dataset=completions(cli.data),
        moe_config=MoEAccelConfig(async_save=True),  # goes on training while a checkpoint is written
    )
    # Every checkpoint is a standard model by itself, with what a resume needs beside it.
    trainer.train(resume_from_checkpoint=any(Path(cli.output).glob("checkpoint-*")))
