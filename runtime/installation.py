"""The distribution that this code is installed as: its name, its version, and the extras that add other packages."""

import importlib

from surgeon.runtime.errors import SurgeonError

DISTRIBUTION = "surgeon-compile"
"""The name that pip knows; Python imports `surgeon.compiler` and `surgeon.runtime`."""

EXTRAS = {
    "accelerate": "learn",
    "gguf": "gguf",
    "matplotlib": "learn",
    "scipy": "learn",
    "triton": "gpu",
}
"""The packages that are imported only where they are needed, each with the extra that installs it."""


def version() -> str:
    """The installed version, or "0+source" if the source tree is not installed."""
    from importlib import metadata  # takes some 20 ms, and few need it

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+source"


def required(package: str, error: type[SurgeonError], where: str, otherwise: str = "") -> None:
    """Imports one of the packages of EXTRAS, or says which extra to install.

    `where` is the place in the user's input that needs it, `otherwise` an alternative remedy, an imperative phrase.

    Raises:
        error: the package is missing or cannot be imported.
    """
    try:
        importlib.import_module(package)
    except ImportError as failure:
        is_missing = isinstance(failure, ModuleNotFoundError) and failure.name == package
        remedy = f"run pip install '{DISTRIBUTION}[{EXTRAS[package]}]'"
        raise error(
            where,
            f"the Python package {package}",
            "none" if is_missing else str(failure),
            f"{remedy}, or {otherwise}" if otherwise else remedy,
        ) from None
