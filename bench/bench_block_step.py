"""block_step against the block's modules, op by op."""

from typing import Any

import pytest
import torch
from harness import measure

from megalodon_ops import registry
from megalodon_ops._library import Maker
from megalodon_ops.config import MegalodonConfig
from megalodon_ops.functional import TimestepNormState
from megalodon_ops.nn import Block
from megalodon_ops.ops.block_step import sample_arguments
from megalodon_ops.state import LayerState

OP = registry["block_step"]
DEMO = {"D": 256, "N": 16, "H": 1, "S": 128, "E": 512, "C": 512, "F": 640, "G": 32}
LARGE = {"D": 1024, "N": 16, "H": 1, "S": 256, "E": 2048, "C": 2048, "F": 2048, "G": 32}


class _Modules:
    """A block of the same sizes; a hook that does nothing keeps it from calling block_step."""

    def __init__(self, D: int, N: int, H: int, S: int, E: int, C: int, F: int, G: int) -> None:
        config = MegalodonConfig(
            model_dim=D,
            cema_ndim=N,
            num_heads=H,
            z_dim=H * S,
            value_dim=H * E,
            chunk_size=C,
            ffn_hidden_dim=F,
            norm_num_groups=G,
            swiglu=True,
            rescale_nffn=True,
        )
        self.block = Block(config).eval()
        self.block.mega.register_forward_hook(lambda *_: None)

    def __call__(self, x: Any, k: Any, v: Any, *rest: Any) -> Any:
        count, mean, var, h, position = rest[:5]
        state = LayerState(k, v, TimestepNormState(count, mean, var), h)
        return self.block.to(x.device, x.dtype)(x[:, None], state, position, True, True)[0]


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [DEMO, LARGE], ids=["demo", "large"])
def test_block_step(benchmark: Any, sizes: dict[str, int], dtype: torch.dtype, rows: int) -> None:
    half = (sizes["C"] // 2,) * rows
    args = sample_arguments(Maker(dtype), **sizes, position=half)
    small = sample_arguments(Maker(dtype), 32, 4, 1, 16, 32, 64, 48, 4, (5,) * rows)
    measure(benchmark, OP, args, small, peers={"modules": _Modules(**sizes)})
