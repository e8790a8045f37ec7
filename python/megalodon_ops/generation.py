"""`generate`: continue prompts of any lengths, at constant memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ._prefill import DEFAULT_PIECE, Prompt
from .model import Megalodon
from .sampling import Sampling, seeds_of
from .session import Event, Session, TokenBytes
from .stopping import Stop


@dataclass
class Generated:
    """One prompt's continuation: tokens, without a stop sequence; the others as in `Event`."""

    tokens: list[int] = field(default_factory=list)
    finish: str = "length"
    stop: Stop | None = None
    rest: bytes = b""


def generate(
    model: Megalodon,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[Stop] = (),
    token_bytes: TokenBytes | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    piece: int = DEFAULT_PIECE,
    recent_norms: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> list[Generated]:
    """Continue prompts of any lengths.

    Args:
        model: in eval mode, if it has any dropout.
        prompts: one per row, as for `prefill`.
        max_new_tokens: the most tokens for each, 0 or more.
        sampling: `Sampling(temperature=0)` is greedy; None is `Sampling()`.
        stop, token_bytes, piece, recent_norms: as for `Session`.
        seed: of row i: seed + i, or the i-th of a sequence. A row's text depends on its prompt and
            its seed, not on the rows beside it.
        batch_size: rows decoded at a time, the next one joining when one is done; None: all.
        on_event: told every `Event` as it happens, with row = the prompt's index (streaming).

    Returns:
        one `Generated` per prompt, in order.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; the message names it.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens: wanted an int; got {max_new_tokens!r}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: wanted 0 or more; got {max_new_tokens}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: wanted None or 1 or more; got {batch_size}")
    session = Session(
        model,
        sampling,
        stop=stop,
        token_bytes=token_bytes,
        piece=piece,
        recent_norms=recent_norms,
    )
    seeds = seeds_of(seed, len(prompts))
    results = [Generated() for _ in prompts]
    if max_new_tokens == 0:
        return results
    begun = 0
    while begun < len(prompts) or session.rows:
        free = (batch_size or len(prompts)) - len(session.rows)
        if free and begun < len(prompts):
            end = begun + free
            session.add(prompts[begun:end], seeds[begun:end], max_new_tokens)
            begun = min(end, len(prompts))
        for event in session.step():
            result = results[event.row]
            result.tokens += event.tokens
            if event.finish is not None:
                result.finish = event.finish
                result.stop, result.rest = event.stop, event.rest
            if on_event is not None:
                on_event(event)
    return results
