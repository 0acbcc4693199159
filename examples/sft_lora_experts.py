"""Supervised fine-tuning with LoRA on attention and on every expert. What is saved is an adapter that PEFT loads.

python examples/sft_lora_experts.py                       # a small random model, here
torchrun --nproc-per-node 8 examples/sft_lora_experts.py Qwen/Qwen3-30B-A3B --data trl-lib/Capybara --steps 1000
"""

from peft import LoraConfig
from small import completions, on_this_machine, parse_arguments
from trl import SFTConfig

from hf_moe_accel import AcceleratedMoESFTTrainer  # was: from trl import SFTTrainer

if __name__ == "__main__":
    cli = parse_arguments(__doc__)
    trainer = AcceleratedMoESFTTrainer(
        model=cli.model,
        args=SFTConfig(cli.output, max_steps=cli.steps, learning_rate=1e-3, **on_this_machine()),
        train_dataset=completions(cli.data),
        peft_config=LoraConfig(
            r=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    )
    trainer.train()
    trainer.save_model()
