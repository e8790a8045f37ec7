"""`Megalodon` as a transformers model, with its state as the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .._prefill import require_tokens
from ..model import Megalodon
from ..state import MegalodonState
from .configuration import MegalodonHfConfig

PREFILL = 2048  # tokens in one call where only the last logits are wanted
# Each row's position is a part of its state; attention weights are never made.
_UNSUPPORTED = ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states")


class MegalodonCache:
    """A `MegalodonState` that transformers carries from one call to the next, of constant size.

    As all caches of transformers it is changed in place: copy `cache.state.clone()` to keep one.
    The model advances it by the tokens it is given, so pass new tokens only.

    Attributes:
        state: the state; None before the first token.
        seen: columns of tokens consumed, padding included.
    """

    # What transformers asks of a cache: nothing is sliced off the tokens, nothing can be undone.
    is_linear = (True,)
    is_compileable = False
    is_croppable = False

    def __init__(self, state: MegalodonState | None = None, seen: int = 0) -> None:
        self.state = state
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of tokens consumed, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices."""
        if self.state is not None:
            self.state = self.state.index_select(indices.to(self.state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.device)
            self.state = self.state.index_select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Back to before the first token."""
        self.state, self.seen = None, 0


@dataclass
class MegalodonCausalLMOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: (), the mean cross-entropy of the next tokens; where labels were given.
        logits: (B, L, V), or the columns that `logits_to_keep` asked for; float32.
        cache: the state after these tokens; where `use_cache` is on.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: MegalodonCache | None = None


class MegalodonForCausalLM(PreTrainedModel, GenerationMixin):
    """`Megalodon` as a transformers model; `model` is the one inside.

    Context has no limit and generation constant memory. Padding (`attention_mask` 0) is skipped:
    a padded batch gives every row what it gives alone, on whichever side the padding is.
    """

    config_class = MegalodonHfConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys = {"model.output.output.weight": "model.embed.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    # As `Megalodon.to` has it: never narrower than float32.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "cema",
        "rmsnorm",
        "nffn.norm",
        "mega.gamma",
        "mega.beta",
        "norm.weight",
        "norm.bias",
        "norm.prior_mean",
        "norm.prior_logv",
        "rope",
    ]

    def __init__(self, config: MegalodonHfConfig) -> None:
        super().__init__(config)
        self.model = Megalodon(config.core())
        self.post_init()

    @classmethod
    def wrap(cls, model: Megalodon, **kwargs: Any) -> MegalodonForCausalLM:
        """A transformers model around an existing one, whose weights it shares."""
        config = MegalodonHfConfig.from_core(model.config, dtype=model.embed.weight.dtype, **kwargs)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            wrapped = cls(config)
        wrapped.model = model
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, but strict.

        Raises:
            ValueError: a weight is missing, unexpected or of another shape, `rope.freqs` or
                `prior_count` contradict the configuration, or that cannot be read.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        where = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # also RecursionError, of a JSON file that is nested too deep
            raise ValueError(f"{where}: {error}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                names = ", ".join(sorted(map(str, info[kind])))
                raise ValueError(f"{where}: {kind.replace('_', ' ')}: {names}")
        buffers = dict(model.model.named_buffers())
        try:
            model.model.load_state_dict(buffers, strict=False)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            raise ValueError(f"{where}: {'; '.join(lines)}") from error
        return (model, info) if wants_info else model

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: every module has initialised itself, and loading is strict."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the embedding."""
        self.model.set_submodule("embed", value)
        self.model.tie_weights()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The output projection."""
        return self.model.output.output

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        """Replace the output projection."""
        self.model.set_submodule("output.output", new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: the vocabulary is a part of the configuration."""
        raise NotImplementedError(
            "resize_token_embeddings: the vocabulary's size is fixed by the configuration"
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers' own; after the prompt no token is padding, and no mask is looked at.

        Raises:
            ValueError: the model has outputs that are no tokens.
        """
        require_tokens(self.model.config)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if kwargs.get("use_cache") and not is_first_iteration:
            inputs["attention_mask"] = None
        return inputs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: MegalodonCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MegalodonCausalLMOutput | tuple[Any, ...]:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, L), only tokens that the cache has not seen.
            attention_mask: (B, L) or (B, seen + L); 0 marks padding, anywhere. A padded token is
                skipped: the state stands still, and the logits there are those before it (0 where
                there are none).
            cache: what an earlier call returned; changed in place.
            labels: (B, L), targets; shifted inside, -100 is left out.
            use_cache: return a cache. None: as the configuration says, off in training.
            logits_to_keep: how many of the last columns, or which columns; 0: all.
            return_dict: an output object (None: as the configuration says) or a tuple.

        Raises:
            TypeError: the cache is not a `MegalodonCache`.
            ValueError: the shapes do not fit, or an argument is not supported (`inputs_embeds`,
                `position_ids`, `output_attentions`, `output_hidden_states`).
        """
        for name in _UNSUPPORTED:
            given = kwargs.pop(name, None)
            if given is not None and given is not False:
                raise ValueError(f"{name}: not supported by {type(self).__name__}")
        cache = kwargs.pop("past_key_values", cache)  # transformers' older name
        if kwargs and labels is None:  # with labels they are the loss function's
            raise TypeError(f"unexpected arguments: {', '.join(sorted(kwargs))}")
        if cache is not None and not isinstance(cache, MegalodonCache):
            raise TypeError(f"cache: wanted a MegalodonCache; got {type(cache).__name__}")
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if use_cache and cache is None:
            cache = MegalodonCache()

        indices = logits_to_keep if isinstance(logits_to_keep, Tensor) else None
        keep = input_ids.shape[1]
        if not isinstance(logits_to_keep, Tensor) and logits_to_keep and labels is None:
            keep = min(keep, logits_to_keep)
        state = None if cache is None else cache.state
        mask = _padding(attention_mask, input_ids)
        if mask is None:
            logits, state = self._run(input_ids, state, keep, cache is not None)
        else:
            logits, state = self._run_padded(input_ids, mask, state, keep, cache is not None)
        if cache is not None:
            cache.state, cache.seen = state, cache.seen + input_ids.shape[1]

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        if indices is not None:
            logits = logits[:, indices]
        output = MegalodonCausalLMOutput(loss, logits, cache if use_cache else None)
        if return_dict is None:
            return_dict = bool(self.config.return_dict)
        return output if return_dict else output.to_tuple()

    def _run(
        self, tokens: Tensor, state: MegalodonState | None, keep: int, want_state: bool
    ) -> tuple[Tensor, MegalodonState | None]:
        """Logits of the last `keep` columns, and the state after them if wanted."""
        length = tokens.shape[1]
        early = max(0, length - max(keep, PREFILL))
        if torch.is_grad_enabled() or (state is None and not want_state and not early):
            out = self.model(tokens, state, return_state=want_state)
            logits, after = out if want_state else (out, None)
            return logits[:, length - keep :], after
        # A long prompt's logits need more memory than all else; they are made and dropped by parts.
        if state is None:
            state = self.model.init_state(tokens.shape[0])
        for piece in tokens[:, :early].split(PREFILL, dim=1):
            self.model(piece, state, inplace_state=True, outputs="last")
        logits = self.model(tokens[:, early:], state, inplace_state=True)
        return logits[:, logits.shape[1] - keep :], state

    def _run_padded(
        self,
        tokens: Tensor,
        mask: Tensor,
        state: MegalodonState | None,
        keep: int,
        want_state: bool,
    ) -> tuple[Tensor, MegalodonState | None]:
        """The same without the padding, which is moved behind each row's tokens."""
        lengths = mask.sum(1)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        moved = tokens.gather(1, order)[:, : int(lengths.max())]
        outputs = "last" if keep == 1 else "logits"
        out = self.model(moved, state, return_state=want_state, lengths=lengths, outputs=outputs)
        logits, after = out if want_state else (out, None)
        if keep == 1:
            return logits.masked_fill((lengths == 0)[:, None], 0.0)[:, None], after
        # For each kept column the number of tokens up to it, so the index of the last of them.
        last = mask.cumsum(1)[:, mask.shape[1] - keep :] - 1
        if not moved.shape[1]:
            return logits.new_zeros(*last.shape, logits.shape[2]), after
        rows = torch.arange(len(lengths), device=mask.device)[:, None]
        picked = logits[rows, last.clamp(min=0)]
        return picked.masked_fill((last < 0)[..., None], 0.0), after


def _padding(attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The mask of these tokens, (B, L) bool, True at a token; None where there is no padding."""
    if attention_mask is None:
        return None
    rows, length = tokens.shape
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != rows
        or attention_mask.shape[1] < length
    ):
        raise ValueError(
            f"attention_mask: wanted [{rows}, {length}] or more columns (those before); "
            f"got {list(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].to(tokens.device) != 0
    return None if bool(mask.all()) else mask
