"""Rows of different lengths in one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """The lengths of right-padded rows, in the forms in which the layers want them.

    Attributes:
        lengths: (B) int64, tokens that count in each row.
        padding: (B, L) bool, True where a step is padding.
        groups: the distinct lengths, each with the rows (int64) that have it.
    """

    lengths: Tensor
    padding: Tensor
    groups: tuple[tuple[int, Tensor], ...]

    @classmethod
    def of(cls, lengths: Tensor | Sequence[int], tokens: Tensor) -> Ragged | None:
        """Check the lengths against tokens (B, L); None where no row is padded.

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
        padding = torch.arange(length, device=device) >= vector[:, None]
        members: dict[int, list[int]] = {}
        for row, value in enumerate(values):
            members.setdefault(value, []).append(row)
        groups = tuple((n, torch.tensor(who, device=device)) for n, who in sorted(members.items()))
        return cls(vector, padding, groups)

    def recur(
        self,
        fn: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        x: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run a recurrence that knows no padding: one call for each distinct length.

        fn maps x (B', n, D) and the state to y and the state after; y is 0 where there is padding.
        """
        ys, states = [], []
        for n, rows in self.groups:
            before = None if state is None else state.index_select(0, rows)
            y, after = fn(x.index_select(0, rows)[:, :n], before)
            ys.append(torch.nn.functional.pad(y, (0, 0, 0, x.shape[1] - n)))
            states.append(after)
        order = torch.cat([rows for _, rows in self.groups]).argsort()
        return torch.cat(ys).index_select(0, order), torch.cat(states).index_select(0, order)


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
