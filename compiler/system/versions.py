"""The versions of what makes compiled parts."""

from importlib.metadata import PackageNotFoundError, version

from surgeon.runtime.installation import version as own_version


def versions(*distributions: str) -> tuple[str, ...]:
    """The versions of these distributions, "none" for one that is not installed, and Surgeon's own at the end."""
    return (*map(_version, distributions), own_version())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
