"""One layer: attention and feed-forward, both added to the block's input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MegalodonConfig
from ..state import LayerState
from .attention import MegaAttention
from .cema import CEMA
from .ffn import FFN
from .init import Linear
from .norms import LayerNorm, RMSNorm, TimestepNorm
from .packing import Packing
from .precision import activation_dtype

# Rows from which a decoding step is faster op by op, with its linear layers as GEMMs of all rows.
_MANY_ROWS = 128


class Block(nn.Module):
    """y = x + MegaAttention(x); out = x + alpha * FFN(LayerNorm(y)): both add the block's input.

    Children: mega (`MegaAttention`, which adds x itself) and nffn (`FFN`).

    A decoding step of up to 127 rows in place is one op, `block_step`, where nothing but the
    modules made here has a say: no dropout, no autocast, no hook on a child, no child that was
    replaced.
    """

    def __init__(self, config: MegalodonConfig, layer_id: int = 0) -> None:
        super().__init__()
        self.mega = MegaAttention(config)
        self.nffn = FFN(config, layer_id)
        self.any_dropout = config.any_dropout

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        position: Tensor | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        packing: Packing | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Arguments and results are those of `MegaAttention.forward`."""
        in_place = inplace_state and packing is None
        if in_place and state is not None and position is not None and self.is_step(x):
            return self._step(x, state, position), state
        y, new_state = self.mega(x, state, position, return_state, inplace_state, packing)
        return self.nffn(y, residual=x), new_state

    def is_step(self, x: Tensor) -> bool:
        """Whether `block_step` computes what the modules would."""
        return (
            x.shape[1] == 1
            and x.shape[0] < _MANY_ROWS
            and x.device.type == "cpu"
            and not (self.training and self.any_dropout)
            and activation_dtype(x) == x.dtype
            and all(is_plain(module, kind) for module, kind in self._parts())
        )

    def _parts(self) -> Iterator[tuple[nn.Module | None, type[nn.Module]]]:
        mega, nffn = self.mega, self.nffn
        yield mega, MegaAttention
        yield nffn, FFN
        yield mega.timenorm, TimestepNorm
        yield mega.cema, CEMA
        yield mega.rmsnorm, RMSNorm
        yield nffn.norm, LayerNorm
        for linear in (mega.wv, mega.wz, mega.wr, mega.wh1, mega.wh2, nffn.fc1, nffn.fc2, nffn.fc3):
            yield linear, Linear

    def _step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        y: Tensor = torch.ops.megalodon.block_step(*self.step_arguments(x[:, 0], state, position))
        return y.unsqueeze(1)

    def step_arguments(self, x: Tensor, state: LayerState, position: Tensor) -> tuple[Any, ...]:
        """All arguments of `block_step` for x (B, D)."""
        mega, nffn, cema = self.mega, self.nffn, self.mega.cema
        return (
            *(x, state.k_cache, state.v_cache, *state.norm, state.h, position),
            *(mega.timenorm.weight, mega.timenorm.bias),
            *(cema.alpha.squeeze(2), cema.delta.squeeze(2), cema.theta.flatten()),
            *(cema.gamma, cema.omega.flatten()),
            mega.rmsnorm.weight,
            *(mega.wv.weight, mega.wv.bias, mega.wz.weight, mega.wz.bias),
            *(mega.wr.weight, mega.wr.bias, mega.wh1.weight, mega.wh1.bias, mega.wh2.weight),
            *(mega.gamma, mega.beta),
            *(nffn.norm.weight, nffn.norm.bias),
            *(nffn.fc1.weight, nffn.fc2.weight),
            *(None if nffn.fc3 is None else nffn.fc3.weight, nffn.alpha),
            *(mega.timenorm.num_groups, mega.num_heads, mega.chunk_size, mega.rope_base, mega.eps),
            mega.sliding,
        )


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling the module would run that class's forward and nothing else."""
    return module is None or (
        type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks
    )
