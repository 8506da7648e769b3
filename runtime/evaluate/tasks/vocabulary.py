"""Plain words and made-up words for the tasks."""

import random

_TEXT = (
    "anchor apple arrow badge basket beach bell bird boat bottle bread bridge brush bucket butter button cabin "
    "candle carpet castle chain chair cherry circle clock cloud coat coffee coin copper corner cotton crown "
    "curtain desert diamond doctor donkey door dragon drum eagle engine farmer feather fence finger flag flower "
    "forest fountain garden glass glove gold guitar hammer harbor helmet honey horse island jacket kettle kitchen "
    "ladder lake lantern leaf lemon letter lion market mirror monkey moon mountain needle ocean orange paper "
    "pencil piano pillow pilot pocket potato rabbit river rocket saddle salt school shadow shovel silver spoon "
    "square station stone summer table tiger tower train tunnel turtle valley velvet violin wagon wallet water "
    "whale wheel window winter wolf yellow zebra"
)
WORDS = tuple(_TEXT.split())
"""Plain words, each of one or two tokens in most vocabularies."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def made_up_words(drawn: random.Random, count: int) -> list[str]:
    """Different words of three syllables that no language has."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(drawn.choice(_CONSONANTS) + drawn.choice(_VOWELS) for _ in range(3))] = None
    return list(found)
