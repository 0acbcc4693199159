"""STATION 1: rows move to the rank of their experts, and back."""

from hf_moe_accel.dispatch.base import TokenDispatcher
from hf_moe_accel.registry import Registry

DISPATCHERS: Registry[type[TokenDispatcher]] = Registry("token dispatcher")
DISPATCHERS.register("deepep", "hf_moe_accel.dispatch.deepep:DeepEPDispatcher")
DISPATCHERS.register("all_to_all", "hf_moe_accel.dispatch.all_to_all:AllToAllDispatcher")
DISPATCHERS.register("local", "hf_moe_accel.dispatch.local:LocalDispatcher")
