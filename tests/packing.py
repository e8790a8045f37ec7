"""Packed rows: lengths of segments worth trying, and bounds that no op accepts.

What an op must compute needs no test of its own: the reference of a packed row is the reference of
every segment alone.
"""

import torch
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(0, 3) | st.integers(0, 60), min_size=1, max_size=7)
BOUNDS_DTYPES = st.sampled_from([torch.int32, torch.int64])

# For a row of 6 tokens: cu_seqlens, the error and what its message says after "{op}: ".
BAD_BOUNDS: list[tuple[torch.Tensor, type[Exception], str]] = [
    (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens must be int32 or int64; got float32"),
    (torch.tensor([0j, 6j]), TypeError, "cu_seqlens must be int32 or int64; got complex64"),
    (torch.tensor([True, True]), TypeError, "cu_seqlens must be int32 or int64; got bool"),
    (torch.tensor([0]), ValueError, r"cu_seqlens must be \[segments \+ 1\].*got \[1\]"),
    (torch.tensor([[0, 6]]), ValueError, r"cu_seqlens must be \[segments \+ 1\].*\[1, 2\]"),
    (torch.tensor([1, 6]), ValueError, "cu_seqlens must be 0 at first; got 1"),
    (torch.tensor([0, 4, 3, 6]), ValueError, r"must be ascending; got 3 after 4 at \[2\]"),
    (torch.tensor([0, 5]), ValueError, r"must be T = 6 \(\w+.shape\[1\]\) at last; got 5"),
    (torch.tensor([0, 2**40, 2**41]), ValueError, "must be T = 6"),
]
