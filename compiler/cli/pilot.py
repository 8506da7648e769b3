"""`surgeon pilot`: tries a package on its model, and writes and shows the figures."""

import argparse
import shutil
import tempfile
from pathlib import Path

from surgeon.compiler.cli.command import Command, Outcome
from surgeon.compiler.cli.values import add_json, add_model_and_text, natural, number, path, positive, ratio
from surgeon.runtime.evaluate.tasks.every import TASKS


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_text(parser)
    parser.add_argument("package", type=path, metavar="PACKAGE", help="the kernel package to try")
    parser.add_argument("--out", type=path, default=Path("pilot.json"), metavar="FILE", help="default: pilot.json")
    parser.add_argument("--length", type=positive, metavar="TOKENS", help="default: the topology's length")
    parser.add_argument(
        "--sequences", type=positive, default=4, metavar="N", help="sequences from each text, spread evenly; default: 4"
    )
    parser.add_argument(
        "--tasks",
        type=natural,
        default=2,
        metavar="N",
        help="rounds of retrieval tasks, at --length tokens and, if all fit, at half of them; default: 2",
    )
    parser.add_argument(
        "--ask",
        action="append",
        choices=TASKS,
        metavar="TASK",
        help=f"a task to ask, repeatable: {', '.join(TASKS)}; default: all of them",
    )
    parser.add_argument(
        "--work",
        type=path,
        metavar="FOLDER",
        help="folder for what was read and answered, so that the same command continues an interrupted pilot, and"
        " others of this model do not ask the dense one again; default: FILE.steps, removed at the end",
    )
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="timing rounds; default: 5")
    parser.add_argument("--no-window", action="store_true", help="leave out the model with equal windows")
    parser.add_argument(
        "--no-pattern", action="store_true", help="leave out the model that recall dense is shown beside"
    )
    parser.add_argument(
        "--recall",
        choices=("dense", "pattern"),
        help="what the rows that ask read: everything (the pattern is shown beside it) or the pattern; default: dense,"
        " but pattern for a package with routed heads",
    )
    parser.add_argument(
        "--dense-rows", type=positive, default=128, metavar="ROWS", help="of recall dense; default: 128"
    )
    limits = parser.add_argument_group("limits of the patched model; beyond one, the exit status is 3")
    limits.add_argument(
        "--min-retrieval",
        type=number,
        default=0.9,
        metavar="X",
        help="least score beside dense on every task where dense scores half or more; default: 0.9",
    )
    limits.add_argument(
        "--max-ppl-ratio",
        type=ratio,
        default=1.02,
        metavar="X",
        help="greatest perplexity of what follows a prompt, beside dense; default: 1.02",
    )
    limits.add_argument(
        "--max-divergence", type=ratio, metavar="X", help="greatest KL from dense there, in nats a token; default: none"
    )
    limits.add_argument(
        "--min-speedup", type=ratio, metavar="X", help="least speed-up of the first token; default: none"
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    from surgeon.compiler.learn.texts.text_file import read_text_file
    from surgeon.compiler.system.atomic_files import check_file, check_folder
    from surgeon.runtime.errors import PilotError
    from surgeon.runtime.package.reader import read_package

    # What can be refused is refused before the work: here before torch is imported, by `run` before weights are read.
    out: Path = arguments.out
    check_file(out, PilotError)
    if arguments.work is not None:
        check_folder(arguments.work, PilotError)
    for file in arguments.text:
        read_text_file(file)
    read_package(arguments.package)

    from surgeon.compiler.pilot.run import PilotRequest, run
    from surgeon.compiler.pilot.table import pilot_lines, refusal
    from surgeon.compiler.system.atomic_files import write_file
    from surgeon.compiler.system.main_process import is_main_process
    from surgeon.compiler.system.stages import stage_display
    from surgeon.compiler.system.terminal import quiet_unless_watched, stdout_encoding
    from surgeon.runtime.evaluate.processes import joined

    request = PilotRequest(
        model=arguments.model,
        texts=tuple(arguments.text),
        package=arguments.package,
        device_map=arguments.device_map,
        length=arguments.length,
        sequences=arguments.sequences,
        tasks=arguments.tasks,
        asked=tuple(arguments.ask or TASKS),
        rounds=arguments.rounds,
        window=not arguments.no_window,
        pattern=not arguments.no_pattern,
        recall=arguments.recall,
        dense_rows=arguments.dense_rows,
        min_retrieval=arguments.min_retrieval,
        max_ppl_ratio=arguments.max_ppl_ratio,
        max_divergence=arguments.max_divergence,
        min_speedup=arguments.min_speedup,
    )
    work: Path = arguments.work or out.with_name(out.name + ".steps")
    quiet_unless_watched()
    # The baseline's package is in the main process's folder, which is removed long after all have loaded it.
    with joined(), stage_display() as progress, tempfile.TemporaryDirectory(prefix="surgeon-") as scratch:
        pilot = run(request, Path(scratch), progress, work)
    if is_main_process():
        write_file(out, pilot.to_json())
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if arguments.json:
        return Outcome((" ".join(pilot.to_json().split("\n")),), refusal(pilot))
    lines = (*pilot_lines(pilot, stdout_encoding()), f"{out}: written in {pilot.seconds:.0f} s")
    return Outcome(lines, refusal(pilot))


PILOT = Command("pilot", "Try a package on its model: quality, speed, memory.", _add_arguments, _run)
