"""Dropout (Srivastava et al. 2014) by masks that are hashes of numbers instead of draws of a generator.

A mask depends on its row's seed, its place in the model, the position and the channel. So it is the same on a CPU and a
GPU, in eager mode and compiled, when a block is computed again for its backward pass, and however the rows of a step
are spread over processes and micro-batches.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # the largest number of 32 bits


def mix_(x: Tensor) -> Tensor:
    """Hash 32-bit numbers, int64, in place; return them. No two numbers have the same hash.

    Two rounds of xor-shift and multiplication, with the constants of C. Wellons' hash-prospector (issue 19, a bias of
    0.107). Its other good constants exceed 2^31, and a product would exceed int64: what it becomes then is left open by
    C++, in which the compiler writes kernels for a CPU.
    """
    x ^= x >> 16
    x *= 0x21F0AAAD
    x &= WORD
    x ^= x >> 15
    x *= 0x735A2D97
    x &= WORD
    x ^= x >> 15
    return x


def place_keys(seeds_B: Tensor, num_places: int) -> Tensor:
    """Return two 32-bit numbers for each place and row, int64 [places, B, 2], from one int64 seed for each row."""
    places_P1 = mix_(torch.arange(num_places, device=seeds_B.device))[:, None]
    low_B, high_B = seeds_B & WORD, (seeds_B >> 32) & WORD
    first_PB = mix_(mix_(low_B ^ places_P1) ^ high_B)
    second_PB = mix_(mix_((first_PB + high_B) & WORD) ^ low_B)
    return torch.stack([first_PB, second_PB], dim=2)


def hashes(keys_B2: Tensor, T: int, D: int) -> Tensor:
    """Return a 32-bit number for each row, position and channel, int64 [B, T, D], by the rows' keys of one place."""
    device = keys_B2.device
    elements_TD = mix_(torch.arange(T, device=device)[:, None] * D + torch.arange(D, device=device))
    first_B11, second_B11 = keys_B2[:, :, None, None].unbind(dim=1)
    x_BTD = elements_TD ^ first_B11
    x_BTD += second_B11
    x_BTD &= WORD
    return mix_(x_BTD)


def dropped(x_BTD: Tensor, keys_B2: Tensor | None, probability: float) -> Tensor:
    """Return x with elements set to 0 with this probability and the others divided by 1 - p; x itself without keys."""
    if keys_B2 is None:
        return x_BTD
    is_dropped_BTD = hashes(keys_B2, *x_BTD.shape[1:]) < round(probability * 2**32)
    return (x_BTD / (1 - probability)).masked_fill(is_dropped_BTD, 0.0)
