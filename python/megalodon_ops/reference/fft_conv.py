"""Causal long convolution, the kernel form of CEMA (arXiv 2404.08801), written as the sum it is."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._common import stat_dtype


def fft_conv(x: Tensor, k: Tensor) -> Tensor:
    """Causal convolution of every channel with its own kernel.

        y_t = sum_{s <= t} k_s x_{t-s}

    Shapes: x (B, L, D); k (D, L). Returns y (B, L, D) in x's dtype. Differentiable in x and k.
    """
    u, k = x.to(stat_dtype(x)), k.to(stat_dtype(x))
    L = x.shape[1]
    y = torch.zeros_like(u)
    for s, k_s in enumerate(k.unbind(1)):
        y = y + pad(k_s * u[:, : L - s], (0, 0, s, 0))
    return y.to(x.dtype)
