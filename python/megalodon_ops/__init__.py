"""Kernels for the Megalodon architecture, as PyTorch ops and for any DLPack array."""
