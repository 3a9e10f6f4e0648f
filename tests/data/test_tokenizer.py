"""Any text goes in and comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.data import ByteTokenizer
from deepseek_lab.presets import PRESETS

TOKENIZER = ByteTokenizer()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert tokens.dtype == torch.int64 and len(tokens) == len(text.encode())
    assert bytes(tokens.tolist()) == text.encode()


@given(st.lists(st.integers(0, 259)))
def test_any_tokens_are_some_text(tokens):
    text = TOKENIZER.decode(tokens)
    assert text == bytes(t for t in tokens if t < 256).decode(errors="replace")
    assert text == TOKENIZER.decode(torch.tensor(tokens, dtype=torch.int64))


def test_special_tokens_vanish_and_broken_bytes_show():
    assert TOKENIZER.decode([256, 104, 257, 105, 259]) == "hi"
    assert TOKENIZER.decode([0xC3]) == "\ufffd"
    assert TOKENIZER.decode(TOKENIZER.encode("é")[:1]) == "\ufffd"


def test_the_tiny_model_has_a_row_for_every_token():
    assert ByteTokenizer.vocab_size == PRESETS["tiny"].vocab_size == 260
    assert 255 < ByteTokenizer.boundary < ByteTokenizer.vocab_size


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match="encode got bytes; expected str"):
        TOKENIZER.encode(b"text")
    with pytest.raises(ValueError, match=r"decode got shape \(1, 2\)"):
        TOKENIZER.decode(torch.tensor([[104, 105]]))


@pytest.mark.parametrize("odd", [-1, 260, 300])
def test_a_token_that_does_not_exist_is_not_dropped_silently(odd):
    for tokens in ([104, odd], torch.tensor([104, odd])):
        with pytest.raises(ValueError, match=f"got token {odd}; expected 0 to 259"):
            TOKENIZER.decode(tokens)


def test_a_text_is_not_decoded_again():
    with pytest.raises(TypeError, match="decode got str, which is a text already"):
        TOKENIZER.decode("123")


def test_each_token_of_a_text_has_a_piece_and_bytes_of_other_letters_are_told_apart():
    assert ByteTokenizer().pieces("a\né中") == ["a", "\n", "C3", "A9", "E4", "B8", "AD"]
    assert ByteTokenizer().pieces("") == []
