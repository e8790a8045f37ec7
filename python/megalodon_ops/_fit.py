"""Whether named weights are a model of some configuration, and what is wrong where they are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .config import NOT_IN_FINGERPRINT, MegalodonConfig

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Where a field of the configuration shows in the weights: parameter, axis, factor.
_SEEN_IN: dict[str, tuple[str, int, int]] = {
    "vocab_size": ("embed.weight", 0, 1),
    "output_size": ("output.output.weight", 0, 1),
    "model_dim": ("embed.weight", 1, 1),
    "z_dim": ("layers.0.mega.wz.weight", 0, 1),
    "value_dim": ("layers.0.mega.wv.weight", 0, 1),
    "ffn_hidden_dim": ("layers.0.nffn.fc1.weight", 0, 1),
    "cema_ndim": ("layers.0.mega.cema.alpha", 1, 1),
    "norm_num_groups": ("layers.0.mega.timenorm.prior_mean", 0, 1),
    "z_dim / num_heads": ("rope.freqs", 0, 2),
}

# Which switch of the configuration makes a parameter exist.
_SWITCHES = {
    "fc3.weight": "swiglu",
    "nffn.alpha": "rescale_nffn",
    "rmsnorm.weight": "norm_affine",
    "nffn.norm.weight": "norm_affine",
    "nffn.norm.bias": "norm_affine",
}

_LAYER = re.compile(r"layers\.(\d+)\.")


def check_layers(config: MegalodonConfig, tensors: Iterable[str], name: str) -> None:
    """Compare the number of layers before a model of the wrong one is made."""
    layers = {int(match[1]) for key in tensors if (match := _LAYER.match(key))}
    whole = layers == set(range(len(layers)))
    if not whole or len(layers) != config.num_layers:
        got = f"{len(layers)}" if whole else f"only {sorted(layers)}"
        raise ValueError(
            f"{name}: the weights do not fit the configuration: num_layers: the configuration "
            f"has {config.num_layers}; the weights have {got}"
        )


def differences(
    shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], config: MegalodonConfig
) -> list[str]:
    """Everything that is wrong with the names, shapes and dtypes of these tensors."""
    problems = []
    for field, (key, axis, factor) in _SEEN_IN.items():
        if key in tensors and tensors[key].dim() > axis:
            got, want = factor * tensors[key].shape[axis], factor * shapes[key][axis]
            if got != want:
                problems.append(f"{field}: the configuration has {want}; {key} has {got}")
    for key in [key for key in shapes if key not in tensors]:
        problems.append(f"{key}: missing{_hint(key, config)}")
    for key in [key for key in tensors if key not in shapes]:
        problems.append(f"{key}: unexpected{_hint(key, config)}")
    for key, tensor in tensors.items():
        if key not in shapes:
            continue
        if tensor.shape != shapes[key]:
            problems.append(f"{key}: wanted {list(shapes[key])}; got {list(tensor.shape)}")
        if key.endswith(".prior_count"):
            fits, kind = not (tensor.is_floating_point() or tensor.is_complex()), "an integer"
        else:
            fits, kind = tensor.dtype in FLOATS, "float32, float64, bfloat16 or float16"
        if not fits:
            problems.append(f"{key}: wanted {kind}; got {tensor.dtype}")
    return problems


def _hint(key: str, config: MegalodonConfig) -> str:
    for suffix, switch in _SWITCHES.items():
        if key.endswith(suffix):
            return f" (the configuration has {switch} = {getattr(config, switch)})"
    return ""


def require_same_config(given: MegalodonConfig, found: MegalodonConfig, name: str) -> None:
    """Raise ValueError where two configurations are of different models, naming the fields."""
    if given.fingerprint() == found.fingerprint():
        return
    theirs = found.to_dict()
    different = [
        f"{field}: wanted {value}; got {theirs[field]}"
        for field, value in given.to_dict().items()
        if value != theirs[field] and field not in NOT_IN_FINGERPRINT
    ]
    raise ValueError(f"{name}: config: another model than config=: {'; '.join(different)}")
