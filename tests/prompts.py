"""Prompts for the tests of generation, the logits after them, and two ways of drawing."""

import torch
from small_model import random_tokens

from megalodon_ops.model import Megalodon
from megalodon_ops.sampling import Sampling

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.0)


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = random_tokens(1, length, seed)[0].tolist()
    return tokens


def next_logits(model: Megalodon, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]))[0, -1]
    return logits
