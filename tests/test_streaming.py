"""The streaming law: f(a || b) = f(a) || f(b | state(a)), for every split, gradient and length."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import assert_close, assert_same_state, padded
from small_model import random_tokens, small_model
from torch import Tensor

from megalodon_ops.model import Megalodon
from megalodon_ops.state import MegalodonState

VARIANTS = st.sampled_from(
    [{}, {"chunk_size": 1}, {"chunk_size": 7}, {"swiglu": True, "rescale_nffn": True},
     {"attention": "sliding"}, {"attention": "sliding", "chunk_size": 7},
     {"layerwise_ckpt": True}, {"share_emb": True, "scale_emb": True}]
)  # fmt: skip


@st.composite
def splits(draw: st.DrawFn, total: int) -> list[int]:
    """Lengths of parts, empty ones included, that make up the total."""
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=5)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


@settings(max_examples=25)
@given(data=st.data(), total=st.integers(0, 25), variant=VARIANTS)
def test_any_split_gives_the_same_logits_and_state(
    data: st.DataObject, total: int, variant: dict[str, Any]
) -> None:
    """Every row is split in its own way: the parts of one call have different lengths."""
    model, rows = small_model(**variant), data.draw(st.integers(1, 3))
    tokens = random_tokens(rows, total)
    cuts = [data.draw(splits(total)) for _ in range(rows)]
    calls = max(map(len, cuts))
    cuts = [[*row, *[0] * (calls - len(row))] for row in cuts]
    with torch.no_grad():
        whole, want = model(tokens, return_state=True)
        state: MegalodonState | None = None
        got: list[list[Tensor]] = [[] for _ in range(rows)]
        starts = [0] * rows
        for lengths in zip(*cuts, strict=True):
            parts = [
                row[None, at : at + n] for row, at, n in zip(tokens, starts, lengths, strict=True)
            ]
            starts = [at + n for at, n in zip(starts, lengths, strict=True)]
            logits, state = model(
                padded(parts, max(lengths)), state, return_state=True, lengths=lengths
            )
            for row, (said, n) in enumerate(zip(logits, lengths, strict=True)):
                got[row].append(said[:n])
    assert_close(torch.stack([torch.cat(row) for row in got]), whole)
    assert state is not None
    assert_same_state(state, want)


def parts_of(model: Megalodon, parts: list[Tensor], detach: bool) -> Tensor:
    """The logits of the last part, with or without a history."""
    state = None
    for part in parts[:-1]:
        state = model(part, state, return_state=True)[1]
        state = state.detach() if detach else state
    logits: Tensor = model(parts[-1], state)
    return logits


@settings(max_examples=10)
@given(data=st.data(), first=st.integers(1, 12), second=st.integers(1, 9), variant=VARIANTS)
def test_gradients_flow_through_states_and_detach_cuts_them(
    data: st.DataObject, first: int, second: int, variant: dict[str, Any]
) -> None:
    model = small_model(**{**variant, "share_emb": False})
    parameters = list(model.parameters())
    # Tokens of the two parts differ, so that the embedding's rows tell where a gradient came from.
    before, after = random_tokens(2, first) % 5, 5 + random_tokens(2, second, seed=1) % 6
    weight = torch.randn(2, second, 11, dtype=torch.float64)

    def gradients(logits: Tensor) -> list[Tensor]:
        total = (weight * logits).sum()
        return list(torch.autograd.grad(total, parameters, materialize_grads=True))

    pieces = [*before.split(data.draw(splits(first)), dim=1), after]
    flowing = gradients(parts_of(model, pieces, detach=False))
    whole = gradients(model(torch.cat([before, after], 1))[:, first:])
    for got, want in zip(flowing, whole, strict=True):
        assert_close(got, want)

    cut = gradients(parts_of(model, pieces, detach=True))
    with torch.no_grad():
        constant = model(before, return_state=True)[1]
    for got, want in zip(cut, gradients(model(after, constant)), strict=True):
        assert_close(got, want)
    embedding = next(i for i, p in enumerate(parameters) if p is model.embed.weight)
    assert flowing[embedding][:5].abs().sum() > 0
    assert (cut[embedding][:5] == 0).all()


def test_truncated_backpropagation_frees_the_past() -> None:
    """Nothing of a detached call stays: the graph behind the state ends at its tensors."""
    model = small_model()
    state = model(random_tokens(1, 6), return_state=True)[1].detach()
    logits = model(random_tokens(1, 3), state)
    for tensor in state.tensors().values():
        assert tensor.grad_fn is None
    assert logits.requires_grad


MILLION = """
import json, re, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_model import small_model
def peak():  # in KiB; that of getrusage begins with the parent process's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
slow, total = sys.argv[2] == "slow", 1_000_000
sizes = dict(model_dim=16, z_dim=8, value_dim=16, num_heads=1, ffn_hidden_dim=16, cema_ndim=4,
             norm_num_groups=4, chunk_size=64, vocab_size=32)
narrow, exact = small_model(dtype=torch.float32, **sizes), small_model(**sizes)
exact.load_state_dict(narrow.state_dict())
with torch.no_grad():
    for model in (narrow, exact) if slow else ():
        for layer in model.layers:
            # Half of the channels: |q| = 1 - 6e-6, a memory of 160,000 tokens.
            layer.mega.cema.alpha[::2] = layer.mega.cema.delta[::2] = -6.0
            layer.mega.cema.theta[::2] -= 12.0
generator = torch.Generator().manual_seed(0)
states = narrow.init_state(1), exact.init_state(1)
done, calls, worst, before = 0, 0, 0.0, 0
with torch.inference_mode():
    while done < total:
        # Any size, the largest first; sometimes a single token, as in decoding.
        draw = int(torch.randint(1, 8193, (), generator=generator))
        length = 8192 if done == 0 else 1 if draw % 3 == 0 else min(draw, total - done)
        tokens = torch.randint(32, (1, length), generator=generator)
        got = narrow(tokens, states[0], inplace_state=True)
        want = exact(tokens, states[1], inplace_state=True)
        worst = max(worst, float((got.double() - want).abs().max() / want.abs().max()))
        done, calls = done + length, calls + 1
        if done > total // 4 and not before:
            before = peak()
grown = (peak() - before) / 1024
pairs = zip(states[0].tensors().values(), states[1].tensors().values())
state = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
print(json.dumps({"logits": worst, "state": state, "grown": grown, "calls": calls,
                  "position": int(states[0].position[0])}))
"""


def test_a_million_tokens_at_constant_memory() -> None:
    """Float32, in calls of any size, against float64: the error does not grow with the length."""
    for kind, logits, state in (("usual", 2e-6, 2e-6), ("slow", 1e-4, 3e-4)):
        command = [sys.executable, "-c", MILLION, str(Path(__file__).parent), kind]
        result = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert result["position"] == 1_000_000
        assert result["calls"] > 200
        assert result["grown"] < 16, "megabytes over the last 750,000 tokens"
        assert result["logits"] < logits, result
        assert result["state"] < state, result
