"""A serving machine's script: loads a package and a saved program, and saves the results of calls.

`serving_process.py export|aoti KERNELS PROGRAM CALLS RESULTS`; the calls may share tensors, such as a cache.
"""

import sys

import torch

from surgeon.runtime import load


def main(kind: str, kernels: str, program: str, calls: str, results: str) -> None:
    package = load(kernels, strict=True)  # first, and kept: the program finds it by its hash
    step = torch._inductor.aoti_load_package(program) if kind == "aoti" else torch.export.load(program).module()
    with torch.no_grad():
        torch.save([step(*call) for call in torch.load(calls)], results)
    assert "transformers" not in sys.modules
    del package


if __name__ == "__main__":
    main(*sys.argv[1:])
