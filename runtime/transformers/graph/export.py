"""torch.export for inference, with its failures raised as PatchErrors."""

from typing import Any

import torch

from surgeon.runtime.errors import PatchError, SurgeonError, short_repr


def exported(
    module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any, expected: str, remedy: str
) -> torch.export.ExportedProgram:
    """Exports the module as a program; `expected` is what tracing demands of the model, `remedy` the way out.

    Example sizes of 0 and 1 would be taken as constants; any others stand for every size.

    Raises:
        PatchError: torch.export cannot trace the module.
    """
    try:
        with torch.no_grad():
            return torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes, strict=False)
    except SurgeonError:
        raise
    except Exception as error:  # torch.export passes on whatever the model's code raises
        got = f"{type(error).__name__}: {short_repr(str(error), 200)}"
        raise PatchError("torch.export", expected, got, remedy) from error
