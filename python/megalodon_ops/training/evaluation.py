"""Bits per byte of a run of bytes, read once and in constant memory, beside gzip and xz."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megalodon_ops.loss import cross_entropy
from megalodon_ops.model import Megalodon
from megalodon_ops.tokenizer import BYTES, Tokenizer

DEFAULT_PIECE = 2048


def byte_tensor(data: bytes) -> torch.Tensor:
    """The bytes as a batch of one: (1, len) int64."""
    return _tensor(data)


def _tensor(tokens: Sequence[int]) -> torch.Tensor:
    array = np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.asarray(tokens)
    return torch.from_numpy(array.astype(np.int64)).unsqueeze(0)


class ModelCoder:
    """The length of the code that the model would need, fed token by token or more.

    The first token has no context and costs log2 of the vocabulary (8 bits of a byte), so the total
    is that of a real, decodable code. The sum is float64: a million float32 terms would lose the
    digits that pieces must agree on. `longest`: tokens in one call of the model.
    """

    def __init__(self, model: Megalodon, longest: int = DEFAULT_PIECE) -> None:
        self._model, self._longest = model, longest
        self._state = model.init_state(1)
        self._last: int | None = None
        self.bits = 0.0

    @torch.inference_mode()
    def update(self, tokens: Sequence[int]) -> None:
        """Add the next tokens (of any number, none included)."""
        if not len(tokens):
            return
        row = _tensor(tokens)
        if self._last is None:
            self.bits += math.log2(self._model.config.vocab_size)
            inputs, targets = row[:, :-1], row[:, 1:]
        else:
            inputs = torch.cat([torch.tensor([[self._last]]), row[:, :-1]], dim=1)
            targets = row
        parts = inputs.split(self._longest, 1), targets.split(self._longest, 1)
        for part, wanted in zip(*parts, strict=True):
            if part.shape[1]:
                hidden = self._model(part, self._state, inplace_state=True, outputs="hidden")
                weight = self._model.output.output.weight
                nats = cross_entropy(hidden, weight, wanted, reduction="none")
                self.bits += nats.double().sum().item() / math.log(2)
        self._last = int(row[0, -1])


def _counted(pieces: Iterable[bytes], count: Callable[[bytes], None]) -> Iterator[bytes]:
    """The same pieces, each of which `count` is told first."""
    for piece in pieces:
        count(piece)
        yield piece


def bits_per_byte(
    model: Megalodon,
    pieces: Iterable[bytes],
    stop: Callable[[], bool] = lambda: False,
    tokenizer: Tokenizer = BYTES,
) -> float | None:
    """Bits per byte of the pieces end to end, or None if `stop`; the model keeps its mode."""
    training = model.training
    model.eval()
    count = 0

    def add(piece: bytes) -> None:
        nonlocal count
        count += len(piece)

    try:
        coder = ModelCoder(model)
        for tokens in tokenizer.stream(_counted(pieces, add)):
            if stop():
                return None
            coder.update(tokens)
    finally:
        model.train(training)
    return coder.bits / count if count else None


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
    tokenizer: Tokenizer = BYTES,
    longest: int = DEFAULT_PIECE,
) -> Comparison:
    """The model's bits per byte next to `gzip -9` and `xz -9` of the same bytes, in one pass.

    `advance` is told the length of each piece done. The compressors' windows (32 KiB and 64 MiB)
    are their own; nothing here grows with the input. `longest`: as of `ModelCoder`.
    """
    coder = ModelCoder(model.eval(), longest)
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: gzip's own header and checksum
    xz = lzma.LZMACompressor(preset=9)
    count = gzip_bytes = xz_bytes = 0

    def squeeze(piece: bytes) -> None:
        nonlocal count, gzip_bytes, xz_bytes
        count += len(piece)
        gzip_bytes += len(gzip.compress(piece))
        xz_bytes += len(xz.compress(piece))

    told = 0
    for tokens in tokenizer.stream(_counted(pieces, squeeze)):
        coder.update(tokens)
        advance(count - told)
        told = count
    gzip_bytes += len(gzip.flush())
    xz_bytes += len(xz.flush())
    return Comparison(count, coder.bits / count, 8 * gzip_bytes / count, 8 * xz_bytes / count)
