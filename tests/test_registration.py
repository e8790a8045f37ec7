"""What torch does between a call and the kernel: modes, subclasses, lazy views, functorch. The
short way past the second dispatch must not skip any of it.
"""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_ops._registration import _plain_key_sets

rms_norm = torch.ops.megalodon.rms_norm.default


class Names(TorchDispatchMode):
    """Records what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8)


@pytest.mark.parametrize("grad", [False, True])
def test_a_dispatch_mode_sees_the_op(x: torch.Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad), Names() as mode:
        rms_norm(x.requires_grad_(grad))
    assert "megalodon::rms_norm" in mode.seen
    assert "aten::empty_like" not in mode.seen


def test_fake_tensors(x: torch.Tensor) -> None:
    with FakeTensorMode() as mode, torch.no_grad():
        y, rstd = rms_norm(mode.from_tensor(x))
    assert (y.shape, rstd.shape) == ((3, 8), (3,))
    assert type(y) is type(mode.from_tensor(x))


def test_meta_tensors(x: torch.Tensor) -> None:
    with torch.no_grad():
        y, rstd = rms_norm(x.to("meta"))
    assert (y.device.type, y.shape, rstd.shape) == ("meta", (3, 8), (3,))


def test_subclasses(x: torch.Tensor) -> None:
    """A subclass with __torch_dispatch__ is unwrapped by its own rule."""
    with torch.no_grad():
        y, _ = rms_norm(TwoTensor(x, 2 * x))
    assert type(y) is TwoTensor
    assert torch.equal(y.a, rms_norm(x)[0])
    assert torch.equal(y.b, rms_norm(2 * x)[0])


def test_lazy_views(x: torch.Tensor) -> None:
    """A tensor whose minus sign is a flag: the dispatcher resolves it before the kernel."""
    with torch.no_grad():
        assert torch.equal(rms_norm(torch._neg_view(x))[0], rms_norm(-x)[0])


def test_functionalize(x: torch.Tensor) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x.clone().mul_(2))[0]

    with torch.no_grad():
        assert torch.equal(torch.func.functionalize(call)(x), call(x))


@pytest.mark.parametrize("grad", [False, True])
def test_compile(x: torch.Tensor, grad: bool) -> None:
    compiled = torch.compile(lambda x: rms_norm(x * 2)[0] + 1, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        y = compiled(x.requires_grad_(grad))
    assert torch.equal(y, rms_norm(x * 2)[0] + 1)
    assert y.requires_grad == grad


def test_inference_mode(x: torch.Tensor) -> None:
    wanted = rms_norm(x)[0]
    with torch.inference_mode():
        assert torch.equal(rms_norm(x)[0], wanted)
        assert torch.equal(rms_norm(x.clone())[0], wanted)


def test_autocast(x: torch.Tensor) -> None:
    """Autocast leaves the op's dtypes alone."""
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rms_norm(x)[0], rms_norm(x.clone())[0])
        assert rms_norm(x)[0].dtype == torch.float32


def test_the_short_way_is_taken() -> None:
    """The key sets that mean "nothing between" are those the dispatcher gives for plain tensors."""
    library = torch.library.Library("megalodon_test", "DEF")
    keys = []
    library.define("probe(Tensor x) -> Tensor")

    def probe(key_set: Any, x: torch.Tensor) -> torch.Tensor:
        keys.append(key_set.raw_repr())
        return x.clone()

    library.impl("probe", probe, "Autograd", with_keyset=True)
    torch.ops.megalodon_test.probe(torch.ones(1))
    torch.ops.megalodon_test.probe(torch.nn.Parameter(torch.ones(1)))
    assert set(keys) <= _plain_key_sets()


def test_results_do_not_require_grad(x: torch.Tensor) -> None:
    y, rstd = rms_norm(torch.nn.Parameter(x).detach(), torch.ones(8))
    assert not y.requires_grad
    assert not rstd.requires_grad
    with torch.no_grad():
        y, _ = rms_norm(torch.nn.Parameter(x), torch.nn.Parameter(torch.ones(8)))
    assert type(y) is torch.Tensor
    assert not y.requires_grad
