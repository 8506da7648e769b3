"""torch.export for inference, with its failures as errors of ours."""

from typing import Any

import torch

from surgeon.runtime.errors import PatchError, SurgeonError, short_repr


def exported(
    module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any, expected: str, remedy: str
) -> torch.export.ExportedProgram:
    """The module as a program; `expected` is what tracing asks of the model, `remedy` what to do where it fails.

    In example sizes 0 and 1 would be taken for constants, and all others stand for any.

    Raises:
        PatchError: torch.export cannot trace the module.
    """
    try:
        with torch.no_grad():
            return torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes, strict=False)
    except SurgeonError:
        raise
    except Exception as error:  # torch.export fails with whatever the model's code runs into
        got = f"{type(error).__name__}: {short_repr(str(error), 200)}"
        raise PatchError("torch.export", expected, got, remedy) from error
