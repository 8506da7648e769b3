"""A view of a model's config for the patched model: the same settings, except for the name of the attention.

Whatever is written to the config or to its view appears in both, so that nothing is lost when a model is unpatched.
The config itself, which other models may share, never names our attention.

Source: `transformers.configuration_utils`, PreTrainedConfig.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedConfig

from surgeon.runtime.errors import PatchError, short_repr

_NAME = "_attn_implementation_internal"


@dataclass
class _Override:
    """The attention that a view names; None once the view is closed, and the config's own name applies."""

    implementation: str | None


def open_view(config: PreTrainedConfig, implementation: str) -> PreTrainedConfig:
    """Makes a view of a config that names another attention until `close_view`; its type has the config type's name.

    A deep copy of it is a view of a deep copy of the config. Pickled, or saved as JSON, it is the config.
    """
    override = _Override(implementation)

    def named(view: PreTrainedConfig) -> str | None:
        return override.implementation or cast(str | None, vars(view).get(_NAME))

    def rename(view: PreTrainedConfig, name: str | None) -> None:
        if override.implementation is None:
            vars(view)[_NAME] = name
        elif name != override.implementation:  # written by a model that is made from this config
            raise PatchError(
                "attn_implementation",
                f"{override.implementation!r}, the attention of a patched model",
                short_repr(name),
                "call unpatch(model) first",
            )

    def deep_copy(_view: PreTrainedConfig, memo: dict[int, Any]) -> PreTrainedConfig:
        copied = copy.deepcopy(config, memo)
        return copied if override.implementation is None else open_view(copied, override.implementation)

    def fresh(_type: type[PreTrainedConfig], *arguments: Any, **settings: Any) -> PreTrainedConfig:
        return type(config)(*arguments, **settings)  # as Transformers 5.19 makes one, for the defaults

    names = {
        "__new__": fresh,
        _NAME: property(named, rename),
        "_surgeon_override": override,
        "__deepcopy__": deep_copy,
        "__reduce_ex__": lambda _view, _protocol: (copy.copy, (config,)),
        "__module__": type(config).__module__,
        "__init__": type(config).__init__,  # without one, Transformers would make one and wrap it
    }
    view: PreTrainedConfig = object.__new__(type(type(config).__name__, (type(config),), names))
    object.__setattr__(view, "__dict__", vars(config))
    return view


def is_view(config: object) -> bool:
    """True if a config is a view, open or closed."""
    return isinstance(getattr(type(config), "_surgeon_override", None), _Override)


def close_view(view: PreTrainedConfig) -> None:
    """Makes a view name the config's own attention again, for any code that still holds the view."""
    cast(Any, type(view))._surgeon_override.implementation = None
