"""How the next token is drawn from the logits of each row."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_SMALL = 4096  # tokens that are simply sorted
_HEAD = 1024  # of more tokens, the likeliest that are tried first


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. In the order in which they act:

    Attributes:
        repetition_penalty: divides positive logits of tokens that were there already (in the prompt
            or since) and multiplies negative ones; 1: off. More than 1 discourages them.
        repetition_window: only the last so many tokens count as "there"; 0: all of them.
        temperature: divides the logits; 0 takes the most likely token, and nothing is drawn.
        top_k: only the k most likely; 0: all.
        top_p: only the fewest whose probabilities reach p; 1: all.
        min_p: only those at least so many times as likely as the most likely one; 0: all.

    Raises:
        TypeError: a field is no number (an int, for top_k and repetition_window).
        ValueError: a field is out of its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"{field.name} must be a {field.type}; got {value!r}")
        self._require("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite")
        self._require("top_k", self.top_k >= 0, "0 (all) or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        # In this range no penalised logit overflows.
        penalty = self.repetition_penalty
        self._require("repetition_penalty", 1e-100 <= penalty <= 1e100, "from 1e-100 to 1e100")
        self._require("repetition_window", self.repetition_window >= 0, "0 (all) or more")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {wanted}; got {getattr(self, name)}")


class History:
    """Which tokens a row has seen, for the repetition penalty: V counts, and a window if any."""

    def __init__(self, vocab_size: int, window: int) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64)
        self.recent: deque[int] | None = deque(maxlen=window) if window else None

    def add(self, tokens: Iterable[int]) -> None:
        """Note more tokens."""
        for token in tokens:
            if self.recent is not None:
                if len(self.recent) == self.recent.maxlen:
                    self.counts[self.recent[0]] -= 1
                self.recent.append(token)
            self.counts[token] += 1

    def read(self, tokens: Tensor) -> None:
        """Note many tokens (1-D), at once."""
        if self.recent is not None:
            assert self.recent.maxlen is not None
            self.add(tokens[-self.recent.maxlen :].tolist())
        else:
            self.counts += torch.bincount(tokens, minlength=len(self.counts))


def seeds_of(seed: int | Sequence[int], rows: int) -> list[int]:
    """The seed of each row: seed + i, or the i-th of a sequence."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [seed + i for i in range(rows)]
    if not isinstance(seed, Iterable):
        raise TypeError(f"seed: wanted an int, or one per prompt; got {seed!r}")
    seeds = list(seed)
    if len(seeds) != rows:
        raise ValueError(f"seed: wanted one int, or {rows} (one per prompt); got {len(seeds)}")
    return seeds


def generator_of(seed: int) -> torch.Generator:
    """A row's random generator, of that seed."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: wanted an int; got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: wanted 0 to 2^63 - 1; got {seed}")
    return torch.Generator().manual_seed(seed)


def sample(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    histories: Sequence[History] = (),
) -> list[int]:
    """Draw one token for every row.

    Args:
        logits: (B, V).
        sampling: for all rows.
        generators: one on the CPU per row, each advanced by one draw (none at temperature 0): what
            a row draws does not depend on the others.
        histories: one per row, if there is a repetition penalty.

    Raises:
        ValueError: a row of the logits holds NaN or +inf, or nothing but -inf.
    """
    scores = logits.double()
    if sampling.repetition_penalty != 1:
        # A model may have fewer outputs than tokens.
        counts = [history.counts[: scores.shape[-1]] for history in histories]
        seen = torch.stack(counts).to(scores.device) > 0
        penalty = sampling.repetition_penalty
        penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(seen, penalised, scores)
    highest = scores.amax(-1, keepdim=True)
    for value in highest.view(-1).tolist():
        if not math.isfinite(value):
            raise ValueError("the model's output is not finite; its weights are damaged")
    if sampling.temperature == 0:
        best: list[int] = scores.argmax(-1).tolist()
        return best
    # Subtracting the maximum first keeps a tiny temperature from making inf - inf.
    scores = (scores - highest).div_(sampling.temperature)
    probabilities, tokens = _in_order(torch.softmax(scores, -1), sampling)
    if sampling.top_k:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    total, last = _cut(probabilities, sampling)
    # The inverse of the cumulative distribution: one uniform draw a token, whatever the options.
    draws = [torch.rand((1, 1), dtype=torch.float64, generator=g) for g in generators]
    draw = (draws[0] if len(draws) == 1 else torch.cat(draws)).to(total.device)
    if last is None:
        index = torch.searchsorted(total, draw.mul_(total[:, -1:]), right=True)
        index.clamp_(max=total.shape[-1] - 1)
    else:
        index = torch.searchsorted(total, draw.mul_(total.gather(-1, last)), right=True)
        index = torch.minimum(index, last)
    drawn: list[int] = (index if tokens is None else tokens.gather(-1, index)).view(-1).tolist()
    return drawn


def _in_order(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The probabilities in an order from which to draw, and their tokens (None: as they are).

    The likeliest first where a filter needs it, equal ones by their number; and all that a filter
    may keep, but not necessarily more: sorting a large vocabulary costs milliseconds.
    """
    width, top_k = probabilities.shape[-1], sampling.top_k
    if width > _SMALL:
        if top_k:
            return probabilities.topk(min(top_k, width))
        if sampling.top_p == 1 and sampling.min_p == 0:
            return probabilities, None
        head, tokens = probabilities.topk(_HEAD)
        tokens, by_number = tokens.sort(-1)
        head, order = head.gather(-1, by_number).sort(descending=True, stable=True)
        _, last = _cut(head, sampling)
        assert last is not None
        # Of those as likely as the head's last one some may be missing.
        if bool((head.gather(-1, last) > head[:, -1:]).all()):
            return head, tokens.gather(-1, order)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    return (ordered[:, :top_k], tokens) if top_k else (ordered, tokens)


def _cut(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Cumulative sums (B, n) of sorted probabilities, and the index (B, 1) of the last that top_p
    and min_p keep (None: all). Each of them keeps the first ones: their number has to be known."""
    total, kept = probabilities.cumsum(-1), []
    if sampling.top_p < 1:
        # A token stays when those before it do not reach p; the first always stays.
        kept.append((total - probabilities < sampling.top_p).sum(-1, keepdim=True))
    if sampling.min_p > 0:
        likely = probabilities >= sampling.min_p * probabilities[:, :1]
        kept.append(likely.sum(-1, keepdim=True))
    if not kept:
        return total, None
    return total, (kept[0] if len(kept) == 1 else torch.minimum(*kept)) - 1
