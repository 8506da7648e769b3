"""Runs a pilot: measures and judges a package on its model, against the dense model and equal windows."""

import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from surgeon.compiler.forecast.learning import seconds_of_prompt
from surgeon.compiler.forecast.pilot import pilot_forecast
from surgeon.compiler.learn.measure.before_weights import read_outline
from surgeon.compiler.learn.measure.checkpoint import read_checkpoint
from surgeon.compiler.learn.measure.checkpoint_files import DeviceMap
from surgeon.compiler.learn.measure.text import read_text, spread
from surgeon.compiler.package.contents import packaged_topology
from surgeon.compiler.pilot.baseline import density_at, window_baseline
from surgeon.compiler.pipeline import compile_package
from surgeon.compiler.system.stages import Forecast, expect
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.passkeys import passkeys
from surgeon.runtime.evaluate.pilot import Candidate, run_pilot, twin
from surgeon.runtime.evaluate.pilot_file import Pilot, PilotMachine, PilotText, judged
from surgeon.runtime.evaluate.processes import processes_of
from surgeon.runtime.installation import version
from surgeon.runtime.loading import Package, load
from surgeon.runtime.package.reader import read_package
from surgeon.runtime.transformers.compatibility import check_config
from surgeon.runtime.transformers.fingerprint import fingerprint
from surgeon.runtime.transformers.patching import patch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PilotRequest:
    """A package, its model and texts, and the settings of the measurement.

    `length` None means the topology's own, `device_map` None the device that the package is for. `sequences` are taken
    from each text; `passkeys` numbers are hidden for each of five depths and two lengths; `rounds` counts timing
    rounds; `window` adds the model with equal windows. A threshold is None if there is none.
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


def run(request: PilotRequest, scratch: Path, progress: Progress | None = None) -> Pilot:
    """Measures and judges the patched model against the dense one and equal windows.

    `scratch` is an empty folder for the package of equal windows; all processes read that of the main process.

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
    outline = read_outline(request.model, request.device_map)
    tokenizer = outline.tokenizer
    check_config(outline.model.config, package.manifest.model)
    _check_length(outline.context, length)
    texts = [read_text(path, tokenizer) for path in request.texts]
    by_text = [spread(text, length, request.sequences) for text in texts]
    sequences = [sequence for taken in by_text for sequence in taken]
    tasks = passkeys(tokenizer, sequences, (length // 2, length), request.passkeys) if request.passkeys else ()
    dense, _ = read_checkpoint(request.model, _DTYPES[dtype], request.device_map, tokenizer)
    if request.device_map is None:
        dense.eval().to(device)
    patched = twin(dense)
    patch(patched, package, recall="pattern")
    expect(progress, partial(_forecast, dense, sequences, len(tasks), request))
    candidates = [
        Candidate("dense", dense, None, 1.0),
        Candidate("patched", patched, package, density_at(topology, length)),
    ]
    if request.window:
        candidates.append(_window_candidate(dense, topology, length, package, dtype, scratch, progress))
    weights = fingerprint(dense)
    columns = run_pilot(candidates, sequences, tasks, request.rounds, progress)
    (beside,) = (column.against_dense for column in columns if column.name == "patched" and column.against_dense)
    return Pilot(
        model=Path(request.model).absolute().name,  # the last part of a name on a hub
        weights_sha256=weights,
        package_id=package.id,
        length=length,
        texts=tuple(PilotText(text.name, text.sha256, len(taken)) for text, taken in zip(texts, by_text, strict=True)),
        machine=_machine(device, dtype),
        columns=columns,
        thresholds=judged(
            beside, {"perplexity_ratio": request.max_ppl_ratio, "first_token_speedup": request.min_speedup}
        ),
        seconds=round(time.perf_counter() - started, 1),
        surgeon=version(),
    )


def _forecast(dense: PreTrainedModel, sequences: list[torch.Tensor], passkeys: int, request: PilotRequest) -> Forecast:
    prompt = seconds_of_prompt(dense, sequences[0])
    return pilot_forecast(
        dense.config,
        dense.num_parameters(),
        lambda _name: prompt,
        ("patched", "window") if request.window else ("patched",),
        len(sequences),
        passkeys,
        request.rounds,
        dense.dtype.itemsize,
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
    patch(model, compiled, recall="pattern")
    return Candidate("window", model, compiled, density_at(baseline, length))


def _check_length(most: int | None, length: int) -> None:
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
