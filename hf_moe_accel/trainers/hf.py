"""The one-import swap for `transformers.Trainer`."""

from __future__ import annotations

from transformers import Trainer

from hf_moe_accel.trainers.mixin import AcceleratedMoEMixin


class AcceleratedMoETrainer(AcceleratedMoEMixin, Trainer):
    """`transformers.Trainer` for mixture-of-experts models: same arguments, plus `moe_config`.

    `model` may also be a hub id or a local path; every rank then reads only its own slices of the weights. A dense
    model trains exactly as with `Trainer`. See `AcceleratedMoEMixin` for what is refused and why.
    """
