"""Half of the sequences of each use ask for facts hidden in them; what is too short for that stays plain."""

import re

import torch

from oracles import filler, letters
from surgeon.compiler.learn.texts.questions import with_questions
from surgeon.compiler.learn.texts.text import Sequences

LENGTH, SCORED = 2000, 300


def plain(length: int = LENGTH) -> Sequences:
    def some(count: int) -> tuple[torch.Tensor, ...]:
        return tuple(filler(length) for _ in range(count))

    return Sequences(some(4), some(2), (some(3), some(3)), (some(2), some(2)))


def text_of(sequence: torch.Tensor) -> str:
    return str(letters().decode(sequence[0]))


def asking(sequences: tuple[torch.Tensor, ...]) -> list[bool]:
    return ["?" in text_of(sequence) for sequence in sequences]


def test_every_second_sequence_of_a_use_has_questions_and_each_round_another_half() -> None:
    made, count = with_questions(plain(), letters(), SCORED, seed=0)
    assert asking(made.calibrate) == [False, True, False, True]
    assert [asking(fresh) for fresh in made.refine] == [[True, False, True], [False, True, False]]
    assert [asking(part) for part in made.cuts] == [[False, True], [False, True]]
    assert asking(made.validate) == [False, False, True, True]
    assert count == 2 + 3 + 2 + 2


def test_the_end_asks_and_answers_what_the_text_says() -> None:
    made, _ = with_questions(plain(), letters(), SCORED, seed=0)
    seen = set()
    for sequence in (*made.calibrate[1::2], *made.validate[2:]):
        assert sequence.shape == (1, LENGTH)
        text = text_of(sequence)
        start = text.rindex("x") + 1  # the filler ends where the questions begin
        assert len(text) - start <= SCORED
        said, asked = text[:start], text[start:]
        for key, number in re.findall(r"magic number for (\w+) is: (\d+)(?!\.)", asked):
            assert f"The special magic number for {key} is: {number}." in said
            seen.add("key")
        for number in re.findall(r"The pass key is (\d+)", asked):
            assert f"The pass key is {number}. Remember it." in said
            seen.add("single")
        for name, number in re.findall(r"The value of (\w+) is the number (\d+)", asked):
            first = re.search(rf"The value of (\w+) is {number}\.", said)
            assert first is not None
            assert name != first[1]
            seen.add("tracking")
    assert seen == {"key", "single", "tracking"}


def test_the_same_seed_makes_the_same_questions() -> None:
    first, again, other = (with_questions(plain(), letters(), SCORED, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.calibrate[1], again.calibrate[1])
    assert not torch.equal(first.calibrate[1], other.calibrate[1])


def test_too_short_sequences_stay_plain() -> None:
    for length, scored in ((400, SCORED), (LENGTH, 40)):
        sequences = plain(length)
        made, count = with_questions(sequences, letters(), scored, seed=0)
        assert count == 0
        assert made == sequences
