"""A training loop of your own with one import changed. Gradients are averaged over the ranks, each on its own batches.

python examples/swap_import.py                            # a small random model, here
torchrun --nproc-per-node 8 examples/swap_import.py Qwen/Qwen3-30B-A3B --data roneneldan/TinyStories --steps 1000
"""

import torch
import torch.distributed as dist
from small import parse_arguments, texts
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

# was: from transformers import AutoModelForCausalLM
from hf_moe_accel import AutoModelForCausalLM, clip_grad_norm_, parameter_groups

if __name__ == "__main__":
    cli = parse_arguments(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(cli.model)
    model = AutoModelForCausalLM.from_pretrained(
        cli.model
    )  # each rank reads its own slices; the process group is made
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world_size == 1:
        model.to(torch.accelerator.current_accelerator() or "cpu")  # several ranks have it where it belongs
    dataset = texts(cli.data).map(lambda row: tokenizer(row["text"], truncation=True, max_length=4096))
    batches = DataLoader(
        dataset.select_columns(["input_ids", "attention_mask"]),
        batch_size=8,
        # Every rank gets as many rows as the others: all must run the same number of passes.
        sampler=DistributedSampler(dataset, num_replicas=world_size, rank=rank),
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4)
    model.train()
    for step, batch in enumerate(batches, start=1):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        num_tokens = (batch["labels"][:, 1:] != -100).sum()
        if world_size > 1:
            dist.all_reduce(num_tokens)
        loss = model(**batch, num_items_in_batch=num_tokens).loss  # sum on this rank / tokens on all ranks
        (loss * world_size).backward()
        clip_grad_norm_(model, 1.0)  # stock clipping cannot span the meshes of dense weights and experts
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            loss = loss.detach()
            if world_size > 1:
                dist.all_reduce(loss)
            if rank == 0:
                print({"step": step, "loss": loss.item()})
        if step == cli.steps:
            break
    model.save_pretrained(cli.output)  # on all ranks: a standard checkpoint, in the original hub keys
    tokenizer.save_pretrained(cli.output)
    model.moe_runtime.close()
    if world_size > 1:
        dist.destroy_process_group()
