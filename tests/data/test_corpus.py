"""The text is there, says nothing twice, and the held-out part was not trained on."""

import pytest
import torch

from deepseek_lab.data import ByteTokenizer, corpus, python_reference, read_files, split

BOUNDARY = ByteTokenizer.boundary


@pytest.fixture(scope="module")
def reference():
    return python_reference()


@pytest.fixture(scope="module")
def parts(reference):
    return split(reference)


def paragraphs(text: str) -> list[str]:
    return [p.strip() for p in text.split("\n\n") if p.strip()]


def test_the_reference_is_some_hundred_thousand_characters_without_a_repeated_paragraph(reference):
    assert 200_000 < sum(map(len, reference)) < 1_000_000
    every = [p for document in reference for p in paragraphs(document)]
    assert len(every) == len(set(every)) > 1000
    assert reference == python_reference()


def test_a_paragraph_is_kept_where_it_stands_first():
    assert corpus.unique_paragraphs(["a\n\nb\n\na", "b", "  c\n\n b \n\nd\n"]) == ["a\n\nb", "  c\n\nd"]
    assert corpus.unique_paragraphs(["\n\n \n\n"]) == []


def test_no_held_out_paragraph_was_read_in_training(parts):
    text, held_out = (ByteTokenizer().decode(part) for part in parts)
    whole = 0
    # The cut ends of a 4,096-token stretch are no paragraphs: a stretch's first and last one are left out.
    for stretch in parts[1].split(4096):
        for paragraph in paragraphs(ByteTokenizer().decode(stretch))[1:-1]:
            if len(paragraph) >= 80:
                whole += 1
                assert paragraph not in text
    assert whole > 50 and len(held_out) > 20_000


def test_nothing_is_lost_between_the_two_parts(reference, parts):
    train, validation = parts
    assert len(train) + len(validation) == sum(len(d.encode()) + 1 for d in reference)
    assert train.dtype == validation.dtype == torch.int16
    assert (train == BOUNDARY).sum() + (validation == BOUNDARY).sum() == len(reference)
    assert train[0] == BOUNDARY
    assert 0.08 < len(validation) / (len(train) + len(validation)) < 0.12


@pytest.mark.parametrize(("held_out", "every"), [(0.1, 10), (0.25, 4), (0.5, 2)])
def test_every_nth_stretch_is_held_out(held_out, every):
    numbers = torch.arange(8 * 4096) // 4096
    text = "".join(map(chr, (numbers + 65).tolist()))[1:]  # the boundary takes the first place
    if every > 8:
        with pytest.raises(ValueError, match=r"too few to hold out 10%; give at least 40,960"):
            split([text], held_out)
        return
    train, validation = split([text], held_out)
    letters = [65 + i for i in range(8) if i % every == every - 1]
    assert validation.unique().tolist() == letters
    assert not set(letters) & set(train.tolist())


@pytest.mark.parametrize("held_out", [0.0, -0.1, 0.51, 1.0])
def test_an_impossible_share_is_refused(held_out):
    with pytest.raises(ValueError, match=f"held_out={held_out}"):
        split(["text"], held_out)


def test_files_of_ones_own_are_read_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_text("ein Löffel\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    assert read_files([tmp_path / "a.txt", str(tmp_path / "b.txt")]) == ["ein Löffel\n", ""]


def test_files_that_hold_no_text_are_refused_by_name(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"picture\.png cannot be read as UTF-8"):
        read_files([tmp_path / "picture.png"])
    with pytest.raises(ValueError, match=r"missing\.txt cannot be read"):
        read_files([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="cannot be read"):
        read_files([tmp_path])
    for nothing in ([], [tmp_path / "empty.txt"]):
        with pytest.raises(ValueError, match="got no text"):
            read_files(nothing)


def test_one_text_or_one_path_is_not_taken_for_a_list_of_letters(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    for path in (tmp_path / "a.txt", str(tmp_path / "a.txt")):
        with pytest.raises(TypeError, match=r"got one path; expected a list of paths: read_files\(\['.*a\.txt'\]\)"):
            read_files(path)
    for text in ("one text " * 9000, b"one text " * 9000):
        with pytest.raises(TypeError, match=rf"got one {type(text).__name__}; .* split\(\[text\]\)"):
            split(text)


def test_no_documents_are_refused_with_where_to_find_some():
    with pytest.raises(ValueError, match=r"split got no documents; .* python_reference"):
        split([])
