"""The normalised feed-forward network of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import MegalodonConfig
from .init import Linear
from .norms import LayerNorm
from .precision import activation_dtype


class FFN(nn.Module):
    """residual + alpha * W2 (silu(W1 u) [* W3 u]), u = LayerNorm(y); no biases.

    Parameters: norm.weight and norm.bias (D) if norm_affine; fc1.weight, fc3.weight (F, D), fc3
    only with swiglu; fc2.weight (D, F); alpha (D) if rescale_nffn, initially 0.1 * 0.5^layer_id.
    """

    def __init__(self, config: MegalodonConfig, layer_id: int = 0) -> None:
        super().__init__()
        dim, hidden, mode = config.model_dim, config.ffn_hidden_dim, config.init_mode
        self.norm = LayerNorm(dim, config.norm_eps, config.norm_affine)
        self.fc1 = Linear(dim, hidden, bias=False, init_mode=mode)
        self.fc2 = Linear(hidden, dim, bias=False, init_mode=mode)
        self.fc3 = Linear(dim, hidden, bias=False, init_mode=mode) if config.swiglu else None
        self.dropout = nn.Dropout(config.dropout)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)
        self.alpha: nn.Parameter | None
        if config.rescale_nffn:
            self.alpha = nn.Parameter(torch.full((dim,), 0.1 * 0.5**layer_id))
        else:
            self.register_parameter("alpha", None)

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        """y (B, L, D) goes through the network; residual (B, L, D) is added to the result.

        They differ: Megalodon's feed-forward adds the *block's* input (two-hop residual).
        """
        u = self.norm(y.to(activation_dtype(y)))
        gate = self.fc1(u)
        hidden = F.silu_mul(gate, None if self.fc3 is None else self.fc3(u))
        out = self.dropout(self.fc2(self.hidden_dropout(hidden)))
        if self.alpha is not None:
            out = self.alpha * out
        total: Tensor = residual + out
        return total
