"""Loading a sharded model and saving it as a standard checkpoint: stock transformers against ours.

    python benchmarks/save_load.py                    # 2 ranks on CPU, or every GPU
    python benchmarks/save_load.py --repeats 1        # a quick look

The arms run in turn, each time in fresh processes, on the same checkpoint and the same layout (expert parallelism over
all ranks). The clock of a load runs over `from_pretrained`, on files that the page cache holds. The clock of a save
runs until the data are on the disk in both arms: `export_checkpoint` syncs its files itself; after stock's
`save_pretrained` rank 0, which alone has written, syncs each file. Exits with 1 when ours takes longer than stock to
save, or needs more memory beyond the shard than 2 x max_shard_size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ep_vs_fsdp import config_of
from harness import PeakHostMemory, PeakMemory, alternate, machine, medians, write
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.hub import convert_file_size_to_int

ARMS = ("stock", "ours")
CEILING = 1.0
LABELS = {
    "load_s": "load, seconds",
    "load_host_mib": "load, peak MiB of host memory a rank",
    "load_device_mib": "load, peak MiB of device memory a rank",
    "save_s": "save, seconds",
    "save_host_mib": "save, MiB of host memory a rank beyond the shard",
    "save_device_mib": "save, MiB of device memory a rank beyond the shard",
}


def run_arm(options: argparse.Namespace) -> None:
    """One arm on this rank."""
    from hf_moe_accel import AutoModelForCausalLM as Ours
    from hf_moe_accel import MoEAccelConfig, export_checkpoint

    world_size, cuda = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Here and not in `from_pretrained`: how long the ranks take to find each other is no part of a load.
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    saved = Path(options.model).parent / "saved"

    memory, started = _memory(), _clock()
    if options.arm == "ours":
        moe_config = MoEAccelConfig(ep_size=world_size)
        model = Ours.from_pretrained(options.model, dtype=torch.bfloat16, moe_config=moe_config)
    else:
        layout = DistributedConfig(fsdp_size=world_size, ep_size=world_size)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, distributed_config=layout)
    result = {"load_s": _clock() - started, **_peaks("load", memory, device)}

    memory, started = _memory(), _clock()
    if options.arm == "ours":
        export_checkpoint(model, saved, max_shard_size=options.max_shard_size)
    else:
        model.save_pretrained(saved, max_shard_size=options.max_shard_size)
        if dist.get_rank() == 0:
            _sync_files(saved)
    result |= {"save_s": _clock() - started, **_peaks("save", memory, device)}

    if dist.get_rank() == 0:
        shutil.rmtree(saved)
        write(options.result, result)
    dist.destroy_process_group()


def _clock() -> float:
    """The time at which all ranks are here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def _memory() -> dict[str, Any]:
    return {"host": PeakHostMemory()} | ({"device": PeakMemory()} if torch.cuda.is_available() else {})


def _peaks(task: str, memory: dict[str, Any], device: torch.device) -> dict[str, float]:
    """The peaks of the rank that needed most."""
    peaks = torch.tensor([one.mib() for one in memory.values()], device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return {f"{task}_{where}_mib": peak for where, peak in zip(memory, peaks.tolist(), strict=True)}


def _sync_files(directory: Path) -> None:
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def main() -> int:
    """Parse, run, compare."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if cuda else 2)
    parser.add_argument("--repeats", type=int, default=5, help="how often the arms run in turn (default 5)")
    parser.add_argument("--output", default=f"benchmarks/results/save_load_{'cuda' if cuda else 'cpu'}.json")
    parser.add_argument("--max-shard-size", default="1GB" if cuda else "100MB", help="upper limit of a file")
    size = parser.add_argument_group("size of the model")
    size.add_argument("--hidden", type=int, default=2048 if cuda else 1024)
    size.add_argument("--intermediate", type=int, default=768 if cuda else 384)
    size.add_argument("--layers", type=int, default=8 if cuda else 6)
    size.add_argument("--experts", type=int, default=128 if cuda else 64)
    size.add_argument("--vocab", type=int, default=32768 if cuda else 16384)
    parser.set_defaults(top_k=8, length=4096)  # which no weight depends on
    for name in ("--arm", "--result", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Run both arms and print them side by side."""
    sizes = {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "experts", "vocab")}
    with tempfile.TemporaryDirectory() as directory:
        source = os.path.join(directory, "source")
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config_of(options), dtype=torch.bfloat16)
        model.save_pretrained(source)
        total = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        print(f"{total:,.0f} MiB of weights in bf16, {options.ranks} ranks, {machine()['device']}")
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        os.sync()  # the first save would wait for what is still to be written of the source
        arguments = [f"--model={source}", f"--max-shard-size={options.max_shard_size}"]
        results = alternate(__file__, ARMS, options.repeats, options.ranks, arguments)
    middle = medians(results)
    stock, ours = middle["stock"], middle["ours"]
    print(f"\n{f'median of {options.repeats}':<52} {'stock':>10} {'ours':>10} {'ours / stock':>14}")
    for name in ours:
        print(f"{LABELS[name]:<52} {stock[name]:>10,.2f} {ours[name]:>10,.2f} {ours[name] / stock[name]:>14.2f}")
    bound = 2 * convert_file_size_to_int(options.max_shard_size) / 2**20
    print(f"{f'bound of the memory beyond the shard, 2 x {options.max_shard_size}, MiB':<52} {bound:>21,.2f}")
    content = {"machine": machine(), "ranks": options.ranks, "size": sizes, "max_shard_size": options.max_shard_size}
    write(options.output, {**content, "weights_mib": total, "bound_mib": bound, "median": middle, "runs": results})
    failures = []
    if ours["save_s"] > CEILING * stock["save_s"]:
        failures.append(f"ours takes {ours['save_s'] / stock['save_s']:.2f} of stock's time to save, above {CEILING}")
    failures += [
        f"{LABELS[name]}: ours needs {ours[name]:,.0f}, above {bound:,.0f}"
        for name in ("save_host_mib", "save_device_mib")
        if ours.get(name, 0.0) > bound
    ]
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
