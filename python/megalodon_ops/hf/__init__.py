"""The model for Hugging Face transformers: configuration, model, cache, and a byte tokenizer.

Importing this registers them with `AutoConfig` and `AutoModelForCausalLM` under the model type
"megalodon_ops". It needs transformers: `pip install 'megalodon-ops[hf]'`.
"""

from __future__ import annotations

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise ImportError(
        f"megalodon_ops.hf needs transformers of version 5.24 or newer ({error}); "
        "pip install 'megalodon-ops[hf]'"
    ) from error

from .configuration import MODEL_TYPE, MegalodonHfConfig
from .modeling import MegalodonCache, MegalodonCausalLMOutput, MegalodonForCausalLM
from .tokenization import byte_tokenizer, export

__all__ = [
    "MegalodonCache",
    "MegalodonCausalLMOutput",
    "MegalodonForCausalLM",
    "MegalodonHfConfig",
    "byte_tokenizer",
    "export",
]

AutoConfig.register(MODEL_TYPE, MegalodonHfConfig, exist_ok=True)
AutoModelForCausalLM.register(MegalodonHfConfig, MegalodonForCausalLM, exist_ok=True)
