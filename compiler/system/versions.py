"""The versions of what is installed here."""

from importlib.metadata import PackageNotFoundError, version


def version_of(distribution: str) -> str | None:
    """A distribution's version, or None where it is not installed, as surgeon itself in a bare source tree."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
