"""Texts: the refusals, and the division into sequences."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.compiler.learn.texts.text import TokenText, divide, read_text, spread
from surgeon.runtime.errors import ModelError


class Letters:
    """A tokenizer that makes one token of each character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def read(path: Path) -> TokenText:
    return read_text(path, Letters())  # type: ignore[arg-type]


def test_a_text_is_its_tokens_and_its_hash(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    text = read(tmp_path / "a.txt")
    assert (text.name, text.tokens.tolist()) == ("a.txt", [97, 98, 99])
    assert text.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a text, got an empty file"),
        (b" \n\t", "expected a text, got an empty file"),
        (b"\x89PNG\xff", "expected UTF-8 text, got a stray byte at 0"),
        (b"ab\0cd", "expected text, got a null character at 2"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read(tmp_path / "bad")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelError, match="expected a readable text file"):
            read(path)


def made(name: str, first: int, count: int) -> TokenText:
    return TokenText(name, "0" * 64, torch.arange(first, first + count))


def test_no_token_is_used_twice_and_every_text_has_its_share() -> None:
    texts = [made("a", 0, 105), made("b", 1000, 200)]
    divided = divide(texts, 10, calibrate=2, validate=3, refine=(1, 2), seed=0)
    assert (len(divided.calibrate), len(divided.validate), [len(fresh) for fresh in divided.refine]) == (4, 6, [2, 4])
    used = torch.cat([*divided.calibrate, *divided.validate, *(s for fresh in divided.refine for s in fresh)], dim=1)
    assert used.unique().numel() == used.numel()
    again = divide(texts, 10, calibrate=2, validate=3, refine=(1, 2), seed=0)
    other = divide(texts, 10, calibrate=2, validate=3, refine=(1, 2), seed=1)
    assert all(torch.equal(one, two) for one, two in zip(divided.validate, again.validate, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(divided.validate, other.validate, strict=True))


def test_short_texts_give_what_they_have() -> None:
    divided = divide([made("a", 0, 29)], 10, calibrate=2, validate=2, refine=(1, 1), seed=0)
    assert (len(divided.calibrate), len(divided.validate)) == (1, 1)
    assert all(torch.equal(fresh[0], divided.calibrate[0]) for fresh in divided.refine)


def test_a_text_of_one_sequence_is_too_short() -> None:
    with pytest.raises(ModelError, match=r"b: expected at least 20 tokens: two sequences, .*, got 19 tokens"):
        divide([made("a", 0, 50), made("b", 0, 19)], 10, calibrate=1, validate=1, refine=(), seed=0)


def test_sequences_are_spread_over_a_text() -> None:
    text = TokenText("a", "", torch.arange(105))
    assert [int(each[0, 0]) for each in spread(text, 10, 3)] == [0, 30, 60]
    assert len(spread(text, 10, 99)) == 10
    with pytest.raises(ModelError, match="at least 106 tokens"):
        spread(text, 106, 1)


def test_a_text_that_is_not_read_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match=r"pipe: expected a readable text file, got a pipe; check the path"):
        read(tmp_path / "pipe")
    monkeypatch.setattr("surgeon.compiler.learn.texts.text_file.MAX_TEXT_BYTES", 10)
    (tmp_path / "a.txt").write_text("a" * 11)
    with pytest.raises(ModelError, match=r"a.txt: expected at most 10 bytes, got a larger text; name a part of it"):
        read(tmp_path / "a.txt")


def test_what_a_tokenizer_raises_is_one_line(tmp_path: Path) -> None:
    def tokenizer(_: str, **__: Any) -> dict[str, list[int]]:
        raise TypeError("no such\nstate")

    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ModelError, match=r"a.txt: expected a text that the model's tokenizer reads, got no such; name"):
        read_text(tmp_path / "a.txt", tokenizer)  # type: ignore[arg-type]
