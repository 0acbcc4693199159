"""What makes any trainer of transformers or TRL an expert-parallel one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin, broadcast_object_list
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hf_moe_accel.auto import AutoModelForCausalLM, refuse_load_arguments
from hf_moe_accel.callbacks.metrics import add_metrics
from hf_moe_accel.config import MoEAccelConfig
from hf_moe_accel.hf import cuda_graphs
from hf_moe_accel.hf.compiling import compile_layers, dynamo_plugin
from hf_moe_accel.hf.discover import base_of, find_experts
from hf_moe_accel.hf.install import keep_liger_off_experts
from hf_moe_accel.hf.loading import distributed_config, meta_model, reshard
from hf_moe_accel.hf.loss import logits_as_made
from hf_moe_accel.optim import AdamW, clip_grad_norm_
from hf_moe_accel.prepare import adopt_adapters, check_model, choose_setup, prepare_moe_model
from hf_moe_accel.runtime import MoERuntime, runtime_of
from hf_moe_accel.trainers.agree import AgreeingLoader, agreed_count
from hf_moe_accel.trainers.arguments import refuse_arguments
from hf_moe_accel.trainers.checkpoints import CheckpointMixin
from hf_moe_accel.trainers.finite import finite_loss

_PLAIN_LOSS = Trainer.compute_loss


class AcceleratedMoEMixin(CheckpointMixin):
    """Put it first in the bases: `class Mine(AcceleratedMoEMixin, AnyTrainer)`.

    The model is prepared in `create_accelerator_and_postprocess`: after PEFT and the process group, before placement,
    optimizer and reference models. Checkpoints are those of `CheckpointMixin`.
    """

    def __init__(self, *args: Any, moe_config: MoEAccelConfig | None = None, **kwargs: Any) -> None:
        """As the trainer it is mixed into, plus `moe_config`. All ranks must call.

        Args:
            args: of the trainer.
            moe_config: how experts are spread and computed; None means: choose well.
            kwargs: of the trainer. `model` may be a loaded model, a hub id or a local path; `peft_config` is taken
                also where the trainer itself knows no such argument.

        Raises:
            ValueError: an argument that does not go with a mixture-of-experts model, before weights are read.
        """
        self.moe_config = moe_config or MoEAccelConfig()
        signature = inspect.signature(super().__init__)
        peft_config = None if "peft_config" in signature.parameters else kwargs.pop("peft_config", None)
        bound = signature.bind_partial(*args, **kwargs)
        model = bound.arguments.get("model")
        training_args = self._training_arguments(model, bound.arguments.get("args"))
        if training_args is not None:
            bound.arguments["args"] = training_args
        loads_itself = hasattr(training_args, "model_init_kwargs") and peft_config is None
        model_init_kwargs = training_args.model_init_kwargs if loads_itself else None
        adopt_adapters(model)
        if isinstance(model, str | os.PathLike) and loads_itself:
            bound.arguments["model"] = str(model)
            self._let_it_load(str(model), training_args, bound.arguments)
        elif isinstance(model, str | os.PathLike):
            wanted = peft_config or bound.arguments.get("peft_config")
            model = bound.arguments["model"] = self._load(model, training_args, wanted)
        elif isinstance(model, nn.Module) and find_experts(model):
            refuse_arguments(training_args)
        if peft_config is not None:
            from hf_moe_accel.hf.peft_bridge import get_peft_model

            bound.arguments["model"] = get_peft_model(model, peft_config)
        elif bound.arguments.get("peft_config") is not None and isinstance(model, nn.Module):
            from hf_moe_accel.hf.peft_bridge import adapter_config

            # The trainer has PEFT make the wrappers, before the process of preparing takes them over.
            bound.arguments["peft_config"] = adapter_config(model, bound.arguments["peft_config"])
        self._user_save_only_model: bool | None = None
        self._ended_epoch: Iterator[Any] | None = None
        self._reference: Any = None
        try:
            super().__init__(*bound.args, **bound.kwargs)
        finally:
            if self._user_save_only_model is not None:
                self.args.save_only_model = self._user_save_only_model
            if loads_itself:
                training_args.model_init_kwargs = model_init_kwargs
        self._check_optimizer()
        if self.moe_config.expert_metrics:
            add_metrics(self)
        if self.moe_config.per_expert_adapter_on_save and hasattr(self.model, "peft_config"):
            from hf_moe_accel.hf.peft_bridge import check_per_expert

            check_per_expert(self.model)

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that was made before sharding, which would train parameters that nothing reads."""
        if self.optimizer is None or not self._is_distributed:
            return
        live = {id(parameter) for parameter in self.model.parameters()}
        if any(id(p) not in live for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "optimizers=(...) holds parameters that are no longer the model's, since sharding makes new ones. Use "
                "optimizer_cls_and_kwargs=(class, {...}) instead, or load the model with "
                "hf_moe_accel.AutoModelForCausalLM and give the optimizer parameter_groups(model)."
            )

    @property
    def _moe_runtime(self) -> MoERuntime | None:
        return None if self.model is None else runtime_of(self.model)

    def _load(self, source: str | os.PathLike[str], training_args: Any, peft_config: Any) -> Any:
        """The model of a hub id or path; arguments are refused before its weights are read."""
        structure = meta_model(AutoModelForCausalLM._auto_class, source, None)
        masters = _keeps_masters(structure.dtype, training_args)
        is_moe = choose_setup(structure, find_experts(structure), self.moe_config, mixed_precision=masters) is not None
        if is_moe:
            refuse_arguments(training_args)
        if training_args is not None:
            # Accelerate makes the process group, with the arguments' backend and timeout, before transformers would.
            _ = training_args.device
        if peft_config is not None and is_moe:
            from hf_moe_accel.hf.peft_bridge import adapter_config, why_not_after_sharding

            said = adapter_config(structure, peft_config)
            if why_not_after_sharding(said, find_experts(structure)):
                # What reads or copies whole weights comes before sharding: each rank reads the model then.
                return AutoModelForCausalLM._auto_class.from_pretrained(source, dtype="auto")
        return AutoModelForCausalLM.from_pretrained(source, moe_config=self.moe_config, fsdp_mixed_precision=masters)

    def _training_arguments(self, model: Any, args: Any) -> Any:
        """The arguments of the trainer; one with arguments of its own may make them here of none, or of others."""
        return args

    def _let_it_load(self, source: str, training_args: Any, arguments: dict[str, Any]) -> None:
        """Have a trainer of TRL, which loads models by name itself, read this rank's slices only.

        Its `args.model_init_kwargs` go to `from_pretrained`, those of an implied reference model as well.
        """
        kwargs = {"trust_remote_code": training_args.trust_remote_code} | (training_args.model_init_kwargs or {})
        structure = meta_model(AutoModelForCausalLM._auto_class, source, None, **kwargs)
        found = find_experts(structure)
        # TRL reads models in fp32 unless told otherwise.
        dtype = structure.dtype if "dtype" in kwargs else torch.float32
        masters = _keeps_masters(dtype, training_args)
        setup = choose_setup(structure, found, self.moe_config, mixed_precision=masters)
        if setup is None:
            return
        refuse_arguments(training_args)
        given = {"quantization_config": arguments.get("quantization_config")}
        refuse_load_arguments(given | (training_args.model_init_kwargs or {}))
        check_model(structure, setup.topology)
        reads_whole = _changes_vocabulary(training_args)
        if arguments.get("peft_config") is not None:
            from hf_moe_accel.hf.peft_bridge import adapter_config, why_not_after_sharding

            config = arguments["peft_config"] = adapter_config(structure, arguments["peft_config"])
            reads_whole |= why_not_after_sharding(config, found) is not None
        if setup.topology.world_size > 1 and not reads_whole:
            # Accelerate makes the process group, with the arguments' backend and timeout, before transformers would.
            _ = training_args.device
            training_args.model_init_kwargs = (training_args.model_init_kwargs or {}) | {
                "distributed_config": distributed_config(setup.topology, mixed_precision=masters)
            }

    def _prepare_model(self, model: Any, like: Any = None) -> Any:
        """Prepare a model that training made or was given; does nothing to a dense one or one that is prepared."""
        adopt_adapters(model)
        base = base_of(model)
        masters = _keeps_masters(base.dtype, self.args)
        if runtime_of(model) is None:
            if choose_setup(base, find_experts(base), self.moe_config, mixed_precision=masters) is None:
                return model
        refuse_arguments(self.args)
        keep_liger_off_experts(self.args)
        prepare_moe_model(model, self.moe_config, fsdp_mixed_precision=masters, like=like)
        runtime = runtime_of(model)
        assert runtime is not None
        self._compile(base, runtime)
        return model

    def _compile(self, base: Any, runtime: MoERuntime) -> None:
        """Compile a prepared model if the arguments or the environment say so, as Trainer would read them."""
        plugin = dynamo_plugin(self.args)
        graphs = cuda_graphs.LayerGraphs.of(base)
        if graphs is not None and not graphs.asked:
            graphs.remove()  # of an earlier trainer
        if plugin is None:
            if self.moe_config.cuda_graphs == "auto":
                cuda_graphs.replay_where_nothing_else_changes(base, runtime, self.args.device)
            return
        kwargs = plugin.to_kwargs()
        if plugin.mode == "reduce-overhead" and self.args.device.type == "cuda":
            reason = cuda_graphs.why_not(base, runtime)
            if reason is not None:
                raise ValueError(f"torch_compile_mode='reduce-overhead' makes CUDA graphs of layers, but {reason}.")
            del kwargs["mode"]  # torch.compile would make others
            if cuda_graphs.LayerGraphs.of(base) is None:
                cuda_graphs.LayerGraphs(base, runtime, self.args.device, **kwargs)
        else:
            compile_layers(base, **kwargs)
        # Accelerate would compile the model as a whole.
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, then prepare the model. All ranks must call."""
        super().create_accelerator_and_postprocess()
        if self.model is not None:
            self._prepare_model(self.model)
            if self._is_distributed and hasattr(self.args, "model_init_kwargs"):
                # With these TRL loads a reference model that nobody gave: each rank its slices.
                self.args.model_init_kwargs = (self.args.model_init_kwargs or {}) | {
                    "distributed_config": base_of(self.model).config.distributed_config
                }
        if self._user_save_only_model is None:
            # Trainer.__init__ raises for sharded models that would save their optimizer; ours puts the value back.
            self._user_save_only_model = self.args.save_only_model
            self.args.save_only_model |= self.model is None or self._moe_runtime is not None

    @property
    def ref_model(self) -> Any:
        """The reference model of trainers that have one: prepared like the policy as soon as it is set."""
        return self._reference

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        first = model is not None and runtime_of(model) is None
        self._reference = model if model is None else self._prepare_model(model, like=self.model)
        if first and self._is_distributed and getattr(self.args, "sync_ref_model", False):
            # TRL writes into its parameters after a step, which must be those that FSDP2 gathers from.
            model.register_forward_hook(lambda *_: reshard(model))

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model for a run or a trial, prepared; the one before gives back what it holds."""
        self._close()
        return self._prepare_model(super().call_model_init(trial), like=self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer, of the parameters that train: after a forward pass FSDP2 still shows gathered ones."""
        if self.model is not None:
            reshard(self.model)
        return super().create_optimizer(*args, **kwargs)

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As in the trainer; for a model of ours torch's fused AdamW with large parameters updated in less time."""
        optimizer_cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        if optimizer_cls is torch.optim.AdamW and kwargs.get("fused") and runtime_of(model) is not None:
            optimizer_cls = AdamW
        return optimizer_cls, kwargs

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As in the trainer, large gradients in less time."""
        if runtime_of(model) is None or self.accelerator.scaler is not None:
            return super()._clip_grad_norm(model)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        later = isinstance(optimizer, AdamW) and not any(map(_sees_gradients, self.callback_handler.callbacks))
        return clip_grad_norm_(model, self.args.max_grad_norm, optimizer=optimizer if later else None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer.

        Raises:
            ValueError: there is no checkpoint to resume from, or its files are not as they were saved; names each
                one, and the newest intact checkpoint.
            AllRanksError: a checkpoint could not be saved.
        """
        if resume_from_checkpoint and self._moe_runtime is not None:
            resume_from_checkpoint = self._resolve_resume(
                None if resume_from_checkpoint is True else resume_from_checkpoint
            )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except _TrialEnded:
            return None
        finally:
            self._end_saves()
            self._close()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer, whose filter for losses that are not finite need not wait for the device then.

        Where a subclass looks at the loss first, it is as it is.
        """
        loss = super().training_step(*args, **kwargs)
        if not self.args.logging_nan_inf_filter or type(self).training_step is not AcceleratedMoEMixin.training_step:
            return loss
        return finite_loss(loss, self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer; where nothing but the loss is read of what the model returns, nothing else is made."""
        reads = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        is_plain = getattr(super().compute_loss, "__func__", None) is _PLAIN_LOSS
        if reads or not is_plain or self._moe_runtime is None:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        with logits_as_made(self.model, base_of(self.model)):
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As in the trainer; an epoch is as long as on the rank that has the fewest batches. All ranks must call."""
        if self._is_distributed and has_length(dataloader):
            dataloader = AgreeingLoader(dataloader, args.device, agreed_count(len(dataloader), args.device))
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The micro-batches of a step; with data of unknown length as many as every rank has."""
        if not self._ranks_must_agree(self.train_dataset):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches: list[Any] = []
        if epoch_iterator is not self._ended_epoch:
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
            batches = batches[: agreed_count(len(batches), device)]
        if len(batches) < num_batches:
            # The trainer goes on asking up to `max_steps`; a rank that has more data must not read it.
            self._ended_epoch = epoch_iterator
        return super().get_batch_samples(iter(batches), len(batches), device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in the trainer; with data of unknown length it ends on all ranks together."""
        return self._agreeing(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in the trainer; with data of unknown length it ends on all ranks together."""
        return self._agreeing(super().get_test_dataloader(test_dataset))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer; rank 0's metrics count, so that all ranks decide alike. All ranks must call."""
        if not self._is_distributed:
            return super().evaluation_loop(*args, **kwargs)
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self._close()
        return output._replace(metrics=broadcast_object_list([output.metrics])[0])

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        """As in the trainer; where rank 0's search ends a trial early, it ends on all ranks. All ranks must call."""
        error: Exception | None = None
        try:
            super()._report_to_hp_search(trial, step, metrics)
        except Exception as raised:
            error = raised
        if self._is_distributed and self.hp_search_backend is not None:
            (ended,) = broadcast_object_list([error is not None])
            if ended:
                # Together, as it waits for all ranks: rank 0's error is on its way up then, and its model gone after.
                self._close()
            if ended and error is None:
                raise _TrialEnded
        if error is not None:
            raise error

    def _agreeing(self, loader: Any) -> Any:
        return AgreeingLoader(loader, self.args.device) if self._ranks_must_agree(loader.dataset) else loader

    def _ranks_must_agree(self, dataset: Any) -> bool:
        return isinstance(dataset, IterableDataset) and self._is_distributed

    @property
    def _is_distributed(self) -> bool:
        runtime = self._moe_runtime
        return runtime is not None and runtime.topology.world_size > 1

    def _close(self) -> None:
        for model in (self.model, self._reference):
            runtime = None if model is None else runtime_of(model)
            if runtime is not None:
                runtime.close()
                graphs = cuda_graphs.LayerGraphs.of(base_of(model))
                if graphs is not None:
                    graphs.release()


def _sees_gradients(callback: TrainerCallback) -> bool:
    """Whether a callback is called while gradients are clipped; transformers' and ours do not look at them then."""
    if type(callback).__module__.split(".")[0] in ("transformers", "hf_moe_accel"):
        return False
    names = ("on_pre_optimizer_step", "on_optimizer_step")
    return any(getattr(getattr(callback, n), "__func__", None) is not getattr(TrainerCallback, n) for n in names)


class _TrialEnded(Exception):
    """Rank 0's hyperparameter search ended the running trial."""


def _keeps_masters(dtype: Any, args: Any) -> bool:
    """Whether weights of a dtype are fp32 masters of bf16, asked for by the arguments or by `accelerate launch`."""
    return args is not None and args.mixed_precision == "bf16" and dtype in (torch.float32, "float32")


def _changes_vocabulary(args: Any) -> bool:
    """Whether a trainer of TRL will add another model's tokens, which a sharded model cannot take up."""
    template = getattr(args, "chat_template_path", None)
    return template is not None and not os.path.isfile(template)
