"""What low precision keeps and loses. So far: the 128 x 128 blocks of published FP8 weights."""

from .scaling import BLOCK, BlockScaled, quantize_blocks

__all__ = ["BLOCK", "BlockScaled", "quantize_blocks"]
