"""Beam search: enough beams find the best continuation, one beam is the greedy one."""

from __future__ import annotations

import pytest
import torch
from prompts import GREEDY, next_logits, prompt
from small_model import small_model

from megalodon_ops.beam import _Search, beam_search
from megalodon_ops.generation import generate
from megalodon_ops.model import Megalodon
from megalodon_ops.stopping import Stops


def all_continuations(
    model: Megalodon, start: list[int], limit: int, stop: tuple[int, ...]
) -> dict[tuple[int, ...], float]:
    """Every continuation with its log probability, ended at the stop sequence or at the limit."""
    done: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(1, limit + 1):
        grown = {}
        for tokens, value in live.items():
            for token, more in enumerate(next_logits(model, start + list(tokens)).log_softmax(-1)):
                grown[(*tokens, token)] = value + float(more)
        live = {}
        for tokens, value in grown.items():
            ended = tokens[-len(stop) :] == stop or length == limit
            (done if ended else live)[tokens] = value
    return done


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_enough_beams_find_the_best(penalty: float) -> None:
    model, start, stop = small_model(vocab_size=4), [1, 2, 3], (2, 1)
    every = all_continuations(model, start, 4, stop)
    best = sorted(every.items(), key=lambda item: -item[1] / len(item[0]) ** penalty)[:5]
    (found,) = beam_search(
        model, [start], 4, beams=256, length_penalty=penalty, results=5, stop=[stop]
    )
    for hypothesis, (tokens, value) in zip(found, best, strict=True):
        ended = tokens[-2:] == stop
        assert tuple(hypothesis.tokens) == (tokens[:-2] if ended else tokens)
        assert hypothesis.finish == ("stop" if ended else "length")
        assert hypothesis.log_probability == pytest.approx(value)
        assert hypothesis.score == pytest.approx(value / len(tokens) ** penalty)


def test_no_continuation_is_found_twice_where_all_are_equal() -> None:
    """The first in number are taken. Stops among them make room: more are asked for, repeatedly."""
    stops = Stops([[token] for token in range(4, 60)], None, 64)
    search = _Search(small_model(vocab_size=64), stops, 8, 3.0, 1, 3)
    goes_on = [*range(4), *range(60, 64)]
    assert search._step(torch.zeros(1, 64), 1) == ([0] * 8, goes_on)
    assert search._step(torch.zeros(8, 64), 2) == ([0] * 8, goes_on)
    assert [beam.tokens for beam in search._live] == [[0, token] for token in goes_on]
    assert sorted(h.tokens for h in search._done) == [[]] * 56 + [[0]] * 56


def test_beams() -> None:
    model, starts = small_model(), [prompt(6), prompt(3, seed=1)]
    one = beam_search(model, starts, 10, beams=1)
    greedy = generate(model, starts, 10, GREEDY)
    assert [found[0].tokens for found in one] == [result.tokens for result in greedy]
    for start, found in zip(
        starts, beam_search(model, starts, 10, beams=4, results=3), strict=True
    ):
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        for hypothesis in found:
            text, value = list(start), 0.0
            for token in hypothesis.tokens:
                value += float(next_logits(model, text).log_softmax(-1)[token])
                text.append(token)
            assert hypothesis.log_probability == pytest.approx(value)
    with pytest.raises(ValueError, match="results: wanted 1 or more and at most beams = 2; got 3"):
        beam_search(model, starts, 4, beams=2, results=3)
    with pytest.raises(ValueError, match="beams: wanted 1 or more; got 0"):
        beam_search(model, starts, 4, beams=0)
    for penalty in (2000.0, -2000.0, 500.0):
        with pytest.raises(ValueError, match=rf"length_penalty: wanted .* 9; got {penalty}"):
            beam_search(model, starts, 9, length_penalty=penalty)
    assert beam_search(model, starts, 9, length_penalty=300.0)[0][0].score < 0
    assert beam_search(model, starts, 1, length_penalty=2000.0)[0][0].score < 0
