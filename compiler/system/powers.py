"""Powers of two, as all sizes inside a GPU kernel must be."""


def padded(number: int) -> int:
    """The smallest power of two that is at least a given positive number."""
    return 1 << (number - 1).bit_length()


def log2(power: int) -> int:
    """The logarithm of a power of two."""
    return power.bit_length() - 1
