"""What runs a layer's densely visible rows on a CPU, its kernel or torch: decided from constants, without torch.

A kernel reads only what is visible, so against `scaled_dot_product_attention` it can lose only where everything is: in
the rows of a layer that see every block up to their own. There, what decides is how fast the two are a block.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.schedule import PackagedSchedule

RATES = {"x86_64_v4": 1.5, "x86_64_v3": 1.3, "portable": 0.5}
"""A variant's speed a dense block over torch's own, measured on processors with AVX2 and AVX-512: see benchmarks."""


@dataclass(frozen=True)
class DenseRows:
    """How many tokens from the start each layer sees densely, and whether torch is faster there, on one variant."""

    tokens: Mapping[int, int]
    variant: str

    @property
    def torch_is_faster(self) -> bool:
        """Whether dense rows are better left to torch; for an unknown variant they are not."""
        return RATES.get(self.variant, 1.0) < 1.0

    @property
    def reason(self) -> str:
        """What decides where a layer sees every block: the variant's time beside torch's."""
        return f"{self.variant} takes {1 / RATES.get(self.variant, 1.0):.1f} of torch's time a dense block"

    def explain(self, layer: int, length: int) -> str:
        """What runs a prefill of `length` tokens, and why."""
        dense = length <= self.tokens[layer]
        sees = "sees every block" if dense else f"sees every block only up to token {self.tokens[layer]}"
        return f"{'sdpa' if dense and self.torch_is_faster else 'kernel'}: layer {layer} {sees}; {self.reason}"


def dense_tokens(manifest: Manifest, schedules: Mapping[int, PackagedSchedule]) -> dict[int, int]:
    """How many tokens from the start each layer sees densely, in every head."""
    blocks = {layer: min(head.dense_rows for head in schedule.heads) for layer, schedule in schedules.items()}
    # What lies beyond is refused, which the kernel does.
    most = manifest.num_blocks if manifest.beyond == "error" else max(blocks.values(), default=0)
    return {layer: min(count, most) * manifest.block_size for layer, count in blocks.items()}
