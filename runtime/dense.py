"""Dense attention where it computes the same as a kernel and takes less time.

A kernel reads only what is visible, so against `scaled_dot_product_attention` it can lose only where everything is: in
the rows of a layer that see every block up to their own. There, what decides is how fast the two are a block.
"""

import logging
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from surgeon.runtime.package import PackageFiles
from surgeon.runtime.schedules import read_schedules

_RATE = {"x86_64_v4": 1.5, "x86_64_v3": 1.3, "portable": 0.5}
"""A variant's time a dense block under torch's own, measured on processors with AVX2 and AVX-512: see benchmarks."""

_LOG = logging.getLogger("surgeon")


@dataclass(frozen=True)
class DenseRows:
    """How many tokens from the start each layer sees densely, and whether torch is faster there, on one variant."""

    tokens: dict[int, int]
    variant: str

    @property
    def torch_is_faster(self) -> bool:
        """Whether dense rows are better left to torch; for an unknown variant they are not."""
        return _RATE.get(self.variant, 1.0) < 1.0

    def explain(self, layer: int, length: int) -> str:
        """What runs a prefill of `length` tokens, and why."""
        rate, dense = _RATE.get(self.variant, 1.0), length <= self.tokens[layer]
        sees = "sees every block" if dense else f"sees every block only up to token {self.tokens[layer]}"
        speed = f"{self.variant} takes {1 / rate:.1f} of torch's time a dense block"
        return f"{'sdpa' if dense and self.torch_is_faster else 'kernel'}: layer {layer} {sees}; {speed}"


def dense_rows(files: PackageFiles, variant: str) -> DenseRows:
    """Counts the dense rows of a package's schedules.

    Raises:
        PackageError: the schedules are damaged.
    """
    blocks = {layer: min(head.dense_rows for head in heads) for layer, heads in read_schedules(files).items()}
    size = files.manifest.block_size
    # What lies beyond is refused, which the kernel does.
    most = files.manifest.num_blocks if files.manifest.beyond == "error" else max(blocks.values(), default=0)
    return DenseRows({layer: min(count, most) * size for layer, count in blocks.items()}, variant)


def visible_end(
    q: torch.Tensor, k: torch.Tensor, position: torch.Tensor | None, first_key: torch.Tensor | None
) -> int | None:
    """Where the visible keys end, if all sequences are unpadded and stand at one position; else None."""
    if first_key is not None and bool(first_key.any()):
        return None
    if position is None:
        return k.shape[2]
    start = position.tolist()
    return start[0] + q.shape[2] if start and start.count(start[0]) == len(start) else None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: int, scale: float) -> torch.Tensor:
    """Causal attention of the last queries over the first `end` keys; shapes as `Package.attention`."""
    queries = q.shape[2]
    mask = None
    if 1 < queries < end:
        mask = torch.ones(queries, end, dtype=torch.bool).tril(end - queries)
    _LOG.debug("attention of %d queries over %d keys by scaled_dot_product_attention", queries, end)
    k, v, causal = k[:, :, :end], v[:, :, :end], queries == end
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()
