"""A day on a card: the shapes, lengths and limits of a real one, and those of a rehearsal on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from inputs import topologies as patterns
from inputs.topologies import Shape
from surgeon.compiler import Topology
from surgeon.compiler.specs.tiles import Tile

Row = dict[str, object]
Tell = Callable[[Row], None]
"""Takes each row of a stage as soon as it is found, so that a stage that is cut off keeps those before."""


@dataclass(frozen=True)
class Day:
    """The measurements to make on a device.

    `shapes` are those that tiles are tuned for, the first one also that of the speed and of the model. `lengths` are
    in tokens, the most important first. `candidates` is the number of tiles tried for each shape: the built-in one,
    then `prefill_tiles`. `limits` are the seconds of the stages, in their order. `tests` are the test functions to run,
    all of them if there are none. A `rehearsal`'s figures say nothing about a card.
    """

    target: str
    device: str
    dtype: str
    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    batches: tuple[int, ...]
    tuned_length: int
    candidates: int
    model_length: int
    model_layers: int
    vocabulary: int
    limits: tuple[int, ...]
    tests: tuple[str, ...] = ()
    prefill_tiles: tuple[Tile, ...] = ()
    rehearsal: bool = False

    @property
    def shape(self) -> Shape:
        """The shape of the speed and of the model."""
        return self.shapes[0]

    def topology(self, shape: Shape, length: int, density: float, layers: int = 1) -> Topology:
        """Windows of a density in so many equal layers."""
        one = patterns.windows(shape, length, density)
        model = replace(one.model, num_hidden_layers=layers)
        return replace(one, model=model, layers=one.layers * layers)

    def named(self, shape: Shape, length: int, density: float) -> str:
        """The name of a package for the speed."""
        return f"speed-{shape.head_dim}-{length}-{round(100 * density)}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


LLAMA_8B = Shape(heads=32, kv_heads=8, head_dim=128, block_size=128)
SMOLLM2 = Shape(heads=9, kv_heads=3, head_dim=64, block_size=64)
HOPPER = Day(
    target="cuda:90",
    device="cuda",
    dtype="bf16",
    shapes=(LLAMA_8B, SMOLLM2),
    lengths=(32768, 8192, 131072),
    densities=(0.25, 1.0, 0.5, 0.1),
    batches=(1, 16),
    tuned_length=32768,
    candidates=10,
    model_length=32768,
    model_layers=4,
    vocabulary=32000,
    limits=(40, 100, 90, 150, 60),
    prefill_tiles=(
        Tile(128, 64, 8, 3, "descriptors"),
        Tile(128, 128, 8, 2, "descriptors"),
        Tile(64, 64, 8, 3, "descriptors", heads=2),
        Tile(128, 64, 8, 3, "descriptors", persistent=True),
        Tile(128, 32, 8, 3, persistent=True),
        Tile(64, 64, 4, 3, "descriptors"),
        Tile(128, 64, 8, 2, "descriptors"),
        Tile(64, 64, 8, 3, "pointers", heads=2),
        Tile(128, 64, 8, 2, "pointers"),
    ),
)
REHEARSAL = Day(
    target="cpu",
    device="cpu",
    dtype="fp32",
    shapes=(Shape(heads=4, kv_heads=2, head_dim=32, block_size=32),),
    lengths=(256,),
    densities=(0.5, 1.0),
    batches=(1, 2),
    tuned_length=256,
    candidates=1,
    model_length=128,
    model_layers=2,
    vocabulary=128,
    limits=(120, 120, 120, 120, 120),
    tests=("test_prefill",),
    rehearsal=True,
)
DAYS = {"hopper": HOPPER, "rehearsal": REHEARSAL}
