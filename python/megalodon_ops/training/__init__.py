"""Training a byte-level language model: data, loop, checkpoints, metrics, evaluation.

Nothing here is imported by `import megalodon_ops`: it needs torch, safetensors, rich and matplotlib
(`pip install 'megalodon-ops[cli]'`).
"""
