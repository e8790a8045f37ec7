"""Modules with the official parameter names, made of the functional ops and linear layers."""

from .attention import MegaAttention
from .block import Block
from .cema import CEMA
from .ffn import FFN
from .norms import LayerNorm, RMSNorm, TimestepNorm

__all__ = ["CEMA", "FFN", "Block", "LayerNorm", "MegaAttention", "RMSNorm", "TimestepNorm"]
