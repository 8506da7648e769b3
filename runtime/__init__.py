"""The serving side: verifies and loads packages, runs their kernels, patches models.

The names below are imported on first use, so that reading a package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from surgeon.runtime import errors

if TYPE_CHECKING:
    from surgeon.runtime.evaluate.comparison import compare, perplexity
    from surgeon.runtime.evaluate.processes import joined
    from surgeon.runtime.loading import Package, load
    from surgeon.runtime.transformers.cache import SurgeonCache
    from surgeon.runtime.transformers.fingerprint import fingerprint, weights_id
    from surgeon.runtime.transformers.graph.serving import serving_program
    from surgeon.runtime.transformers.graph.tracing import trace
    from surgeon.runtime.transformers.patching import patch, unpatch

    __version__: str

__all__ = [
    "Package",
    "SurgeonCache",
    "__version__",
    "compare",
    "errors",
    "fingerprint",
    "joined",
    "load",
    "patch",
    "perplexity",
    "serving_program",
    "trace",
    "unpatch",
    "weights_id",
]

_HOMES = {
    "Package": "loading",
    "SurgeonCache": "transformers.cache",
    "compare": "evaluate.comparison",
    "fingerprint": "transformers.fingerprint",
    "joined": "evaluate.processes",
    "load": "loading",
    "patch": "transformers.patching",
    "perplexity": "evaluate.comparison",
    "serving_program": "transformers.graph.serving",
    "trace": "transformers.graph.tracing",
    "unpatch": "transformers.patching",
    "weights_id": "transformers.fingerprint",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module(f"{__name__}.installation").version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
