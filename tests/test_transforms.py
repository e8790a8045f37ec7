"""Derivatives beyond torch.autograd.grad: those of ``torch.func`` in reverse mode are right, those
that no op has (forward mode, second order) are errors, never zeros.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import copies
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import megalodon_ops
from megalodon_ops import registry, rms_norm
from megalodon_ops._library import Maker, Op

F64 = torch.float64
OPS = list(registry)
DIFFERENTIABLE = [op for op in OPS if op.backward_schema is not None]


def sample(op: Op, dtype: torch.dtype = F64) -> list[Any]:
    return copies(next(iter(op.samples(Maker(dtype)))).args)


def floats(args: list[Any]) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]


def loss_of(op: Op, args: list[Any]) -> Callable[..., Tensor]:
    """The sum of squares of the op's first output, as a function of its floating-point inputs."""
    places = floats(args)

    def loss(*tensors: Tensor) -> Tensor:
        changed = list(args)
        for i, tensor in zip(places, tensors, strict=True):
            changed[i] = tensor
        y = op.overload(*changed)
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    return loss


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_grad_is_autograds(op: Op) -> None:
    args = sample(op)
    loss, tensors = loss_of(op, args), [args[i] for i in floats(args)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    got = grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_tangents_are_refused(op: Op) -> None:
    """Of every floating-point argument, with gradients and without."""
    for i in floats(sample(op)):
        for needs_grad in (False, True):
            args = sample(op)
            primal = args[i].requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad), forward_ad.dual_level():
                args[i] = forward_ad.make_dual(primal, torch.ones_like(primal))
                with pytest.raises(NotImplementedError, match=f"^{op.name}: forward-mode deriv"):
                    op.overload(*args)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 8, dtype=F64)


def loss(x: Tensor) -> Tensor:
    return rms_norm(x, torch.linspace(-1, 1, 8, dtype=F64)).square().sum()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacrev_vjp_and_vmap(x: Tensor) -> None:
    wanted = torch.autograd.functional.jacobian(rms_norm, x)
    assert torch.equal(jacrev(rms_norm)(x), wanted)
    _, pull = vjp(rms_norm, x)
    assert torch.equal(pull(x)[0], torch.autograd.functional.vjp(rms_norm, x, x)[1])
    assert torch.equal(vmap(grad(loss))(x), grad(loss)(x))
    assert torch.equal(grad(lambda x: vmap(loss)(x).sum())(x), grad(loss)(x))


def test_grad_inside_compile(x: Tensor) -> None:
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), grad(loss)(x))


def test_outer_transforms_see_through_inner_ones(x: Tensor) -> None:
    """The op is outside of the inner derivative, and inside of the outer one."""

    def inner(x: Tensor) -> Tensor:
        return grad(lambda v: (v * rms_norm(x)).sum())(torch.ones_like(x)).square().sum()

    assert torch.equal(grad(inner)(x), grad(lambda x: rms_norm(x).square().sum())(x))


@pytest.mark.parametrize(
    "call",
    [
        jacfwd(loss),
        hessian(loss),
        lambda x: jvp(loss, (x,), (x,)),
        lambda x: jvp(grad(loss), (x,), (x,)),
        lambda x: grad(lambda x: jvp(loss, (x,), (x,))[1])(x),
        lambda x: jvp(lambda y: grad(lambda z: (z * rms_norm(y)).sum())(x), (x,), (x,)),
        torch.compile(lambda x: jvp(loss, (x,), (x,)), backend="aot_eager"),
    ],
    ids=["jacfwd", "hessian", "jvp", "jvp grad", "grad jvp", "jvp beside grad", "compiled jvp"],
)
def test_forward_mode_is_refused_at_every_level(
    x: Tensor, call: Callable[[Tensor], object]
) -> None:
    with pytest.raises(NotImplementedError, match=r"^rms_norm: forward-mode .*; use reverse mode"):
        call(x)


@pytest.mark.parametrize("call", [grad(lambda x: grad(loss)(x).sum()), jacrev(jacrev(loss))])
def test_second_derivatives_are_refused(x: Tensor, call: Callable[[Tensor], object]) -> None:
    with pytest.raises(NotImplementedError, match="rms_norm_backward: second derivatives are not"):
        call(x)


def test_tangents_of_a_gradient_are_refused(x: Tensor) -> None:
    x.requires_grad_()
    y = rms_norm(x)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"^rms_norm_backward: forward-mode derivatives"),
    ):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_tensors_without_a_tangent_pass(x: Tensor) -> None:
    value, tangent = jvp(lambda y: y * rms_norm(x), (x,), (torch.ones_like(x),))
    assert torch.equal(value, x * rms_norm(x))
    assert torch.equal(tangent, rms_norm(x))


def test_a_model(x: Tensor) -> None:
    sizes = {"num_layers": 2, "model_dim": 16, "z_dim": 8, "value_dim": 16, "num_heads": 2}
    more = {"ffn_hidden_dim": 20, "cema_ndim": 2, "chunk_size": 4, "norm_num_groups": 4}
    config = megalodon_ops.MegalodonConfig(**sizes, **more, vocab_size=32)  # type: ignore[arg-type]
    model = megalodon_ops.Megalodon(config).double()
    tokens = torch.randint(32, (2, 11))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(model, parameters, (tokens,))
        return logits.square().mean()

    model(tokens).square().mean().backward()
    for name, gradient in grad(loss)(parameters).items():
        assert torch.equal(gradient, model.get_parameter(name).grad), name
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        jvp(loss, (parameters,), (parameters,))
