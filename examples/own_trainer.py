"""A trainer class of your own: any trainer of transformers or TRL with the mixin in front.

python examples/own_trainer.py                            # a small random model, here
torchrun --nproc-per-node 8 examples/own_trainer.py Qwen/Qwen3-30B-A3B --data trl-lib/Capybara --steps 1000
"""

import math
from typing import Any

from small import completions, on_this_machine, parse_arguments
from trl import SFTConfig, SFTTrainer

from hf_moe_accel import AcceleratedMoEMixin


class MyTrainer(SFTTrainer):
    """What you have: here, it logs the perplexity too."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["perplexity"] = math.exp(logs["loss"])
        super().log(logs, *args, **kwargs)


class MyMoETrainer(AcceleratedMoEMixin, MyTrainer):
    """The same, with experts spread over the ranks. The mixin comes first."""


if __name__ == "__main__":
    cli = parse_arguments(__doc__)
    trainer = MyMoETrainer(
        model=cli.model,
        args=SFTConfig(cli.output, max_steps=cli.steps, learning_rate=1e-4, **on_this_machine()),
        train_dataset=completions(cli.data),
    )
    trainer.train()
    trainer.save_model()
