"""Kernels for the Megalodon architecture (arXiv 2404.08801), as PyTorch ops and for DLPack arrays.

``torch.ops.megalodon.*``, the friendly functions and the model are there where torch is installed;
``megalodon_ops.kernels.*`` runs the same kernels on NumPy and other arrays, without torch. The
environment variable ``MEGALODON_TORCH=0`` leaves torch alone even where it is installed;
``MEGALODON_ISA`` forces an instruction set (portable, avx2, avx512 or avx512_bf16).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from megalodon_ops import _C, kernels, ops
from megalodon_ops._library import registry
from megalodon_ops._package import cmake_dir, include_dir
from megalodon_ops.config import MegalodonConfig

__version__ = _C.version()

__all__ = ["MegalodonConfig", "cmake_dir", "include_dir", "kernels", "ops", "registry"]

if os.environ.get("MEGALODON_ISA"):
    _C.set_isa(os.environ["MEGALODON_ISA"])

HAS_TORCH = os.environ.get("MEGALODON_TORCH", "1") != "0" and bool(
    importlib.util.find_spec("torch")
)

if HAS_TORCH:
    from megalodon_ops import _torch

    _torch.attach()

    from megalodon_ops._prefill import prefill
    from megalodon_ops.beam import Hypothesis, beam_search
    from megalodon_ops.checkpoint import load_checkpoint, save_checkpoint
    from megalodon_ops.functional import *  # noqa: F403
    from megalodon_ops.functional import __all__ as _functional_names
    from megalodon_ops.generation import Generated, generate
    from megalodon_ops.loss import cross_entropy
    from megalodon_ops.model import Megalodon
    from megalodon_ops.sampling import Sampling
    from megalodon_ops.session import Event, Session
    from megalodon_ops.state import MegalodonState

    __all__ += [
        "Event",
        "Generated",
        "Hypothesis",
        "Megalodon",
        "MegalodonState",
        "Sampling",
        "Session",
        "beam_search",
        "cross_entropy",
        "generate",
        "load_checkpoint",
        "prefill",
        "save_checkpoint",
        *_functional_names,
    ]
else:

    def __getattr__(name: str) -> Any:
        raise AttributeError(
            f"module 'megalodon_ops' has no attribute {name!r} (torch is not in use: only "
            "megalodon_ops.kernels is there)"
        )
