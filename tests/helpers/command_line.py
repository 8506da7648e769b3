"""The command line, in this process, and as a test's own processes start it."""

from pathlib import Path

import pytest

from surgeon.compiler.cli import main as cli

RUN = "import sys; from surgeon.compiler.cli.main import main; sys.exit(main())"


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str | Path) -> str:
    """The one line on standard error of a run that must end with `status` and print nothing else."""
    assert cli.main(list(map(str, arguments))) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("surgeon: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    return err
