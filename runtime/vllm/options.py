"""The plugin's options: `--additional-config` of vLLM, and an environment variable for the package."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.transformers.recall import DENSE, DENSE_ROWS, rows_that_ask

PACKAGE_VARIABLE = "SURGEON_VLLM_PACKAGE"
"""The environment variable that names the package where `--additional-config` does not."""

_PREFIX = "surgeon_"
_CONFIG = "--additional-config"


@dataclass(frozen=True)
class Options:
    """The package that a server shall run on, and the recall of its prompts.

    `recall` None is that of a patched model: "pattern" for a package with routed heads, else "dense". `sha256` is the
    identity that the package must have, or None for any.
    """

    package: str
    recall: str | None = None
    dense_rows: int = DENSE_ROWS
    sha256: str | None = None

    @property
    def asking(self) -> int:
        """The tokens at a prompt's end that read everything: 0 under recall "pattern"."""
        return rows_that_ask(DENSE if self.recall is None else self.recall, self.dense_rows)

    def to_config(self) -> dict[str, object]:
        """The same options as entries of `--additional-config`."""
        return {_PREFIX + name: value for name, value in asdict(self).items() if value is not None}


def options_of(additional_config: object, environment: Mapping[str, str] = os.environ) -> Options | None:
    """Reads the options of a server; None if no package is named.

    Raises:
        PatchError: an option is unknown or has another type, or there are options but no package.
    """
    entries = additional_config if isinstance(additional_config, Mapping) else {}
    given = {str(name)[len(_PREFIX) :]: entries[name] for name in entries if str(name).startswith(_PREFIX)}
    known = Options.__dataclass_fields__
    for name in given:
        if name not in known:
            raise PatchError(
                f"{_CONFIG}: {_PREFIX}{name}",
                "one of " + ", ".join(_PREFIX + each for each in known),
                "another name",
                "correct the name",
            )
    given.setdefault("package", environment.get(PACKAGE_VARIABLE) or None)
    if given["package"] is None:
        if len(given) > 1:
            raise PatchError(
                _CONFIG, f"{_PREFIX}package", "other options without it", f"name the package, or set {PACKAGE_VARIABLE}"
            )
        return None
    for name in ("package", "recall", "sha256"):
        if name in given and not isinstance(given[name], str):
            raise PatchError(f"{_CONFIG}: {_PREFIX}{name}", "a string", short_repr(given[name]), "correct the option")
    options = Options(**given)
    _ = options.asking  # so that an unknown recall is refused here
    return options
