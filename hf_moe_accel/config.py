"""The one configuration of the library: flat, readable by every HF argument parser, checked by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass, field

EXPERT_CHECKPOINTING = ("activation", "up", "full")


@dataclass
class MoEAccelConfig:
    """How a mixture-of-experts model is spread over the ranks and computed.

    Every default means "choose well by yourself". A value that you write is honoured or is an error; only "auto"
    falls back. Parses beside `TrainingArguments`, `SFTConfig` or `DPOConfig` with `HfArgumentParser` and `TrlParser`.

    Raises:
        ValueError: a value is out of its range; names the value, the limit and the fix.
    """

    # The union ends in None so that HfArgumentParser hands the text over unconverted ("auto" or a number).
    ep_size: int | str | None = field(
        default="auto",
        metadata={
            "help": "Expert parallelism: the number of ranks that share one full set of experts. It must divide the "
            "number of experts and the ranks of a replica. 'auto': the largest number that divides the experts and "
            "the ranks in a node. 1: no expert parallelism (FSDP only)."
        },
    )
    dp_replicate_size: int = field(
        default=1,
        metadata={
            "help": "Copies of the whole sharded model (HSDP): weights are sharded within a copy, gradients are "
            "all-reduced between copies. Use the number of nodes when the network between them is slow."
        },
    )
    token_dispatcher: str = field(
        default="auto",
        metadata={
            "help": "How tokens reach the ranks of their experts: 'auto', 'deepep' (DeepEP's kernels over NVLink; "
            "needs ep_size > 1 within a node, bf16, and DeepEP built from source), 'all_to_all' (NCCL or gloo "
            "collectives; needs ep_size > 1), 'local' (every rank has all experts; needs ep_size 1)."
        },
    )
    expert_backend: str = field(
        default="auto",
        metadata={
            "help": "How the experts compute: 'auto' (the first that can), 'quack' (CUDA, bf16 and fp16: as 'fused', "
            "with quack-kernels' grouped products, which read rows through an index; pip install "
            "'hf_moe_accel[quack]'; on other GPUs than Hopper by name only), 'fused' (CUDA: torch's grouped matrix "
            "product between Triton kernels), 'padded_bmm' (CPU: batched products of padded blocks), 'grouped_mm' "
            "(torch's grouped matrix product alone), 'eager' (a loop over the experts: the slow reference). Never "
            "chosen by 'auto': 'transformer_engine' (CUDA, bf16: as 'fused', with TransformerEngine's grouped "
            "product), and with its products in FP8 'transformer_engine_fp8' (a scale for each matrix) and "
            "'transformer_engine_fp8_block' (a scale for each block of 128)."
        },
    )
    collective_timeout: float = field(
        default=600.0,
        metadata={
            "help": "Seconds that a rank may come no further in a forward or backward pass, from one exchange of "
            "tokens to the next, before every rank prints who is where and the job ends. Raise it when a layer takes "
            "minutes."
        },
    )
    async_save: bool = field(
        default=False,
        metadata={
            "help": "Go on training while a checkpoint is written. Each rank keeps a copy of its shard of the weights "
            "and of the optimizer in host memory until it is written. One checkpoint at a time; an error is raised at "
            "the next save or at the end of training."
        },
    )
    merge_adapters_on_save: bool = field(
        default=False,
        metadata={
            "help": "Where a LoRA adapter is saved, write the whole model with the adapter folded in as well, to "
            "`merged/` beside it: a standard checkpoint for transformers, vLLM and SGLang."
        },
    )
    per_expert_adapter_on_save: bool = field(
        default=False,
        metadata={
            "help": "Where a LoRA adapter is saved, write it also with a pair of matrices for each expert, to "
            "`per_expert/` beside it: the form that vLLM and SGLang read. Only for models whose hub checkpoints store "
            "experts one by one."
        },
    )

    # As ep_size: the union ends in None so that the text comes unconverted.
    overlap_chunks: int | str | None = field(
        default="auto",
        metadata={
            "help": "Parts that a layer's tokens are sent in, so that one part travels while another computes. More "
            "parts hide more of the transfers but make the products of the experts smaller, and gradients of trained "
            "experts are added up. 'auto': 1 where an EP group is within a node, else one part for each 2,048 tokens "
            "of a rank, 4 at most. Shared experts compute while tokens travel as well. "
            "1: no overlap but that of the weights' gradients. With ep_size 1 nothing travels, and it has no effect."
        },
    )
    expert_checkpointing: str = field(
        default="activation",
        metadata={
            "help": "What the experts compute again in the backward pass, to save memory. For each layer and each "
            "(token, expert) pair, in bf16: 'activation': the activation alone, which costs no time; kept are the "
            "pre-activation, 4 bytes x intermediate size, and the rows that were received from other ranks, 2 bytes x "
            "hidden size a row. 'up': the first projection as well; kept are the received rows. 'full': the rows are "
            "sent again too, with the routing as it was; kept are a few numbers a pair. Under activation "
            "checkpointing of whole layers, which keeps the received rows so that nothing is sent twice, 'full' frees "
            "those as well, and 'up' changes nothing."
        },
    )
    cuda_graphs: str = field(
        default="auto",
        metadata={
            "help": "Whether the trainers replay layers as CUDA graphs, which spares the host launching each kernel. "
            "'auto': where all experts are on one GPU, once it waits for the host, batches of one shape have come "
            "several times, nothing hooks into the layers, and memory is left: a pass has some of its own in graphs. "
            "'off': never. To have layers compiled as well, and to be told why where that cannot be, pass "
            "torch_compile=True and torch_compile_mode='reduce-overhead'."
        },
    )
    check_tokens: bool = field(
        default=False,
        metadata={
            "help": "For finding errors: before tokens are sent, look for rows that are not finite and for expert "
            "numbers that the model does not have, and name layer, rank and the first of them. Costs a device sync a "
            "layer."
        },
    )
    expert_metrics: bool = field(
        default=True,
        metadata={
            "help": "Count where tokens go and time the parts of a step, and log both: load of the experts and the "
            "ranks, entropy of the routers, tokens a second, utilisation, memory. False: count and log nothing."
        },
    )

    def __post_init__(self) -> None:
        """Check each value by arithmetic alone; no device, no network, no process group is touched."""
        self.ep_size = self._auto_or_number("ep_size", "ranks")
        self.overlap_chunks = self._auto_or_number("overlap_chunks", "parts")
        if not isinstance(self.dp_replicate_size, int) or self.dp_replicate_size < 1:
            raise ValueError(
                f"dp_replicate_size={self.dp_replicate_size} must be a whole number, 1 or more; 1 means one copy."
            )
        if not self.collective_timeout > 0:
            raise ValueError(
                f"collective_timeout={self.collective_timeout} must be more than 0 seconds; the default is 600."
            )
        for name in ("token_dispatcher", "expert_backend"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}={value!r} must be a name, for example {name}='auto'.")
        if self.cuda_graphs not in ("auto", "off"):
            raise ValueError(
                f"cuda_graphs={self.cuda_graphs!r} must be 'auto' or 'off'; to insist on graphs, pass "
                "torch_compile_mode='reduce-overhead' to the trainer."
            )
        if self.expert_checkpointing not in EXPERT_CHECKPOINTING:
            levels = ", ".join(map(repr, EXPERT_CHECKPOINTING))
            raise ValueError(f"expert_checkpointing={self.expert_checkpointing!r} must be one of {levels}.")

    def _auto_or_number(self, name: str, of_what: str) -> int | str:
        value = getattr(self, name)
        if value is None or value == "auto":
            return "auto"
        try:
            number = int(value) if isinstance(value, int | str) else 0
        except ValueError:
            number = 0
        if number < 1 or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be 'auto' or a whole number of {of_what}, 1 or more.")
        return number
