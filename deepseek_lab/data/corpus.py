"""Text that is on every learner's disk already: the language reference inside CPython, or files of one's own.

The reference says many things twice (the topic "with" stands again inside "compound"). A model that is tested on a
paragraph it has read looks better than it is, so each paragraph is kept once, and the held-out part is honest.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .tokenizer import ByteTokenizer


def python_reference() -> list[str]:
    """Return the topics of `pydoc_data.topics` in alphabetical order, without paragraphs that stood in an earlier one.

    About 370,000 characters of English technical prose in Python 3.11. The wording differs between Python versions.
    """
    from pydoc_data.topics import topics

    return unique_paragraphs(topics[name] for name in sorted(topics))


def read_files(paths: Iterable[str | Path]) -> list[str]:
    """Return the text of one's own files, one document each. Raises ValueError for one that is missing or no UTF-8."""
    if isinstance(paths, (str, Path)):
        raise TypeError(f"read_files got one path; expected a list of paths: read_files([{str(paths)!r}])")
    documents = []
    for path in map(Path, paths):
        try:
            documents.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); choose plain text files") from error
    if not any(documents):
        raise ValueError("read_files got no text; name at least one file that is not empty")
    return documents


def unique_paragraphs(documents: Iterable[str]) -> list[str]:
    """Return the documents without paragraphs that already stood in one of them; a document left empty goes."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        fresh = []
        for paragraph in document.split("\n\n"):
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                fresh.append(paragraph.strip("\n"))
        if fresh:
            kept.append("\n\n".join(fresh))
    return kept


def split(documents: list[str], held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return training and validation tokens [token] uint8-sized int16: the documents with a boundary before each.

    The validation part is every n-th stretch of 4,096 tokens, so that it is spread over all topics.
    """
    if isinstance(documents, (str, bytes)):
        raise TypeError(f"split got one {type(documents).__name__}; expected a list of texts: split([text])")
    if not documents:
        raise ValueError("split got no documents; give at least one text, for example python_reference()")
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out={held_out} is not between 0 and 0.5; 0.1 keeps a tenth for validation")
    tokenizer = ByteTokenizer()
    boundary = torch.tensor([tokenizer.boundary])
    tokens = torch.cat([part for text in documents for part in (boundary, tokenizer.encode(text))]).to(torch.int16)
    stretches = tokens.split(4096)
    every = round(1 / held_out)
    train = [s for i, s in enumerate(stretches) if i % every != every - 1]
    validation = [s for i, s in enumerate(stretches) if i % every == every - 1]
    if not validation:
        raise ValueError(
            f"{len(tokens):,} tokens are too few to hold out {held_out:.0%}; give at least {4096 * every:,}"
        )
    return torch.cat(train), torch.cat(validation)
