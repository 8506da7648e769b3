"""Serve time: verify and load a package, run its kernels, patch a model.

The names below are imported when they are first used, so that reading a package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.runtime.fingerprints import fingerprint
    from surgeon.runtime.kv_cache import SurgeonCache
    from surgeon.runtime.loading import Package, load
    from surgeon.runtime.patching import patch, unpatch
    from surgeon.runtime.serving import serving_program
    from surgeon.runtime.tracing import trace

__all__ = ["Package", "SurgeonCache", "fingerprint", "load", "patch", "serving_program", "trace", "unpatch"]

_HOMES = {
    "Package": "loading",
    "SurgeonCache": "kv_cache",
    "fingerprint": "fingerprints",
    "load": "loading",
    "patch": "patching",
    "serving_program": "serving",
    "trace": "tracing",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
