"""transformers' Trainer with one import changed: the script is otherwise what it was.

python examples/swap_trainer.py                           # a small random model, here
torchrun --nproc-per-node 8 examples/swap_trainer.py Qwen/Qwen3-30B-A3B --data roneneldan/TinyStories --steps 1000
"""

from small import on_this_machine, parse_arguments, texts
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from hf_moe_accel import AcceleratedMoETrainer  # was: from transformers import Trainer

if __name__ == "__main__":
    cli = parse_arguments(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(cli.model)
    dataset = texts(cli.data)
    trainer = AcceleratedMoETrainer(
        model=cli.model,  # or a loaded model; by its name, each rank reads its own slices only
        args=TrainingArguments(cli.output, max_steps=cli.steps, learning_rate=1e-4, **on_this_machine()),
        train_dataset=dataset.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=4096),
            batched=True,
            remove_columns=dataset.column_names,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # a standard checkpoint, in the original hub keys
