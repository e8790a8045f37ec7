"""block_step: it is the block's modules; in place, many rows, hooks and dropout; bad arguments."""

import math
from typing import Any

import pytest
import torch
from backend import BACKEND, values_are_read
from checks import DTYPES, check_forward
from hypothesis import given
from hypothesis import strategies as st
from small_model import random_tokens, small_config, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_ops import registry
from megalodon_ops._library import Maker
from megalodon_ops.nn import Block
from megalodon_ops.nn.block import _MANY_ROWS
from megalodon_ops.ops.block_step import sample_arguments

OP = registry["block_step"]
NAMES = [argument.name for argument in OP.arguments]
F64 = torch.float64


@given(
    H=st.integers(1, 3),
    half=st.integers(0, 9),
    E=st.integers(0, 20),
    C=st.integers(1, 9),
    F=st.integers(0, 40),
    K=st.integers(1, 6),
    G=st.integers(1, 5),
    N=st.integers(1, 5),
    position=st.lists(st.integers(0, 10**9), max_size=3),
    optional=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    isa: str,
    H: int,
    half: int,
    E: int,
    C: int,
    F: int,
    K: int,
    G: int,
    N: int,
    position: list[int],
    optional: bool,
    dtype: torch.dtype,
) -> None:
    sizes = {"D": K * G, "N": N, "H": H, "S": 2 * half, "E": E, "C": C, "F": F, "G": G}
    args = sample_arguments(Maker(dtype), **sizes, position=tuple(position), optional=optional)
    check_forward(OP, args)


@pytest.mark.parametrize("N", [16, 70])
def test_wide_rows_on_several_threads(isa: str, N: int) -> None:
    """Wide enough for every part to be split: the state of a row is read before it is written."""
    sizes = {"D": 1024, "N": N, "H": 2, "S": 32, "E": 256, "C": 40, "F": 300, "G": 16}
    args = sample_arguments(Maker(F64), **sizes, position=(37,))
    check_forward(OP, args)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
            results.append([OP.overload(*copies), *copies[1:7]])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [4, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_are_taken_at_a_time(isa: str, rows: int, dtype: torch.dtype) -> None:
    sizes = {"D": 24, "N": 3, "H": 2, "S": 8, "E": 8, "C": 5, "F": 40, "G": 3}
    positions = tuple(range(rows))
    check_forward(OP, sample_arguments(Maker(dtype), **sizes, position=positions))


class Calls(TorchDispatchMode):
    """Counts the calls of block_step."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is OP.overload
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, rows: int = 2) -> tuple[Tensor, Any, int]:
    """Logits and state after five tokens, the last four one at a time in place."""
    tokens = random_tokens(rows, 5)
    with torch.no_grad(), Calls() as calls:
        _, state = model(tokens[:, :1], return_state=True)
        parts = [model(t, state, inplace_state=True) for t in tokens[:, 1:].split(1, dim=1)]
    return torch.cat(parts, 1), state, calls.count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_affine": False},
        {"swiglu": False},
        {"rescale_nffn": False},
        {"num_heads": 1, "rope_base": 100.0, "norm_eps": 1e-3},
    ],
    ids=str,
)
def test_it_is_the_modules(changes: dict[str, Any]) -> None:
    model = small_model(**changes).eval()
    fused, state, calls = step(model)
    assert calls == 8
    for layer in model.layers:
        layer.nffn.fc2.register_forward_hook(lambda *_: None)
    plain, plain_state, calls = step(model)
    assert calls == 0
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(tensor, plain_state.tensors()[name], rtol=1e-12, atol=1e-12)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_modules_that_were_changed_are_called() -> None:
    model = small_model().eval()
    with torch.no_grad():
        before, _, _ = step(model)
    for layer in model.layers:
        plain = layer.mega.wr
        layer.mega.wr = Doubled(plain.in_features, plain.out_features, dtype=F64)
        layer.mega.wr.load_state_dict(plain.state_dict())
    after, _, calls = step(model)
    assert calls == 0
    assert not torch.equal(before, after)


def test_when_it_is_not_used() -> None:
    model = small_model()
    assert step(model.train())[2] == 8  # without dropout, training is nothing special
    assert step(model, rows=_MANY_ROWS)[2] == 0
    assert step(small_model(dropout=0.1).train())[2] == 0
    assert step(small_model(dropout=0.1).eval())[2] == 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step(small_model(dtype=torch.float32))[2] == 0


def test_nan_stays_in_its_row() -> None:
    sizes = {"D": 12, "N": 3, "H": 2, "S": 4, "E": 6, "C": 5, "F": 10, "G": 3}
    clean, args = (sample_arguments(Maker(F64), **sizes, position=(2, 3)) for _ in range(2))
    args[0][0] = math.nan
    got, want = OP.overload(*args), OP.overload(*clean)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


def test_gradients_are_refused() -> None:
    block = Block(small_config())
    args = dict(zip(NAMES, next(iter(OP.samples(Maker(torch.float32)))).args, strict=True))
    args["wv_weight"] = args["wv_weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match="block_step: has no gradient"):
        OP.overload(**args)
    assert block(torch.ones(1, 1, 12))[0].requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 1, 12)}, ValueError, r"x must be \[B, D\]; got \[2, 1, 12\]"),
        ({"count": torch.ones(2)}, TypeError, "count must be int64; got float32"),
        ({"h": torch.ones(2, 12, 3)}, ValueError, r"h must be \[B, D, N, 2\] with .*; got"),
        ({"num_groups": 5}, ValueError, r"num_groups must be a divisor of D = 12 .*; got 5"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1; got 0"),
        ({"num_heads": 3}, ValueError, r"k_cache must be \[B, C, H, S\] with .*H = 3.*; got"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"eps": 0.0}, ValueError, "eps must be .*; got 0"),
        ({"eps": 1e-60}, ValueError, "eps must be positive and finite in float32; got 1e-60"),
        ({"k_cache": torch.ones(2, 5, 2, 3)}, ValueError, "k_cache must be .* S even; got S = 3"),
        ({"wz_weight": torch.ones(7, 12)}, ValueError, r"wz_weight must be .*; got \[7, 12\]"),
        ({"wz_weight": torch.ones(8, 12).half()}, TypeError, "wz_weight must be float32; got fl"),
        ({"norm_bias": None}, ValueError, "norm_weight and norm_bias must be given both or neith"),
        ({"fc3_weight": torch.ones(9, 12)}, ValueError, r"fc3_weight must be .*; got \[9, 12\]"),
        pytest.param(
            {"count": torch.tensor([0, -2])},
            ValueError,
            "count must be at least 0 everywhere",
            marks=values_are_read,
        ),
        pytest.param(
            {"position": torch.tensor([0, -2])},
            ValueError,
            "position must be at least 0 everywhere",
            marks=values_are_read,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_change_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    sizes = {"D": 12, "N": 3, "H": 2, "S": 4, "E": 6, "C": 5, "F": 10, "G": 3}
    args = sample_arguments(Maker(torch.float32), **sizes, position=(2, 3))
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(error, match=f"block_step: {message}"):
        OP.overload(**{**dict(zip(NAMES, args, strict=True)), **change})
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.skipif(BACKEND == "cuda", reason="copies on the GPU share nothing")
@pytest.mark.parametrize(
    ("other", "written"), [("v_cache", "k_cache"), ("var", "mean"), ("position", "count")]
)
def test_states_that_share_memory_are_refused(other: str, written: str) -> None:
    sizes = {"D": 12, "N": 3, "H": 2, "S": 4, "E": 4, "C": 5, "F": 10, "G": 3}
    args = dict(
        zip(NAMES, sample_arguments(Maker(torch.float32), **sizes, position=(2, 3)), strict=True)
    )
    before = args[written].clone()
    message = f"block_step: {other} must be apart in memory from {written}, which is written to"
    with pytest.raises(ValueError, match=message):
        OP.overload(**{**args, other: args[written]})
    assert torch.equal(args[written], before)
