"""The model under torch.compile(fullgraph=True): one graph, the same numbers."""

import pytest
import torch
from small_model import random_tokens, small_model

# Importing the model registers the ops, where they are built.
pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.megalodon, "cema"), reason="needs the compiled ops (torch.ops.megalodon)"
)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_forward_and_gradients() -> None:
    model = small_model(swiglu=True, rescale_nffn=True, scale_emb=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 9)
    want = model(tokens)
    grads = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    got = compiled(tokens)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), list(model.parameters())), grads, strict=True
    ):
        torch.testing.assert_close(a, b)


def test_streaming() -> None:
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 9)
    parts, state = [], None
    with torch.no_grad():
        want = model(tokens)
        for part in tokens.split([4, 3, 1, 1], dim=1):
            logits, state = compiled(part, state, return_state=True)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), want)


def test_decoding_in_place() -> None:
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 6)
    state = model.init_state(2)
    with torch.no_grad():
        want = model(tokens)
        parts = [compiled(t, state, inplace_state=True) for t in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), want)
    assert state.position.tolist() == [6, 6]


def test_autocast() -> None:
    model = small_model(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(tokens), model(tokens))


def test_checkpointing() -> None:
    model = small_model(layerwise_ckpt=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 6)
    parameters = list(model.parameters())
    want = torch.autograd.grad(model(tokens).square().sum(), parameters)
    got = torch.autograd.grad(compiled(tokens).square().sum(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_dropout_draws_a_new_seed_each_time(checkpointed: bool) -> None:
    model = small_model(attention_dropout=0.4, layerwise_ckpt=checkpointed).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, 9)
    parameters = list(model.parameters())
    results = []
    for call in (model, compiled):
        torch.manual_seed(3)
        logits = [call(tokens), call(tokens)]
        assert not torch.equal(*logits)
        results.append([*logits, *torch.autograd.grad(logits[1].square().sum(), parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor() -> None:
    model = small_model(dtype=torch.float32)
    tokens = random_tokens(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(tokens), model(tokens))


def test_export() -> None:
    model = small_model().eval()
    tokens = random_tokens(2, 6)
    program = torch.export.export(model, (tokens,))
    torch.testing.assert_close(program.module()(tokens), model(tokens))
