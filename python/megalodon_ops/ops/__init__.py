"""The ops: one module per op, each of which adds itself to the registry when imported."""

from megalodon_ops.ops import (
    block_step,
    cema,
    cema_kernel,
    chunk_attention,
    chunk_attention_step,
    fft_conv,
    layer_norm,
    linear_step,
    qk_norm_rope,
    rms_norm,
    silu_mul,
    timestep_norm,
)

__all__ = [
    "block_step",
    "cema",
    "cema_kernel",
    "chunk_attention",
    "chunk_attention_step",
    "fft_conv",
    "layer_norm",
    "linear_step",
    "qk_norm_rope",
    "rms_norm",
    "silu_mul",
    "timestep_norm",
]
