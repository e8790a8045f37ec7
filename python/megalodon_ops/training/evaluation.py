"""Bits per byte of a run of bytes, read once and in constant memory, beside gzip and xz."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from megalodon_ops.loss import cross_entropy
from megalodon_ops.model import Megalodon

DEFAULT_PIECE = 2048


def byte_tensor(data: bytes) -> torch.Tensor:
    """The bytes as a batch of one: (1, len) int64."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64)).unsqueeze(0)


class ModelCoder:
    """The length of the code that the model would need, fed piece by piece.

    The first byte has no context and costs 8 bits, so the total is that of a real, decodable code.
    The sum is float64: a million float32 terms would lose the digits that pieces must agree on.
    """

    def __init__(self, model: Megalodon) -> None:
        self._model = model
        self._state = model.init_state(1)
        self._last = b""
        self.bits = 0.0
        self.count = 0

    @torch.inference_mode()
    def update(self, piece: bytes) -> None:
        """Add the bytes of the next piece (of any length, empty included)."""
        if not piece:
            return
        if not self._last:
            self.bits += 8.0
        inputs, targets = self._last + piece[:-1], piece if self._last else piece[1:]
        if inputs:
            hidden = self._model(
                byte_tensor(inputs), self._state, inplace_state=True, outputs="hidden"
            )
            weight = self._model.output.output.weight
            nats = cross_entropy(hidden, weight, byte_tensor(targets), reduction="none")
            self.bits += nats.double().sum().item() / math.log(2)
        self._last = piece[-1:]
        self.count += len(piece)


def bits_per_byte(
    model: Megalodon,
    pieces: Iterable[bytes],
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Bits per byte of the pieces end to end, or None if `stop`; the model keeps its mode."""
    training = model.training
    model.eval()
    try:
        coder = ModelCoder(model)
        for piece in pieces:
            if stop():
                return None
            coder.update(piece)
    finally:
        model.train(training)
    return coder.bits / coder.count if coder.count else None


@dataclass(frozen=True)
class Comparison:
    """Sizes of one run of `count` bytes, in bits per byte."""

    count: int
    model: float
    gzip: float
    xz: float


def compare(
    model: Megalodon,
    pieces: Iterable[bytes],
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """The model's bits per byte next to `gzip -9` and `xz -9` of the same bytes, in one pass.

    `advance` is told the length of each piece done. The compressors' windows (32 KiB and 64 MiB)
    are their own; nothing here grows with the input.
    """
    coder = ModelCoder(model.eval())
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: gzip's own header and checksum
    xz = lzma.LZMACompressor(preset=9)
    gzip_bytes = xz_bytes = 0
    for piece in pieces:
        coder.update(piece)
        gzip_bytes += len(gzip.compress(piece))
        xz_bytes += len(xz.compress(piece))
        advance(len(piece))
    gzip_bytes += len(gzip.flush())
    xz_bytes += len(xz.flush())
    count = coder.count
    return Comparison(count, coder.bits / count, 8 * gzip_bytes / count, 8 * xz_bytes / count)
