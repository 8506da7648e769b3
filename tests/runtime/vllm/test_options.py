"""The plugin's options: where they come from, and which are refused."""

from typing import Any

import pytest

from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm.options import PACKAGE_VARIABLE, Options, options_of

NAMED = {PACKAGE_VARIABLE: "from the environment"}


def test_without_a_package_there_are_no_options() -> None:
    assert options_of({}, {}) is None
    assert options_of(None, {PACKAGE_VARIABLE: ""}) is None
    assert options_of({"another_plugin": 1}, {}) is None


def test_the_config_goes_before_the_environment() -> None:
    assert options_of({}, NAMED) == Options("from the environment")
    assert options_of(None, NAMED) == Options("from the environment")
    assert options_of({"surgeon_package": "kernels"}, NAMED) == Options("kernels")


def test_options_survive_the_config_that_other_processes_get() -> None:
    options = Options("kernels", "pattern", 64, "ab" * 32)
    assert options_of(options.to_config(), {}) == options
    assert options_of(Options("kernels").to_config(), {}) == Options("kernels")


def test_the_rows_that_ask() -> None:
    assert Options("kernels").asking == 128
    assert Options("kernels", "dense", 7).asking == 7
    assert Options("kernels", "pattern", 7).asking == 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"surgeon_packages": "kernels"}, "surgeon_packages: expected one of surgeon_package, surgeon_recall"),
        ({"surgeon_recall": "dense"}, "expected surgeon_package, got other options without it; name the package, or"),
        ({"surgeon_package": 3}, "surgeon_package: expected a string, got 3"),
        ({"surgeon_package": "kernels", "surgeon_recall": "sparse"}, 'recall: expected "dense" or "pattern", got'),
        ({"surgeon_package": "kernels", "surgeon_recall": None}, "surgeon_recall: expected a string, got None"),
        ({"surgeon_package": "kernels", "surgeon_dense_rows": "128"}, "dense_rows: expected a whole number of tokens"),
        ({"surgeon_package": "kernels", "surgeon_sha256": 1}, "surgeon_sha256: expected a string, got 1"),
    ],
)
def test_wrong_options_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError) as refused:
        options_of(entries, {})
    assert message in str(refused.value)
