"""What a kernel must satisfy against its reference: the same for every op.

The error of a kernel against the float64 reference may be at most twice that of the plain
reference run in the kernel's own dtype, above a floor from the magnitude of the numbers; in
float64, where the reference is the oracle itself, it is a small multiple of the rounding unit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalodon_ops import _C
from megalodon_ops._library import Op

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT64_BOUND = 1e-11


def available_isas() -> list[str]:
    """The instruction sets this machine runs."""
    best = _C.isa()
    try:
        _C.set_isa("auto")
        return list(ISAS[: ISAS.index(_C.isa()) + 1])
    finally:
        _C.set_isa(best)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def to_float64(args: Sequence[Any]) -> list[Any]:
    return [a.detach().to(torch.float64) if is_float(a) else a for a in args]


def copies(args: Sequence[Any], requires_grad: bool = False) -> list[Any]:
    """Fresh leaves, so that an op that writes to its inputs can be run again."""
    return [
        a.detach().clone().requires_grad_(requires_grad and a.is_floating_point())
        if isinstance(a, Tensor)
        else a
        for a in args
    ]


def _floor(reference: Tensor, dtype: torch.dtype) -> float:
    """What rounding alone explains, from the magnitude of the numbers that went in (about 1) or
    came out: a result that cancels to much less than either cannot be better than this."""
    if reference.numel() == 0:
        return 0.0
    rounded = reference.to(dtype)
    shifted = ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
    return 2 * shifted + 4 * torch.finfo(dtype).eps * max(1.0, rounded.abs().max().item())


def assert_close(what: str, got: Tensor, oracle: Tensor, plain: Tensor, tolerance: float) -> None:
    """``got`` against the float64 ``oracle``, allowed twice the error of ``plain``."""
    assert got.shape == oracle.shape, f"{what}: shape {tuple(got.shape)}, {tuple(oracle.shape)}"
    assert got.dtype == plain.dtype, f"{what}: dtype {got.dtype}, wanted {plain.dtype}"
    if not got.is_floating_point():
        assert torch.equal(got, plain), what
        return
    if got.numel() == 0:
        return
    finite = torch.isfinite(oracle)
    assert torch.equal(torch.isfinite(got), finite), f"{what}: inf or NaN where none is wanted"
    oracle = torch.where(finite, oracle, 0.0)
    got = torch.where(finite, got, 0)
    plain = torch.where(finite, plain, 0)
    error = (got.double() - oracle).abs().max().item()
    if got.dtype == torch.float64:
        bound = FLOAT64_BOUND * max(1.0, oracle.abs().max().item())
    else:
        bound = 2 * (plain.double() - oracle).abs().max().item() + _floor(oracle, got.dtype)
    assert error <= tolerance * bound, f"{what}: error {error:.3e}, bound {tolerance * bound:.3e}"


def check_forward(op: Op, args: Sequence[Any]) -> None:
    """Every output, and every input that is written to."""
    ours, plain, oracle = copies(args), copies(args), to_float64(copies(args))
    with torch.no_grad():
        got = as_tuple(op.overload(*ours))
        same_dtype = as_tuple(op.reference(*plain))
        exact = as_tuple(op.reference(*oracle))
    for name, a, b, c in zip(op.returns, got, exact, same_dtype, strict=True):
        assert_close(f"{op.name}: {name}", a, b, c, op.tolerance)
    for argument, a, b, c in zip(op.arguments, ours, oracle, plain, strict=False):
        if isinstance(a, Tensor) and op.mutates:
            assert_close(f"{op.name}: {argument.name}", a, b, c, op.tolerance)


def gradients(
    function: Any, args: Sequence[Any], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of sum(outputs * cotangents) in every floating-point input."""
    leaves = [a.requires_grad_() if is_float(a) else a for a in copies(args)]
    outputs = as_tuple(function(*leaves))
    pairs = [
        (o, c.to(o.dtype))
        for o, c in zip(outputs, cotangents, strict=True)
        if c is not None and o.requires_grad
    ]
    wanted = [leaf for leaf in leaves if is_float(leaf)]
    return list(
        torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
    )


def cotangents_of(op: Op, args: Sequence[Any], seed: int = 1) -> list[Tensor | None]:
    """Random cotangents, exact in every dtype, for the differentiable outputs."""
    generator = torch.Generator().manual_seed(seed)
    leaves = copies(args, requires_grad=True)
    return [
        torch.randint(-8, 9, o.shape, generator=generator).double() / 8 if o.requires_grad else None
        for o in as_tuple(op.overload(*leaves))
    ]


def check_gradients(op: Op, args: Sequence[Any]) -> None:
    """Every gradient."""
    cotangents = cotangents_of(op, args)
    got = gradients(op.overload, args, cotangents)
    plain = gradients(op.reference, args, cotangents)
    oracle = gradients(op.reference, to_float64(args), cotangents)
    names = [a.name for a, value in zip(op.arguments, args, strict=False) if is_float(value)]
    for name, a, b, c in zip(names, got, oracle, plain, strict=True):
        what = f"{op.name}: gradient of {name}"
        if b is None or c is None:
            assert a is None or not a.any(), what
            continue
        assert a is not None, what
        assert_close(what, a, b, c, op.tolerance)
