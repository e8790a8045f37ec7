"""`MegalodonConfig` as a transformers configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from ..config import MegalodonConfig

MODEL_TYPE = "megalodon_ops"
_FIELDS = tuple(field.name for field in dataclasses.fields(MegalodonConfig))


class MegalodonHfConfig(PreTrainedConfig):
    """`MegalodonConfig` as a transformers configuration: the same fields, checked alike.

    `hidden_size`, `num_hidden_layers` and `num_attention_heads` are other names of `model_dim`,
    `num_layers` and `num_heads`; `tie_word_embeddings` is `share_emb`.

    Raises:
        TypeError, ValueError: as `MegalodonConfig`.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012 (transformers wants a plain dict, which it does not change)
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    }
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        for other, name in self.attribute_map.items():
            if other in kwargs:
                kwargs.setdefault(name, kwargs.pop(other))
        core = MegalodonConfig.from_dict({n: kwargs.pop(n) for n in _FIELDS if n in kwargs})
        tied = kwargs.pop("tie_word_embeddings", core.share_emb)
        if tied != core.share_emb:
            raise ValueError(
                f"tie_word_embeddings: wanted share_emb = {core.share_emb}; got {tied}"
            )
        for name, value in core.to_dict().items():
            setattr(self, name, value)
        self.use_cache = kwargs.pop("use_cache", True)
        self.tie_word_embeddings = tied
        super().__init__(**kwargs)

    @classmethod
    def from_core(cls, config: MegalodonConfig, **kwargs: Any) -> MegalodonHfConfig:
        """The transformers configuration of a model; kwargs are transformers' own fields."""
        return cls(**config.to_dict(), **kwargs)

    def core(self) -> MegalodonConfig:
        """The configuration that `Megalodon` takes."""
        return MegalodonConfig.from_dict({name: getattr(self, name) for name in _FIELDS})
