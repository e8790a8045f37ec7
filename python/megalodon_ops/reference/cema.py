"""Complex exponential moving average (CEMA), arXiv 2404.08801, as the released code has it.

The released code (XuezheMax/megalodon) does not rotate the input term, scales gamma by sqrt(1/N)
and adds omega x.
"""

import math

import torch
from torch import Tensor

from ._common import per_segment, row, stat_dtype


def cema_coefficients(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The coefficients of the recurrence, in float64, from the raw parameters.

        a = sigmoid(alpha)
        rho = 1 - sigmoid(alpha) sigmoid(delta)
        phi_n = n (2 pi / N) sigmoid(theta),  n = 1 .. N
        g = sqrt(1/N) (gamma_re + i gamma_im)

    Shapes: alpha, delta (D, N); theta (D); gamma (D, N, 2). Returns a, rho, phi (D, N) float64 and
    g (D, N) complex128.
    """
    alpha, delta, theta, gamma = (p.double() for p in (alpha, delta, theta, gamma))
    N = alpha.shape[1]
    a = alpha.sigmoid()
    # 1 - sigmoid(alpha) sigmoid(delta) without cancellation when both sigmoids are near 1.
    rho = (-alpha).sigmoid() + a * (-delta).sigmoid()
    n = torch.arange(1, N + 1, dtype=torch.float64, device=alpha.device)
    phi = n * (2 * math.pi / N) * theta.sigmoid()[:, None]
    g = math.sqrt(1 / N) * torch.complex(gamma[..., 0], gamma[..., 1])
    return a, rho, phi, g


def cema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The CEMA recurrence, step by step.

        h_t = a x_t + q h_{t-1},   q = rho e^{i phi},   h_{-1} = h0 or 0
        y_t = Re sum_n g_n h_{t,n} + omega x_t

    Shapes: x (B, L, D); alpha, delta (D, N); theta, omega (D); gamma (D, N, 2); h0 (B, D, N, 2),
    last axis (re, im). Returns y (B, L, D) in x's dtype and the last state h (B, D, N, 2), not
    multiplied by g. With cu_seqlens (segments + 1), x is (1, T, D), every segment is run alone, and
    h0 and h have a row per segment. `algorithm` is ignored. Differentiable in every floating-point
    argument.
    """
    if cu_seqlens is not None:
        return per_segment(
            lambda i, t: cema(x[:, t], alpha, delta, theta, gamma, omega, row(h0, i)),
            cu_seqlens,
            dims=(1, 0),
        )
    stat = stat_dtype(x)
    a, rho, phi, g = cema_coefficients(alpha, delta, theta, gamma)
    a, q, g = a.to(stat), torch.polar(rho, phi).to(stat.to_complex()), g.to(stat.to_complex())
    u = x.to(stat)

    B, L, D = x.shape
    zero = torch.zeros(B, D, a.shape[1], dtype=q.dtype, device=x.device)
    h = [zero if h0 is None else torch.view_as_complex(h0.to(stat).contiguous())]
    for t in range(L):
        h.append(a * u[:, t, :, None] + q * h[-1])

    y = (g * torch.stack(h, 1)[:, 1:]).real.sum(-1) + omega.to(stat) * u
    return y.to(x.dtype), torch.view_as_real(h[-1])
