"""`MegalodonState`: everything a model carries from one call to the next, in fixed shapes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _files
from .functional import TimestepNormState

if TYPE_CHECKING:
    from .config import MegalodonConfig

_FORMAT = "megalodon_ops.state"
_VERSION = "2"  # 1 had no checksum
_LAYER_NAMES = ("k_cache", "v_cache", "norm_count", "norm_mean", "norm_var", "cema_h")
_FINAL_NAMES = ("norm_count", "norm_mean", "norm_var")


class LayerState(NamedTuple):
    """What one layer carries.

    Attributes:
        k_cache: (B, C, H, S/H), rotated keys; slot p % C holds the token of position p. Slots
            position % C and later are stale and never read.
        v_cache: (B, C, H, E/H), values, likewise.
        norm: TimestepNorm's count (B) int64, mean and var (B, G).
        h: (B, D, N, 2), CEMA's state.

    The caches have the activations' dtype; mean, var and h are float32 (float64 if those are).
    """

    k_cache: Tensor
    v_cache: Tensor
    norm: TimestepNormState
    h: Tensor


@dataclass(frozen=True)
class MegalodonState:
    """The state of a model after some tokens, one row per sequence.

    Rows may stand at different positions. A model never changes a state it is given, except where
    it is told to with `inplace_state=True`; all methods here return new states.

    Attributes:
        layers: one `LayerState` per layer.
        final_norm: the state of the last TimestepNorm.
        position: (B) int64, tokens consumed by each row.
        fingerprint: `MegalodonConfig.fingerprint()` of the model it belongs to.
    """

    layers: tuple[LayerState, ...]
    final_norm: TimestepNormState
    position: Tensor
    fingerprint: str

    @classmethod
    def initial(
        cls,
        config: MegalodonConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MegalodonState:
        """The state before the first token, for `batch_size` rows.

        dtype is that of the caches, so of the model's activations.
        """
        named = {
            # Where the count is 0 any variance has weight 0; the official prior's is 1.
            name: torch.full(shape, float(name.endswith("norm_var")), dtype=kind, device=device)
            for name, (shape, kind) in _layout(config, batch_size, dtype).items()
        }
        return _from_tensors(named, config.num_layers, config.fingerprint())

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self.position.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return self.position.device

    @property
    def dtype(self) -> torch.dtype:
        """The caches' dtype, which is that of the model's activations."""
        return self.layers[0].k_cache.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name it has in a file: layers.0.k_cache, ..., position."""
        named = {"position": self.position}
        for i, layer in enumerate(self.layers):
            values = (layer.k_cache, layer.v_cache, *layer.norm, layer.h)
            named |= {f"layers.{i}.{n}": t for n, t in zip(_LAYER_NAMES, values, strict=True)}
        named |= {f"final.{n}": t for n, t in zip(_FINAL_NAMES, self.final_norm, strict=True)}
        return named

    def map(self, fn: Callable[[Tensor], Tensor]) -> MegalodonState:
        """A state whose every tensor is fn of this one's."""
        layers = tuple(
            LayerState(fn(layer.k_cache), fn(layer.v_cache), _map_norm(fn, layer.norm), fn(layer.h))
            for layer in self.layers
        )
        norm = _map_norm(fn, self.final_norm)
        return MegalodonState(layers, norm, fn(self.position), self.fingerprint)

    def clone(self) -> MegalodonState:
        """A copy that shares no memory; gradients flow through it."""
        return self.map(torch.clone)

    def detach(self) -> MegalodonState:
        """The same memory without its autograd history (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MegalodonState:
        """The state on a device; tensors that are there already are shared, not copied."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def index_select(self, rows: Tensor) -> MegalodonState:
        """The rows of these indices (int64 or int32, (B')), copied; repeats allowed (beams).

        Raises:
            ValueError: rows is not a vector of integers.
        """
        if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"MegalodonState.index_select: rows must be a vector of int64 or int32; "
                f"got {rows.dtype} {list(rows.shape)}"
            )
        return self.map(lambda t: t.index_select(0, rows))

    def select(self, row: int) -> MegalodonState:
        """One row as a state of batch size 1, copied; a negative row counts from the end.

        Raises:
            IndexError: there is no such row.
        """
        size = self.batch_size
        if not -size <= row < size:
            raise IndexError(f"MegalodonState.select: row must be in [{-size}, {size}); got {row}")
        start = row % size
        return self.map(lambda t: t[start : start + 1].clone())

    @staticmethod
    def cat(states: Sequence[MegalodonState]) -> MegalodonState:
        """The rows of several states of one model, in one batch.

        Raises:
            ValueError: there is no state, or they belong to different models.
        """
        if not states:
            raise ValueError("MegalodonState.cat: wanted one state or more; got none")
        prints = sorted({state.fingerprint for state in states})
        if len(prints) > 1:
            raise ValueError(
                f"MegalodonState.cat: wanted states of one config; got {', '.join(prints)}"
            )
        first = states[0]
        columns = zip(*(state.tensors().values() for state in states), strict=True)
        joined = {n: torch.cat(c) for n, c in zip(first.tensors(), columns, strict=True)}
        return _from_tensors(joined, len(first.layers), first.fingerprint)

    def with_norms(self, other: MegalodonState) -> MegalodonState:
        """This state with the other's timestep-norm statistics and counts, its tensors shared."""
        layers = tuple(
            mine._replace(norm=theirs.norm)
            for mine, theirs in zip(self.layers, other.layers, strict=True)
        )
        return MegalodonState(layers, other.final_norm, self.position, self.fingerprint)

    def check(
        self, config: MegalodonConfig, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Check that a model of this config can continue from here. Looks at no values.

        Raises:
            ValueError: config, batch size, device, dtype or a shape differs; the message names it.
        """
        if self.fingerprint != config.fingerprint():
            raise ValueError(
                f"state: config: the state belongs to a model of config {self.fingerprint}; "
                f"this model's is {config.fingerprint()}"
            )
        if self.batch_size != batch_size:
            raise ValueError(
                f"state: batch: wanted {batch_size} rows (tokens.shape[0]); got {self.batch_size}"
            )
        wanted = _layout(config, batch_size, dtype)
        named = self.tensors()
        if named.keys() != wanted.keys():
            raise ValueError(
                f"state: layers: wanted {config.num_layers} layers; got {len(self.layers)}"
            )
        for name, tensor in named.items():
            shape, kind = wanted[name]
            if tensor.device != device:
                raise ValueError(
                    f"state: device: {name} is on {tensor.device}; tokens and model on {device}"
                )
            if tensor.dtype != kind:
                raise ValueError(f"state: dtype: {name}: wanted {kind}; got {tensor.dtype}")
            if tensor.shape != shape:
                raise ValueError(
                    f"state: shape: {name}: wanted {list(shape)}; got {list(tensor.shape)}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, all of it or nothing (atomic replacement).

        The file holds the tensors of `tensors()` and, as metadata, the config's fingerprint
        and a checksum.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written; an older file of that name is unharmed.
        """
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "num_layers": str(len(self.layers)),
        }
        _files.write(path, self.tensors(), metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: MegalodonConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> MegalodonState:
        """Read a state written by `save`.

        Args:
            path: the file.
            config: if given, the config the state must belong to.
            device: where to put it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is not a state, or belongs to another config.
            ImportError: safetensors is not installed.
        """
        named, metadata = _files.read(path, _FORMAT, _VERSION)
        return cls.from_file(os.fspath(path), named, metadata, config).to(device)

    @classmethod
    def from_file(
        cls,
        name: str,
        named: dict[str, Tensor],
        metadata: Mapping[str, str],
        config: MegalodonConfig | None = None,
    ) -> MegalodonState:
        """A state from the tensors and the metadata of a file; errors are those of `load`."""
        fingerprint = metadata.get("fingerprint", "")
        if config is not None and fingerprint != config.fingerprint():
            raise ValueError(
                f"{name}: config: the state belongs to a model of config {fingerprint}; "
                f"wanted {config.fingerprint()}"
            )
        try:
            layers = int(metadata["num_layers"])
            state = _from_tensors(named, layers, fingerprint)
            damaged = state.tensors().keys() != named.keys()
            if config is not None:
                state.check(config, state.batch_size, state.dtype, torch.device("cpu"))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{name}: not a complete MegalodonState: {error}") from error
        if damaged:
            raise ValueError(f"{name}: not a MegalodonState: it holds tensors of another kind")
        return state


def _map_norm(fn: Callable[[Tensor], Tensor], norm: TimestepNormState) -> TimestepNormState:
    return TimestepNormState(fn(norm.count), fn(norm.mean), fn(norm.var))


def _from_tensors(named: dict[str, Tensor], layers: int, fingerprint: str) -> MegalodonState:
    """The inverse of `MegalodonState.tensors`; KeyError names an absent tensor."""
    states = []
    for i in range(layers):
        k, v, count, mean, var, h = (named[f"layers.{i}.{name}"] for name in _LAYER_NAMES)
        states.append(LayerState(k, v, TimestepNormState(count, mean, var), h))
    final = TimestepNormState(*(named[f"final.{name}"] for name in _FINAL_NAMES))
    return MegalodonState(tuple(states), final, named["position"], fingerprint)


def _layout(
    config: MegalodonConfig, batch: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a state, by name."""
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    heads, chunk = config.num_heads, config.chunk_size
    groups = (batch, config.norm_num_groups)
    norm = {
        "norm_count": ((batch,), torch.int64),
        "norm_mean": (groups, stat),
        "norm_var": (groups, stat),
    }
    layer: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "k_cache": ((batch, chunk, heads, config.z_head_dim), dtype),
        "v_cache": ((batch, chunk, heads, config.value_head_dim), dtype),
        **norm,
        "cema_h": ((batch, config.model_dim, config.cema_ndim, 2), stat),
    }
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"position": ((batch,), torch.int64)}
    for i in range(config.num_layers):
        layout |= {f"layers.{i}.{name}": entry for name, entry in layer.items()}
    layout |= {f"final.{name}": entry for name, entry in norm.items()}
    return layout
