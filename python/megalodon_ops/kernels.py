"""The kernels as plain functions on arrays: NumPy, CuPy, torch or anything with ``__dlpack__``. No
torch needed.

One function per kernel, ``{op}`` and ``{op}_backward``, with the arguments of the op's schema and
``out``, a tuple of arrays to write to (one array where there is one output). Without ``out`` the
outputs are allocated by the library the first array came from. There is no autograd here, and the
same errors as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megalodon_ops import _C
from megalodon_ops import ops as _ops
from megalodon_ops._library import REQUIRED, lazily_negated, parse_schema, registry

__all__: list[str] = []
_ = _ops  # importing the ops fills the registry


def _resolved(name: str, argument: str, array: Any, written: bool) -> Any:
    """The array with a minus sign that is torch's flag carried out: kernels see memory alone."""
    if not (hasattr(array, "is_neg") and array.is_neg()):
        return array
    if written:
        raise lazily_negated(name, argument)
    return array.resolve_neg()


def _make(name: str, kernel: Callable[..., Any], schema: str, text: str) -> Callable[..., Any]:
    arguments, returns = parse_schema(schema)
    signature = inspect.Signature(
        [
            inspect.Parameter(
                a.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if a.default is REQUIRED else a.default,
            )
            for a in arguments
        ]
        + [inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=None)]
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        bound.apply_defaults()
        *inputs, out = bound.arguments.values()
        if out is not None:
            out = tuple(out) if isinstance(out, list | tuple) else (out,)
            for result, array in zip(returns, out, strict=False):  # the kernel counts them
                _resolved(name, result, array, written=True)
        inputs = [
            _resolved(name, argument.name, array, argument.written)
            for argument, array in zip(arguments, inputs, strict=True)
        ]
        return kernel(*inputs, out)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{text}\n\nReturns {', '.join(returns)}."
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _fill() -> None:
    for op in registry:
        text = f"{op.summary}: {op.equation}"
        globals()[op.name] = _make(op.name, getattr(_C, f"{op.name}_forward"), op.schema, text)
        __all__.append(op.name)
        if op.backward_schema is not None:
            name = f"{op.name}_backward"
            text = f"The gradients of {op.name}."
            globals()[name] = _make(name, getattr(_C, name), op.backward_schema, text)
            __all__.append(name)


_fill()
