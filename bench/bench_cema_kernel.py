"""cema_kernel against the same blocking in plain torch: powers as a product of two tables."""

import math
from typing import Any

import pytest
import torch
from harness import measure
from torch import Tensor

from megalodon_ops import registry
from megalodon_ops._library import Maker

OP = registry["cema_kernel"]


def _torch(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int) -> Tensor:
    N = alpha.shape[1]
    a = alpha.sigmoid()
    n = torch.arange(1, N + 1, dtype=alpha.dtype, device=alpha.device)
    phi = n * (2 * math.pi / N) * theta.sigmoid()[:, None]
    log_q = torch.complex(torch.log1p(-a * delta.sigmoid()), phi)
    c = a * torch.view_as_complex(gamma) / math.sqrt(N)
    powers = torch.exp(log_q[..., None] * torch.arange(64, device=alpha.device))
    coarse = (
        torch.exp(log_q[..., None] * 64 * torch.arange((length + 63) // 64, device=alpha.device))
        * c[..., None]
    )
    return torch.einsum("dnj,dni->dij", powers, coarse).real.flatten(1)[:, :length].contiguous()


def _arguments(D: int, L: int, shift: float) -> tuple[Any, ...]:
    make, N = Maker(torch.float32), 16
    alpha, delta, theta, gamma = make.stat(D, N), make.stat(D, N), make.stat(D), make.stat(D, N, 2)
    return alpha, delta + shift, theta, gamma, L


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("shift", [0.0, -6.0], ids=["decaying", "lasting"])
def test_cema_kernel(benchmark: Any, shift: float, backward: bool) -> None:
    measure(
        benchmark,
        OP,
        _arguments(512, 4096, shift),
        _arguments(64, 300, shift),
        backward=backward,
        floor="fma",
        peers={"torch": _torch},
    )
