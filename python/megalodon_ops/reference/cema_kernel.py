"""The convolution kernel of CEMA (arXiv 2404.08801), as the released code evaluates it."""

import torch
from torch import Tensor

from .cema import cema_coefficients


def cema_kernel(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int) -> Tensor:
    """The response of CEMA to an impulse, without the omega term.

        k_t = Re sum_n a_n g_n q_n^t,   t = 0 .. length - 1
            = sum_n a_n rho_n^t (Re g_n cos(t phi_n) - Im g_n sin(t phi_n))

    Shapes: alpha, delta (D, N); theta (D); gamma (D, N, 2). Returns k (D, length) in alpha's dtype.
    Differentiable in alpha, delta, theta, gamma.
    """
    a, rho, phi, g = (c[..., None] for c in cema_coefficients(alpha, delta, theta, gamma))
    t = torch.arange(length, dtype=torch.float64, device=alpha.device)
    k = a * rho**t * (g.real * torch.cos(t * phi) - g.imag * torch.sin(t * phi))
    return k.sum(1).to(alpha.dtype)
