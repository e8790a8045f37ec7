"""timestep_norm: group norm with statistics over all steps so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like, sequences, stat

if TYPE_CHECKING:
    from torch import Tensor


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    count: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    import torch

    B, L, _ = x.shape
    rows = sequences(x, cu_seqlens)
    state = (stat(x, rows, num_groups), stat(x, rows, num_groups))
    steps = (stat(x, B, L, num_groups), stat(x, B, L, num_groups))
    return like(x), x.new_empty((rows,), dtype=torch.int64), *state, *steps


def _backward_fake(
    dy: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    weight: Tensor,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    step_mean: Tensor,
    step_rstd: Tensor,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, ...]:
    return like(x), like(weight), like(weight), like(mean, of=weight), like(var, of=weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, num_groups, eps, *optional = inputs
    _, count, _, _, step_mean, step_rstd = output
    ctx.save_for_backward(x, weight, *optional, step_mean, step_rstd)
    ctx.num_groups, ctx.eps = num_groups, eps
    ctx.mark_non_differentiable(count, step_mean, step_rstd)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, _dcount: None, dmean: Tensor | None, dvar: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    import torch

    x, weight, *rest = ctx.saved_tensors
    dx, dweight, dbias, dmean0, dvar0 = torch.ops.megalodon.timestep_norm_backward(
        torch.zeros_like(x) if dy is None else dy,
        dmean,
        dvar,
        x,
        weight,
        *rest,
        ctx.num_groups,
        ctx.eps,
    )
    has_state = rest[0] is not None
    state = (dmean0, dvar0) if has_state else (None, None)
    return dx, dweight, dbias, None, None, None, *state, None, None


def _samples(make: Maker) -> Iterator[Sample]:
    import torch

    def state(B: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
        return make.ints(*range(0, 3 * B, 3)), make.stat(B, G), make.stat(B, G).square() + 0.5

    none = (None, None, None)
    x = make.activation(2, 19, 24)
    parameters = make.stat(24), make.stat(24)
    yield Sample("no state", (x, *parameters, 3, 1e-3, *none, None, None))
    yield Sample("state", (x, *parameters, 6, 1e-5, *state(2, 6), None, None))
    mask = make.mask(2, 19)
    yield Sample("mask", (x, *parameters, 2, 1e-3, *none, mask, None))
    yield Sample("state and mask", (x, *parameters, 4, 1e-3, *state(2, 4), mask, None))
    one_each = make.activation(3, 7, 5), make.stat(5), make.stat(5)
    yield Sample("groups of one channel", (*one_each, 5, 1e-2, *state(3, 5), None, None))
    row, bounds = make.activation(1, 46, 24), make.bounds(3, 0, 1, 42, dtype=torch.int32)
    yield Sample("packed", (row, *parameters, 3, 1e-3, *none, None, bounds))
    bounds, mask = make.bounds(0, 7, 1, 38), make.mask(1, 46)
    yield Sample("packed, state and mask", (row, *parameters, 6, 1e-3, *state(4, 6), mask, bounds))


def _cost(x: Tensor, *_: Any) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size(), flops=8 * x.numel())


OP = registry.add(
    Op(
        name="timestep_norm",
        summary="group norm with statistics over all steps so far",
        equation="y_t = (x_t - M_t) / sqrt(V_t + eps) * (weight + 1) + bias",
        schema=(
            "(Tensor x, Tensor weight, Tensor bias, SymInt num_groups, float eps=1e-05,"
            " Tensor? count=None, Tensor? mean=None, Tensor? var=None,"
            " Tensor? padding_mask=None, Tensor? cu_seqlens=None)"
            " -> (Tensor y, Tensor count, Tensor mean, Tensor var,"
            " Tensor step_mean, Tensor step_rstd)"
        ),
        fake=_fake,
        backward_schema=(
            "(Tensor dy, Tensor? dmean, Tensor? dvar, Tensor x, Tensor weight, Tensor? count,"
            " Tensor? mean, Tensor? var, Tensor? padding_mask, Tensor? cu_seqlens,"
            " Tensor step_mean, Tensor step_rstd, SymInt num_groups, float eps)"
            " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dmean0, Tensor dvar0)"
        ),
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
    )
)
