"""Sampling: what each option leaves to draw from, and that every row draws as if it were alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prompts import WARM, next_logits, prompt
from small_model import small_model

from megalodon_ops import sampling as sampling_module
from megalodon_ops.generation import generate
from megalodon_ops.sampling import History, Sampling, sample


def draws(logits: list[float], count: int = 300, **options: Any) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([logits])
    return {sample(rows, Sampling(**options), [generator])[0] for _ in range(count)}


def test_filters() -> None:
    logits = [0.0, 3.0, 1.0, 2.0, -math.inf]
    assert draws(logits, temperature=1.0) == {0, 1, 2, 3}
    assert draws(logits, temperature=1.0, top_k=2) == {1, 3}
    assert draws(logits, temperature=1.0, top_k=99) == {0, 1, 2, 3}
    assert draws(logits, temperature=1.0, top_p=0.5) == {1}
    assert draws(logits, temperature=1.0, top_p=1e-9) == {1}
    assert draws(logits, temperature=1.0, top_p=0.7) == {1, 3}
    assert draws(logits, temperature=1.0, min_p=1.0) == {1}
    assert draws(logits, temperature=1.0, min_p=0.9 * math.exp(-1)) == {1, 3}
    assert draws(logits, temperature=1.0, min_p=0.9 * math.exp(-2)) == {1, 2, 3}
    assert draws(logits, temperature=2.0, min_p=0.9 * math.exp(-1)) == {1, 2, 3}
    assert draws(logits, temperature=1.0, top_p=0.7, min_p=0.9 * math.exp(-2)) == {1, 3}
    assert draws(logits, temperature=1e-300) == {1}
    assert draws(logits, temperature=0) == {1}


def test_frequencies() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    rows = logits.expand(4000, -1)
    drawn = torch.tensor(sample(rows, WARM, [generator] * 4000))
    counts = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(counts, logits.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.01}, {"min_p": 1e-9}, {"top_k": 40}, {},
     {"top_k": 40, "top_p": 0.8}, {"top_p": 0.9, "min_p": 0.01}, {"top_p": 1e-9}],
)  # fmt: skip
@pytest.mark.parametrize("ties", [False, True])
def test_a_large_vocabulary_is_not_sorted(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], ties: bool
) -> None:
    """And the draws are those from the sorted one, equal logits included."""
    logits = 4 * torch.randn(3, 5000)
    logits = logits.bfloat16().float() if ties else logits
    logits[2] = logits[2] if options.get("min_p") else logits[2] / 100  # nothing stands out

    def drawn() -> list[list[int]]:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return [sample(logits, Sampling(temperature=1.0, **options), generators) for _ in range(40)]

    fast = drawn()
    monkeypatch.setattr(sampling_module, "_SMALL", 5000)
    if not options:  # drawn in the vocabulary's order
        flat = torch.tensor(fast).T
        assert all(len(row.unique()) > 5 for row in flat)
    elif not (ties and options.get("top_k")):  # of equal ones either may be the k-th
        assert fast == drawn()


def test_rows_do_not_share_draws() -> None:
    logits = torch.randn(3, 50)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(3)]

    options = Sampling(temperature=1.3, top_k=30, top_p=0.9, min_p=0.01)
    together, alone = generators(), generators()
    for _ in range(20):
        want = [sample(row[None], options, [g])[0] for row, g in zip(logits, alone, strict=True)]
        assert sample(logits, options, together) == want


def test_repetition_penalty() -> None:
    history = History(4, 0)
    history.read(torch.tensor([1, 1, 3]))
    rows = torch.tensor([[1.0, 1.5, -1.0, -0.9]])
    for penalty, best in ((1.0, 1), (1.4, 1), (1.6, 0)):
        options = Sampling(temperature=0, repetition_penalty=penalty)
        assert sample(rows, options, [], [history]) == [best]
    only = torch.tensor([[-math.inf, -math.inf, -1.0, -0.9]])
    penalised = Sampling(temperature=0, repetition_penalty=1.6)
    assert sample(only, penalised, [], [history]) == [2]


@given(
    tokens=st.lists(st.integers(0, 4), max_size=12),
    cut=st.integers(0, 12),
    window=st.integers(0, 5),
)
def test_history_counts_the_window(tokens: list[int], cut: int, window: int) -> None:
    history = History(5, window)
    history.read(torch.tensor(tokens[:cut], dtype=torch.int64))
    history.add(tokens[cut:])
    kept = tokens[-window:] if window else tokens
    assert history.counts.tolist() == [kept.count(token) for token in range(5)]


def test_repetition_penalty_of_a_session() -> None:
    """Prompt and generated tokens count, the window forgets: equal to the plain definition."""
    model, start = small_model(), prompt(7)
    for window in (0, 3):
        options = Sampling(temperature=0, repetition_penalty=1.8, repetition_window=window)
        got = generate(model, [start], 12, options, piece=4)[0].tokens
        text = list(start)
        for token in got:
            logits = next_logits(model, text)
            for seen in set(text[-window:] if window else text):
                logits[seen] = logits[seen] / 1.8 if logits[seen] > 0 else logits[seen] * 1.8
            assert token == int(logits.argmax())
            text.append(token)


@pytest.mark.parametrize("penalty", [1e-100, 1e100])
def test_no_penalised_logit_overflows(penalty: float) -> None:
    history = History(2, 0)
    history.add([0])
    options = Sampling(temperature=0, repetition_penalty=penalty)
    large = torch.finfo(torch.float32).max
    for logits in ([large, -large], [-large, large]):
        best = sample(torch.tensor([logits]), options, [], [history])
        assert best == [int(logits[1] > logits[0])]


def test_bad_sampling() -> None:
    for field, value, wanted in (
        ("temperature", -1.0, "temperature must be 0 or more, and finite; got -1.0"),
        ("temperature", math.nan, "temperature must be"),
        ("top_k", -1, "top_k must be"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1; got 0.0"),
        ("min_p", 1.1, "min_p must be from 0 to 1; got 1.1"),
        ("temperature", math.inf, "temperature must be 0 or more, and finite; got inf"),
        ("repetition_penalty", 0.0, "repetition_penalty must be from 1e-100 to 1e100; got 0.0"),
        ("repetition_penalty", 5e-324, "repetition_penalty must be"),
        ("repetition_window", -1, "repetition_window must be"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Sampling(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="top_k must be a int"):
        Sampling(top_k=1.5)  # type: ignore[arg-type]
    for bad in ([0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="not finite"):
            sample(torch.tensor([bad]), WARM, [torch.Generator()])
