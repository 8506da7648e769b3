"""The torch ops that stand for a packaged attention kernel in eager code, `torch.compile` and `torch.export`."""

import weakref
from typing import TYPE_CHECKING, Any

import torch

from surgeon.runtime.errors import PackageError, PatchError

if TYPE_CHECKING:
    from surgeon.runtime.loading import Package

# define/impl on a Library costs a fraction of the custom_op decorator's overhead a call.
_LIBRARY = torch.library.Library("surgeon", "DEF")
_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, Tensor? position, Tensor? first_key, float scale, str package, int layer)"
_LIBRARY.define(f"attention{_ARGUMENTS} -> Tensor")
_LIBRARY.define(f"attention_with_lse{_ARGUMENTS} -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_rotary(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? first_key, float scale, "
    "str package, int layer) -> Tensor"
)

# A package may be loaded more than once: an id is known as long as one of its packages is.
_packages: dict[str, weakref.WeakSet["Package"]] = {}


def register(package: "Package") -> None:
    """Makes a loaded package known to the ops by its id, for as long as it is referenced somewhere."""
    _packages.setdefault(package.id, weakref.WeakSet()).add(package)


def find(package: str) -> "Package":
    """The loaded package with this id.

    Raises:
        PackageError: it is not loaded in this process.
    """
    found = next(iter(_packages.get(package, ())), None)
    if found is None:
        raise PackageError(
            "surgeon.attention",
            f"package {package[:12]} loaded in this process",
            "none with this id",
            "call surgeon.runtime.load on its folder first and keep the result",
        )
    return found


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor | None,
    first_key: torch.Tensor | None,
    scale: float,
    package: str,
    layer: int,
) -> torch.Tensor:
    return find(package).run(layer, q, k, v, position, first_key, scale)


def _attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor | None,
    first_key: torch.Tensor | None,
    scale: float,
    package: str,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    log_sum_exp = q.new_empty(q.shape[:3], dtype=torch.float32)
    return find(package).run(layer, q, k, v, position, first_key, scale, log_sum_exp), log_sum_exp


def _attention_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first_key: torch.Tensor | None,
    scale: float,
    package: str,
    layer: int,
) -> torch.Tensor:
    return find(package).run_rotary(layer, q, k, v, cos, sin, first_key, scale)


def _fake_attention(q: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, length, head_dim = q.shape
    return q.new_empty((batch, length, heads, head_dim))


def _fake_attention_with_lse(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_attention(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(_context: Any, *_gradients: torch.Tensor) -> None:
    raise PatchError(
        "surgeon.attention",
        "a forward pass only",
        "a call of backward",
        "run under torch.no_grad(), or unpatch the model to train it",
    )


for _key in ("CPU", "CUDA"):  # "CUDA" is also where torch keeps its HIP devices
    _LIBRARY.impl("attention", _attention, _key)
    _LIBRARY.impl("attention_with_lse", _attention_with_lse, _key)
_LIBRARY.impl("attention_rotary", _attention_rotary, "CPU")
for _name, _fake in (
    ("attention", _fake_attention),
    ("attention_with_lse", _fake_attention_with_lse),
    ("attention_rotary", _fake_attention),
):
    torch.library.register_fake(f"surgeon::{_name}", _fake, lib=_LIBRARY)
    # Without this, autograd would drop the gradient in silence.
    torch.library.register_autograd(f"surgeon::{_name}", _backward, lib=_LIBRARY)
