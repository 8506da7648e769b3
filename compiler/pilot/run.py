"""Runs a pilot: measures and judges a package on its model, against the dense model and equal windows."""

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.compiler.forecast.learning import seconds_of_prompt
from surgeon.compiler.forecast.pilot import pilot_forecast
from surgeon.compiler.learn.measure.before_weights import read_outline
from surgeon.compiler.learn.measure.checkpoint import read_checkpoint
from surgeon.compiler.learn.measure.checkpoint_files import DeviceMap
from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore
from surgeon.compiler.learn.texts.text import read_text, spread
from surgeon.compiler.package.contents import packaged_topology
from surgeon.compiler.pilot.baseline import density_at, window_baseline
from surgeon.compiler.pipeline import compile_package
from surgeon.compiler.system.stages import Forecast, expect
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.pilot.pilot_file import Pilot, PilotMachine, PilotText, judged
from surgeon.runtime.evaluate.pilot.run import Candidate, run_pilot, twin
from surgeon.runtime.evaluate.processes import Processes, processes_of
from surgeon.runtime.evaluate.steps import named
from surgeon.runtime.evaluate.tasks.every import TASKS
from surgeon.runtime.evaluate.tasks.prompts import fitting_lengths, make_prompts
from surgeon.runtime.installation import version
from surgeon.runtime.loading import Package, load
from surgeon.runtime.package.reader import read_package
from surgeon.runtime.transformers.compatibility import check_config
from surgeon.runtime.transformers.fingerprint import fingerprint
from surgeon.runtime.transformers.patching import patch
from surgeon.runtime.transformers.recall import recall_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST = 4  # tokens: two of a prompt and two that follow it


@dataclass(frozen=True)
class PilotRequest:
    """A package, its model and texts, and the settings of the measurement.

    `length` None means the topology's own, `device_map` None the device that the package is for. `sequences` are taken
    from each text. `tasks` counts the rounds of retrieval tasks, at `length` and, if they fit, at half of it; `asked`
    names them. `rounds` counts timing rounds. The judged model reads with `recall`, as in `patch`. Under "dense",
    `pattern` shows a model beside it that reads by the pattern; `window` adds one with equal windows. A threshold is
    None if there is none.
    """

    model: str
    texts: tuple[Path, ...]
    package: Path
    device_map: DeviceMap | None = None
    length: int | None = None
    sequences: int = 4
    tasks: int = 2
    asked: tuple[str, ...] = TASKS
    rounds: int = 5
    window: bool = True
    pattern: bool = True
    recall: str | None = None
    dense_rows: int = 128
    min_retrieval: float | None = 0.9
    max_ppl_ratio: float | None = 1.02
    max_divergence: float | None = None
    min_speedup: float | None = None


def run(request: PilotRequest, scratch: Path, progress: Progress | None = None, work: Path | None = None) -> Pilot:
    """Measures and judges the patched model against the dense one and equal windows.

    `scratch` is an empty folder for the package of equal windows; all processes read that of the main process. What is
    read and answered is kept in the folder `work`, so that an interrupted pilot goes on; without it, nothing is kept.

    Raises:
        PackageError: the package cannot be read.
        ModelError: the model or a text cannot be used.
        PatchError: the package does not fit the model.
    """
    started = time.perf_counter()
    topology = packaged_topology(read_package(request.package))
    package = load(request.package)
    recall = recall_of(request.recall, package.manifest)
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
    lengths = fitting_lengths(tokenizer, length, request.asked)
    prompts = make_prompts(tokenizer, sequences, lengths, request.tasks, tasks=request.asked)
    density = density_at(topology, length)
    dense, _ = read_checkpoint(request.model, _DTYPES[dtype], request.device_map, tokenizer)
    if request.device_map is None:
        dense.eval().to(device)
    beside_pattern = request.pattern and recall == "dense"
    others = 1 + beside_pattern + request.window
    sizes = (len(sequences), sequences[0], len(prompts), request.rounds, others)
    expect(progress, partial(_forecast, dense, *sizes))
    candidates = [
        Candidate("dense", dense, None, 1.0),
        _patched("patched", dense, package, density, recall, request.dense_rows),
    ]
    if beside_pattern:
        candidates.append(_patched("pattern", dense, package, density, "pattern", request.dense_rows))
    if request.window:
        baseline = window_baseline(topology, length)
        compiled = _compiled(baseline, processes_of(dense), package, dtype, scratch, progress)
        found = density_at(baseline, length)
        candidates.append(_patched("window", dense, compiled, found, recall, request.dense_rows))
    weights = fingerprint(dense)
    once = named(partial(_kept_once, CheckpointStore(work)), weights=weights, **_surroundings(dense, tokenizer, device))
    measured = run_pilot(candidates, sequences, tokenizer, prompts, request.rounds, progress, once)
    (beside,) = (each.against_dense for each in measured.columns if each.name == "patched" and each.against_dense)
    return Pilot(
        model=Path(request.model).absolute().name,  # the last part of a name on a hub
        weights_sha256=weights,
        package_id=package.id,
        length=length,
        texts=tuple(PilotText(text.name, text.sha256, len(taken)) for text, taken in zip(texts, by_text, strict=True)),
        machine=_machine(device, dtype),
        questions=measured.retrieval.questions,
        dropped_tasks=measured.retrieval.dropped,
        columns=measured.columns,
        thresholds=judged(
            beside,
            {
                "worst_retrieval": request.min_retrieval,
                "continuation_ratio": request.max_ppl_ratio,
                "continuation_divergence": request.max_divergence,
                "first_token_speedup": request.min_speedup,
            },
        ),
        seconds=round(time.perf_counter() - started, 1),
        surgeon=version(),
    )


def _kept_once(
    store: CheckpointStore, step: Mapping[str, object], measure: Callable[[], Sequence[float]]
) -> Sequence[float]:
    def compute() -> dict[str, torch.Tensor]:
        return {"numbers": torch.tensor(list(measure()), dtype=torch.float64, device="cpu")}

    numbers: list[float] = store.once(step, compute)["numbers"].tolist()
    return numbers


def _surroundings(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, object]:
    """Everything but its weights and the text that the dense model's figures depend on."""
    generation = dense.generation_config
    described = (
        dense.config.to_json_string(use_diff=False),
        None if generation is None else generation.to_json_string(use_diff=False),
        sorted(tokenizer.get_vocab().items()),
    )
    return {
        "model": hashlib.sha256(repr(described).encode()).hexdigest(),
        "dtype": str(dense.dtype),
        "device": str(device),
        "surgeon": version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def _forecast(
    dense: PreTrainedModel, sequences: int, first: torch.Tensor, prompts: int, rounds: int, others: int
) -> Forecast:
    prompt = seconds_of_prompt(dense, first)
    return pilot_forecast(
        dense.config,
        dense.num_parameters(),
        prompt,
        (prompt,) * others,
        sequences,
        prompts,
        rounds,
        dense.dtype.itemsize,
    )


def _patched(
    name: str, dense: PreTrainedModel, package: Package, density: float, recall: str, dense_rows: int
) -> Candidate:
    model = twin(dense)
    patch(model, package, recall=recall, dense_rows=dense_rows)
    return Candidate(name, model, package, density, recall, dense_rows if recall == "dense" else 0)


def _compiled(
    baseline: Topology, processes: Processes, package: Package, dtype: str, scratch: Path, progress: Progress | None
) -> Package:
    """The package of equal windows, for one target of the package, made by the main process."""
    targets = package.manifest.targets
    chosen = ("cpu",) if "cpu" in targets else targets
    made = partial(compile_package, baseline, scratch / "window", targets=chosen, dtypes=(dtype,), progress=progress)
    return load(processes.first(made))


def _check_length(most: int | None, length: int) -> None:
    if length < _LEAST or (most is not None and length > most):
        raise ModelError(
            "--length", f"{_LEAST} to {most} tokens, the model's context", str(length), "choose another --length"
        )


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
