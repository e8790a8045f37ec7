"""`MegalodonConfig`: the official field names and defaults, checked. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_ROPE_BASE = 10000.0

_SIZES = (
    "num_layers",
    "model_dim",
    "z_dim",
    "value_dim",
    "num_heads",
    "ffn_hidden_dim",
    "cema_ndim",
    "chunk_size",
    "vocab_size",
    "norm_num_groups",
)
_FLAGS = ("norm_affine", "swiglu", "rescale_nffn", "scale_emb", "share_emb", "layerwise_ckpt")
INIT_MODES = ("he", "bert", "gaussian", "xavier", "none")
_CHOICES = {
    "init_mode": INIT_MODES,
    "attention": ("chunk", "sliding"),
    "attention_dropout_mode": ("key", "weight"),
}
_DROPOUTS = ("dropout", "hidden_dropout", "attention_dropout")

# How a model is trained, not what it computes: a state or a checkpoint outlives a change of these.
NOT_IN_FINGERPRINT = (*_DROPOUTS, "attention_dropout_mode", "init_mode", "layerwise_ckpt")


@dataclass(frozen=True)
class MegalodonConfig:
    """Sizes and switches of a Megalodon model. Immutable; every field is checked on construction.

    Attributes:
        num_layers: number of blocks.
        model_dim: D, width of the residual stream.
        z_dim: S, width of the shared query/key representation, all heads together.
        value_dim: E, width of the values, all heads together.
        num_heads: H; divides `z_dim` and `value_dim`, and `z_dim / H` is even (RoPE rotates pairs).
        ffn_hidden_dim: F.
        cema_ndim: N, complex moving averages per channel.
        chunk_size: C, attention is causal inside blocks of C tokens and absent across them; or the
            width of the sliding window.
        vocab_size: V, rows of the embedding.
        output_size: columns of the logits; None means `vocab_size`. Generation refuses more of them
            than tokens.
        norm_num_groups: G of TimestepNorm; divides `model_dim` into groups of two channels or more.
        norm_affine: whether mega.rmsnorm and nffn.norm have parameters.
        norm_eps: eps of every norm.
        rope_base: base of the rotary frequencies; None means 10000.
        swiglu: gated feed-forward (fc3) instead of plain silu.
        rescale_nffn: learned per-channel scale on the feed-forward's output.
        scale_emb: multiply embeddings by sqrt(D).
        share_emb: one matrix for the embedding and the output projection.
        dropout, hidden_dropout, attention_dropout: probabilities in [0, 1), active in training.
        attention: "chunk", as released, or "sliding": each token attends to the last C, itself
            included, and rotary positions are absolute.
        attention_dropout_mode: what `attention_dropout` drops: "key", keys before the softmax
            (DropKey, as the released code's fused attention), or "weight", weights after it.
        init_mode: initialisation of the linear weights: "he", "bert", "gaussian", "xavier", "none".
        layerwise_ckpt: recompute each layer in the backward pass instead of storing activations.

    Raises:
        TypeError: a field has the wrong type (a bool is not an int).
        ValueError: a field has an impossible value. The message names field, wanted and got.

    Source: ModelConf of the released code (XuezheMax/megalodon), where `vocab_size` and
    `output_size` come from the tokenizer and have no default.
    """

    num_layers: int = 8
    model_dim: int = 1024
    z_dim: int = 256
    value_dim: int = 2048
    num_heads: int = 1
    ffn_hidden_dim: int = 2048
    cema_ndim: int = 16
    chunk_size: int = 2048
    vocab_size: int = 32000
    output_size: int | None = None
    norm_num_groups: int = 32
    norm_affine: bool = True
    norm_eps: float = 1e-5
    rope_base: float | None = None
    swiglu: bool = False
    rescale_nffn: bool = False
    scale_emb: bool = False
    share_emb: bool = False
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_mode: str = "he"
    layerwise_ckpt: bool = False
    attention: str = "chunk"
    attention_dropout_mode: str = "key"

    def __post_init__(self) -> None:
        for name in _SIZES:
            _require_size(name, getattr(self, name))
        if self.output_size is not None:
            _require_size("output_size", self.output_size)
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: wanted a bool; got {_shown(value)}")
        for name in _DROPOUTS:
            value = self._as_float(name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}: wanted a probability in [0, 1); got {value}")
        if not 0.0 < self._as_float("norm_eps") < math.inf:
            raise ValueError(f"norm_eps: wanted a finite number > 0; got {self.norm_eps}")
        if self.rope_base is not None and not 0.0 < self._as_float("rope_base") < math.inf:
            raise ValueError(f"rope_base: wanted None or a finite number > 0; got {self.rope_base}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}: wanted a str; got {_shown(value)}")
            if value not in choices:
                raise ValueError(f"{name}: wanted one of {', '.join(choices)}; got {value!r}")
        self._check_divisibility()
        # Not a field: made once, because traced code (torch.compile) cannot hash.
        object.__setattr__(self, "_fingerprint", self._hash())

    def _as_float(self, name: str) -> float:
        """Check that a field is a real number, and store it as a float (configs in JSON hold 0)."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: wanted a float; got {_shown(value)}")
        object.__setattr__(self, name, float(value))
        return float(value)

    def _check_divisibility(self) -> None:
        for name in ("z_dim", "value_dim"):
            value = getattr(self, name)
            if value % self.num_heads:
                raise ValueError(
                    f"{name}: wanted a multiple of num_heads = {self.num_heads}; got {value}"
                )
        if self.z_head_dim % 2:
            raise ValueError(
                f"z_dim: wanted an even z_dim / num_heads (RoPE rotates pairs); got "
                f"{self.z_dim} / {self.num_heads} = {self.z_head_dim}"
            )
        if self.model_dim % self.norm_num_groups:
            raise ValueError(
                f"norm_num_groups: wanted a divisor of model_dim = {self.model_dim}; "
                f"got {self.norm_num_groups}"
            )
        if self.model_dim // self.norm_num_groups < 2:
            # The first step of a one-channel group has zero variance and is its own mean.
            raise ValueError(
                f"norm_num_groups: wanted two channels or more in a group, so at most "
                f"{self.model_dim // 2} for model_dim = {self.model_dim}; "
                f"got {self.norm_num_groups}"
            )
        if self.share_emb and self.num_outputs != self.vocab_size:
            raise ValueError(
                f"output_size: wanted vocab_size = {self.vocab_size} with share_emb; "
                f"got {self.output_size}"
            )

    @property
    def z_head_dim(self) -> int:
        """Query/key width of one head, `z_dim / num_heads`."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """Value width of one head, `value_dim / num_heads`."""
        return self.value_dim // self.num_heads

    @property
    def is_sliding(self) -> bool:
        """Whether attention is by a sliding window."""
        return self.attention == "sliding"

    @property
    def rope_chunk(self) -> int:
        """The tokens after which rotary positions begin anew: never, in a sliding window."""
        return 2**62 if self.is_sliding else self.chunk_size

    @property
    def num_outputs(self) -> int:
        """Columns of the logits: `output_size`, or `vocab_size` where that is None."""
        return self.vocab_size if self.output_size is None else self.output_size

    @property
    def any_dropout(self) -> bool:
        """Whether training draws random numbers at all."""
        return any(getattr(self, name) > 0.0 for name in _DROPOUTS)

    @property
    def rope_base_value(self) -> float:
        """The rotary base in force: `rope_base`, or 10000 where that is None."""
        return DEFAULT_ROPE_BASE if self.rope_base is None else self.rope_base

    @classmethod
    def preset(cls, name: str) -> MegalodonConfig:
        """A released configuration, or "paper7B": the 7B model as arXiv 2404.08801 describes it.

        The paper has chunks of 4096 and a rotary base of 100000 where the released code has 2048
        and 10000.

        Raises:
            ValueError: no preset has that name; the message lists the names.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}; got {name!r}")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> MegalodonConfig:
        """A copy with some fields changed, checked again.

        Raises:
            ValueError: a name is not a field, or a value does not fit.
        """
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, JSON-ready; `from_dict` restores an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MegalodonConfig:
        """A config from a mapping; absent fields take their defaults.

        Raises:
            ValueError: a key is not a field; the message names the key and the fields.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in names)
        if unknown:
            raise ValueError(
                f"MegalodonConfig: unknown field {', '.join(unknown)}; the fields are "
                f"{', '.join(names)}"
            )
        return cls(**values)

    def fingerprint(self) -> str:
        """Hash of what a state or a checkpoint depends on: sizes, switches, eps, rotary base.

        Equal for configs that differ only in dropouts, `init_mode` or `layerwise_ckpt`, and for a
        default written out (`rope_base=10000.0` and None). Stable across versions and machines.
        """
        fingerprint: str = self._fingerprint  # type: ignore[attr-defined]
        return fingerprint

    def _hash(self) -> str:
        fields = self.to_dict()
        for name in NOT_IN_FINGERPRINT:
            del fields[name]
        fields["rope_base"] = self.rope_base_value
        fields["output_size"] = self.num_outputs
        if self.attention == "chunk":  # as before there was another
            del fields["attention"]
        text = "megalodon-config-1 " + json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _require_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int; got {_shown(value)}")
    if value < 1:
        raise ValueError(f"{name}: wanted an int >= 1; got {value}")
    if value >= 2**63:
        raise ValueError(f"{name}: wanted an int < 2^63; got {value}")


_MEGA_1_3B = {
    "num_layers": 24,
    "model_dim": 2048,
    "num_heads": 2,
    "z_dim": 512,
    "value_dim": 4096,
    "ffn_hidden_dim": 4864,
    "norm_num_groups": 64,
}
_MEGA_7_1B = {
    "num_layers": 32,
    "model_dim": 4096,
    "num_heads": 4,
    "z_dim": 1024,
    "value_dim": 8192,
    "ffn_hidden_dim": 11264,
    "norm_num_groups": 64,
}
_MEGA_7_3B = {**_MEGA_7_1B, "ffn_hidden_dim": 8192, "swiglu": True}

PRESETS: dict[str, dict[str, Any]] = {
    "mega200M": {
        "num_layers": 12,
        "model_dim": 1024,
        "num_heads": 1,
        "z_dim": 256,
        "value_dim": 2048,
        "ffn_hidden_dim": 2560,
        "norm_num_groups": 32,
    },
    "mega1.3B": _MEGA_1_3B,
    "mega1.3B_pg19": {
        **_MEGA_1_3B,
        "ffn_hidden_dim": 3584,
        "swiglu": True,
        "scale_emb": True,
        "share_emb": True,
    },
    "mega7.1B": _MEGA_7_1B,
    "mega7.3B": _MEGA_7_3B,
    "paper7B": {**_MEGA_7_3B, "chunk_size": 4096, "rope_base": 100000.0},
}
