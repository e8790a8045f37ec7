"""The ops: one module per op, each of which adds itself to the registry when imported."""

from megalodon_ops.ops import rms_norm

__all__ = ["rms_norm"]
