"""Decoder: the model's own decoding steps, prepared; when it is not, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_model import VOCAB, random_tokens, small_model
from torch import Tensor, nn

from megalodon_ops.model import Megalodon
from megalodon_ops.nn.block import _MANY_ROWS
from megalodon_ops.state import MegalodonState

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def prefilled(model: Megalodon, rows: int) -> MegalodonState:
    with torch.no_grad():
        state: MegalodonState = model(random_tokens(rows, 5, seed=1), return_state=True)[1]
    return state


def assert_same_steps(model: Megalodon, rows: int = 2, prepared: str = "kernels") -> None:
    """Twenty steps (more than a chunk) of the decoder and of the model: equal, as is the state."""
    state = prefilled(model, rows)
    other = state.clone()
    decoder = model.decoder(state)
    assert decoder.prepared == prepared
    assert decoder.state is state
    exact = {"rtol": 0, "atol": 0}  # the same kernels; only the head's product is another call
    for tokens in random_tokens(rows, 20).split(1, dim=1):
        with torch.no_grad():
            wanted = model(tokens, other, inplace_state=True)
        got = decoder(tokens)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)
        for (name, a), b in zip(state.tensors().items(), other.tensors().values(), strict=True):
            torch.testing.assert_close(a, b, **exact, msg=name)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 1, "scale_emb": True, "share_emb": True},
        {"num_layers": 3, "swiglu": False, "norm_affine": False, "output_size": 11},
        {"attention": "sliding"},
    ],
    ids=str,
)
def test_it_is_the_model(changes: dict[str, Any], dtype: torch.dtype) -> None:
    assert_same_steps(small_model(**changes, dtype=dtype))


def replace_a_child(model: Megalodon) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain = model.layers[1].mega.wr
    model.layers[1].mega.wr = Doubled(plain.in_features, plain.out_features, dtype=F64)


CHANGES: dict[str, Callable[[Megalodon], Any]] = {
    "a child that was replaced": replace_a_child,
    "a hook on the model": lambda model: model.register_forward_hook(lambda *_: None),
    "a hook on a layer": lambda model: model.layers[0].register_forward_hook(lambda *_: None),
    "a hook on the norm": lambda m: m.output.final_norm.register_forward_hook(lambda *_: None),
    "a hook on the head": lambda m: m.output.output.register_forward_hook(lambda *_: None),
    "a hook on the embedding": lambda m: m.embed.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_were_changed_are_called(change: str) -> None:
    model = small_model().eval()
    CHANGES[change](model)
    assert_same_steps(model, prepared="modules")


def test_rows() -> None:
    assert_same_steps(small_model(), rows=1)
    assert_same_steps(small_model(), rows=_MANY_ROWS, prepared="modules")
    assert_same_steps(small_model(), rows=0, prepared="modules")


def test_dropout_and_autocast_take_the_modules() -> None:
    model = small_model(dropout=0.1)
    assert model.train().decoder(model.init_state(1)).prepared == "modules"
    assert model.eval().decoder(model.init_state(1)).prepared == "kernels"
    narrow = small_model(dtype=F32)
    with torch.autocast("cpu", dtype=BF16):
        assert_same_steps(narrow, prepared="modules")


def test_values_changed_in_place_count() -> None:
    """Of parameters and of the state; gradients may be wanted outside."""
    model, new = small_model(), small_model(seed=1)
    state = prefilled(model, 1)
    decoder = model.decoder(state)
    model.load_state_dict(new.state_dict())
    start = prefilled(new, 1)
    for mine, value in zip(state.tensors().values(), start.tensors().values(), strict=True):
        mine.copy_(value)
    token = torch.tensor([[7]], dtype=torch.int32)
    got = decoder(token)
    with torch.no_grad():
        torch.testing.assert_close(got, new(token, start))
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"wanted int64 or int32 \(2, 1\)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"got torch.int64 \[3, 1\]"),
        (torch.zeros(2, 1), ValueError, r"got torch.float32 \[2, 1\]"),
        (torch.zeros(2, 1, dtype=torch.int64, device="meta"), ValueError, "device: wanted .* cpu"),
        (torch.tensor([[0], [VOCAB]]), IndexError, rf"wanted ids in \[0, {VOCAB}\); got {VOCAB}"),
        (torch.tensor([[0], [-1]]), IndexError, "got -1"),
    ],
    ids=str,
)
def test_bad_tokens_change_nothing(tokens: Tensor, error: type[Exception], message: str) -> None:
    model = small_model()
    state = prefilled(model, 2)
    before = state.clone()
    with pytest.raises(error, match=f"Decoder: tokens: .*{message}"):
        model.decoder(state)(tokens)
    for a, b in zip(state.tensors().values(), before.tensors().values(), strict=True):
        assert torch.equal(a, b)


def test_tokens_that_are_no_tensor() -> None:
    model = small_model()
    with pytest.raises(TypeError, match=r"Decoder: tokens: wanted a torch\.Tensor; got list"):
        model.decoder(model.init_state(2))([[1], [2]])  # type: ignore[arg-type]


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="state: config"):
        small_model().decoder(small_model(chunk_size=3).init_state(1))
    with pytest.raises(TypeError, match="state: wanted a MegalodonState"):
        small_model().decoder(None)
