"""Reads and checks the int32 matrices of a package's safetensors files."""

import functools
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from surgeon.runtime.errors import PackageError, printable, short_repr

Matrix = npt.NDArray[np.int32]


def ascend(*numbers: npt.NDArray[np.integer] | int) -> npt.NDArray[np.bool_]:
    """Compares the arguments place by place: true where each number is at most the next one."""
    return functools.reduce(np.logical_and, (np.less_equal(lower, upper) for lower, upper in pairwise(numbers)))


class Matrices:
    """The tensors of one file; `where` names it in errors, and `data` is None if the package lacks it.

    Raises:
        PackageError: there is no file, or its bytes are not in the safetensors format.
    """

    def __init__(self, data: bytes | None, where: str) -> None:
        self._where = where
        if data is None:
            raise self.fault("", "a safetensors file", "none")
        try:
            self._tensors = safetensors.numpy.load(data)
        except Exception as error:  # the library raises its own types and NumPy's
            raise self.fault("", "a safetensors file", printable(str(error)[:100]) or type(error).__name__) from None

    def read(self, name: str, columns: int | None = None) -> Matrix:
        """Reads the matrix called `name`, with this number of columns or, if None, at least one.

        Raises:
            PackageError: there is no such matrix, or it has another type or shape.
        """
        found = self._tensors.get(name)
        wanted = f"an int32 matrix [any, {'some' if columns is None else columns}]"
        if found is None:
            raise self.fault(name, wanted, "none")
        fits = found.dtype == np.int32 and found.ndim == 2
        if not fits or (not found.shape[1] if columns is None else found.shape[1] != columns):
            raise self.fault(name, wanted, f"{found.dtype} {list(found.shape)}")
        return found

    def require(self, name: str, matrix: Matrix, fits: npt.NDArray[np.bool_], expected: str) -> None:
        """Refuses a matrix with a row that does not fit.

        Raises:
            PackageError: `fits`, one value per row, is not true for all; the message names the first row that fails.
        """
        if not fits.all():
            row = int(fits.argmin())
            raise self.fault(f"{name}[{row}]", expected, short_repr(matrix[row].tolist()))

    def fault(self, name: str, expected: str, got: str) -> PackageError:
        """The error for a matrix whose numbers are wrong, or for the whole file if `name` is empty."""
        return PackageError(
            f"{self._where}: {name}" if name else self._where, expected, got, "compile the package again"
        )
