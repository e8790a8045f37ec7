"""One layer: attention and feed-forward, both added to the block's input."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import MegalodonConfig
from ..state import LayerState
from .attention import MegaAttention
from .ffn import FFN


class Block(nn.Module):
    """y = x + MegaAttention(x); out = x + alpha * FFN(LayerNorm(y)): both add the block's input.

    Children: mega (`MegaAttention`, which adds x itself) and nffn (`FFN`).
    """

    def __init__(self, config: MegalodonConfig, layer_id: int = 0) -> None:
        super().__init__()
        self.mega = MegaAttention(config)
        self.nffn = FFN(config, layer_id)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        position: Tensor | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """Arguments and results are those of `MegaAttention.forward`."""
        y, new_state = self.mega(x, state, position, return_state, inplace_state)
        return self.nffn(y, residual=x), new_state
