"""The registry of ops, and their registration with ``torch.library``.

An :class:`Op` holds everything about one op: schema, fake, autograd formula, reference, sample
inputs, cost. Tests, benches, ``megalodon info`` and the op table of the README are generated from
:data:`registry`. Importing this module does not import torch; :func:`register_with_torch` does the
joining once torch is there.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from megalodon_ops import _C

if TYPE_CHECKING:
    import torch

NAMESPACE = "megalodon"


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


def _with_defaults(
    arguments: tuple[Argument, ...], call: Callable[..., Any], leading: int = 0
) -> Callable[..., Any]:
    """``call`` for a dispatcher that leaves out trailing arguments at their default. ``leading``
    arguments come before those of the schema.
    """
    count = len(arguments) + leading
    defaults = (REQUIRED,) * leading + tuple(argument.default for argument in arguments)

    def complete(*args: Any) -> Any:
        return call(*args) if len(args) == count else call(*args, *defaults[len(args) :])

    return complete


def _plain_key_sets() -> frozenset[int]:
    """The dispatch keys of calls where nothing stands between autograd and the kernel.

    The dispatcher leaves out keys that this op falls through. Any other key (a mode, a subclass,
    functorch, functionalization, a lazy negation) makes another number.
    """
    import torch

    key, key_set = torch._C.DispatchKey, torch._C.DispatchKeySet
    return frozenset(
        key_set(getattr(key, device)).add(getattr(key, f"Autograd{device}")).raw_repr()
        for device in ("CPU", "CUDA")
    )


_library: torch.library.Library | None = None


def register_with_torch() -> None:
    """Defines every op of the registry as ``torch.ops.megalodon.{name}``, with its backward.
    Idempotent.
    """
    global _library
    if _library is not None:
        return
    import torch

    _library = torch.library.Library(NAMESPACE, "DEF")
    for op in registry:
        _define(_library, op.name, op.schema, f"{op.name}_forward", op.fake)
        if op.backward_schema is None:
            _library.impl(op.name, _inference_only(op), "Autograd", with_keyset=True)
            continue
        assert op.backward_fake is not None
        backward = f"{op.name}_backward"
        _define(_library, backward, op.backward_schema, backward, op.backward_fake)
        _library.impl(op.name, _differentiable(op), "Autograd", with_keyset=True)
        _library.impl(backward, _once_differentiable(backward, op.backward_schema), "Autograd")


def _define(
    library: torch.library.Library, name: str, schema: str, kernel: str, fake: Callable[..., Any]
) -> None:
    import torch

    arguments, _ = parse_schema(schema)
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    implementation = _with_defaults(arguments, getattr(_C, kernel))
    library.impl(name, implementation, "CPU")
    library.impl(name, implementation, "CUDA")
    on_one_device = _on_one_device(name, arguments, fake)
    torch.library.register_fake(f"{NAMESPACE}::{name}", on_one_device, lib=library)


def _on_one_device(
    name: str, arguments: tuple[Argument, ...], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """The fake, after the check of devices that kernels make. One tensor on meta is enough for the
    dispatcher to call the fake: what it makes on the CPU would pass for results.
    """
    import torch

    def checked(*args: Any) -> Any:
        named = zip(arguments, args, strict=False)  # the dispatcher leaves out defaults
        tensors = [(a.name, value) for a, value in named if isinstance(value, torch.Tensor)]
        first, device = tensors[0][0], tensors[0][1].device
        for other, tensor in tensors:
            if tensor.device != device:
                raise ValueError(
                    f"{name}: {other} must be on {device} like {first}; got {tensor.device}"
                )
        return fake(*args)

    return checked


def _below_autograd(name: str) -> Callable[..., Any]:
    import torch

    overload = getattr(torch.ops.megalodon, name).default
    guard = torch._C._AutoDispatchBelowAutograd

    def call(*args: Any) -> Any:
        with guard():
            return overload(*args)

    return call


def _tensor_places(arguments: tuple[Argument, ...]) -> tuple[int, ...]:
    return tuple(i for i, argument in enumerate(arguments) if argument.type.startswith("Tensor"))


def _written_places(op: Op) -> tuple[int, ...]:
    return tuple(i for i, argument in enumerate(op.arguments) if argument.written)


def _needs_grad(args: tuple[Any, ...], places: Iterable[int]) -> bool:
    for i in places:  # a plain loop: half the time of any() with a generator
        tensor = args[i]
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _below(op: Op) -> Callable[[torch._C.DispatchKeySet, tuple[Any, ...]], Any]:
    """The op below autograd. Where nothing stands between, straight to the kernel: this spares a
    small call the second dispatch, a third of its time.
    """
    kernel, call = getattr(_C, f"{op.name}_forward"), _below_autograd(op.name)
    plain, written = _plain_key_sets(), _written_places(op)

    def below(keys: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        if keys.raw_repr() in plain:
            return kernel(*args)
        for i in written:  # torch would resolve a copy, then fail for that it is one
            if args[i].is_neg():
                raise lazily_negated(op.name, op.arguments[i].name)
        return call(*args)

    return below


def lazily_negated(name: str, argument: str) -> ValueError:
    """The error of a tensor that is written to and whose minus sign is a flag."""
    return ValueError(
        f"{name}: {argument} must not be lazily negated, since it is written to; got such a view"
        " (resolve_neg() makes a tensor of it)"
    )


def _recorded(
    name: str,
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """A call that records ``backward``: ``apply`` of a ``torch.autograd.Function`` of these.

    Not the class's own ``apply``: that starts over at the outermost transform of ``torch.func``,
    while the dispatcher calls us in the middle of one, to record at its level. What is below may be
    another one, for which ``apply`` must not have switched gradients off.
    """
    import torch
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled

    transformed = torch._C._are_functorch_transforms_active

    def below(*args: Any) -> Any:
        if not transformed():
            return forward(*args)
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return forward(*args)

    methods = {"forward": below, "setup_context": setup_context, "backward": backward}
    members = {key: staticmethod(method) for key, method in methods.items()}
    function: Any = type(name, (torch.autograd.Function,), members)
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply

    def record(*args: Any) -> Any:
        if not transformed():
            return apply(*args)
        with enable_single_level_autograd_function():
            return apply(*args)

    return record


def _no_tangents(name: str, places: tuple[int, ...]) -> Callable[[tuple[Any, ...]], None]:
    """Refuses forward-mode derivatives, which would get lost below autograd. To be called where a
    level of them is open.
    """
    import torch

    unpack_dual: Any = torch.autograd.forward_ad.unpack_dual

    def refuse(args: tuple[Any, ...]) -> None:
        if not torch._C._is_fwd_grad_enabled():
            return
        for i in places:
            if args[i] is not None and unpack_dual(args[i]).tangent is not None:
                raise NotImplementedError(
                    f"{name}: forward-mode derivatives (jvp, jacfwd) are not implemented;"
                    " use reverse mode (torch.autograd.grad, vjp, jacrev)"
                )

    return refuse


def _differentiable(op: Op) -> Callable[..., Any]:
    """The Autograd kernel: records the op's formula where a gradient is wanted."""
    import torch

    assert op.setup_context is not None
    assert op.gradients is not None
    record = _recorded(op.name, _below_autograd(op.name), op.setup_context, op.gradients)
    below, places, grad_enabled = _below(op), _tensor_places(op.arguments), torch.is_grad_enabled
    forward_ad, no_tangents = torch.autograd.forward_ad, _no_tangents(op.name, places)

    def autograd(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            no_tangents(args)
        if grad_enabled() and _needs_grad(args, places):
            return record(*args)
        return below(keys, args)

    return _with_defaults(op.arguments, autograd, leading=1)


def _once_differentiable(name: str, schema: str) -> Callable[..., Any]:
    """The Autograd kernel of a backward op: second derivatives are an error, not silently zero."""
    import torch

    call = _below_autograd(name)
    arguments, _ = parse_schema(schema)
    places = _tensor_places(arguments)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name}: second derivatives are not implemented")

    record = _recorded(name, call, lambda ctx, inputs, output: None, backward)
    forward_ad, no_tangents = torch.autograd.forward_ad, _no_tangents(name, places)

    def autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            no_tangents(args)
        if torch.is_grad_enabled() and _needs_grad(args, places):
            return record(*args)
        return call(*args)

    return _with_defaults(arguments, autograd)


def _inference_only(op: Op) -> Callable[..., Any]:
    """The Autograd kernel of an op without a gradient; tells autograd what was written to."""
    import torch

    below = _below(op)
    places, written = _tensor_places(op.arguments), _written_places(op)
    forward_ad, no_tangents = torch.autograd.forward_ad, _no_tangents(op.name, places)

    def autograd(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            no_tangents(args)
        if torch.is_grad_enabled() and _needs_grad(args, places):
            raise NotImplementedError(
                f"{op.name}: has no gradient; call it under torch.no_grad() or on detached tensors"
            )
        result = below(keys, args)
        for i in written:
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return result

    return _with_defaults(op.arguments, autograd, leading=1)
