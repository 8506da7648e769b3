"""The versions in the cache keys of compiled parts."""

from importlib.metadata import version

import surgeon.runtime
from surgeon.compiler.system.versions import versions


def test_versions_are_those_installed_and_surgeons_own() -> None:
    assert versions("numpy", "no-such-distribution") == (version("numpy"), "none", surgeon.runtime.__version__)
