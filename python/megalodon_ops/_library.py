"""The registry of ops.

An :class:`Op` holds everything about one op: schema, fake, autograd formula, reference, sample
inputs, cost. Tests, benches, ``megalodon info`` and the op table of the README are generated from
:data:`registry`. Importing this module does not import torch; ``_registration.py`` does the joining
once torch is there.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Argument(NamedTuple):
    """One argument of a schema. ``default`` is :data:`REQUIRED` where there is none; ``written``:
    it is updated in place.
    """

    name: str
    type: str
    default: Any
    written: bool


REQUIRED: Any = object()


class Cost(NamedTuple):
    """The least a call has to move and to compute: bytes read and written once, FLOPs (an FMA is
    two).
    """

    bytes: int
    flops: int


class Sample(NamedTuple):
    """Inputs of one call, in the order of the schema, and what they stand for."""

    name: str
    args: tuple[Any, ...]


class Maker:
    """Makes the tensors of samples: reproducible, of one activation dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0):
        import torch

        self.dtype = dtype
        self.stat_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values.to(dtype=dtype, device=self.device)

    def activation(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers of the activation dtype."""
        return self._normal(shape, self.dtype)

    def stat(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers of the dtype of parameters, states and statistics."""
        return self._normal(shape, self.stat_dtype) * scale

    def ints(self, *values: int) -> torch.Tensor:
        """An int64 vector of these values."""
        import torch

        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def bounds(self, *lengths: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """cu_seqlens of segments of these lengths, int64 unless said otherwise."""
        import torch

        ends = [0, *itertools.accumulate(lengths)]
        return torch.tensor(ends, dtype=dtype or torch.int64, device=self.device)

    def mask(self, *shape: int, probability: float = 0.3) -> torch.Tensor:
        """A bool tensor, True with this probability."""
        import torch

        values = torch.rand(shape, generator=self._generator) < probability
        return values.to(self.device)


@dataclass(frozen=True)
class Op:
    """One op. Schemas leave out the name: ``(Tensor x, float eps=1e-05) -> Tensor y``.

    ``setup_context`` and ``gradients`` are those of ``torch.autograd.Function``; an op without
    ``backward_schema`` is for inference. ``samples`` covers every pattern of optional arguments;
    ``tolerance`` multiplies the tests' bounds and is 1 unless a comment says why.
    """

    name: str
    summary: str
    equation: str
    schema: str
    fake: Callable[..., Any]
    samples: Callable[[Maker], Iterable[Sample]]
    cost: Callable[..., Cost]
    backward_schema: str | None = None
    backward_fake: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    gradients: Callable[..., Any] | None = None
    tolerance: float = 1.0
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    arguments: tuple[Argument, ...] = field(init=False)
    returns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        arguments, returns = parse_schema(self.schema)
        object.__setattr__(self, "arguments", arguments)
        object.__setattr__(self, "returns", returns)

    @property
    def reference(self) -> Callable[..., Any]:
        """The equation in plain torch (imports torch)."""
        module = importlib.import_module(f"megalodon_ops.reference.{self.name}")
        function: Callable[..., Any] = getattr(module, self.name)
        return function

    @property
    def overload(self) -> Any:
        """``torch.ops.megalodon.{name}.default``."""
        import torch

        return getattr(torch.ops.megalodon, self.name).default

    @property
    def mutates(self) -> bool:
        """Whether the op writes to some of its inputs."""
        return "!" in self.schema


_DEFAULTS: dict[str, Any] = {"None": None, "True": True, "False": False}


def _parse_default(text: str) -> Any:
    if text in _DEFAULTS:
        return _DEFAULTS[text]
    if text.startswith('"'):
        return text.strip('"')
    return float(text) if re.search(r"[.e]", text) else int(text)


def parse_schema(schema: str) -> tuple[tuple[Argument, ...], tuple[str, ...]]:
    """Reads ``(Type name=default, ...) -> (Tensor name, ...)`` without torch."""
    inputs, outputs = schema.split("->")
    arguments = []
    for part in inputs.strip().removeprefix("(").removesuffix(")").split(","):
        kind, _, rest = part.strip().partition(" ")
        name, _, text = rest.partition("=")
        default = _parse_default(text) if text else REQUIRED
        arguments.append(Argument(name, re.sub(r"\(.*\)", "", kind), default, "!" in kind))
    returns = tuple(part.split()[-1] for part in outputs.strip().strip("()").split(","))
    return tuple(arguments), returns


class Registry:
    """The ops by name, in order of registration."""

    def __init__(self) -> None:
        self._ops: dict[str, Op] = {}

    def add(self, op: Op) -> Op:
        if op.name in self._ops:
            raise ValueError(f"registry: {op.name} is registered already")
        self._ops[op.name] = op
        return op

    def __iter__(self) -> Iterator[Op]:
        return iter(self._ops.values())

    def __len__(self) -> int:
        return len(self._ops)

    def __getitem__(self, name: str) -> Op:
        return self._ops[name]


registry = Registry()


def lazily_negated(name: str, argument: str) -> ValueError:
    """The error of a tensor that is written to and whose minus sign is a flag."""
    return ValueError(
        f"{name}: {argument} must not be lazily negated, since it is written to; got such a view"
        " (resolve_neg() makes a tensor of it)"
    )
