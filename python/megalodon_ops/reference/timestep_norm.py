"""Timestep normalisation, arXiv 2404.08801, as the released code computes it."""

import torch
from torch import Tensor

from ._common import per_segment, row, stat_dtype


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    count: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise every group of channels by its mean and variance over all time steps so far.

    Each step counts as one, with the group's own mean mu_t and biased variance s_t over its D/G
    channels:

        n' = n + 1,   M' = (n M + mu_t) / n',   V' = (n V + s_t) / n' + n (mu_t - M)^2 / n'^2
        y_t = (x_t - M') / sqrt(V' + eps) (weight + 1) + bias

    A padded step (padding_mask True) leaves n, M, V as they are and gives y_t = 0.

    Shapes: x (B, L, D); weight, bias (D); count (B) int64; mean, var (B, G); padding_mask (B, L)
    bool. Without a state the start is n = 0, M = 0, V = 1. Returns y (B, L, D) in x's dtype, the
    last count, mean and var, and step_mean = M' and step_rstd = 1 / sqrt(V' + eps) of every step,
    (B, L, G). With cu_seqlens (segments + 1), x is (1, T, D), every segment is run alone, and
    count, mean and var have a row per segment. Differentiable in x, weight, bias, mean, var.
    """
    if cu_seqlens is not None:

        def alone(i: int, t: slice) -> tuple[Tensor, ...]:
            state = row(count, i), row(mean, i), row(var, i)
            mask = None if padding_mask is None else padding_mask[:, t]
            return timestep_norm(x[:, t], weight, bias, num_groups, eps, *state, mask)

        return per_segment(alone, cu_seqlens, dims=(1, 0, 0, 0, 1, 1))
    stat = stat_dtype(x)
    B, L, D = x.shape
    G = num_groups
    groups = torch.unflatten(x.to(stat), -1, (G, D // G))
    mu = groups.mean(-1)
    s = (groups - mu[..., None]).square().mean(-1)

    n = torch.zeros(B, dtype=torch.int64, device=x.device) if count is None else count
    M = [torch.zeros(B, G, dtype=stat, device=x.device) if mean is None else mean.to(stat)]
    V = [torch.ones(B, G, dtype=stat, device=x.device) if var is None else var.to(stat)]
    if padding_mask is None:
        padding_mask = torch.zeros(B, L, dtype=torch.bool, device=x.device)

    for t in range(L):
        padded = padding_mask[:, t]
        c1 = (n / (n + 1).double()).to(stat)[:, None]
        c2 = (1 / (n + 1).double()).to(stat)[:, None]
        M_t = c1 * M[-1] + c2 * mu[:, t]
        V_t = c1 * V[-1] + c2 * s[:, t] + c1 * c2 * (mu[:, t] - M[-1]) ** 2
        M.append(torch.where(padded[:, None], M[-1], M_t))
        V.append(torch.where(padded[:, None], V[-1], V_t))
        n = torch.where(padded, n, n + 1)

    step_mean = torch.stack(M, 1)[:, 1:]
    step_rstd = (torch.stack(V, 1)[:, 1:] + eps).rsqrt()
    normed = ((groups - step_mean[..., None]) * step_rstd[..., None]).flatten(-2)
    y = normed * (weight.to(stat) + 1) + bias.to(stat)
    y = y.masked_fill(padding_mask[..., None], 0)
    return y.to(x.dtype), n, M[-1], V[-1], step_mean, step_rstd
