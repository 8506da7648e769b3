"""A pilot: a package on its model, beside the dense model and equal windows, measured and judged."""

import dataclasses
import math
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.checkpoint import DeviceMap, read_checkpoint
from surgeon.compiler.learn.measure.text import TokenText, read_text
from surgeon.compiler.learn.patterns.trees import interval_tree
from surgeon.compiler.learn.patterns.windows import causal_pairs, uniform_windows
from surgeon.compiler.package.contents import packaged_topology
from surgeon.compiler.pipeline import compile_package
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import SparseHead, Topology
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.passkeys import passkeys
from surgeon.runtime.evaluate.pilot import Candidate, run_pilot, twin
from surgeon.runtime.evaluate.pilot_file import AgainstDense, Pilot, PilotMachine, PilotText, judged
from surgeon.runtime.evaluate.processes import processes_of
from surgeon.runtime.loading import Package, load
from surgeon.runtime.package.reader import read_package
from surgeon.runtime.transformers.fingerprint import fingerprint
from surgeon.runtime.transformers.patching import patch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PilotRequest:
    """A package, its model and texts, and how to measure them.

    `length` None means the topology's own, `device_map` None the device that the package is for. `sequences` are taken
    of each text; `passkeys` numbers are hidden for each of five depths and two lengths; `rounds` are of timing;
    `window` adds the model with equal windows. The thresholds are None where there is none.
    """

    model: str
    texts: tuple[Path, ...]
    package: Path
    device_map: DeviceMap | None = None
    length: int | None = None
    sequences: int = 4
    passkeys: int = 2
    rounds: int = 5
    window: bool = True
    max_ppl_ratio: float | None = None
    min_speedup: float | None = None


def window_baseline(topology: Topology, length: int) -> Topology:
    """Equal windows and a sink over the same layers, as dense as the topology is at so many tokens.

    The density is met from below, to less than one head's next block. Where it leaves no room for a sink, there is
    none.

    Raises:
        TopologyError: the length is beyond the topology's own, and the topology refuses that.
    """
    blocks = -(-length // topology.block_size)
    pairs = causal_pairs(blocks)
    # A sum of whole numbers of pairs: rounding must not cost the last of them.
    visible = round(density_at(topology, length) * pairs * len(topology.covered) * topology.model.num_attention_heads)
    density = visible / (pairs * len(topology.covered) * topology.model.num_attention_heads)
    sink = 1 if density * pairs >= 2 * blocks - 1 else 0
    windows = uniform_windows(len(topology.covered), topology.model.num_attention_heads, blocks, sink, density)
    rows = iter(windows.tolist())
    layers = tuple(
        tuple(SparseHead(0, 0.0, sink, window) for window in next(rows)) if heads else () for heads in topology.layers
    )
    provenance = {"method": "window", "density_of": topology.sha256}
    return dataclasses.replace(
        topology,
        num_blocks=blocks,
        dendrograms=(interval_tree(blocks),),
        layers=layers,
        beyond="window",
        provenance=provenance,
    )


def density_at(topology: Topology, length: int) -> float:
    """Visible pairs over causal pairs of blocks at so many tokens, over the covered layers' heads."""
    blocks = -(-length // topology.block_size)
    densities = [float(value) for layer in topology.covered for value in topology.density(layer, blocks)]
    return math.fsum(densities) / len(densities)


def spread(text: TokenText, length: int, count: int) -> list[torch.Tensor]:
    """At most `count` sequences `[1, length]` of a text, none overlapping, spread evenly over it.

    Raises:
        ModelError: the text is shorter than one sequence.
    """
    available = len(text.tokens) // length
    if not available:
        raise ModelError(
            text.name,
            f"at least {length} tokens, one sequence",
            f"{len(text.tokens)} tokens",
            "use a longer text, or a smaller --length",
        )
    taken = min(count, available)
    starts = [index * available // taken * length for index in range(taken)]
    return [text.tokens[start : start + length][None] for start in starts]


def run(request: PilotRequest, scratch: Path, progress: Progress | None = None) -> Pilot:
    """Measures and judges the patched model beside the dense one and equal windows.

    `scratch` is an empty folder for the package of equal windows; of several processes all read the first one's.

    Raises:
        PackageError: the package cannot be read.
        ModelError: the model or a text cannot be used.
        PatchError: the package does not fit the model.
    """
    started = time.perf_counter()
    topology = packaged_topology(read_package(request.package))
    package = load(request.package)
    device = torch.device("cpu" if "cpu" in package.manifest.targets else "cuda")
    dtype = next(name for name, kind in _DTYPES.items() if kind in package.dtypes_on(device))
    length: int = request.length or topology.num_blocks * topology.block_size
    dense, tokenizer = read_checkpoint(request.model, _DTYPES[dtype], request.device_map)
    if request.device_map is None:
        dense.eval().to(device)
    _check_length(dense, length)
    patched = twin(dense)
    patch(patched, package)
    texts = [read_text(path, tokenizer) for path in request.texts]
    by_text = [spread(text, length, request.sequences) for text in texts]
    sequences = [sequence for taken in by_text for sequence in taken]
    tasks = passkeys(tokenizer, sequences, (length // 2, length), request.passkeys) if request.passkeys else ()
    candidates = [
        Candidate("dense", dense, None, 1.0),
        Candidate("patched", patched, package, density_at(topology, length)),
    ]
    if request.window:
        candidates.append(_window_candidate(dense, topology, length, package, dtype, scratch, progress))
    weights = fingerprint(dense)
    columns = run_pilot(candidates, sequences, tasks, request.rounds, progress)
    beside: dict[str, AgainstDense] = {each.name: each.against_dense for each in columns if each.against_dense}
    return Pilot(
        model=Path(request.model).absolute().name,  # of a name on a hub, its end
        weights_sha256=weights,
        package_id=package.id,
        length=length,
        texts=tuple(PilotText(text.name, text.sha256, len(taken)) for text, taken in zip(texts, by_text, strict=True)),
        machine=_machine(device, dtype),
        columns=columns,
        thresholds=judged(beside, request.max_ppl_ratio, request.min_speedup),
        seconds=round(time.perf_counter() - started, 1),
    )


def _window_candidate(
    dense: PreTrainedModel,
    topology: Topology,
    length: int,
    package: Package,
    dtype: str,
    scratch: Path,
    progress: Progress | None,
) -> Candidate:
    baseline = window_baseline(topology, length)
    targets = package.manifest.targets
    chosen = ("cpu",) if "cpu" in targets else targets
    made = partial(compile_package, baseline, scratch / "window", targets=chosen, dtypes=(dtype,), progress=progress)
    model = twin(dense)
    compiled = load(processes_of(dense).first(made))
    patch(model, compiled)
    return Candidate("window", model, compiled, density_at(baseline, length))


def _check_length(model: PreTrainedModel, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length < 2 or (most is not None and length > most):
        raise ModelError("--length", f"2 to {most} tokens, the model's context", str(length), "choose another --length")


def _machine(device: torch.device, dtype: str) -> PilotMachine:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return PilotMachine(
        processor=names[0] if names else platform.processor(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=dtype,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        transformers=str(transformers.__version__),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
