"""Sequences of different lengths end to end in one row: what the layers see of any such batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The segments of a packed row (1, T, ...), each a sequence of its own.

    Attributes:
        cu_seqlens: (segments + 1) int32 or int64: segment i is the tokens from cu_seqlens[i] to
            before cu_seqlens[i + 1]; 0 first, T last.
        places: (B, L) bool, where the tokens stood in right-padded rows; None if they came packed.
    """

    cu_seqlens: Tensor
    places: Tensor | None = None

    @classmethod
    def of_bounds(cls, cu_seqlens: Tensor, tokens: Tensor) -> Packing:
        """Check cu_seqlens against tokens (1, T).

        Values are read on the host, so a device is waited for; not while compiling.

        Raises:
            TypeError: cu_seqlens is not a tensor.
            ValueError: it is no ascending vector from 0 to T, or has another dtype or device.
        """
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens: wanted a torch.Tensor; got {type(cu_seqlens).__name__}")
        if cu_seqlens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"cu_seqlens: dtype: wanted int64 or int32; got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                "cu_seqlens: wanted shape (segments + 1) with at least one segment; "
                f"got {list(cu_seqlens.shape)}"
            )
        if cu_seqlens.device != tokens.device:
            raise ValueError(
                f"cu_seqlens: device: wanted the tokens', {tokens.device}; got {cu_seqlens.device}"
            )
        if tokens.shape[0] != 1:
            raise ValueError(
                f"tokens: wanted one packed row (1, T) with cu_seqlens; got {list(tokens.shape)}"
            )
        if not torch.compiler.is_compiling():
            _check_bounds(cu_seqlens, tokens.shape[1])
        return cls(cu_seqlens)

    @classmethod
    def of_lengths(cls, lengths: Tensor | Sequence[int], tokens: Tensor) -> Packing | None:
        """The right-padded rows of tokens (B, L) as segments; None where no row is padded.

        Raises:
            TypeError: lengths holds no integers.
            ValueError: lengths is no vector of B integers in [0, L].
        """
        rows, length = tokens.shape
        values = _integers(lengths)
        if len(values) != rows:
            raise ValueError(f"lengths: wanted {rows} (tokens.shape[0]); got {len(values)}")
        for row, value in enumerate(values):
            if not 0 <= value <= length:
                raise ValueError(
                    f"lengths: wanted values in [0, {length}] (tokens.shape[1]); "
                    f"got {value} in row {row}"
                )
        if all(value == length for value in values):
            return None
        device = tokens.device
        vector = torch.tensor(values, dtype=torch.int64, device=device)
        places = torch.arange(length, device=device) < vector[:, None]
        return cls(torch.nn.functional.pad(vector.cumsum(0), (1, 0)), places)

    @property
    def segments(self) -> int:
        """How many there are."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:
        """(segments) int64."""
        return self.cu_seqlens.diff().to(torch.int64)

    def pack(self, tokens: Tensor) -> Tensor:
        """The tokens (B, L) of padded rows as one row (1, T); those of a packed row as they are."""
        return tokens if self.places is None else tokens[self.places].unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """x (1, T, D) in the shape in which the tokens came; 0 where there is padding."""
        if self.places is None:
            return x
        out = x.new_zeros(*self.places.shape, x.shape[-1])
        return out.masked_scatter(self.places.unsqueeze(-1), x)

    def last(self) -> tuple[Tensor, Tensor]:
        """The token that ends each segment, and whether the segment has none (then it is 0)."""
        empty = self.lengths == 0
        return (self.cu_seqlens[1:].to(torch.int64) - 1).masked_fill(empty, 0), empty

    def tails(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last `count` tokens of every segment, or all of a shorter one.

        Returns their numbers in the row, their segments, and how many tokens of their segment come
        before them: int64 vectors of one length. A device is waited for.
        """
        lengths, starts = self.lengths, self.cu_seqlens[:-1].to(torch.int64)
        segment = torch.arange(self.segments, device=lengths.device).repeat_interleave(lengths)
        token = torch.arange(len(segment), device=lengths.device)
        step = token - starts[segment]
        kept = (step >= lengths[segment] - count).nonzero().squeeze(1)
        return kept, segment[kept], step[kept]


def _check_bounds(cu_seqlens: Tensor, total: int) -> None:
    bounds = cu_seqlens.to("cpu", torch.int64)
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: wanted 0 first; got {int(bounds[0])}")
    falls = (bounds.diff() < 0).nonzero()
    if len(falls):
        i = int(falls[0])
        raise ValueError(
            f"cu_seqlens: wanted ascending values; got {int(bounds[i + 1])} after "
            f"{int(bounds[i])} at [{i + 1}]"
        )
    if bounds[-1] != total:
        raise ValueError(
            f"cu_seqlens: wanted {total} (tokens.shape[1]) last; got {int(bounds[-1])}"
        )


def _integers(lengths: Tensor | Sequence[int]) -> list[int]:
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"lengths: wanted a vector of int64 or int32; "
                f"got {lengths.dtype} {list(lengths.shape)}"
            )
        return [int(value) for value in lengths.tolist()]
    values = list(lengths)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"lengths: wanted integers; got {value!r}")
    return values
