"""Cross entropy of an output layer, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .nn.precision import activation_dtype

REDUCTIONS = ("mean", "sum", "none")
IGNORE_INDEX = -100

# Logits in one piece by default: 64 MB in float32.
_PIECE_LOGITS = 1 << 24
# Fewer tokens than this make narrow matrix products.
_LEAST_TOKENS = 64


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    *,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Cross entropy of the logits ``hidden @ weight.T``, a piece of the tokens at a time.

    With x the logits of a token, t its target, ``Z = log sum_v exp x_v`` and e the smoothing::

        loss = (1 - e) (Z - x_t) + e (Z - mean_v x_v) + z_loss Z^2

    One pass over the pieces makes the loss and, where gradients are recorded, both of them: each
    piece's logits turn into their own gradient in place, which goes into two matrix products. With
    reduction "none" that waits for the backward pass, which makes the logits again.

    Args:
        hidden: (..., D) activation; `Megalodon` returns it with ``outputs="hidden"``.
        weight: (V, D), of hidden's dtype; under autocast both become autocast's, as in a linear
            layer.
        targets: (...) int64, in [0, V) or ignore_index. Checked on the CPU only.
        ignore_index: such tokens have loss 0, no gradient, and do not count in the mean.
        label_smoothing: e, from 0 to 1.
        z_loss: weight of Z^2, which keeps Z near 0.
        reduction: "mean" over the tokens that count (NaN if none does), "sum", or "none".
        chunk: tokens in a piece; None: 2^24 / V, and at least 64.

    Returns:
        a scalar, or the shape of targets for "none"; float32 (float64 for float64). Differentiable,
        once, in hidden and weight. Sums over tokens are in that dtype, as is the accumulated
        gradient of the weight.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a number does not fit; the message names it.
        IndexError: a target is out of range.

    Peak memory beyond inputs and gradients: 4 to 6 bytes (8 in float64) per logit of one piece, and
    one copy of the weight's gradient (for 16-bit weights another one in 16 bits).
    """
    kind = activation_dtype(hidden)
    if kind != hidden.dtype or (weight.dtype != kind and kind == activation_dtype(weight)):
        hidden, weight = hidden.to(kind), weight.to(kind)
    _check(hidden, weight, targets, ignore_index, label_smoothing, z_loss, reduction, chunk)
    size = chunk or max(_LEAST_TOKENS, _PIECE_LOGITS // max(1, weight.shape[0]))
    # A function's own needs_input_grad does not know of torch.no_grad.
    record = torch.is_grad_enabled() and reduction != "none"
    options = (ignore_index, label_smoothing, z_loss, size)
    flat = (hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1))
    losses: Tensor
    if reduction == "none":
        losses = _TokenLosses.apply(*flat, *options)  # type: ignore[no-untyped-call]
        return losses.view(targets.shape)
    losses = _TotalLoss.apply(*flat, *options, record)  # type: ignore[no-untyped-call]
    if reduction == "sum":
        return losses
    return losses / (targets != ignore_index).sum()


class _TotalLoss(torch.autograd.Function):
    """The sum of the losses; the gradients are made along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
        size: int,
        record: bool,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        d_hidden = torch.empty_like(hidden) if record and ctx.needs_input_grad[0] else None
        d_weight = (
            torch.zeros_like(weight, dtype=_wide(weight.dtype))
            if record and ctx.needs_input_grad[1]
            else None
        )
        for at in range(0, len(hidden), size):
            rows = slice(at, at + size)
            piece = _Piece(hidden[rows], weight, targets[rows], ignore_index, smoothing, z_loss)
            total += piece.losses().sum()
            if d_hidden is not None or d_weight is not None:
                piece.gradients(None, d_hidden, d_weight, at)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * grad).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
        size: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options = (ignore_index, smoothing, z_loss, size)
        losses = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        for at in range(0, len(hidden), size):
            rows = slice(at, at + size)
            piece = _Piece(hidden[rows], weight, targets[rows], ignore_index, smoothing, z_loss)
            losses[rows] = piece.losses()
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        ignore_index, smoothing, z_loss, size = ctx.options
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = (
            torch.zeros_like(weight, dtype=_wide(weight.dtype)) if ctx.needs_input_grad[1] else None
        )
        for at in range(0, len(hidden), size):
            rows = slice(at, at + size)
            piece = _Piece(hidden[rows], weight, targets[rows], ignore_index, smoothing, z_loss)
            piece.gradients(grad[rows], d_hidden, d_weight, at)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None


class _Piece:
    """Some tokens: their losses, and the gradient of these, in the memory of the logits."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> None:
        self._hidden, self._weight = hidden, weight
        self._smoothing, self._z_loss = smoothing, z_loss
        self._ignored = targets == ignore_index
        self._index = targets.masked_fill(self._ignored, 0)[:, None]
        logits = (hidden @ weight.T).to(_wide(hidden.dtype))
        # Shifted by their maximum, which cancels in all but Z.
        highest = logits.amax(-1, keepdim=True) if logits.numel() else logits[:, :1]
        logits.sub_(highest)
        self._target = logits.gather(-1, self._index).squeeze(-1)
        self._mean = logits.mean(-1) if smoothing else self._target
        self._exp = logits.exp_()
        self._sum = self._exp.sum(-1)
        self._log_sum = self._sum.log()
        self._z = self._log_sum + highest.squeeze(-1)

    def losses(self) -> Tensor:
        """(n), 0 where ignored."""
        losses = self._log_sum - self._target
        if self._smoothing:
            smooth = self._log_sum - self._mean
            losses = (1 - self._smoothing) * losses + self._smoothing * smooth
        if self._z_loss:
            losses = losses + self._z_loss * self._z.square()
        return losses.masked_fill(self._ignored, 0.0)

    def gradients(
        self, grad: Tensor | None, d_hidden: Tensor | None, d_weight: Tensor | None, at: int
    ) -> None:
        """Add the gradient of sum(grad * losses), or of sum(losses), to hidden's rows from `at` and
        to the weight's. Once."""
        factor = 1 / self._sum
        if self._z_loss:
            factor = factor * (1 + 2 * self._z_loss * self._z)
        d_logits = self._exp.mul_(factor[:, None])
        ones = factor.new_full((1, 1), self._smoothing - 1).expand_as(self._index)
        d_logits.scatter_add_(-1, self._index, ones)
        if self._smoothing:
            d_logits.sub_(self._smoothing / d_logits.shape[-1])
        if grad is not None:
            d_logits.mul_(grad[:, None])
        # Not a product with 0: the logits of an ignored token may be inf or NaN.
        d_logits.masked_fill_(self._ignored[:, None], 0.0)
        self._multiply(d_logits.to(self._hidden.dtype), d_hidden, d_weight, at)

    def _multiply(
        self, d_logits: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, at: int
    ) -> None:
        if d_hidden is not None:
            torch.mm(d_logits, self._weight, out=d_hidden[at : at + len(d_logits)])
        if d_weight is None:
            return
        if d_weight.dtype == self._hidden.dtype:
            d_weight.addmm_(d_logits.T, self._hidden)
        else:
            d_weight += d_logits.T @ self._hidden


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    chunk: int | None,
) -> None:
    def refuse(kind: type[Exception], name: str, wanted: str, got: object) -> None:
        raise kind(f"cross_entropy: {name}: wanted {wanted}; got {got}")

    if not hidden.is_floating_point():
        refuse(TypeError, "hidden", "a floating dtype", hidden.dtype)
    if weight.dtype != hidden.dtype:
        refuse(TypeError, "weight", f"{hidden.dtype} (hidden's)", weight.dtype)
    if targets.dtype != torch.int64:
        refuse(TypeError, "targets", "int64", targets.dtype)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        wanted = f"[V, {hidden.shape[-1]}] (hidden.shape[-1])" if hidden.dim() else "[V, D]"
        refuse(ValueError, "weight", wanted, list(weight.shape))
    if targets.shape != hidden.shape[:-1]:
        refuse(ValueError, "targets", f"{list(hidden.shape[:-1])}", list(targets.shape))
    if not 0 <= label_smoothing <= 1:
        refuse(ValueError, "label_smoothing", "a number from 0 to 1", label_smoothing)
    if not 0 <= z_loss < float("inf"):
        refuse(ValueError, "z_loss", "a finite number >= 0", z_loss)
    if reduction not in REDUCTIONS:
        refuse(ValueError, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
    if chunk is not None and chunk < 1:
        refuse(ValueError, "chunk", "None or an int >= 1", chunk)
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        if targets.numel() == 0:
            return
        low, high = targets.masked_fill(targets == ignore_index, 0).aminmax()
        if int(low) < 0 or int(high) >= weight.shape[0]:
            wanted = f"[0, {weight.shape[0]}) or ignore_index = {ignore_index}"
            refuse(IndexError, "targets", wanted, int(low) if int(low) < 0 else int(high))
