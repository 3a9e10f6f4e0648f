"""Text to batches: what the model reads."""

from .batches import Batches
from .corpus import python_reference, read_files, split
from .tokenizer import ByteTokenizer

__all__ = ["Batches", "ByteTokenizer", "python_reference", "read_files", "split"]
