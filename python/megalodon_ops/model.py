"""`Megalodon`: the language model, with the official parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import MegalodonConfig
from .decoding import Decoder
from .functional import TimestepNormState
from .nn import Block, TimestepNorm
from .nn.init import Embedding, OutputLinear
from .nn.packing import Packing
from .nn.precision import KeepsPrecision, activation_dtype
from .state import LayerState, MegalodonState

OUTPUTS = ("logits", "last", "hidden")


class Rope(KeepsPrecision):
    """The official buffer `rope.freqs`: base^(-2j/dz), j = 0 .. dz/2 - 1, (dz/2) float32.

    It is there for the sake of checkpoints and computes nothing: the rotary base comes from the
    config. A checkpoint's frequencies are compared with the config's and never taken over
    (the released code obeys them silently).
    """

    freqs: Tensor

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self.register_buffer("freqs", self._compute(None))

    def _compute(self, device: torch.device | None) -> Tensor:
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        return (self.base ** (-pairs / self.head_dim)).to(torch.float32)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}freqs"
        given = state_dict.get(key)
        if given is not None:
            problem = self._difference(given)
            if problem:
                error_msgs: list[str] = args[-1]
                error_msgs.append(f"{key}: {problem}")
            state_dict = {**state_dict, key: self._compute(given.device)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _difference(self, given: Tensor) -> str:
        """What is wrong with a checkpoint's frequencies; empty where they are this model's."""
        if given.shape != self.freqs.shape:
            return f"wanted shape {list(self.freqs.shape)}; got {list(given.shape)}"
        if given.device.type == "meta":
            return ""
        mine = self._compute(torch.device("cpu")).double()
        theirs = given.detach().to("cpu", torch.float64)
        # Both are rounded once, to float32 here and to whatever dtype was saved there.
        saved = torch.finfo(given.dtype)
        tolerance = 4 * max(torch.finfo(torch.float32).eps, saved.eps)
        if torch.allclose(theirs, mine, rtol=tolerance, atol=saved.tiny * saved.eps):
            return ""
        base = float("nan")
        if len(theirs) > 1:
            base = float(theirs[1]) ** (-self.head_dim / 2)
        return (
            f"the checkpoint was made with rope_base about {base:.6g}; the config has "
            f"rope_base = {self.base:.6g}"
        )

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}"


class Output(nn.Module):
    """The head: final_norm (`TimestepNorm`), then output (V, D), no bias."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.final_norm = TimestepNorm(
            config.model_dim, config.norm_num_groups, eps=config.norm_eps
        )
        self.output = OutputLinear(config.model_dim, config.num_outputs)

    def forward(
        self,
        x: Tensor,
        state: TimestepNormState | None = None,
        packing: Packing | None = None,
        outputs: str = "logits",
    ) -> tuple[Tensor, TimestepNormState]:
        """x (B, L, D) -> what `Megalodon.forward` returns for `outputs`, and the norm's state."""
        cu_seqlens = None if packing is None else packing.cu_seqlens
        normed, state = self.final_norm(x, state, cu_seqlens=cu_seqlens)
        if outputs == "last":
            normed = _last(normed, packing)
        elif packing is not None:
            normed = packing.unpack(normed)
        if outputs == "hidden":
            return normed, state
        logits = self.output(normed)
        return logits if logits.dtype == torch.float64 else logits.float(), state


class Megalodon(nn.Module):
    """A Megalodon language model (arXiv 2404.08801, as the released code computes it).

    Parameter and buffer names, shapes and initial values are the released code's, and
    `load_state_dict` accepts a consolidated official checkpoint strictly; its `rope.freqs` and
    `prior_count` entries must agree with the config.

    `.bfloat16()`, `.half()`, `.to(dtype)` and a narrow default dtype leave CEMA, norms and
    gamma/beta in float32. Under autocast the residual stream stays float32 and everything inside
    the layers is narrow.

    Args:
        config: sizes and switches.
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        if not isinstance(config, MegalodonConfig):
            raise TypeError(
                f"Megalodon: config: wanted a MegalodonConfig; got {type(config).__name__}"
            )
        self.config = config
        self.embed = Embedding(config.vocab_size, config.model_dim)
        self.rope = Rope(config.z_head_dim, config.rope_base_value)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.output = Output(config)
        self.dropout = nn.Dropout(config.dropout)
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_weights)  # type: ignore[no-untyped-call]

    def tie_weights(self) -> None:
        """Make output.output.weight the embedding itself again, where the config shares them.

        Called wherever torch may have separated them (`to_empty`, `load_state_dict(assign=True)`).
        """
        if self.config.share_emb:
            self.output.output.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        state: MegalodonState | None = None,
        return_state: bool = False,
        *,
        inplace_state: bool = False,
        lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        outputs: str = "logits",
    ) -> Tensor | tuple[Tensor, MegalodonState]:
        """Logits of the next token at every position.

        Splitting the tokens over calls changes nothing: any lengths, empty ones included, rows at
        different positions included.

        Args:
            tokens: (B, L) int64 or int32, in [0, vocab_size). Values are checked on the CPU only.
            state: the state after the tokens before these; None starts a sequence.
            return_state: also return the state after these tokens.
            inplace_state: write that state into `state`'s own tensors and return `state` itself:
                fixed addresses and no copies, for decoding. Without it `state` stays as it is.
            lengths: B integers in [0, L], the tokens of each row that count; None means L in
                every row. What follows them is padding of any value: it changes no state, and
                the outputs there mean nothing. Read on the host, so a device is waited for.
            cu_seqlens: (segments + 1) int32 or int64, on the tokens' device: the tokens are one
                packed row (1, T) of independent documents, document i being the tokens from
                cu_seqlens[i] to before cu_seqlens[i + 1]; 0 first, T last. A state has a row per
                document: a packed row leaves the state that the documents would have left as a
                batch. Read on the host, too. Not together with lengths.
            outputs: "logits"; "last", the logits after each row's last token alone (NaN for a row
                without a token); or "hidden", what `output.output` would multiply, for
                `megalodon_ops.cross_entropy`.

        Returns:
            logits (B, L, V), float32 (float64 for a float64 model), or (B, V) for "last" (of a
            packed row (segments, V)), or hidden (B, L, D) of the activations' dtype; and the new
            state if asked.
            Differentiable in the parameters and in the floating tensors of the state.

        Raises:
            TypeError: tokens is not a tensor, or state not a MegalodonState.
            ValueError: tokens has the wrong dtype, rank or device; the state's batch, dtype, device
                or config differ; inplace_state without a state, or while gradients are recorded;
                lengths are no B integers in [0, L]; cu_seqlens does not ascend from 0 to T, or is
                given together with lengths; outputs is none of the three.
            IndexError: a token is out of range (tokens on the CPU, not while compiling).
        """
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs: wanted one of {', '.join(OUTPUTS)}; got {outputs!r}")
        tokens, packing = self.check(tokens, state, inplace_state, lengths, cu_seqlens)
        make_state = return_state or inplace_state
        position = None if state is None else state.position

        x = self.embed(tokens)
        if self.config.scale_emb:
            x = x * math.sqrt(self.config.model_dim)
        x = self.dropout(x)

        recompute = self.config.layerwise_ckpt and torch.is_grad_enabled()
        draws = self.training and self.config.any_dropout
        layers: list[LayerState] = []
        for i, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[i]
            arguments = (x, layer_state, position, make_state, inplace_state, packing)
            if recompute:
                x, new = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=draws
                )
            else:
                x, new = layer(*arguments)
            if new is not None:
                layers.append(new)

        logits: Tensor
        old_norm = None if state is None else state.final_norm
        logits, norm = self.output(x, old_norm, packing, outputs)
        if not make_state:
            return logits
        length = tokens.shape[1] if packing is None else packing.lengths
        if inplace_state and state is not None:
            for mine, value in zip(state.final_norm, norm, strict=True):
                mine.copy_(value)
            state.position.add_(length)
            new_state = state
        else:
            new_state = MegalodonState(
                tuple(layers), norm, _advanced(position, length, tokens), self.config.fingerprint()
            )
        return (logits, new_state) if return_state else logits

    def decoder(self, state: MegalodonState) -> Decoder:
        """A function of tokens (B, 1) that takes decoding steps from `state`, in place, faster.

        Raises:
            TypeError, ValueError: as `forward` does of a state.
        """
        return Decoder(self, state)

    def init_state(self, batch_size: int) -> MegalodonState:
        """The state before the first token, for `batch_size` rows, on the model's device.

        The caches take the dtype that activations have now: autocast's inside autocast.

        Raises:
            ValueError: batch_size is not an int >= 0.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"init_state: batch_size: wanted an int >= 0; got {batch_size!r}")
        weight = self.embed.weight
        return MegalodonState.initial(
            self.config, batch_size, activation_dtype(weight), weight.device
        )

    def check(
        self,
        tokens: Tensor,
        state: MegalodonState | None,
        inplace_state: bool,
        lengths: Tensor | Sequence[int] | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Packing | None]:
        """Validate the arguments of forward; reads token values only where that costs no sync.

        Returns the tokens, and where sequences differ in length, their packing: then the tokens are
        one packed row.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: wanted a torch.Tensor; got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: dtype: wanted int64 or int32; got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: wanted shape (B, L); got {list(tokens.shape)}")
        weight = self.embed.weight
        if tokens.device != weight.device:
            raise ValueError(
                f"tokens: device: wanted the model's, {weight.device}; got {tokens.device}"
            )
        packing = None
        if cu_seqlens is not None:
            if lengths is not None:
                raise ValueError("lengths, cu_seqlens: wanted one of them; got both")
            packing = Packing.of_bounds(cu_seqlens, tokens)
        elif lengths is not None:
            packing = Packing.of_lengths(lengths, tokens)
        rows = tokens.shape[0] if packing is None else packing.segments
        if packing is not None:
            tokens = packing.pack(tokens)
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(tokens, self.config.vocab_size)
        if inplace_state and state is None:
            raise ValueError("inplace_state: wanted a state to write into; got state=None")
        if state is None:
            return tokens, packing
        if not isinstance(state, MegalodonState):
            raise TypeError(f"state: wanted a MegalodonState; got {type(state).__name__}")
        if inplace_state and torch.is_grad_enabled():
            raise ValueError(
                "inplace_state: wanted torch.no_grad() or torch.inference_mode(); "
                "gradients are being recorded, and their backward needs the old state"
            )
        state.check(self.config, rows, activation_dtype(weight), weight.device)
        return tokens, packing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Megalodon:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie_weights()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = (f"{prefix}embed.weight", f"{prefix}output.output.weight")
        first, second = (state_dict.get(name) for name in names)
        if self.config.share_emb and not _agree(first, second):
            error_msgs: list[str] = args[-1]
            error_msgs.append(
                f"{names[1]}: differs from {names[0]}, but the config has share_emb on"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _tie_weights(model: Megalodon, _: object) -> None:
    model.tie_weights()


def _advanced(position: Tensor | None, length: Tensor | int, tokens: Tensor) -> Tensor:
    """The positions after `length` more tokens."""
    if position is not None:
        return position + length
    if isinstance(length, Tensor):
        return length
    return torch.full((tokens.shape[0],), length, dtype=torch.int64, device=tokens.device)


def _last(x: Tensor, packing: Packing | None) -> Tensor:
    """The last step of each sequence (B, D); NaN for one that has none."""
    rows, length, width = x.shape if packing is None else (packing.segments, *x.shape[1:])
    if length == 0:
        return x.new_full((rows, width), math.nan)
    if packing is None:
        return x[:, -1]
    last, empty = packing.last()
    return x[0, last].masked_fill(empty[:, None], math.nan)


def _agree(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal, as far as both are there and have values."""
    if a is None or b is None or a is b or "meta" in (a.device.type, b.device.type):
        return True
    return a.shape == b.shape and torch.equal(a, b.to(a.device, a.dtype))


def _check_range(tokens: Tensor, vocab_size: int) -> None:
    if tokens.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise IndexError(f"tokens: wanted ids in [0, {vocab_size}); got {bad}")
