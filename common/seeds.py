"""The range of --seed, and its use with generators that take 32 bits of a seed."""

import hashlib

SEEDS = range(2**63)


def seed_fault(seed: int) -> str | None:
    """Return why --seed is out of range, or None. Every command has the same range."""
    return None if seed in SEEDS else f"--seed {seed} must lie between 0 and {SEEDS[-1]}"


def as_32_bits(seed: int) -> int:
    """Return the seed itself if it is below 2^32, else a number below 2^32 that depends on all its bits.

    torch's generator on the CPU, mt19937, ignores all but 32 bits of a seed.
    """
    return seed if seed < 2**32 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
