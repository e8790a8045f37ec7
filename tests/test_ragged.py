"""Rows of different lengths in one call equal the same rows alone; rows join and leave a batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import PADDING, advance, assert_close, assert_same_state, padded
from small_model import VOCAB, random_tokens, small_model

from megalodon_ops.state import MegalodonState


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    data=st.data(),
    variant=st.sampled_from([{}, {"chunk_size": 1}, {"chunk_size": 3}, {"layerwise_ckpt": True}]),
)
def test_padded_rows_equal_the_rows_alone(
    lengths: list[int], extra: int, data: st.DataObject, variant: dict[str, Any]
) -> None:
    model = small_model(**variant)
    starts = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=4, max_size=4))
    before = None if starts is None else advance(model, starts[: len(lengths)])
    rows = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    tokens = padded(rows, max(lengths) + extra)
    weights = [torch.randn(1, n, VOCAB, dtype=torch.float64) for n in lengths]

    logits, state = model(tokens, before, return_state=True, lengths=lengths)
    last = model(tokens, before, lengths=torch.tensor(lengths), outputs="last")
    alone = [None if before is None else before.select(i) for i in range(len(lengths))]
    want = [model(row, old, return_state=True) for row, old in zip(rows, alone, strict=True)]
    got_loss = want_loss = torch.zeros((), dtype=torch.float64)
    for i, (n, (row_logits, _)) in enumerate(zip(lengths, want, strict=True)):
        assert_close(logits[i : i + 1, :n], row_logits)
        if n:
            assert_close(last[i], row_logits[0, -1])
        else:
            assert last[i].isnan().all()
        got_loss = got_loss + (weights[i] * logits[i : i + 1, :n]).sum()
        want_loss = want_loss + (weights[i] * row_logits).sum()
    assert_same_state(state, MegalodonState.cat([after for _, after in want]))

    if got_loss.requires_grad and want_loss.requires_grad and sum(lengths):
        parameters = list(model.parameters())
        ours = torch.autograd.grad(got_loss, parameters, materialize_grads=True, retain_graph=True)
        theirs = torch.autograd.grad(
            want_loss, parameters, materialize_grads=True, retain_graph=True
        )
        for got, wanted in zip(ours, theirs, strict=True):
            assert_close(got, wanted)

    with torch.no_grad():
        mine = model.init_state(len(lengths)) if before is None else before.detach().clone()
        result, same = model(tokens, mine, return_state=True, inplace_state=True, lengths=lengths)
    assert same is mine
    assert_same_state(mine, state)
    for i, n in enumerate(lengths):
        assert_close(result[i, :n], logits[i, :n])


def test_float32_and_bfloat16() -> None:
    lengths = [7, 3, 0, 7, 12]
    rows = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = small_model(dtype=dtype)
        with torch.no_grad():
            last, state = model(
                padded(rows, 12), return_state=True, lengths=lengths, outputs="last"
            )
            for i, row in enumerate(rows):
                if row.shape[1]:
                    torch.testing.assert_close(
                        last[i], model(row)[0, -1], rtol=tolerance, atol=tolerance
                    )
        assert state.position.tolist() == lengths
        assert state.dtype == dtype


def test_bad_lengths() -> None:
    model = small_model()
    tokens = random_tokens(2, 3)
    with pytest.raises(ValueError, match=r"lengths: wanted values in \[0, 3\] .*; got 4 in row 1"):
        model(tokens, lengths=[3, 4])
    with pytest.raises(ValueError, match=r"lengths: wanted values in \[0, 3\] .*; got -1 in row 0"):
        model(tokens, lengths=torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"lengths: wanted 2 \(tokens.shape\[0\]\); got 3"):
        model(tokens, lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="lengths: wanted a vector of int64 or int32"):
        model(tokens, lengths=torch.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match=r"lengths: wanted integers; got 1\.5"):
        model(tokens, lengths=[1.5, 2])
    with pytest.raises(IndexError, match=r"wanted ids in \[0, 11\); got -100"):
        model(torch.tensor([[1, PADDING, 2]] * 2), lengths=[3, 2])  # inside a row
    with pytest.raises(ValueError, match="outputs: wanted one of logits, last, hidden; got 'all'"):
        model(tokens, outputs="all")


def test_outputs() -> None:
    model = small_model()
    tokens = random_tokens(2, 5)
    logits = model(tokens)
    hidden, state = model(tokens, return_state=True, outputs="hidden")
    assert hidden.shape == (2, 5, 12)
    assert_close(hidden @ model.output.output.weight.T, logits)
    assert_close(model(tokens, outputs="last"), logits[:, -1])
    assert model(tokens[:, :0], state, outputs="last").isnan().all()


@settings(max_examples=10)
@given(data=st.data())
def test_rows_join_and_leave_a_running_batch(data: st.DataObject) -> None:
    """Continuous batching: prompts of any length come, are decoded together, and go."""
    model = small_model()
    rows = [random_tokens(1, 30, seed=i) for i in range(6)]
    want = [model(row)[0] for row in rows]
    waiting, running, done = list(range(6)), [], 0
    state = model.init_state(0)
    with torch.no_grad():
        while done < 6:
            count = data.draw(st.integers(0 if running else 1, 3)) if waiting else 0
            new, waiting = waiting[:count], waiting[count:]
            if new:
                sizes = [data.draw(st.integers(1, 9)) for _ in new]
                prompts = [rows[i][:, :n] for i, n in zip(new, sizes, strict=True)]
                last, fresh = model(
                    padded(prompts, max(sizes)), return_state=True, lengths=sizes, outputs="last"
                )
                for i, n, logits in zip(new, sizes, last, strict=True):
                    assert_close(logits, want[i][n - 1])
                state = MegalodonState.cat([state, fresh])
                running += new
            for _ in range(data.draw(st.integers(1, 4))):
                at = state.position.tolist()
                step = torch.stack([rows[i][0, p] for i, p in zip(running, at, strict=True)])
                logits = model(step[:, None], state, inplace_state=True)
                for i, p, row in zip(running, at, logits[:, 0], strict=True):
                    assert_close(row, want[i][p])
            stay = [
                k
                for k, p in enumerate(state.position.tolist())
                if p < 24 and data.draw(st.booleans())
            ]
            done += len(running) - len(stay)
            state = state.index_select(torch.tensor(stay, dtype=torch.int64))
            running = [running[k] for k in stay]
