"""The choice between a kernel and torch for a layer's dense rows on a CPU, made from measured rates and without torch.

A kernel reads only what is visible, and `scaled_dot_product_attention` computes the same only where that is everything:
in the rows of a layer that see every block up to their own. There, what decides is how fast the two are a block.
Elsewhere the kernel runs whatever it takes, which a slow one makes worse than dense attention near density 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from surgeon.runtime.kernels.cpu.rates import DECODE, Rates, rate_of, rates_of
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.schedule import HeadSchedule


@dataclass(frozen=True)
class DenseRows:
    """The reach of each layer's dense rows, and the calls in which torch is faster there, on one variant.

    `tokens` are those from the start that a layer sees densely; `rates` are the variant's own on this processor, whose
    level is `level`.
    """

    manifest: Manifest
    schedules: Mapping[int, Sequence[HeadSchedule]]
    tokens: Mapping[int, int]
    variant: str
    level: str
    rates: Rates

    @classmethod
    def of(
        cls, manifest: Manifest, schedules: Mapping[int, Sequence[HeadSchedule]], variant: str, level: str
    ) -> "DenseRows":
        """Makes the choice for a package's layers, on one of its variants and processors of one level."""
        blocks = {layer: min(head.dense_rows for head in heads) for layer, heads in schedules.items()}
        # What lies beyond is refused, which the kernel does.
        most = manifest.num_blocks if manifest.beyond == "error" else max(blocks.values(), default=0)
        tokens = {layer: min(count, most) * manifest.block_size for layer, count in blocks.items()}
        return cls(manifest, schedules, tokens, variant, level, rates_of(variant, level))

    @property
    def most_tokens(self) -> int:
        """The tokens that a call may see densely where the caller asks for it; what lies beyond is refused."""
        manifest = self.manifest
        return manifest.num_blocks * manifest.block_size if manifest.beyond == "error" else 2**62

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """The storage types of the package's CPU kernels."""
        return tuple(dict.fromkeys(kernel.dtype for kernel in self.manifest.kernels if kernel.target == "cpu"))

    def rate(self, dtype: str, queries: int, keys: int) -> float:
        """Torch's time over the kernel's in a call that sees every block."""
        return rate_of(self.rates, dtype, queries, keys, self._grouped)

    def torch_is_faster(self, dtype: str, queries: int, keys: int) -> bool:
        """True where a call that sees every block is better left to torch; false where nothing was measured."""
        return self.rate(dtype, queries, keys) < 1.0

    def torch_decodes_faster(self, dtype: str) -> bool:
        """True where a call of one query may be better left to torch: always where decoding was not measured."""
        return self.rates.get(dtype, {}).get(DECODE[self._grouped], 0.0) < 1.0

    @property
    def torch_dtypes(self) -> frozenset[str]:
        """The storage types in which torch is faster in some call that sees every block."""
        other = DECODE[not self._grouped]
        slower = {
            dtype: min((rate for call, rate in calls.items() if call != other), default=1.0) < 1.0
            for dtype, calls in self.rates.items()
        }
        return frozenset(dtype for dtype in self.dtypes if slower.get(dtype))

    @property
    def _grouped(self) -> bool:
        model = self.manifest.model
        return model.num_attention_heads > model.num_key_value_heads

    def density(self, layer: int, length: int) -> float:
        """The share of the causal pairs of blocks that a layer reads of so many tokens."""
        rows = -(-length // self.manifest.block_size)
        heads = self.schedules[layer]
        return sum(head.visible_blocks(rows) for head in heads) / (len(heads) * rows * (rows + 1) / 2)

    def times(self, length: int, density: float = 1.0) -> dict[str, float]:
        """A prefill's time beside dense attention's, by dtype, as the rates predict it."""
        return {dtype: density / self.rate(dtype, length, length) for dtype in self.dtypes}

    def reason(self, length: int, density: float = 1.0) -> str:
        """The predicted times of a prefill, which decide."""
        by_time: dict[str, list[str]] = {}
        for dtype, time in self.times(length, density).items():
            by_time.setdefault(f"{time:.2g}", []).append(dtype)
        times = ", ".join(f"{time} ({', '.join(dtypes)})" for time, dtypes in by_time.items())
        return f"{self.variant} takes {times} of dense attention's time, {self.level}"

    def runs(self, length: int) -> str:
        """Names what runs a prefill that sees every block, by dtype where they differ."""
        torch = [dtype for dtype in self.dtypes if self.torch_is_faster(dtype, length, length)]
        ours = [dtype for dtype in self.dtypes if dtype not in torch]
        if not (torch and ours):
            return "sdpa" if torch else "kernel"
        return f"sdpa ({', '.join(torch)}), kernel ({', '.join(ours)})"

    def explain(self, layer: int, length: int) -> str:
        """Names what runs a prefill of `length` tokens, and why."""
        if length <= self.tokens[layer]:
            return f"{self.runs(length)}: layer {layer} sees every block; {self.reason(length)}"
        density = self.density(layer, length)
        slower = any(time > 1.0 for time in self.times(length, density).values())
        return (
            f"kernel: layer {layer} sees every block only up to token {self.tokens[layer]}, {density:.0%} of them up "
            f"to {length}; {self.reason(length, density)}{', which gives another result' if slower else ''}"
        )
