"""What a serving machine runs: loads a package and a saved program, calls it once, saves what came out.

`serving_process.py export|aoti KERNELS PROGRAM INPUTS OUTPUTS`; the inputs are saved back too, as the call left them.
"""

import sys

import torch

from surgeon.runtime import load


def main(kind: str, kernels: str, program: str, inputs: str, outputs: str) -> None:
    package = load(kernels, strict=True)  # first, and held: the program knows it by its hash
    step = torch._inductor.aoti_load_package(program) if kind == "aoti" else torch.export.load(program).module()
    given = torch.load(inputs)
    with torch.no_grad():
        found = step(*given)
    torch.save((found, given), outputs)
    assert "transformers" not in sys.modules
    del package


if __name__ == "__main__":
    main(*sys.argv[1:])
