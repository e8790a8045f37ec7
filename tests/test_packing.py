"""Documents packed into one row: the model computes what it computes of each alone."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import BAD_BOUNDS
from rows import advance, assert_close, assert_same_state
from small_model import VOCAB, random_tokens, small_model
from torch import Tensor

from megalodon_ops.state import MegalodonState

VARIANTS = st.sampled_from(
    [{}, {"chunk_size": 1}, {"chunk_size": 3}, {"swiglu": True}, {"layerwise_ckpt": True},
     {"attention": "sliding"}, {"attention": "sliding", "chunk_size": 1}]
)  # fmt: skip


def bounds_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    data=st.data(),
    variant=VARIANTS,
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_packed_documents_equal_the_documents_alone(
    lengths: list[int], data: st.DataObject, variant: dict[str, Any], dtype: torch.dtype
) -> None:
    """Logits, states and all gradients, through the states before as well."""
    model = small_model(**variant)
    starts = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=5, max_size=5))
    before = None if starts is None else advance(model, starts[: len(lengths)])
    documents = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    tokens, bounds = torch.cat(documents, 1), bounds_of(lengths, dtype)
    weights = torch.randn(1, sum(lengths), VOCAB, dtype=torch.float64)

    logits, state = model(tokens, before, return_state=True, cu_seqlens=bounds)
    last = model(tokens, before, cu_seqlens=bounds, outputs="last")
    alone = [None if before is None else before.select(i) for i in range(len(lengths))]
    want = [model(d, old, return_state=True) for d, old in zip(documents, alone, strict=True)]
    assert_close(logits, torch.cat([one for one, _ in want], 1))
    assert_same_state(state, MegalodonState.cat([after for _, after in want]))
    for got, (one, _) in zip(last, want, strict=True):
        if one.shape[1]:
            assert_close(got, one[0, -1])
        else:
            assert got.isnan().all()

    if sum(lengths):
        parameters = list(model.parameters())
        total = (weights * torch.cat([one for one, _ in want], 1)).sum()
        ours = torch.autograd.grad(
            (weights * logits).sum(), parameters, materialize_grads=True, retain_graph=True
        )
        theirs = torch.autograd.grad(total, parameters, materialize_grads=True, retain_graph=True)
        for got, wanted in zip(ours, theirs, strict=True):
            assert_close(got, wanted)

    with torch.no_grad():
        mine = model.init_state(len(lengths)) if before is None else before.detach().clone()
        again, same = model(tokens, mine, return_state=True, inplace_state=True, cu_seqlens=bounds)
    assert same is mine
    assert_same_state(mine, state)
    assert_close(again, logits)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_documents_of_one_length_equal_a_batch(dropout: float) -> None:
    """With attention dropout, too: a document draws what its row would draw."""
    model = small_model(attention_dropout=dropout)
    tokens = random_tokens(3, 7)
    torch.manual_seed(1)
    batch, state = model(tokens, return_state=True)
    torch.manual_seed(1)
    packed, after = model(
        tokens.view(1, 21), return_state=True, cu_seqlens=torch.tensor([0, 7, 14, 21])
    )
    assert_close(packed.view_as(batch), batch)
    assert_same_state(after, state)


def test_ten_thousand_documents() -> None:
    model = small_model()
    lengths = torch.randint(0, 4, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens, bounds = random_tokens(1, sum(lengths)), bounds_of(lengths, torch.int32)
    with torch.no_grad():
        logits = model(tokens, cu_seqlens=bounds)
        for i in (0, 4_999, 9_999, *range(5_000, 5_020)):
            document = slice(int(bounds[i]), int(bounds[i + 1]))
            assert_close(logits[:, document], model(tokens[:, document]))


def test_packed_prompts_are_decoded_as_a_batch() -> None:
    model, lengths = small_model(), [5, 1, 8]
    documents = [random_tokens(1, n + 3, seed=n) for n in lengths]
    prompts = [d[:, :n] for d, n in zip(documents, lengths, strict=True)]
    with torch.no_grad():
        _, state = model(torch.cat(prompts, 1), return_state=True, cu_seqlens=bounds_of(lengths))
        steps = torch.cat([d[:, -3:] for d in documents])
        logits = model(steps, state)
        for got, document in zip(logits, documents, strict=True):
            assert_close(got, model(document)[0, -3:])


@pytest.mark.parametrize("bounds", [bounds for bounds, _, _ in BAD_BOUNDS])
def test_bad_bounds(bounds: Tensor) -> None:
    """What the ops refuse, the model refuses before it computes anything."""
    with pytest.raises(ValueError, match=r"^cu_seqlens: "):
        small_model()(random_tokens(1, 6), cu_seqlens=bounds)


def test_bad_arguments() -> None:
    model, bounds = small_model(), torch.tensor([0, 2, 6])
    with pytest.raises(TypeError, match=r"cu_seqlens: wanted a torch.Tensor; got list"):
        model(random_tokens(1, 6), cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match=r"tokens: wanted one packed row .* got \[2, 6\]"):
        model(random_tokens(2, 6), cu_seqlens=bounds)
    with pytest.raises(ValueError, match="lengths, cu_seqlens: wanted one of them; got both"):
        model(random_tokens(1, 6), lengths=[6], cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"state: .*wanted"):
        model(random_tokens(1, 6), model.init_state(3), cu_seqlens=bounds)
    with pytest.raises(ValueError, match="cu_seqlens: device: wanted the tokens', cpu; got meta"):
        model(random_tokens(1, 6), cu_seqlens=bounds.to("meta"))
