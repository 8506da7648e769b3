"""The versions of the tools that make compiled parts."""

from importlib.metadata import PackageNotFoundError, version

from surgeon.runtime.installation import version as own_version


def versions(*distributions: str) -> tuple[str, ...]:
    """The versions of these distributions, "none" for one that is not installed, then Surgeon's own."""
    return (*map(_version, distributions), own_version())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
