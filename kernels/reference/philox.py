"""Philox4x32-10: random words for every counter, without any state (Salmon et al., SC 2011)."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_FACTORS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(seed: int, high: int | Tensor, low: Tensor) -> Tensor:
    """Four 32-bit words for every counter ``(high, low)``, [N, 4] int64.

    Args:
        seed: 64 bits of key.
        high: upper 64 bits of the counters: one for all, int64 of no dimension if a tensor, or [N].
        low: lower 64 bits of the counters, [N] int64.
    """
    upper = high.expand(low.shape) if isinstance(high, Tensor) else torch.full_like(low, high)
    words = [low & _WORD, low >> 32 & _WORD, upper & _WORD, upper >> 32 & _WORD]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        # Products of 64 bits wrap around, which loses the sign alone.
        first, second = (words[2 * i] * _FACTORS[i] for i in range(2))
        words = [
            second >> 32 & _WORD ^ words[1] ^ keys[0],
            second & _WORD,
            first >> 32 & _WORD ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [key + step & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(words, dim=-1)
