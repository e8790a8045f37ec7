"""Decoding: one token per row and call, with everything prepared that stays the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import _C
from .nn import Block, TimestepNorm
from .nn.block import is_plain
from .nn.init import Embedding, OutputLinear
from .state import MegalodonState

if TYPE_CHECKING:
    from .model import Megalodon

_WARM_UPS = 3  # calls before a capture, as torch's documentation of CUDA graphs asks for


class Decoder:
    """`model(tokens, state, inplace_state=True)` for one token per row, faster.

    Made by `Megalodon.decoder`. On the CPU every layer's arguments are collected once, and a step
    is one call of the kernel of `block_step` per layer: what Python adds to it falls from two
    thirds to a tenth of the time of a small model. On a GPU a step is the replay of a CUDA graph.
    Where that would not compute what the modules do (a hook, a child that was replaced, dropout,
    autocast, many rows on the CPU) each call goes through the modules.

    It holds the tensors that model and state have when it is made: change them in place
    (`load_state_dict`, `copy_`) as you like; after `.to()` or `assign=True` make a new one.

    Attributes:
        state: the state, written by every step.
        prepared: "kernels", "graph", or "modules" where nothing could be prepared.
    """

    def __init__(self, model: Megalodon, state: MegalodonState) -> None:
        if not isinstance(state, MegalodonState):
            raise TypeError(f"state: wanted a MegalodonState; got {type(state).__name__}")
        self.state = state
        self._rows = state.batch_size
        self._vocab_size = model.config.vocab_size
        self._device = model.embed.weight.device
        with torch.inference_mode():
            tokens = torch.zeros((self._rows, 1), dtype=torch.int64, device=self._device)
            model.check(tokens, state, inplace_state=True, lengths=None)
            self.prepared, self._step = _prepare(model, state, tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Take one step.

        Args:
            tokens: (B, 1) int64 or int32, in [0, vocab_size). Values are checked on the CPU only.

        Returns:
            logits (B, 1, V), float32 (float64 for a float64 model). The next call overwrites them.

        Raises:
            TypeError: tokens is not a tensor.
            ValueError: tokens has the wrong dtype, shape or device.
            IndexError: a token is out of range (tokens on the CPU).
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"Decoder: tokens: wanted a torch.Tensor; got {type(tokens).__name__}")
        if tokens.shape != (self._rows, 1) or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Decoder: tokens: wanted int64 or int32 ({self._rows}, 1), the state's rows; got "
                f"{tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.device != self._device:
            raise ValueError(
                f"Decoder: tokens: device: wanted the model's, {self._device}; got {tokens.device}"
            )
        if self._device.type == "cpu":
            for token in tokens.flatten().tolist():
                if not 0 <= token < self._vocab_size:
                    raise IndexError(
                        f"Decoder: tokens: wanted ids in [0, {self._vocab_size}); got {token}"
                    )
        with torch.inference_mode():
            return self._step(tokens)


Step = Callable[[Tensor], Tensor]


def _prepare(model: Megalodon, state: MegalodonState, tokens: Tensor) -> tuple[str, Step]:
    def modules(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens, state, inplace_state=True)
        return logits

    device = tokens.device.type
    if state.batch_size == 0 or (model.training and model.config.any_dropout):
        return "modules", modules
    if device == "cuda" and not torch.is_autocast_enabled("cuda"):
        return "graph", _capture(model, state, tokens)
    if device == "cpu" and _is_plain(model, state.batch_size):
        return "kernels", _collect(model, state)
    return "modules", modules


def _is_plain(model: Megalodon, rows: int) -> bool:
    """Whether the kernels compute what the modules would."""
    parts: tuple[tuple[nn.Module, type[nn.Module]], ...] = (
        (model.embed, Embedding),
        (model.output.final_norm, TimestepNorm),
        (model.output.output, OutputLinear),
    )
    x = model.embed.weight[:1, None].expand(rows, -1, -1)
    return (
        not any(m._forward_hooks or m._forward_pre_hooks for m in (model, model.output))
        and all(is_plain(module, kind) for module, kind in parts)
        and all(
            isinstance(layer, Block) and is_plain(layer, Block) and layer.is_step(x)
            for layer in model.layers
        )
    )


def _collect(model: Megalodon, state: MegalodonState) -> Step:
    """The step as calls of kernels: two buffers take turns as a layer's input and output."""
    rows, config = state.batch_size, model.config
    embedding = model.embed.weight.detach()
    first = embedding.new_empty(rows, config.model_dim)
    x, y = first, torch.empty_like(first)
    layers = []
    for layer, layer_state in zip(model.layers, state.layers, strict=True):
        assert isinstance(layer, Block)
        layers.append((*layer.step_arguments(x, layer_state, state.position), (y,)))
        x, y = y, x

    norm = model.output.final_norm
    affine = (norm.weight.detach(), norm.bias.detach())
    last = (x[:, None], *affine, norm.num_groups, norm.eps, *state.final_norm, None, None)
    normed, *after = _C.timestep_norm_forward(*last)
    outputs = (normed, *after)
    head = (normed[:, 0], model.output.output.weight.detach(), None)
    logits: Tensor = _C.linear_step_forward(*head)
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    scale = math.sqrt(config.model_dim) if config.scale_emb else 1.0
    block_step, timestep_norm, linear_step, position = (
        _C.block_step_forward,
        _C.timestep_norm_forward,
        _C.linear_step_forward,
        state.position,
    )

    def step(tokens: Tensor) -> Tensor:
        torch.index_select(embedding, 0, tokens[:, 0], out=first)
        if scale != 1.0:
            first.mul_(scale)
        for arguments in layers:
            block_step(*arguments)
        timestep_norm(*last, outputs)
        for mine, value in zip(state.final_norm, after, strict=False):
            mine.copy_(value)
        position.add_(1)
        linear_step(*head, (logits,))
        return logits.to(wide)[:, None]

    return step


def _capture(model: Megalodon, state: MegalodonState, tokens: Tensor) -> Step:
    """The step as a CUDA graph. Not yet run on a GPU."""
    side = torch.cuda.Stream(tokens.device)
    side.wait_stream(torch.cuda.current_stream(tokens.device))
    with torch.cuda.stream(side):
        spare = state.clone()
        for _ in range(_WARM_UPS):
            model(tokens, spare, inplace_state=True)
    torch.cuda.current_stream(tokens.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits: Tensor = model(tokens, state, inplace_state=True)

    def step(new: Tensor) -> Tensor:
        tokens.copy_(new)
        graph.replay()
        return logits

    return step
