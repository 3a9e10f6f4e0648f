"""placeholder: the reference until the Numba body is there"""

from .reference import decode, dequantize, encode, quantize  # noqa: F401
