"""The command line, called in this process or started by a test in processes of its own."""

from pathlib import Path

import pytest

from surgeon.compiler.cli import main as cli

RUN = "import sys; from surgeon.compiler.cli.main import main; sys.exit(main())"


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str | Path) -> str:
    """Runs a command that must exit with `status` and print a single line, on standard error, which is returned."""
    assert cli.main(list(map(str, arguments))) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("surgeon: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    return err
