"""CEMA module: the complex exponential moving average with its official parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from .precision import KeepsPrecision, wide_zeros


class CEMA(KeepsPrecision):
    """Complex exponential moving average over time, N per channel (arXiv 2404.08801 section 3.1,
    as the released code computes it).

    Parameters, raw as in the released code: alpha and delta (D, N, 1), theta (D, 1, 1),
    gamma (D, N, 2) = (re, im), omega (D, 1).

    Args:
        embed_dim: D.
        ndim: N.
    """

    def __init__(self, embed_dim: int, ndim: int = 16) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.ndim = ndim
        self.alpha = nn.Parameter(wide_zeros(embed_dim, ndim, 1))
        self.delta = nn.Parameter(wide_zeros(embed_dim, ndim, 1))
        self.theta = nn.Parameter(wide_zeros(embed_dim, 1, 1))
        self.gamma = nn.Parameter(wide_zeros(embed_dim, ndim, 2))
        self.omega = nn.Parameter(wide_zeros(embed_dim, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The released code's initialisation."""
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        if not self.theta.is_meta:
            self.theta.copy_(_initial_theta(self.embed_dim).view(-1, 1, 1))
        nn.init.normal_(self.gamma[..., 0], std=1.0)
        nn.init.zeros_(self.gamma[..., 1])
        nn.init.trunc_normal_(self.omega, std=0.25, a=-1.0, b=1.0)

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Average x (B, L, D) after the state h (B, D, N, 2); None is zero.

        With cu_seqlens, x is a packed row (1, T, D) and h has a row per segment.

        Returns:
            y of x's shape and dtype, and the state after the last step (float32, or float64 for a
            float64 x). Differentiable in x, every parameter and the state.
        """
        parameters = self.alpha, self.delta, self.theta, self.gamma, self.omega
        return F.cema(x, *parameters, state, cu_seqlens=cu_seqlens)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, ndim={self.ndim}"


def _initial_theta(channels: int) -> Tensor:
    """logit(f), f a random permutation of D^(-i/D), i = 1..D.

    Drawn on the CPU whatever the default device, so that equally seeded ranks agree. One channel
    takes the first frequency of two, where the released code has logit(1) = inf.
    """
    base = max(channels, 2)
    steps = torch.arange(1, channels + 1, dtype=torch.float64, device="cpu")
    freqs = float(base) ** (-steps / base)
    return torch.logit(freqs[torch.randperm(channels, device="cpu")])
