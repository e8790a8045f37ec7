"""block_step: one decoding step of a whole block; the state is updated in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like

if TYPE_CHECKING:
    from torch import Tensor


def _fake(x: Tensor, *_: Any) -> Tensor:
    return like(x)


def sample_arguments(
    make: Maker,
    D: int,
    N: int,
    H: int,
    S: int,
    E: int,
    C: int,
    F: int,
    G: int,
    position: tuple[int, ...],
    optional: bool = True,
    sliding: bool = False,
) -> tuple[Any, ...]:
    """Arguments of these sizes, one row per position; `optional`: with everything optional."""
    B = len(position)

    def weight(rows: int, columns: int) -> Tensor:
        return make.activation(rows, columns) / math.sqrt(max(columns, 1))

    def maybe(tensor: Tensor) -> Tensor | None:
        return tensor if optional else None

    def affine(*shape: int) -> Tensor:
        return make.stat(*shape, scale=0.3)

    return (
        make.activation(B, D),
        make.activation(B, C, H, S),
        make.activation(B, C, H, E),
        make.ints(*position),
        make.stat(B, G),
        make.stat(B, G).square() + 0.5,
        make.stat(B, D, N, 2),
        make.ints(*position),
        *(affine(D), affine(D)),
        *(make.stat(*shape) for shape in ((D, N), (D, N), (D,), (D, N, 2), (D,))),
        maybe(affine(D)),
        *(weight(H * E, D), make.activation(H * E)),
        *(weight(H * S, D), make.activation(H * S)),
        *(weight(H * E, D), make.activation(H * E)),
        *(weight(D, D), make.activation(D)),
        weight(D, H * E),
        *(affine(2, H * S), affine(2, H * S)),
        *(maybe(affine(D)), maybe(affine(D))),
        *(weight(F, D), weight(D, F), maybe(weight(F, D))),
        maybe(make.activation(D)),
        *(G, H, C, 10000.0, 1e-5, sliding),
    )


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("one row", sample_arguments(make, 12, 3, 1, 8, 20, 5, 18, 4, (3,)))
    yield Sample("rows", sample_arguments(make, 40, 4, 2, 6, 7, 70, 33, 10, (0, 69, 141)))
    window = sample_arguments(make, 12, 3, 1, 8, 20, 5, 18, 4, (3, 4, 5, 12), sliding=True)
    yield Sample("sliding", window)
    plain = sample_arguments(make, 12, 3, 2, 4, 6, 5, 10, 3, (7, 2), optional=False)
    yield Sample("without the optional", plain)


def _cost(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    h: Tensor,
    position: Tensor,
    *parameters: Any,
) -> Cost:
    """With the slots that are filled; the weights count once, their products once per row."""
    rows, chunk, heads = k_cache.shape[:3]
    sliding = parameters[-1] is True
    slots = int(((position + 1).clamp(max=chunk) if sliding else position % chunk + 1).sum())
    cached = slots * heads * (k_cache.shape[3] + v_cache.shape[3])
    tensors = [p for p in parameters if hasattr(p, "element_size")]
    weights = sum(p.numel() for p in tensors if p.dim() == 2 and p.dtype == x.dtype)
    read = sum(p.numel() * p.element_size() for p in tensors)
    return Cost(
        bytes=read + cached * x.element_size() + 2 * h.numel() * h.element_size(),
        flops=2 * (rows * weights + cached + 6 * h.numel() // 2),
    )


OP = registry.add(
    Op(
        name="block_step",
        summary="one decoding step of a whole block, state updated in place",
        equation=(
            "y = x + ffn_alpha W2 (silu(W1 u) W3 u), u = layer_norm(x + mega_attention(x)),"
            " one token per row"
        ),
        schema=(
            "(Tensor x, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) count,"
            " Tensor(d!) mean, Tensor(e!) var, Tensor(f!) h, Tensor position,"
            " Tensor timenorm_weight, Tensor timenorm_bias, Tensor cema_alpha, Tensor cema_delta,"
            " Tensor cema_theta, Tensor cema_gamma, Tensor cema_omega, Tensor? rmsnorm_weight,"
            " Tensor wv_weight, Tensor wv_bias, Tensor wz_weight, Tensor wz_bias,"
            " Tensor wr_weight, Tensor wr_bias, Tensor wh1_weight, Tensor wh1_bias,"
            " Tensor wh2_weight, Tensor gamma, Tensor beta, Tensor? norm_weight,"
            " Tensor? norm_bias, Tensor fc1_weight, Tensor fc2_weight, Tensor? fc3_weight,"
            " Tensor? ffn_alpha, SymInt num_groups, SymInt num_heads, SymInt chunk_size,"
            " float rope_base=10000.0, float eps=1e-05,"
            " bool sliding=False) -> Tensor y"
        ),
        fake=_fake,
        samples=_samples,
        cost=_cost,
    )
)
