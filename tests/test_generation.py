"""Generation: every row as if it were alone, from prompts of any kind and length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import GREEDY, next_logits, prompt
from rows import assert_same_state
from small_model import random_tokens, small_model

from megalodon_ops._prefill import prefill
from megalodon_ops.beam import beam_search
from megalodon_ops.generation import Generated, generate
from megalodon_ops.sampling import Sampling
from megalodon_ops.session import Event


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batch_size=st.none() | st.integers(1, 3),
    piece=st.integers(1, 40),
    greedy=st.booleans(),
)
def test_rows_are_as_if_alone(
    lengths: list[int], batch_size: int | None, piece: int, greedy: bool
) -> None:
    model = small_model()
    prompts = [prompt(n, seed=i) for i, n in enumerate(lengths)]
    sampling = GREEDY if greedy else Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1)
    options: dict[str, Any] = {"sampling": sampling, "stop": [(3, 4), (5,)]}
    events: list[Event] = []
    got = generate(
        model, prompts, 9, **options, seed=7, batch_size=batch_size, piece=piece,
        on_event=events.append,
    )  # fmt: skip
    for i, start in enumerate(prompts):
        assert got[i] == generate(model, [start], 9, **options, seed=[7 + i])[0]
        streamed = [token for e in events if e.row == i for token in e.tokens]
        assert streamed == got[i].tokens


def test_greedy_is_argmax_of_the_whole_forward() -> None:
    model, start = small_model(), prompt(11)
    made = generate(model, [torch.tensor(start), start[:3]], 12, GREEDY)
    for begin, result in zip((start, start[:3]), made, strict=True):
        text = list(begin)
        for token in result.tokens:
            assert token == int(next_logits(model, text).argmax())
            text.append(token)


def test_prompts_of_any_kind() -> None:
    model = small_model(vocab_size=256)
    text = b"some text of 20 byte"

    def pieces() -> Iterator[bytes]:
        for at in range(0, 20, 3):
            yield text[at : at + 3]
            yield b""

    forms = [text, list(text), torch.tensor(list(text), dtype=torch.int32), pieces()]
    results = generate(model, forms, 5, GREEDY)
    assert all(result == results[0] for result in results)
    assert generate(model, [], 5) == []
    assert generate(model, [text], 0) == [Generated()]


def test_long_prompts_are_read_in_pieces() -> None:
    """No call of the model sees more than `piece` tokens, and no more logits than rows are made."""
    model, calls, heads = small_model(), [], []
    model.embed.register_forward_hook(lambda _, args, __: calls.append(args[0].numel()))
    model.output.output.register_forward_hook(lambda _, __, y: heads.append(y.shape[:-1].numel()))

    def pieces() -> Iterator[list[int]]:
        for i in range(50):
            yield prompt(37, seed=i)

    logits, state = prefill(model, [pieces(), prompt(100), prompt(3)], piece=64)
    assert max(calls) <= 64
    assert max(heads) <= 3
    assert state.position.tolist() == [1850, 100, 3]
    whole = [token for i in range(50) for token in prompt(37, seed=i)]
    torch.testing.assert_close(logits[0], next_logits(model, whole), rtol=1e-9, atol=1e-10)


def test_bad_prompts() -> None:
    model = small_model()
    for prompts, kind, wanted in (
        ([[1], []], ValueError, "prompts: prompt 1 is empty"),
        ([[11]], IndexError, r"prompts: prompt 0: wanted ids in \[0, 11\); got 11"),
        ([[-1]], IndexError, "got -1"),
        (["text"], TypeError, r"got a str \(encode it\)"),
        ("text", TypeError, "got one prompt"),
        (torch.tensor([1]), TypeError, "got one prompt"),
        ([[0.5]], TypeError, r"wanted token ids; got 0\.5"),
        ([torch.tensor([[1]])], TypeError, "wanted a vector of token ids"),
        ([3], TypeError, "wanted token ids or bytes; got int"),
        (iter([[1]]), TypeError, "wanted a sequence of prompts, one per row; got list_iterator"),
    ):
        with pytest.raises(kind, match=wanted):
            generate(model, prompts, 3)  # type: ignore[arg-type]
    for options, wanted in (
        ({"max_new_tokens": -1}, "max_new_tokens: wanted 0 or more; got -1"),
        ({"seed": [1, 2]}, r"seed: wanted one int, or 1 \(one per prompt\); got 2"),
        ({"seed": -1}, r"seed: wanted 0 to 2\^63 - 1; got -1"),
        ({"batch_size": 0}, "batch_size: wanted None or 1 or more; got 0"),
        ({"piece": 0}, "piece: wanted an int >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            generate(model, [[1]], **{"max_new_tokens": 3, **options})
    for options, wanted in (
        ({"max_new_tokens": 1.5}, r"max_new_tokens: wanted an int; got 1\.5"),
        ({"seed": 1.5}, r"seed: wanted an int, or one per prompt; got 1\.5"),
        ({"seed": True}, "seed: wanted an int, or one per prompt; got True"),
        ({"seed": ["1"]}, "seed: wanted an int; got '1'"),
        ({"batch_size": 1.5}, r"batch_size: wanted None or an int; got 1\.5"),
        ({"batch_size": True}, "batch_size: wanted None or an int; got True"),
    ):
        with pytest.raises(TypeError, match=wanted):
            generate(model, [[1]], **{"max_new_tokens": 3, **options})
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        generate(small_model(dropout=0.1).train(), [[1]], 3)


@pytest.mark.parametrize("window", [0, 3])
def test_a_model_of_fewer_outputs_than_tokens(window: int) -> None:
    """Those beyond are read and never said, whatever the penalty on what was read."""
    model, start = small_model(output_size=7), [9, 10, 3, 9]
    options = Sampling(temperature=0, repetition_penalty=1.8, repetition_window=window)
    text = list(start)
    for token in generate(model, [start], 9, options)[0].tokens:
        logits = next_logits(model, text)
        for seen in set(text[-window:] if window else text) & set(range(7)):
            logits[seen] = logits[seen] / 1.8 if logits[seen] > 0 else logits[seen] * 1.8
        assert token == int(logits.argmax())
        text.append(token)
    assert len(text) == len(start) + 9
    assert len(beam_search(model, [start], 4)[0][0].tokens) == 4


def test_outputs_that_are_no_tokens_are_refused() -> None:
    model = small_model(output_size=12)
    for call in (generate, beam_search):
        with pytest.raises(ValueError, match=r"output_size: wanted at most vocab_size = 11, .* 12"):
            call(model, [[1]], 3)


@pytest.mark.parametrize("length", [1, 4, 5, 31, 32, 33, 36, 37, 40, 41, 47, 60])
def test_recent_norms_are_the_released_codes(length: int) -> None:
    """Its schedule, written down: chunks two by two, the statistics of the last six from 8 on."""
    model = small_model()
    chunk, text = 4, random_tokens(1, length)
    with torch.no_grad():
        state, whole = model.init_state(1), (length - 1) // chunk
        for first in range(0, whole, 2):
            end = min(first + 2, whole) * chunk
            state = model(text[:, first * chunk : end], state, return_state=True)[1]
            if end >= 8 * chunk:
                fresh = model(text[:, end - 6 * chunk : end], return_state=True)[1]
                state = state.with_norms(fresh)
        want, state = model(text[:, whole * chunk :], state, return_state=True)
        got, after = prefill(model, [text[0], text[0, :3]], recent_norms=True)
        torch.testing.assert_close(got[:1], want[:, -1], rtol=1e-9, atol=1e-10)
        assert_same_state(after.select(0), state)
        plain = prefill(model, [text[0]])[0]
    assert torch.allclose(plain, got[:1], rtol=1e-6) == (length <= 32)
    seen = length if length <= 32 else 6 * chunk + 1 + (length - 1) % chunk
    assert after.layers[0].norm.count[0] == seen
    expected = generate(model, [text[0]], 3, GREEDY, recent_norms=True)[0].tokens
    assert expected[0] == int(want[0, -1].argmax())
    with pytest.raises(ValueError, match="recent_norms: wanted state=None"):
        prefill(model, [[1]], after.select(0), recent_norms=True)
