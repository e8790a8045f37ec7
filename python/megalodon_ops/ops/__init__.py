"""The ops: one module per op, each of which adds itself to the registry when imported."""

from megalodon_ops.ops import cema, rms_norm

__all__ = ["cema", "rms_norm"]
