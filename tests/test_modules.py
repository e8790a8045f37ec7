"""What the model's parts promise: initial values, dtypes, dropout, checkpoints, errors."""

import math
from typing import Any

import pytest
import torch
from small_model import VOCAB, random_tokens, small_config, small_model
from torch.utils.flop_counter import FlopCounterMode

from megalodon_ops.model import Megalodon
from megalodon_ops.nn import CEMA, FFN, TimestepNorm
from megalodon_ops.nn import linear as linear_module
from megalodon_ops.nn.init import Linear, init_linear_

SENSITIVE = ("cema.", "norm", "gamma", "beta", "prior_", "rope.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_keep_sensitive_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    reference = Megalodon(small_config(rescale_nffn=True))
    exact = {n: t.clone() for n, t in reference.state_dict().items()}
    for convert in (lambda m: m.to(dtype), lambda m: m.to("cpu", dtype)):
        model = convert(Megalodon(reference.config))
        model.load_state_dict(exact)
        for name, tensor in model.state_dict().items():
            if name.endswith("prior_count"):
                assert tensor.dtype == torch.int64
            elif any(part in name for part in SENSITIVE):
                assert tensor.dtype == torch.float32, name
                assert torch.equal(tensor, exact[name]), name
            else:
                assert tensor.dtype == dtype, name
        assert model.embed.weight.dtype == dtype
        logits, state = model(random_tokens(2, 5), return_state=True)
        assert logits.dtype == torch.float32
        assert state.dtype == dtype
        assert state.layers[0].h.dtype == torch.float32
    assert all(p.dtype == torch.float64 for p in model.double().parameters())
    assert model(random_tokens(2, 5)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_default_dtype_is_as_a_conversion_to_it(dtype: torch.dtype) -> None:
    config, before = small_config(rescale_nffn=True), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, norm = Megalodon(config), TimestepNorm(6, 3, prior_count=2)
        tokens = random_tokens(2, 5)
        model(tokens)[:, -1].sum().backward()
        step, state = model(tokens[:, :1], model.init_state(2), return_state=True)
    finally:
        torch.set_default_dtype(before)
    wanted = Megalodon(config).to(dtype).state_dict()
    del wanted["rope.freqs"]  # rounded to float32 once, whatever the dtype
    for name, tensor in wanted.items():
        assert model.state_dict()[name].dtype == tensor.dtype, name
    assert norm.prior_mean.dtype == norm.prior_logv.dtype == norm.to(dtype).weight.dtype
    assert (state.dtype, step.dtype) == (dtype, torch.promote_types(dtype, torch.float32))


def test_narrowing_does_not_round_sensitive_values() -> None:
    model = small_model(dtype=torch.float32)
    before = model.layers[0].mega.cema.alpha.clone()
    model.bfloat16()
    assert torch.equal(model.layers[0].mega.cema.alpha, before)
    model.half()
    assert torch.equal(model.layers[0].mega.cema.alpha, before)


def test_autocast() -> None:
    model = small_model(dtype=torch.float32)
    tokens = random_tokens(2, 7)
    seen: dict[str, torch.dtype] = {}
    for name in ("timenorm", "wz", "wh2"):
        model.layers[1].mega.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(
                name, (out[0] if isinstance(out, tuple) else out).dtype
            )
        )
    model.layers[1].register_forward_hook(lambda _, a, out: seen.update(stream=out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens, return_state=True)
        assert model.init_state(2).dtype == torch.bfloat16
        model(tokens, state)
    assert seen == {
        "timenorm": torch.bfloat16,
        "wz": torch.bfloat16,
        "wh2": torch.bfloat16,
        "stream": torch.float32,
    }
    assert logits.dtype == torch.float32
    assert state.dtype == torch.bfloat16
    torch.testing.assert_close(logits, model(tokens), rtol=0.05, atol=0.1)
    with pytest.raises(ValueError, match="state: dtype"):
        model(tokens, state)


def test_initial_values() -> None:
    torch.manual_seed(0)
    config = small_config(model_dim=96, value_dim=400, rescale_nffn=True, share_emb=False)
    model = Megalodon(config)
    layer = model.layers[1]
    dim = config.model_dim

    def std(tensor: torch.Tensor) -> float:
        return tensor.std().item()

    assert std(layer.mega.wv.weight) == pytest.approx(1 / math.sqrt(3 * dim), rel=0.05)
    assert std(layer.mega.wh2.weight) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    assert std(model.embed.weight) == pytest.approx(dim**-0.5, rel=0.1)
    assert model.embed.weight.abs().max() <= 3 * dim**-0.5
    cema = layer.mega.cema
    assert std(cema.alpha) == pytest.approx(0.2, rel=0.15)
    assert std(cema.gamma[..., 0]) == pytest.approx(1.0, rel=0.15)
    assert (cema.gamma[..., 1] == 0).all()
    assert cema.omega.abs().max() <= 1
    freqs = torch.sigmoid(cema.theta.double()).flatten()
    wanted = dim ** (-torch.arange(1, dim + 1, dtype=torch.float64) / dim)
    torch.testing.assert_close(freqs.sort().values, wanted.flip(0), rtol=1e-5, atol=0)
    assert not torch.equal(freqs, wanted)
    torch.testing.assert_close(layer.nffn.alpha, torch.full((dim,), 0.05))
    zeros = ("bias", "mega.gamma", "beta", "norm.weight")
    for name, value in model.named_parameters():
        if name.endswith(zeros):
            assert (value == 0).all(), name


def test_init_modes() -> None:
    torch.manual_seed(0)
    weight = torch.empty(300, 200)
    assert init_linear_(weight, "bert").std().item() == pytest.approx(0.02, rel=0.02)
    assert init_linear_(weight, "gaussian").std().item() == pytest.approx(0.987, rel=0.02)
    assert weight.abs().max() <= 3
    bound = math.sqrt(6 / 500)
    assert init_linear_(weight, "xavier").abs().max().item() == pytest.approx(bound, rel=0.01)
    assert (init_linear_(weight, "none") == 0).all()
    with pytest.raises(ValueError, match=r"init_mode: wanted one of he, .*; got 'zero'"):
        init_linear_(weight, "zero")


def test_one_channel_cema_is_finite() -> None:
    assert CEMA(1, 4).theta.isfinite().all()


def test_timestep_norm_prior() -> None:
    norm = TimestepNorm(4, 4, prior_count=3)
    assert {n for n, _ in norm.named_parameters()} == {"weight", "bias", "prior_mean", "prior_logv"}
    _, state = norm(torch.randn(2, 5, 4))
    assert state.count.tolist() == [8, 8]
    with pytest.raises(ValueError, match="prior_count: wanted 2 or more"):
        TimestepNorm(4, 4)
    with pytest.raises(ValueError, match="num_groups: wanted a divisor"):
        TimestepNorm(4, 3)


def test_a_timestep_norm_state_of_two() -> None:
    with pytest.raises(ValueError, match=r"state must be \(count, mean, var\); got 2 of them"):
        TimestepNorm(6, 3)(torch.ones(1, 2, 6), torch.zeros(2, 1, 3).unbind())


def test_shared_embedding() -> None:
    model = small_model(share_emb=True)
    names = {n for n, _ in model.named_parameters()}
    assert "embed.weight" in names
    assert "output.output.weight" not in names
    state = model.state_dict()
    assert "output.output.weight" in state
    other = Megalodon(model.config).double()
    other.load_state_dict(state)
    tokens = random_tokens(1, 4)
    torch.testing.assert_close(other(tokens), model(tokens))

    with torch.device("meta"):
        empty = Megalodon(model.config)
    empty.to_empty(device="cpu")
    assert empty.output.output.weight is empty.embed.weight
    with torch.device("meta"):
        empty = Megalodon(model.config)
    empty.load_state_dict(state, assign=True)
    assert empty.output.output.weight is empty.embed.weight
    assert not any(t.is_meta for t in empty.state_dict().values())
    torch.testing.assert_close(empty(tokens), model(tokens))

    state["output.output.weight"] = state["output.output.weight"] + 1
    with pytest.raises(RuntimeError, match=r"output\.output\.weight: differs from embed"):
        other.load_state_dict(state)


def test_checkpoint_of_another_config_is_refused() -> None:
    model = small_model()
    state = model.state_dict()
    other = Megalodon(small_config(rope_base=500.0))
    with pytest.raises(
        RuntimeError, match=r"rope.freqs: .*rope_base about 10000; .* has rope_base = 500"
    ):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"rope.freqs"):
        other.load_state_dict(state, strict=False)
    torch.testing.assert_close(other.rope.freqs, torch.tensor([1.0, 500**-0.5]))
    key = "layers.0.mega.timenorm.prior_count"
    with pytest.raises(RuntimeError, match=f"{key}: the config wants 0; the checkpoint has 4"):
        model.load_state_dict({**state, key: torch.tensor(4)})
    assert model.layers[0].mega.timenorm.prior_count == 0
    with pytest.raises(RuntimeError, match=r'Missing key.*"rope.freqs"'):
        model.load_state_dict({n: t for n, t in state.items() if n != "rope.freqs"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"rope.cos"'):
        model.load_state_dict({**state, "rope.cos": torch.zeros(1)})
    # Frequencies saved in bfloat16 are these frequencies still.
    model.load_state_dict({**state, "rope.freqs": state["rope.freqs"].bfloat16()})
    assert model.rope.freqs.dtype == torch.float64


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[0]], TypeError, "tokens: wanted a torch.Tensor; got list"),
        (torch.zeros(1, 2), ValueError, "tokens: dtype: wanted int64 or int32; got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"tokens: wanted shape \(B, L\); got \[2"),
        (torch.tensor([[0, VOCAB]]), IndexError, r"tokens: wanted ids in \[0, 11\); got 11"),
        (torch.tensor([[0, -100]]), IndexError, r"tokens: wanted ids in \[0, 11\); got -100"),
        (
            torch.zeros(1, 1, dtype=torch.int64, device="meta"),
            ValueError,
            "tokens: device: wanted the model's, cpu; got meta",
        ),
    ],
)
def test_bad_tokens(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model()(tokens)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="config: wanted a MegalodonConfig; got dict"):
        Megalodon({})
    with pytest.raises(ValueError, match="batch_size: wanted an int >= 0; got -1"):
        small_model().init_state(-1)


def test_int32_tokens() -> None:
    model = small_model()
    tokens = random_tokens(2, 3)
    assert torch.equal(model(tokens.int()), model(tokens))


DROPOUTS = {"dropout": 0.3, "hidden_dropout": 0.3, "attention_dropout": 0.3}


@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_acts_in_training_only(name: str) -> None:
    model, plain = small_model(**{name: 0.3}), small_model()
    tokens = random_tokens(2, 8)
    assert not torch.equal(model(tokens), plain(tokens))
    first = model(tokens)
    assert not torch.equal(first, model(tokens))
    torch.manual_seed(1)
    first = model(tokens)
    torch.manual_seed(1)
    assert torch.equal(first, model(tokens))
    assert torch.equal(model.eval()(tokens), plain(tokens))


def test_one_token_in_training_uses_dropkey() -> None:
    """The one-token kernel has no dropout, so it must not be taken where there is some."""
    model = small_model(attention_dropout=0.9)
    tokens = random_tokens(4, 1)
    with torch.no_grad():
        _, state = model(random_tokens(4, 3), return_state=True)
        trained = model(tokens, state, return_state=True)[0]
        assert not torch.equal(trained, model.eval()(tokens, state, return_state=True)[0])


@pytest.mark.parametrize("dropouts", [{}, DROPOUTS])
@pytest.mark.parametrize("streamed", [False, True])
def test_checkpointing_gives_the_same_gradients(dropouts: dict[str, float], streamed: bool) -> None:
    tokens = random_tokens(2, 8)
    results = []
    for layerwise in (False, True):
        model = small_model(layerwise_ckpt=layerwise, **dropouts)
        torch.manual_seed(5)
        state = None
        if streamed:
            _, state = model(tokens[:, :3], return_state=True)
        logits, _ = model(tokens[:, 3:], state, return_state=True)
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append((logits, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_checkpointing_recomputes() -> None:
    calls = []
    model = small_model(layerwise_ckpt=True)
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(random_tokens(1, 3)).sum().backward()
    assert len(calls) == 2


def test_feed_forward_adds_the_residual_it_is_given() -> None:
    network = FFN(small_config(init_mode="none"))
    y, residual = torch.randn(1, 2, 12), torch.randn(1, 2, 12)
    assert torch.equal(network(y, residual), residual)


@pytest.mark.parametrize("bias", [True, False])
def test_large_products_of_float32_are_the_same_numbers(bias: bool) -> None:
    """Those take another library: values and gradients against float64, on views too."""
    torch.manual_seed(0)
    layer = Linear(300, 128, bias=bias, init_mode="he")
    x = torch.randn(2, 500, 600)[..., ::2].requires_grad_()
    dy = torch.randn(2, 500, 128)
    assert linear_module._is_for_one_dnn(x, layer.weight)

    def results(layer: torch.nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, (x, *layer.parameters()), dy.to(x.dtype))]

    wide = torch.nn.Linear(300, 128, bias=bias, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    for got, want in zip(results(layer, x), results(wide, x.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6 * want.abs().max().item())


def test_small_traced_and_narrow_products_are_the_plain_op() -> None:
    weight = torch.ones(256, 256)
    large = torch.ones(1024, 256)
    assert linear_module._is_for_one_dnn(large, weight)
    for x in (large[:4], large.double(), large.bfloat16(), large.to("meta")):
        assert not linear_module._is_for_one_dnn(x, weight.to(x.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_module.linear(large, weight).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear_module.linear(large, weight)
    assert counter.get_total_flops() == 2 * 1024 * 256 * 256
