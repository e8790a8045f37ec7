"""Text from a model, one byte at a time, for as long as wanted, at constant memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megalodon_ops.model import Megalodon
from megalodon_ops.training.errors import CommandError
from megalodon_ops.training.evaluation import byte_tensor

# What an empty prompt means: text begins after a line break.
EMPTY_PROMPT = b"\n"


@dataclass(frozen=True)
class Sampling:
    """How the next byte is drawn from the logits.

    temperature: divides the logits; 0 means the most likely byte. top_k: only the k most likely (0:
    all). top_p: only the fewest whose probabilities reach p (1: all), applied after top_k.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise CommandError(f"--temperature must be 0 or more; got {self.temperature}")
        if self.top_k < 0:
            raise CommandError(f"--top-k must be 0 (all) or more; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise CommandError(f"--top-p must be above 0 and at most 1; got {self.top_p}")


@dataclass
class Timing:
    """Filled in while text is made: tokens and seconds of the prompt and of decoding."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token from `logits` (V); raises CommandError where they are no numbers."""
    if not math.isfinite(float(logits.max())):
        raise CommandError("the model's output is not finite; its weights are damaged")
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Subtracting the maximum first keeps a tiny temperature from making inf - inf.
    scores = (logits.double() - logits.max()) / sampling.temperature
    probabilities, tokens = torch.softmax(scores, -1).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities = probabilities[: sampling.top_k]
        probabilities = probabilities / probabilities.sum()
    total = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        # A token stays when those before it do not reach p; the first always stays.
        total = total[: int((total - probabilities < sampling.top_p).sum())]
    # The inverse of the cumulative distribution: one uniform draw a token, whatever the options.
    draw = torch.rand((), dtype=torch.float64, generator=generator) * total[-1]
    index = min(int(torch.searchsorted(total, draw, right=True)), len(total) - 1)
    return int(tokens[index])


@torch.inference_mode()
def generate(
    model: Megalodon,
    prompt: Iterable[bytes],
    sampling: Sampling,
    seed: int,
    max_new_tokens: int | None = None,
    timing: Timing | None = None,
) -> Iterator[int]:
    """Yield new tokens after `prompt` (pieces, each prefilled in one call); None: without end.

    One state of fixed size is carried on; nothing grows with the number of tokens.
    """
    timing = timing if timing is not None else Timing()
    generator = torch.Generator().manual_seed(seed)
    state = model.init_state(1)
    logits: torch.Tensor | None = None
    begin = time.perf_counter()
    for piece in prompt:
        if piece:
            logits = model(byte_tensor(piece), state, inplace_state=True)
            timing.prompt_tokens += len(piece)
    if logits is None:
        logits = model(byte_tensor(EMPTY_PROMPT), state, inplace_state=True)
    timing.prompt_seconds = time.perf_counter() - begin

    token_tensor = torch.empty((1, 1), dtype=torch.int64)
    while max_new_tokens is None or timing.tokens < max_new_tokens:
        begin = time.perf_counter()
        if timing.tokens:
            logits = model(token_tensor, state, inplace_state=True)
        token = sample(logits[0, -1], sampling, generator)
        token_tensor.fill_(token)
        timing.tokens += 1
        timing.seconds += time.perf_counter() - begin
        yield token
