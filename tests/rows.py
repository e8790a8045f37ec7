"""Rows of different lengths in one batch, and states compared row by row."""

import torch
from small_model import random_tokens
from torch import Tensor

from megalodon_ops.model import Megalodon
from megalodon_ops.state import MegalodonState

PADDING = -100  # of no vocabulary: the model must not look at it


def padded(rows: list[Tensor], length: int) -> Tensor:
    out = torch.full((len(rows), length), PADDING)
    for i, row in enumerate(rows):
        out[i, : row.shape[1]] = row[0]
    return out


def advance(model: Megalodon, starts: list[int]) -> MegalodonState:
    """The state of rows that have read so many random tokens each."""
    rows = [random_tokens(1, n, seed=50 + i) for i, n in enumerate(starts)]
    return MegalodonState.cat([model(row, return_state=True)[1] for row in rows])


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def assert_same_state(got: MegalodonState, want: MegalodonState) -> None:
    """Equal wherever a state is read: cache slots from position % C on are stale."""
    assert torch.equal(got.position, want.position)
    theirs = want.tensors()
    for name, tensor in got.tensors().items():
        for row in range(got.batch_size):
            ours, other = tensor[row], theirs[name][row]
            if name.endswith("cache"):
                filled = int(got.position[row]) % tensor.shape[1]
                ours, other = ours[:filled], other[:filled]
            torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-10, msg=name)
