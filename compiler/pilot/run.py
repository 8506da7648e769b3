"""`surgeon pilot`: a package on its model, beside the dense model and equal windows, measured, judged and written."""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.checkpoint import read_checkpoint
from surgeon.compiler.learn.measure.text import read_text, spread
from surgeon.compiler.package.contents import packaged_topology
from surgeon.compiler.pilot.baseline import density_at, window_baseline
from surgeon.compiler.pilot.table import pilot_lines
from surgeon.compiler.pipeline import compile_package
from surgeon.compiler.system.atomic_files import write_file
from surgeon.compiler.system.main_process import is_first
from surgeon.compiler.system.terminal import Progress, progress_bar, quiet_unless_watched
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import ModelError, PilotError
from surgeon.runtime.evaluate.passkeys import passkeys
from surgeon.runtime.evaluate.pilot import Candidate, run_pilot, twin
from surgeon.runtime.evaluate.pilot_file import Column, Pilot, PilotMachine, PilotText, Threshold, judged
from surgeon.runtime.evaluate.processes import joined, processes_of
from surgeon.runtime.loading import Package, load
from surgeon.runtime.package.reader import read_package
from surgeon.runtime.transformers.fingerprint import fingerprint
from surgeon.runtime.transformers.patching import patch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(arguments: argparse.Namespace) -> tuple[Iterable[str], bool]:
    """Runs the pilot and writes its file; returns the lines to print and whether it passed.

    Raises:
        PackageError: the package cannot be read.
        ModelError: the model or a text cannot be used.
        PatchError: the package does not fit the model.
    """
    out: Path = arguments.out
    if not out.parent.is_dir():  # said now, not after minutes
        raise PilotError(str(out), "a file in a folder that exists", "none", "make the folder, or name another --out")
    quiet_unless_watched()
    # The baseline's package lies in the first process's folder, until all have long loaded it.
    with joined(), progress_bar() as progress, tempfile.TemporaryDirectory(prefix="surgeon-") as scratch:
        pilot = _pilot(arguments, Path(scratch), progress)
    if is_first():
        write_file(out, pilot.to_json())
    if arguments.json:
        return (" ".join(pilot.to_json().split("\n")),), pilot.passed
    encoding = (sys.stdout and sys.stdout.encoding) or "ascii"
    return (*pilot_lines(pilot, encoding), f"{out}: written in {pilot.seconds:.0f} s"), pilot.passed


def _pilot(arguments: argparse.Namespace, scratch: Path, progress: Progress | None) -> Pilot:
    started = time.perf_counter()
    topology = packaged_topology(read_package(arguments.package))
    package = load(arguments.package)
    device = torch.device("cpu" if "cpu" in package.manifest.targets else "cuda")
    dtype = next(name for name, kind in _DTYPES.items() if kind in package.dtypes_on(device))
    length: int = arguments.length or topology.num_blocks * topology.block_size
    dense, tokenizer = read_checkpoint(arguments.model, _DTYPES[dtype], arguments.device_map)
    if arguments.device_map is None:
        dense.eval().to(device)
    _check_length(dense, length)
    patched = twin(dense)
    patch(patched, package)
    texts = [read_text(path, tokenizer) for path in arguments.text]
    by_text = [spread(text, length, arguments.sequences) for text in texts]
    sequences = [sequence for taken in by_text for sequence in taken]
    tasks = passkeys(tokenizer, sequences, (length // 2, length), arguments.passkeys) if arguments.passkeys else ()
    candidates = [
        Candidate("dense", dense, None, 1.0),
        Candidate("patched", patched, package, density_at(topology, length)),
    ]
    if not arguments.no_window:
        candidates.append(_window_candidate(dense, topology, length, package, dtype, scratch, progress))
    weights = fingerprint(dense)
    columns = run_pilot(candidates, sequences, tasks, arguments.rounds, progress)
    return Pilot(
        model=Path(arguments.model).absolute().name,  # of a name on a hub, its end
        weights_sha256=weights,
        package_id=package.id,
        length=length,
        texts=tuple(PilotText(text.name, text.sha256, len(taken)) for text, taken in zip(texts, by_text, strict=True)),
        machine=_machine(device, dtype),
        columns=columns,
        thresholds=_thresholds(columns, arguments),
        seconds=round(time.perf_counter() - started, 1),
    )


def _thresholds(columns: Sequence[Column], arguments: argparse.Namespace) -> tuple[Threshold, ...]:
    (found,) = (column.against_dense for column in columns if column.name == "patched" and column.against_dense)
    return judged(found, {"perplexity_ratio": arguments.max_ppl_ratio, "first_token_speedup": arguments.min_speedup})


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
