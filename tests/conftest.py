"""What all tests share: golden files, the flag that rewrites them, a cache of compiled parts, and one thread."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

with contextlib.suppress(ModuleNotFoundError):  # a machine with a GPU may have only what the tests marked gpu need
    from hypothesis import settings

    # No deadline: other work may share the processor. A check of a change tries what it tried before; others look on.
    settings.register_profile("surgeon", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("surgeon")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden files with what the code makes now, then read the diff",
    )


@pytest.fixture(scope="session", autouse=True)
def _compiled_parts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled parts are kept beside pytest's own cache, away from the user's, so that a second run is quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGEON_CACHE", str(request.config.cache.mkdir("surgeon")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, which wait for each other long where other work has the cores."""
    import torch  # slow to import, so only who wants this needs it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the file `tests/golden/<name>`, or rewrites the file under --update-golden."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if update:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        assert file.is_file(), f"{file} is missing: run pytest --update-golden and read what it wrote"
        assert text == file.read_text(encoding="utf-8"), (
            f"not as in {file}: run pytest --update-golden and read the diff"
        )

    return compare
