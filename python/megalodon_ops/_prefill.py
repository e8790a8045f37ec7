"""Prompts of any lengths into a state, in pieces, at bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import accumulate

import torch
from torch import Tensor

from .config import MegalodonConfig
from .model import Megalodon
from .state import MegalodonState

# The tokens of one row, or, to be read piece by piece, an iterator of such; bytes are tokens of a
# model of bytes.
Piece = Tensor | bytes | Sequence[int]
Prompt = Piece | Iterator[Piece]

DEFAULT_PIECE = 2048


def require_count(name: str, value: object, lowest: int = 1, optional: bool = False) -> None:
    """Raise TypeError or ValueError where an argument is no int of at least so much."""
    if optional and value is None:
        return
    none = "None or " if optional else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted {none}an int; got {value!r}")
    if value < lowest:
        raise ValueError(f"{name}: wanted {none}{lowest} or more; got {value}")


def require_several(prompts: object) -> None:
    """Raise TypeError where one prompt was given instead of a sequence of them."""
    if isinstance(prompts, str | bytes | Tensor):
        raise TypeError("prompts: wanted a sequence of prompts, one per row; got one prompt")


def number_of(prompts: Sequence[Prompt]) -> int:
    """How many prompts these are; TypeError where they are one, or cannot be counted."""
    require_several(prompts)
    if not isinstance(prompts, Sized):
        got = type(prompts).__name__
        raise TypeError(f"prompts: wanted a sequence of prompts, one per row; got {got}")
    return len(prompts)


def require_tokens(config: MegalodonConfig) -> None:
    """Raise ValueError where a model has outputs that are no tokens, so cannot read what it says.

    Fewer outputs than tokens are well: some tokens are never said.
    """
    if config.num_outputs > config.vocab_size:
        raise ValueError(
            f"generation: output_size: wanted at most vocab_size = {config.vocab_size}, every "
            f"output being a token; got {config.num_outputs}"
        )


@torch.inference_mode()
def prefill(
    model: Megalodon,
    prompts: Sequence[Prompt],
    state: MegalodonState | None = None,
    *,
    piece: int = DEFAULT_PIECE,
    on_tokens: Callable[[int, Tensor], None] | None = None,
    recent_norms: bool = False,
) -> tuple[Tensor, MegalodonState]:
    """Read one prompt per row, and leave each row's state as if it had been read alone.

    The rows are read together, packed, at most `piece` tokens in one call of the model; a row whose
    prompt has ended takes no further part. Memory does not grow with the prompts' lengths.

    Args:
        model: the model; its weights' device is where it runs.
        prompts: one per row, not empty: tokens as a 1-D integer tensor, a sequence of ints or, for
            a model of bytes, bytes; or an iterator of such pieces, which is read as it is needed.
        state: the rows' state before (unchanged); None starts sequences.
        piece: tokens in one call of the model.
        on_tokens: told (row, tokens) of what is read, in order.
        recent_norms: read as the released code does: from the eighth chunk on, after every second
            one, timestep norm's statistics and counts become those of a new run over the last six
            chunks. Rows are read one by one, two chunks in a call (whatever `piece`), at four times
            the cost. The plain recurrence, which training computes, is the default.

    Returns:
        the logits (B, V) after each row's last token, and the state.

    Raises:
        TypeError: a prompt is none of these.
        ValueError: a prompt is empty; piece is below 1; the state has another number of rows;
            recent_norms with a state, whose last chunks are not known.
        IndexError: a token is out of range.
    """
    if isinstance(piece, bool) or not isinstance(piece, int) or piece < 1:
        raise ValueError(f"piece: wanted an int >= 1; got {piece!r}")
    require_several(prompts)
    readers = [_Reader(row, prompt, model) for row, prompt in enumerate(prompts)]
    for row, reader in enumerate(readers):
        if not reader.more():
            raise ValueError(f"prompts: prompt {row} is empty: there is nothing to continue")
    if recent_norms:
        if state is not None:
            raise ValueError("recent_norms: wanted state=None: its last six chunks are not known")
        return _read_with_recent_norms(model, readers, on_tokens)
    current = model.init_state(len(readers)) if state is None else state.clone()
    return _read(model, readers, current, piece, on_tokens)


def _read(
    model: Megalodon,
    readers: list[_Reader],
    current: MegalodonState,
    piece: int,
    on_tokens: Callable[[int, Tensor], None] | None,
) -> tuple[Tensor, MegalodonState]:
    device = current.device
    active = list(range(len(readers)))
    order: list[int] = []
    ended: list[MegalodonState] = []
    results: list[Tensor] = []
    while active:
        share = max(1, piece // len(active))
        parts = [readers[row].take(share) for row in active]
        if on_tokens is not None:
            for row, part in zip(active, parts, strict=True):
                on_tokens(row, part)
        bounds = None
        if len(parts) > 1:
            bounds = torch.tensor([0, *accumulate(map(len, parts))], device=device)
        tokens = torch.cat(parts).unsqueeze(0).to(device)
        last = model(tokens, current, inplace_state=True, cu_seqlens=bounds, outputs="last")
        at_end = [not readers[row].more() for row in active]
        if not any(at_end):
            continue
        gone = torch.tensor([i for i, end in enumerate(at_end) if end], device=device)
        order += [row for row, end in zip(active, at_end, strict=True) if end]
        results.append(last.index_select(0, gone))
        if all(at_end):  # no copy where all rows end together, the usual case of one row
            ended.append(current)
            break
        ended.append(current.index_select(gone))
        stay = torch.tensor([i for i, end in enumerate(at_end) if not end], device=device)
        current = current.index_select(stay)
        active = [row for row, end in zip(active, at_end, strict=True) if not end]
    if not ended:
        return torch.zeros(0, model.config.num_outputs, device=device), current
    logits = torch.cat(results)
    joined = ended[0] if len(ended) == 1 else MegalodonState.cat(ended)
    if order == sorted(order):
        return logits, joined
    rows = torch.tensor(order, device=device).argsort()
    return logits.index_select(0, rows), joined.index_select(rows)


def _read_with_recent_norms(
    model: Megalodon,
    readers: list[_Reader],
    on_tokens: Callable[[int, Tensor], None] | None,
) -> tuple[Tensor, MegalodonState]:
    """Two chunks at a time, the last 1 to C tokens alone, as the released code's `generate`."""
    chunk, device = model.config.chunk_size, model.embed.weight.device
    results, states = [torch.zeros(0, model.config.num_outputs, device=device)], []
    for row, reader in enumerate(readers):
        state, recent = model.init_state(1), torch.empty(0, dtype=torch.int64)
        length = 0
        while True:
            part = reader.take(2 * chunk)
            if on_tokens is not None:
                on_tokens(row, part)
            at_end = not reader.more()
            whole = (len(part) - 1) // chunk * chunk if at_end else 2 * chunk
            if whole:
                _step(model, part[:whole], state)
                length += whole
                recent = torch.cat([recent, part[:whole]])[-6 * chunk :]
                if length >= 8 * chunk:
                    fresh = model.init_state(1)
                    for some in recent.split(2 * chunk):
                        _step(model, some, fresh)
                    state = state.with_norms(fresh)
            if at_end:
                results.append(_step(model, part[whole:], state))
                states.append(state)
                break
    return torch.cat(results), MegalodonState.cat([model.init_state(0), *states])


def _step(model: Megalodon, tokens: Tensor, state: MegalodonState) -> Tensor:
    """Read tokens (1-D) of one row, in place; the logits (1, V) after the last."""
    row = tokens.unsqueeze(0).to(state.device)
    logits: Tensor = model(row, state, inplace_state=True, outputs="last")
    return logits


class _Reader:
    """The tokens of one prompt, as many at a time as are asked for."""

    def __init__(self, row: int, prompt: Prompt, model: Megalodon) -> None:
        self._row, self._vocab_size = row, model.config.vocab_size
        if isinstance(prompt, Iterator):
            self._pieces, self._buffer = prompt, torch.empty(0, dtype=torch.int64)
        else:
            self._pieces, self._buffer = iter(()), self._tokens(prompt)

    def _fill(self, count: int) -> None:
        parts, have = [self._buffer], len(self._buffer)
        while have < count:
            piece = next(self._pieces, None)
            if piece is None:
                break
            parts.append(self._tokens(piece))
            have += len(parts[-1])
        if len(parts) > 1:
            self._buffer = torch.cat(parts)

    def more(self) -> bool:
        """Whether there is another token."""
        self._fill(1)
        return len(self._buffer) > 0

    def take(self, count: int) -> Tensor:
        """The next tokens, at most `count`."""
        self._fill(count)
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _tokens(self, piece: Piece) -> Tensor:
        where = f"prompts: prompt {self._row}"
        if isinstance(piece, bytes):
            if self._vocab_size > 256:
                raise ValueError(
                    f"{where} is bytes, but this model has {self._vocab_size} tokens, which are "
                    "not single bytes: wanted token ids"
                )
            piece = torch.frombuffer(bytearray(piece), dtype=torch.uint8) if piece else []
        elif isinstance(piece, str):
            raise TypeError(f"{where}: wanted token ids or bytes; got a str (encode it)")
        elif not isinstance(piece, Tensor):
            if not isinstance(piece, Sequence):
                raise TypeError(f"{where}: wanted token ids or bytes; got {type(piece).__name__}")
            for token in piece:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise TypeError(f"{where}: wanted token ids; got {token!r}")
        tokens = torch.as_tensor(piece, dtype=None if isinstance(piece, Tensor) else torch.int64)
        if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(
                f"{where}: wanted a vector of token ids; got {tokens.dtype} {list(tokens.shape)}"
            )
        tokens = tokens.to("cpu", torch.int64)
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if len(outside):
            raise IndexError(
                f"{where}: wanted ids in [0, {self._vocab_size}); got {int(outside[0])}"
            )
        return tokens
