"""Which dtype a parameter keeps, and which dtype activations take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


class KeepsPrecision(nn.Module):
    """A module whose *own* parameters and buffers never become narrower than float32.

    `.bfloat16()`, `.half()` and `.to(dtype)` convert its children as usual and leave its own
    floating point tensors in float32; `.double()` and `.float()` convert everything. Moving devices
    works as ever. The kernels take float32 parameters beside narrow activations: near a pole of
    1 - 1e-4, bfloat16's spacing of the raw parameters changes a memory's length by percents.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        if recurse:
            for module in self.children():
                module._apply(fn)

        def widened(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype in _NARROW and tensor.is_floating_point():
                # From the original: `out` is already rounded.
                return tensor.to(device=out.device, dtype=torch.float32)
            return out

        super()._apply(widened, recurse=False)  # type: ignore[no-untyped-call]
        return self


def wide_zeros(*shape: int) -> Tensor:
    """Zeros for such a module's own parameter: of the default dtype, where that is not narrow."""
    return torch.zeros(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))


def activation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what a linear layer makes of x: autocast's where that is on, else x's own.

    float64 is exempt, as it is from torch's own autocast.
    """
    kind = x.device.type
    if (
        x.dtype != torch.float64
        and kind in ("cpu", "cuda")  # others have no kernels, and "meta" has no autocast to ask for
        and torch.is_autocast_enabled(kind)
    ):
        return torch.get_autocast_dtype(kind)
    return x.dtype
