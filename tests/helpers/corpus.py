"""Generated text that a tiny model can learn something from."""

import random

SENTENCE = "the cat sat on a mat and the dog ran to it; then both slept in sun by an old oak tree."
WORDS = SENTENCE.split()


def make_text(num_characters: int, seed: int = 0) -> str:
    """Return random sentences over a small vocabulary, the same for the same seed."""
    rng = random.Random(seed)
    lines: list[str] = []
    while sum(map(len, lines)) < num_characters:
        lines.append(" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "\n")
    return "".join(lines)[:num_characters]
