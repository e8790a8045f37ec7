"""chunk_attention_step: one decoding step of chunk attention; the caches are updated in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like

if TYPE_CHECKING:
    from torch import Tensor


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    chunk_size: int,
    sliding: bool = False,
) -> Tensor:
    return like(v)


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(H: int, S: int, E: int, C: int, *position: int) -> tuple[Any, ...]:
        B = len(position)
        return (
            make.activation(B, H, S) * S**-0.5,
            make.activation(B, H, S),
            make.activation(B, H, E),
            make.activation(B, C, H, S),
            make.activation(B, C, H, E),
            make.ints(*position),
            C,
        )

    yield Sample("one row", sample(1, 8, 20, 5, 3))
    yield Sample("rows", sample(2, 6, 3, 70, 0, 69, 141))
    yield Sample("sliding", (*sample(2, 6, 3, 70, 0, 69, 141), True))


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    chunk_size: int,
    sliding: bool = False,
) -> Cost:
    """With the slots that are filled."""
    _, H, S = q.shape
    slots = (position + 1).clamp(max=chunk_size) if sliding else position % chunk_size + 1
    elements = int(slots.sum()) * H * (S + v.shape[2])
    return Cost(bytes=elements * q.element_size(), flops=2 * elements)


OP = registry.add(
    Op(
        name="chunk_attention_step",
        summary="one decoding step of chunk attention, caches updated in place",
        equation=(
            "k_cache[m] = k, v_cache[m] = v,"
            " o = sum_(j <= m) softmax_j(q . k_cache[j]) v_cache[j], m = position mod C"
            " (sliding: over all slots written)"
        ),
        schema=(
            "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,"
            " Tensor position, SymInt chunk_size, bool sliding=False) -> Tensor o"
        ),
        fake=_fake,
        samples=_samples,
        cost=_cost,
    )
)
