"""A Megalodon small enough to run in milliseconds, for the model's tests."""

from typing import Any

import torch
from torch import Tensor

from megalodon_ops.config import MegalodonConfig
from megalodon_ops.model import Megalodon

VOCAB = 11

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "model_dim": 12,
    "z_dim": 8,
    "value_dim": 12,
    "num_heads": 2,
    "ffn_hidden_dim": 10,
    "cema_ndim": 3,
    "chunk_size": 4,
    "vocab_size": VOCAB,
    "norm_num_groups": 3,
}

# Divisible by two and by four, for shards: heads, channels, groups and hidden units.
WIDE: dict[str, Any] = {
    "model_dim": 16,
    "z_dim": 16,
    "value_dim": 24,
    "num_heads": 4,
    "ffn_hidden_dim": 12,
    "norm_num_groups": 4,
}


def small_config(**changes: Any) -> MegalodonConfig:
    return MegalodonConfig(**{**SIZES, **changes})


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Megalodon:
    """A model whose every parameter is random, those included that are initially constant."""
    torch.manual_seed(seed)
    model = Megalodon(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def wide_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Megalodon:
    return small_model(dtype=dtype, **{**WIDE, **changes}).eval()


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


def assert_same(got: Megalodon, want: Megalodon) -> None:
    """Equal to the bit: the configuration, every tensor of the state_dict, the logits."""
    assert got.config.fingerprint() == want.config.fingerprint()
    ours, theirs = got.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert (got.output.output.weight is got.embed.weight) == want.config.share_emb
    tokens = random_tokens(2, 9) % want.config.vocab_size
    assert torch.equal(got(tokens), want(tokens))
