"""Beam search: the continuations of highest probability that a bounded search finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._prefill import (
    DEFAULT_PIECE,
    Prompt,
    prefill,
    require_count,
    require_several,
    require_tokens,
)
from .model import Megalodon
from .session import TokenBytes
from .state import MegalodonState
from .stopping import Matcher, Stop, Stops

_LARGEST_EXPONENT = 700.0  # e to this power, or its negative, is a float64


@dataclass
class Hypothesis:
    """One continuation.

    Attributes:
        tokens: without the stop sequence that ended it.
        log_probability: natural logarithm of the probability of all its tokens, stop included.
        score: log_probability / length ** length_penalty; the length counts the stop.
        finish: "stop" or "length".
        rest: as in `Event`.
    """

    tokens: list[int]
    log_probability: float
    score: float
    finish: str = "length"
    rest: bytes = b""


@dataclass
class _Beam:
    tokens: list[int]
    log_probability: float
    matcher: Matcher


@torch.inference_mode()
def beam_search(
    model: Megalodon,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    results: int = 1,
    stop: Sequence[Stop] = (),
    token_bytes: TokenBytes | None = None,
    piece: int = DEFAULT_PIECE,
) -> list[list[Hypothesis]]:
    """Continue each prompt by beam search, one prompt after the other.

    At every step the `beams` best unfinished continuations stay, of equal ones the first by number;
    where their order changes, so do the rows of the state (one copy of it). With one beam it is
    greedy decoding.

    Args:
        model: in eval mode, if it has any dropout.
        prompts, stop, token_bytes, piece: as for `generate`.
        max_new_tokens: the most tokens of a continuation, 1 or more.
        beams: unfinished continuations kept, rows of a step.
        length_penalty: a continuation's score is its log probability over its length to this
            power: 0 compares probabilities, which favours short ones; more favours longer ones.
        results: continuations returned, at most `beams`.

    Returns:
        per prompt, at most `results` continuations, the highest score first.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; the message names it.
    """
    require_count("max_new_tokens", max_new_tokens)
    require_count("beams", beams)
    require_count("results", results)
    if results > beams:
        raise ValueError(f"results: wanted 1 or more and at most beams = {beams}; got {results}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: wanted a finite number; got {length_penalty}")
    if abs(length_penalty) * math.log(max_new_tokens) > _LARGEST_EXPONENT:
        raise ValueError(
            f"length_penalty: wanted a power that float64 holds of max_new_tokens = "
            f"{max_new_tokens}; got {length_penalty}"
        )
    if model.training and model.config.any_dropout:
        raise ValueError("the model is in training mode, with dropout: call model.eval()")
    require_tokens(model.config)
    stops = Stops(stop, token_bytes, model.config.vocab_size)
    require_several(prompts)
    found = []
    for prompt in prompts:
        logits, state = prefill(model, [prompt], piece=piece)
        search = _Search(model, stops, beams, length_penalty, results, max_new_tokens)
        found.append(search.run(logits, state))
    return found


class _Search:
    """The search from one prompt."""

    def __init__(
        self,
        model: Megalodon,
        stops: Stops,
        beams: int,
        length_penalty: float,
        results: int,
        limit: int,
    ) -> None:
        self._model, self._count, self._limit = model, beams, limit
        self._penalty, self._results = length_penalty, results
        self._live = [_Beam([], 0.0, Matcher(stops))]
        self._done: list[Hypothesis] = []

    def run(self, logits: Tensor, state: MegalodonState) -> list[Hypothesis]:
        for length in range(1, self._limit + 1):
            parents, tokens = self._step(logits, length)
            if not self._live or length == self._limit or self._decided(length):
                break
            if parents != list(range(state.batch_size)):
                state = state.index_select(torch.tensor(parents, device=state.device))
            step = torch.tensor(tokens, device=state.device).unsqueeze(1)
            logits = self._model(step, state, inplace_state=True)[:, -1]
        else:
            length = self._limit
        if length == self._limit:
            for beam in self._live:
                tokens = beam.tokens + list(beam.matcher.flush())
                score = self._score(beam.log_probability, length)
                self._done.append(Hypothesis(tokens, beam.log_probability, score))
        return self._best()

    def _step(self, logits: Tensor, length: int) -> tuple[list[int], list[int]]:
        """Replace the beams by their best continuations; which beam each comes from, its token."""
        before = [beam.log_probability for beam in self._live]
        total = torch.log_softmax(logits.double(), -1)
        total = total + torch.tensor(before, dtype=torch.float64, device=total.device)[:, None]
        if not bool(total.isfinite().any(-1).all()) or bool(total.isnan().any()):
            raise ValueError("the model's output is not finite; its weights are damaged")
        width, flat = total.shape[1], total.view(-1)
        old, self._live = self._live, []
        parents: list[int] = []
        tokens: list[int] = []
        # Continuations that end make room for others, so how many are needed is not known.
        seen, wanted = 0, 0
        while len(self._live) < self._count and seen < len(flat):
            wanted = min(len(flat), max(2 * wanted, 2 * self._count))
            values, indices = _likeliest(flat, wanted)
            pairs = list(zip(values.tolist(), indices.tolist(), strict=True))[seen:]
            seen = wanted
            for value, index in pairs:
                if len(self._live) == self._count or value == -math.inf:
                    break
                parent, token = divmod(index, width)
                if self._continue(old[parent], token, value, length):
                    parents.append(parent)
                    tokens.append(token)
        return parents, tokens

    def _continue(self, beam: _Beam, token: int, value: float, length: int) -> bool:
        """Add one token to a beam; whether the result goes on."""
        matcher = beam.matcher.copy()
        fed = matcher.feed(token)
        tokens = [*beam.tokens, *fed.tokens]
        if fed.stop is not None:
            score = self._score(value, length)
            self._done.append(Hypothesis(tokens, value, score, "stop", fed.rest))
            return False
        self._live.append(_Beam(tokens, value, matcher))
        return True

    def _score(self, log_probability: float, length: int) -> float:
        return float(log_probability / length**self._penalty)

    def _best(self) -> list[Hypothesis]:
        return sorted(self._done, key=lambda h: -h.score)[: self._results]

    def _decided(self, length: int) -> bool:
        """Whether nothing that the beams can become is among the best: probabilities only fall."""
        best = self._best()
        if len(best) < self._results:
            return False
        highest = self._live[0].log_probability
        return best[-1].score >= max(self._score(highest, n) for n in (length + 1, self._limit))


def _likeliest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest values (of a vector) and their indices, equal ones by index: the first `count` of
    one order, whatever the count. Two calls of topk may choose among equals in two ways."""
    lowest = values.topk(count).values[-1]
    indices = (values >= lowest).nonzero().squeeze(1)
    ordered, places = values[indices].sort(descending=True, stable=True)
    return ordered[:count], indices[places[:count]]
