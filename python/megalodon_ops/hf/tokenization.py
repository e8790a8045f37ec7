"""A tokenizer of bytes for transformers, and whole folders for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .._atomic import new_folder
from ..model import Megalodon
from ..tokenizer import BYTES, Tokenizer, byte_letters
from .modeling import MegalodonForCausalLM


def export(model: Megalodon, folder: str | os.PathLike[str], tokenizer: Tokenizer = BYTES) -> None:
    """Write a model and its tokenizer as a new folder that `AutoModelForCausalLM` reads.

    Raises:
        ValueError: the tokenizer is a SentencePiece model, which transformers wants converted.
        FileExistsError: the folder is there and not empty.
        OSError: it cannot be written; nothing is left behind.
    """
    if tokenizer.file_name not in ("", "tokenizer.json"):
        raise ValueError(
            f"tokenizer: wanted bytes or a tokenizer.json; got {tokenizer.file_name} "
            "(convert_slow_tokenizer of transformers makes one of it)"
        )
    with new_folder(Path(folder)) as temporary:
        MegalodonForCausalLM.wrap(model).save_pretrained(temporary)
        if tokenizer.file_name:
            from tokenizers import Tokenizer as Backend

            backend = Backend.from_buffer(tokenizer.data)
            PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(temporary)
        elif model.config.vocab_size == tokenizer.vocab_size:
            byte_tokenizer().save_pretrained(temporary)


def byte_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose 256 tokens are the bytes, token = byte value, for models on bytes.

    It pads on the left with byte 0. There is no beginning or end of a text; kwargs go to
    `PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {
        "padding_side": "left",
        "pad_token": letters[0],
        "clean_up_tokenization_spaces": False,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**options, **kwargs})
