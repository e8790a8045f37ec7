"""`generate`: continue prompts of any lengths, at constant memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ._prefill import DEFAULT_PIECE, Prompt, number_of, require_count
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
    require_count("max_new_tokens", max_new_tokens, lowest=0)
    require_count("batch_size", batch_size, optional=True)
    count = number_of(prompts)
    session = Session(
        model,
        sampling,
        stop=stop,
        token_bytes=token_bytes,
        piece=piece,
        recent_norms=recent_norms,
    )
    seeds = seeds_of(seed, count)
    results = [Generated() for _ in prompts]
    if max_new_tokens == 0:
        return results
    begun = 0
    while begun < count or session.rows:
        free = (batch_size or count) - len(session.rows)
        if free and begun < count:
            end = begun + free
            session.add(prompts[begun:end], seeds[begun:end], max_new_tokens)
            begun = min(end, count)
        for event in session.step():
            result = results[event.row]
            result.tokens += event.tokens
            if event.finish is not None:
                result.finish = event.finish
                result.stop, result.rest = event.stop, event.rest
            if on_event is not None:
                on_event(event)
    return results
