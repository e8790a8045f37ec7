"""Linear and embedding layers with the official initialisation of the released code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import INIT_MODES
from .linear import linear


def init_linear_(weight: Tensor, mode: str) -> Tensor:
    """Fill a weight (out, in) in place by the official mode of that name, and return it.

    "he": normal, std 1/sqrt(3 fan_in) (Kaiming with a = sqrt(5)); "bert": normal, std 0.02;
    "gaussian": normal, std 1, truncated at 3; "xavier": uniform; "none": zeros, for a model whose
    weights are loaded next (the released code leaves them uninitialised there).

    Raises:
        ValueError: no mode has that name.
    """
    if mode == "he":
        return nn.init.kaiming_normal_(weight, a=math.sqrt(5.0))
    if mode == "bert":
        return nn.init.normal_(weight, std=0.02)
    if mode == "gaussian":
        return nn.init.trunc_normal_(weight, std=1.0, a=-3.0, b=3.0)
    if mode == "xavier":
        return nn.init.xavier_uniform_(weight)
    if mode == "none":
        return nn.init.zeros_(weight)
    raise ValueError(f"init_mode: wanted one of {', '.join(INIT_MODES)}; got {mode!r}")


def init_embedding_(weight: Tensor) -> Tensor:
    """Fill a weight (V, D) in place: normal, std D^-1/2, truncated at 3 std."""
    std = weight.shape[-1] ** -0.5
    return nn.init.trunc_normal_(weight, std=std, a=-3.0 * std, b=3.0 * std)


class Linear(nn.Linear):
    """`nn.Linear` whose weight is initialised by a mode of `init_linear_` and whose bias is 0."""

    def __init__(self, in_features: int, out_features: int, bias: bool, init_mode: str) -> None:
        # Set first: nn.Linear's constructor calls reset_parameters.
        self.init_mode = init_mode
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        init_linear_(self.weight, self.init_mode)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class OutputLinear(nn.Linear):
    """The output projection (V, D): no bias, initialised like the embedding."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        init_embedding_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` with the official initialisation."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            init_embedding_(self.weight)
