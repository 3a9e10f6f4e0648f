"""One token per byte: nothing to train, nothing to download, any text goes in and comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, then four special ones.

    `boundary` (256) stands between documents and starts a text; 257 to 259 are kept for later parts of the course.
    """

    boundary = 256
    vocab_size = 260

    def encode(self, text: str) -> Tensor:
        """Return the bytes of a text: [token] int64."""
        if not isinstance(text, str):
            raise TypeError(f"encode got {type(text).__name__}; expected str, for example tokenizer.encode('The def')")
        return (
            torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8).long()
            if text
            else torch.empty(0).long()
        )

    def pieces(self, text: str) -> list[str]:
        """Return what stands for each token of a text: an ASCII letter itself, a byte of any other as "C3"."""
        return [chr(byte) if byte < 128 else f"{byte:02X}" for byte in self.encode(text).tolist()]

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Return the text of tokens [token]. Special tokens vanish, bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for a token that does not exist.
        """
        if isinstance(tokens, str):
            raise TypeError("decode got str, which is a text already; expected tokens [token], as encode returns them")
        if isinstance(tokens, Tensor) and tokens.dim() != 1:
            raise ValueError(f"decode got shape {tuple(tokens.shape)}; expected [token], decode one row at a time")
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else [int(t) for t in tokens]
        odd = next((t for t in numbers if not 0 <= t < self.vocab_size), None)
        if odd is not None:
            raise ValueError(f"decode got token {odd}; expected 0 to {self.vocab_size - 1}: these tokens come from "
                             "another tokenizer or vocabulary, decode them with their own")  # fmt: skip
        return bytes(int(t) for t in numbers if t < 256).decode("utf-8", errors="replace")
