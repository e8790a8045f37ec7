"""The registration of the ops with ``torch.library``: kernels, fakes, autograd formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from megalodon_ops import _C
from megalodon_ops._library import (
    REQUIRED,
    Argument,
    Op,
    lazily_negated,
    parse_schema,
    registry,
)

if TYPE_CHECKING:
    import torch

NAMESPACE = "megalodon"


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
