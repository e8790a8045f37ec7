"""The operators as equations in plain PyTorch: what every kernel is tested against.

Each function has the name, arguments and results of its compiled op, is differentiable by autograd,
and computes in float32, or in float64 when its activations are float64. None of them is fast.
"""

from .block_step import block_step
from .cema import cema
from .cema_kernel import cema_kernel
from .chunk_attention import chunk_attention
from .chunk_attention_step import chunk_attention_step
from .fft_conv import fft_conv
from .layer_norm import layer_norm
from .linear_step import linear_step
from .qk_norm_rope import qk_norm_rope
from .rms_norm import rms_norm
from .silu_mul import silu_mul
from .timestep_norm import timestep_norm

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
