"""A table of wrong calls over all commands: each is one line on standard error and a status that README gives."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import RUN
from surgeon.compiler.cli import main as cli
from wrong_calls import make_files, wrong_calls

CALLS = wrong_calls()
STATUSES = (cli.FAILED, cli.BAD_INPUT, cli.THRESHOLD_MISSED)
PROCESSES = (
    "compile bomb.json --out new",
    "compile topology.json --out loop/new",
    "inspect pipe",
    "inspect waiting",
    "export --format hf-kernels linked --out new",
    "report pilot.json topology.json --beside pilot.json",
    "assess model-cut --text text.txt --length 64 --block 16",
)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrong")
    make_files(made, folder / "model")
    return made


def parsed(call: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a line sets, and its arguments."""
    words = shlex.split(call)
    variables = [word for word in words[:1] if "=" in word]
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


def is_one_line(text: str) -> bool:
    return text.startswith("surgeon: ") and text.endswith("\n") and text[:-1].isprintable() and len(text) < 1000


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_is_one_line_and_a_status(
    call: str, files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    variables, arguments = parsed(call)
    monkeypatch.chdir(files)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = {path.name for path in files.iterdir()}
    status = cli.main(arguments)
    out, err = capfd.readouterr()
    assert status in STATUSES, f"{status}: {out}"
    assert is_one_line(err), err
    assert "nobody foresaw" not in err, err
    assert out == ""
    assert {path.name for path in files.iterdir()} == before, "nothing is left behind"


@pytest.mark.parametrize("call", PROCESSES)
def test_a_process_says_the_same(call: str, files: Path) -> None:
    """With all that an interpreter prints at its end, and its exit status as a shell sees it."""
    assert call in CALLS
    done = subprocess.run(
        [sys.executable, "-c", RUN, *parsed(call)[1]],
        capture_output=True,
        text=True,
        cwd=files,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode in STATUSES
    assert is_one_line(done.stderr), done.stderr
    assert done.stdout == ""


def test_the_table_has_all_commands() -> None:
    assert len(CALLS) >= 200
    called = {parsed(call)[1][0] for call in CALLS}
    assert {command.name for command in cli.COMMANDS} <= called
