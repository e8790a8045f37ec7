"""TimestepNorm, RMSNorm and LayerNorm modules. The effective scale of each is `weight + 1`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional import TimestepNormState
from .precision import KeepsPrecision, wide_zeros


class TimestepNorm(KeepsPrecision):
    """Group normalisation by the running mean and variance of all steps so far (arXiv 2404.08801
    section 3.2, as the released code computes it).

    Args:
        num_features: D.
        num_groups: G, a divisor of D.
        prior_count: n0 virtual steps before the first, of learned mean and log-variance. With 0
            (what Megalodon uses) the prior has no weight, and its entries are buffers.
        eps: inside the root.

    Parameters: weight (D) and bias (D), both initially 0; prior_mean (G) and prior_logv (G),
    learned where prior_count > 0. Buffer: prior_count () int64.

    Raises:
        ValueError: num_groups does not divide num_features, or prior_count is too small for
            groups of one channel (their first step would have zero variance).
    """

    prior_count: Tensor
    prior_mean: Tensor
    prior_logv: Tensor

    def __init__(
        self, num_features: int, num_groups: int, prior_count: int = 0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_features % num_groups:
            raise ValueError(
                f"TimestepNorm: num_groups: wanted a divisor of num_features = {num_features}; "
                f"got {num_groups}"
            )
        if num_groups == num_features and prior_count < 2:
            raise ValueError(
                f"TimestepNorm: prior_count: wanted 2 or more with groups of one channel; "
                f"got {prior_count}"
            )
        self.num_features = num_features
        self.num_groups = num_groups
        self.eps = eps
        self.initial_count = prior_count
        self.weight = nn.Parameter(wide_zeros(num_features))
        self.bias = nn.Parameter(wide_zeros(num_features))
        self.register_buffer("prior_count", torch.tensor(prior_count, dtype=torch.int64))
        if prior_count > 0:
            self.prior_mean = nn.Parameter(wide_zeros(num_groups))
            self.prior_logv = nn.Parameter(wide_zeros(num_groups))
        else:
            self.register_buffer("prior_mean", wide_zeros(num_groups))
            self.register_buffer("prior_logv", wide_zeros(num_groups))

    def forward(
        self,
        x: Tensor,
        state: TimestepNormState | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, TimestepNormState]:
        """Normalise x (B, L, D) after the steps summarised by `state`.

        Args:
            x: (B, L, D), any floating dtype.
            state: count (B) int64, mean and var (B, G); None is the prior.
            padding_mask: (B, L) bool, True = padded: the output is 0 and the state stands still.
            cu_seqlens: bounds of the segments of a packed row x (1, T, D); the state then has a row
                per segment.

        Returns:
            y of x's shape and dtype, and the state after the last step.

        Differentiable in x, weight, bias, the prior and the state's mean and var.
        """
        if state is None and self.initial_count > 0:
            rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            state = TimestepNormState(
                self.prior_count.expand(rows).contiguous(),
                self.prior_mean.expand(rows, -1).contiguous(),
                self.prior_logv.exp().expand(rows, -1).contiguous(),
            )
        scale = self.weight, self.bias, self.num_groups, self.eps
        return F.timestep_norm(x, *scale, state, padding_mask, cu_seqlens=cu_seqlens)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}prior_count"
        given = state_dict.get(key)
        if given is not None and given.device.type != "meta" and int(given) != self.initial_count:
            error_msgs: list[str] = args[-1]
            error_msgs.append(
                f"{key}: the config wants {self.initial_count}; the checkpoint has {int(given)}"
            )
            # torch copies whatever is in the dictionary, refused or not.
            own = torch.tensor(self.initial_count, device=given.device)
            state_dict = {**state_dict, key: own}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}"


class RMSNorm(KeepsPrecision):
    """y = x / sqrt(mean(x^2) + eps) * (weight + 1) over the last axis.

    Parameter: weight (D), initially 0; absent where `affine` is off.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(wide_zeros(num_features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), any floating dtype -> y of the same shape and dtype."""
        return F.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


class LayerNorm(KeepsPrecision):
    """y = (x - mean) / sqrt(var + eps) * (weight + 1) + bias over the last axis, biased variance.

    Parameters: weight (D) and bias (D), initially 0; absent where `affine` is off.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(wide_zeros(num_features)) if affine else None
        self.bias = nn.Parameter(wide_zeros(num_features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), any floating dtype -> y of the same shape and dtype."""
        return F.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"
