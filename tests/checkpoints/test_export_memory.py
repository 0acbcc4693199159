"""How much memory an export takes beyond the shards. The model is built sharded: no rank ever holds it whole."""

import ctypes
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_moe_accel.hf.export import export_checkpoint
from hf_moe_accel.weights.shards import shards_of
from tests.helpers.models import tiny_config

MIB = 2**20
MAX_SHARD_SIZE = 60_000_000
# A gate_up_proj of 64 experts is 268 MB, one tensor in the hub's format too, and half of it lies on each rank.
SIZES = {"hidden_size": 1024, "intermediate_size": 1024, "num_local_experts": 64, "vocab_size": 32768}


# ---------------------------------------------------------------------------------------------------------------------
# What the ranks run


def sharded_model():
    """GPT-OSS in bf16, each rank's rows full of random bits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt_oss", **SIZES), dtype=torch.bfloat16)
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    _, _, mesh = type(model).prepare_distribute_model(config)
    model = type(model).maybe_distribute_model(model, config, mesh).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in model.parameters():
        parameter.detach().to_local().view(torch.int16).random_(generator=generator)
    return model


def peak_of_export(model, directory):
    """What the export takes at its peak beyond what was in use before, in bytes, by the kernel's own count."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that malloc keeps unused would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    before = resident("VmRSS")
    export_checkpoint(model, directory, max_shard_size=MAX_SHARD_SIZE)
    # Counts mapped files too, but no weight lies in one: only the code that runs for the first time is added.
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def assert_written(shards, directory):
    """This rank's rows of every tensor are in the files, bit for bit."""
    keys = []
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                first, end = shards[key].held[dist.get_rank()]
                rows = file.get_slice(key)[first:end]
                assert torch.equal(rows.view(torch.int16), shards[key].local.view(torch.int16)), key
                keys.append(key)
    assert sorted(keys) == sorted(shards)


def export_and_compare(directory):
    model = sharded_model()
    shards = shards_of(model.state_dict(), dist.get_world_size())
    peak = peak_of_export(model, directory)
    assert_written(shards, directory)
    shard = sum(shard.local.nbytes for shard in shards.values())
    largest = max(shard.row_bytes * shard.num_rows for shard in shards.values())
    return shard, largest, peak


# ---------------------------------------------------------------------------------------------------------------------
# The test


def test_an_export_takes_no_more_than_two_files_beyond_the_shard(ranks):
    # Not tmp_path, which pytest would keep: this is a gigabyte.
    with tempfile.TemporaryDirectory() as directory:
        results = ranks(export_and_compare, 2, Path(directory))
    bound = 2 * MAX_SHARD_SIZE
    for rank, (shard, largest, peak) in enumerate(results):
        print(
            f"rank {rank}: shard {shard / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB, "
            f"peak beyond the shard {peak / MIB:.1f} MiB of {bound / MIB:.1f} MiB"
        )
    for shard, largest, peak in results:
        # A model to tell: one that would break the bound if its largest tensor were brought together whole.
        assert largest > bound and shard > 2 * bound
        assert peak <= bound
