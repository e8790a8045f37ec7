"""The model against the official code's numbers, and the laws of streaming."""

from typing import Any

import golden
import pytest
import torch
from golden import Arrays, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import VOCAB, random_tokens, small_model
from torch import Tensor, nn

from megalodon_ops.config import MegalodonConfig
from megalodon_ops.model import Megalodon
from megalodon_ops.nn import Block, MegaAttention
from megalodon_ops.nn import attention as attention_module
from megalodon_ops.state import MegalodonState

F32, F64 = torch.float32, torch.float64


def config_of(case: Case) -> MegalodonConfig:
    assert case.arrays  # skips where there is no golden data
    h = case.hyper
    return MegalodonConfig(
        num_layers=h.get("layers", 1),
        model_dim=h["mdim"],
        z_dim=h["zdim"],
        value_dim=h["hdim"],
        num_heads=h["heads"],
        ffn_hidden_dim=h.get("ffn", 48),
        cema_ndim=h["ndim"],
        chunk_size=h["chunk"],
        vocab_size=h.get("vocab", 53),
        norm_num_groups=h["groups"],
        norm_affine=h["norm_affine"],
        norm_eps=h["eps"],
        rope_base=h["base"],
        swiglu=h.get("swiglu", False),
        rescale_nffn=h.get("rescale", False),
        scale_emb=h.get("scale_emb", False),
        share_emb=h.get("share_emb", False),
    )


def loaded(module: nn.Module, case: Case, dtype: torch.dtype) -> nn.Module:
    module.to(dtype).load_state_dict(case.group("param/"), strict=True)
    return module


def relative_error(got: Tensor, ref: Tensor) -> float:
    """max|got - ref| / max|ref|; 0 where there is nothing to compare."""
    if ref.numel() == 0:
        return 0.0
    difference = (got.double() - ref.double()).abs().max()
    return (difference / ref.abs().max().clamp(min=1e-30)).item()


def check(case: Case, got: Arrays, dtype: torch.dtype) -> None:
    """Compare every array of the case: float64 to 1e-10, float32 to twice the official error.

    That error is the official float32 code's largest in the case, over outputs and over gradients:
    the gradient of one bias is a long sum whose rounding is luck, theirs as well as ours.
    """
    wanted = case.arrays if dtype == F64 else case.float32
    names = {n for n in wanted if n.startswith(("out/", "grad/", "state@"))}
    assert names <= got.keys(), f"{case.name}: not computed: {sorted(names - got.keys())}"
    if dtype == F64:
        golden.assert_golden64(case, {n: got[n].detach() for n in names})
        return
    for group in ("out/", "grad/"):
        official = {n: v for n, v in case.float32.items() if n.startswith(group)}
        worst = max((relative_error(v, case.arrays[n]) for n, v in official.items()), default=0.0)
        for name in official:
            assert got[name].shape == case.arrays[name].shape, name
            error = relative_error(got[name].detach(), case.arrays[name])
            assert error <= 2 * worst, f"{case.name} {name}: {error:.3g}, official {worst:.3g}"


def parameter_gradients(case: Case, module: nn.Module, total: Tensor, **inputs: Tensor) -> Arrays:
    named = {**inputs, **dict(module.named_parameters(remove_duplicate=False))}
    wanted = {n: named[n] for n in case.group("grad/")}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return {f"grad/{n}": g for n, g in zip(wanted, grads, strict=True)}


def record(into: Arrays, name: str, module: nn.Module) -> None:
    """Keep a module's (first) output under this name."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        into[name] = output[0] if isinstance(output, tuple) else output

    module.register_forward_hook(hook)


@golden.each("mega_layer", F64, F32)
def test_layer(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = loaded(MegaAttention(config_of(case)), case, dtype)
    got: Arrays = {}
    record(got, "out/timenorm", layer.timenorm)
    record(got, "out/cema", layer.cema)
    record(got, "out/mx", layer.rmsnorm)
    attend = attention_module.F.chunk_attention

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        o = attend(*args, **kwargs)
        got["out/attn"] = o.flatten(-2)
        return o

    monkeypatch.setattr(attention_module.F, "chunk_attention", recorded)
    x = golden.leaves(case, dtype)["x"]
    y, state = layer(x)
    assert state is None
    total = (case.arrays["cot/y"].to(dtype) * y).sum()
    got |= {"out/y": y, "out/scalar": total}
    check(case, got | parameter_gradients(case, layer, total, x=x), dtype)


@golden.each("mega_block", F64, F32)
def test_block(case: Case, dtype: torch.dtype) -> None:
    block = loaded(Block(config_of(case), case.hyper["layer_id"]), case, dtype)
    got: Arrays = {}
    record(got, "out/mega", block.mega)
    x = golden.leaves(case, dtype)["x"]
    y, _ = block(x)
    total = (case.arrays["cot/y"].to(dtype) * y).sum()
    got |= {"out/y": y, "out/scalar": total}
    check(case, got | parameter_gradients(case, block, total, x=x), dtype)


@golden.each("mega_model", F64, F32)
def test_model(case: Case, dtype: torch.dtype) -> None:
    model = loaded(Megalodon(config_of(case)), case, dtype)
    got: Arrays = {}
    for i, layer in enumerate(model.layers):
        record(got, f"out/hidden{i}", layer)
    record(got, "out/final_norm", model.output.final_norm)
    logits = model(case.arrays["in/tokens"])
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), case.arrays["in/targets"], reduction="none"
    )
    loss = losses.mean()
    got |= {"out/logits": logits, "out/token_losses": losses, "out/loss": loss}
    check(case, got | parameter_gradients(case, model, loss), dtype)


def golden_state(state: MegalodonState, tokens_seen: int) -> Arrays:
    """A state under the names and in the shapes of the official cache."""
    at = f"state@{tokens_seen}"
    filled = tokens_seen % state.layers[0].k_cache.shape[1]
    got: Arrays = {}
    for i, layer in enumerate(state.layers):
        got |= {
            f"{at}/layer{i}/cache_k": layer.k_cache[:, :filled],
            f"{at}/layer{i}/cache_v": layer.v_cache[:, :filled],
            f"{at}/layer{i}/cache_len": torch.tensor(filled),
            f"{at}/layer{i}/norm_count": layer.norm.count,
            f"{at}/layer{i}/norm_mean": layer.norm.mean,
            f"{at}/layer{i}/norm_var": layer.norm.var,
            f"{at}/layer{i}/hx": layer.h,
        }
    final = zip(("count", "mean", "var"), state.final_norm, strict=True)
    return got | {f"{at}/final/norm_{name}": value for name, value in final}


@pytest.mark.parametrize("inplace", [False, True])
@golden.each("mega_decode", F64, F32)
def test_decode(case: Case, dtype: torch.dtype, inplace: bool) -> None:
    model = loaded(Megalodon(config_of(case)), case, dtype)
    tokens = case.arrays["in/tokens"]
    got: Arrays = {}
    parts = []
    with torch.no_grad():
        state = model.init_state(tokens.shape[0])
        for part in tokens.split(case.arrays["in/segs"].tolist(), dim=1):
            logits, state = model(part, state, return_state=True, inplace_state=inplace)
            parts.append(logits)
            got |= golden_state(state.clone(), int(state.position[0]))
        got |= {"out/logits": torch.cat(parts, 1), "out/logits_full": model(tokens)}
    check(case, got, dtype)


VARIANTS = st.fixed_dictionaries(
    {},
    optional={
        "swiglu": st.just(True),
        "rescale_nffn": st.just(True),
        "scale_emb": st.just(True),
        "share_emb": st.just(True),
        "norm_affine": st.just(False),
        "rope_base": st.just(50.0),
        "chunk_size": st.sampled_from([1, 3, 7]),
        "layerwise_ckpt": st.just(True),
    },
)
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def run_in_parts(
    model: Megalodon, tokens: Tensor, lengths: list[int], **flags: Any
) -> tuple[Tensor, MegalodonState]:
    parts, state = [], flags.pop("state", None)
    for part in tokens.split(lengths, dim=1):
        logits, state = model(part, state, return_state=True, **flags)
        parts.append(logits)
    return torch.cat(parts, 1), state


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def assert_same_future(a: MegalodonState, b: MegalodonState, model: Megalodon) -> None:
    """The states are interchangeable: equal wherever they will be read."""
    assert torch.equal(a.position, b.position)
    more = random_tokens(a.batch_size, 3, seed=7)
    assert_close(model(more, a), model(more, b))


@settings(deadline=None, max_examples=15)
@given(lengths=LENGTHS, rows=st.integers(0, 3), variant=VARIANTS)
def test_splitting_changes_nothing(lengths: list[int], rows: int, variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    tokens = random_tokens(rows, sum(lengths))
    parameters = list(model.parameters())
    weight = torch.randn(rows, sum(lengths), VOCAB, dtype=F64)

    whole, state = model(tokens, return_state=True)
    assert_close(model(tokens), whole)
    parts, end = run_in_parts(model, tokens, lengths)
    assert_close(parts, whole)
    assert_same_future(end, state, model)
    for got, want in zip(
        torch.autograd.grad((weight * parts).sum(), parameters, materialize_grads=True),
        torch.autograd.grad((weight * whole).sum(), parameters, materialize_grads=True),
        strict=True,
    ):
        assert_close(got, want)

    with torch.no_grad():
        for inplace in (False, True):
            start = model.init_state(rows)
            ones = [1] * sum(lengths) or [0]
            parts, end = run_in_parts(model, tokens, ones, state=start, inplace_state=inplace)
            assert_close(parts, whole)
            assert_same_future(end, state, model)


@settings(deadline=None, max_examples=10)
@given(starts=st.lists(st.integers(0, 9), min_size=1, max_size=3), length=st.integers(0, 6))
def test_rows_at_different_positions(starts: list[int], length: int) -> None:
    model = small_model()
    tokens = random_tokens(len(starts), max(starts) + length + 1)
    rows, futures, want = [], [], []
    for i, start in enumerate(starts):
        row = tokens[i : i + 1]
        rows.append(model(row[:, :start], return_state=True)[1])
        futures.append(row[:, start : start + length])
        want.append(model(row[:, : start + length])[:, start:])
    state = MegalodonState.cat(rows)
    assert state.position.tolist() == starts
    logits, state = model(torch.cat(futures), state, return_state=True)
    assert_close(logits, torch.cat(want))
    with torch.no_grad():
        last = torch.stack([tokens[i, s + length] for i, s in enumerate(starts)])[:, None]
        step, _ = model(last, state, return_state=True)
        for i, start in enumerate(starts):
            assert_close(step[i], model(tokens[i : i + 1, : start + length + 1])[0, -1:])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 9])
def test_state_is_changed_only_on_demand(length: int) -> None:
    model = small_model()
    tokens = random_tokens(2, length)
    with torch.no_grad():
        state = model(random_tokens(2, 6, seed=1), return_state=True)[1]
        before = state.clone()
        want, after = model(tokens, state, return_state=True)
        model(tokens, state)
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor, before.tensors()[name]), name

        addresses = {n: t.data_ptr() for n, t in state.tensors().items()}
        logits, same = model(tokens, state, return_state=True, inplace_state=True)
    assert same is state
    assert {n: t.data_ptr() for n, t in state.tensors().items()} == addresses
    assert_close(logits, want)
    assert_same_future(state, after, model)


def test_gradients_reach_the_state() -> None:
    model = small_model()
    state = model(random_tokens(2, 5), return_state=True)[1].detach()
    leaves = {n: t.requires_grad_() for n, t in state.tensors().items() if t.is_floating_point()}
    logits = model(random_tokens(2, 1, seed=3), state)
    grads = torch.autograd.grad(logits.square().sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name
    slots = grads[list(leaves).index("layers.0.v_cache")].abs().sum((2, 3))
    assert (slots[:, 0] > 0).all()
    assert (slots[:, 1:] == 0).all()
