"""The files of Debian packages, downloaded through apt and unpacked; nothing is installed."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

_SECONDS = 120


def unpack(names: Sequence[str], scratch: Path, progress: Callable[[str], None]) -> Path:
    """Downloads the packages into `scratch` and returns the folder there that holds all their files.

    Raises:
        OSError: apt-get or dpkg-deb is not installed, or apt-get left no package.
        subprocess.SubprocessError: one of them failed or took too long.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")
    progress(f"fetching {' and '.join(names)} through apt")
    try:
        run(["apt-get", "download", *names], scratch)
    except subprocess.CalledProcessError:
        # The package lists are missing or stale: fetch lists of our own, which any user can do.
        lists = ["-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}"]
        for part in ("lists/partial", "cache/archives/partial"):
            (scratch / part).mkdir(parents=True)
        run(["apt-get", *lists, "update"], scratch)
        run(["apt-get", *lists, "download", *names], scratch)
    packages = sorted(scratch.glob("*.deb"))
    if not packages:
        raise FileNotFoundError("apt-get left no package")
    for package in packages:
        run(["dpkg-deb", "-x", str(package), "files"], scratch)
    return scratch / "files"


def run(command: Sequence[str], folder: Path) -> str:
    """Runs a command in a folder, without input, and returns what it prints.

    Raises:
        subprocess.SubprocessError: the command failed or took longer than two minutes.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_SECONDS,
        check=True,
    )
    return done.stdout


def reason(error: Exception) -> str:
    """The reason why one of these failed, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        return (str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"])[-1]
    return str(error)
