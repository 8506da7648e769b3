"""Powers of two, which all sizes inside a GPU's kernel are."""


def padded(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def log2(power: int) -> int:
    """The logarithm of a power of two."""
    return power.bit_length() - 1
