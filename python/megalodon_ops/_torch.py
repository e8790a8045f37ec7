"""Joining torch: its thread pool runs our kernels, its dispatcher knows our ops."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from megalodon_ops import _C
from megalodon_ops._registration import register_with_torch


def _use_torch_threads() -> None:
    """Hands torch's parallel loop to the kernels, so that torch.set_num_threads holds for them."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    address = ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    _C.set_parallel_for(address)


def attach() -> None:
    """Called once, when megalodon_ops is imported and torch is installed."""
    _use_torch_threads()
    register_with_torch()
