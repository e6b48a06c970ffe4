"""Random words: Philox4x32-10 in PyTorch, the same as `csrc/philox.h`. `sampling.py` defines their use.

Words and counters are int64 tensors in [0, 2^32). Shapes are static, and nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
PIXELS, POSITIVES = 0, 1  # streams
_ROUNDS = 10
# The multipliers less 2^32: products of 32-bit words with these fit in int64. The true products reach 2^64.
_MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 16  # 512 KiB of int64


def philox(seed: Tensor | int, counter: Tensor, *, stream: int = PIXELS) -> Tensor:
    """One 32-bit random word per counter value (the word of a pixel), by Philox4x32-10.

    Four consecutive counter values share a Philox block, `counter >> 2`. `counter & 3` is the number of the word in it
    (`hpcloss.plan.sampling`).

    Args:
        seed: int, or 0-dim int64 tensor on the counter's device.
        counter: Integers of any shape, at least 0.
        stream: 32-bit number that separates independent uses of one seed.

    Returns:
        int64 tensor with the shape of the counter and values in [0, 2^32).

    Raises:
        ValueError: The seed has another shape or device, or is out of the int64 range.
        TypeError: Seed or counter is not an integer.
    """
    if counter.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counter must be int32 or int64, got {counter.dtype}")
    key = key_words(as_seed(seed, counter.device))
    return words_at(key, counter.long().reshape(-1), stream).reshape(counter.shape)


def philox_block(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four output words of Philox4x32-10; counter words and key words are int64 in [0, 2^32) and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # c * M = c * (M - 2^32) + c * 2^32: the first product fits in int64, the floor of its half adds exactly.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32).add_(c0), (p1 >> 32).add_(c2)
        c0, c1 = (high1 ^ c1).bitwise_xor_(k0), p1.bitwise_and_(MASK)
        c2, c3 = (high0 ^ c3).bitwise_xor_(k1), p0.bitwise_and_(MASK)
        k0, k1 = (k0 + _KEY_STEPS[0]) & MASK, (k1 + _KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def words_at(key: tuple[Tensor, Tensor], counter: Tensor, stream: int = PIXELS) -> Tensor:
    """One word per counter value [n]."""
    zero = torch.zeros_like(key[0])

    def word(counter: Tensor) -> Tensor:
        block = counter >> 2
        words = philox_block((block & MASK, block >> 32, zero, zero + stream), key)
        return torch.stack(words, 1).gather(1, (counter & 3)[:, None])[:, 0]

    return in_chunks(word, counter)


def dense_words(key: tuple[Tensor, Tensor], n: int) -> Tensor:
    """The words of pixels 0 ... n-1, each Philox block computed once."""
    zero = torch.zeros_like(key[0])

    def words(block: Tensor) -> Tensor:
        return torch.stack(philox_block((block & MASK, block >> 32, zero, zero + PIXELS), key), 1)

    return in_chunks(words, torch.arange((n + 3) // 4, device=key[0].device)).reshape(-1)[:n]


def in_chunks(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """function(*values), which acts row by row. Eager mode on the CPU runs it on pieces that stay in cache.

    A long chain of whole-map operations is limited by memory (2 to 5 times slower, measured).
    """
    if values[0].device.type != "cpu" or values[0].numel() <= _CHUNK or torch.compiler.is_compiling():
        return function(*values)
    return torch.cat([function(*chunk) for chunk in zip(*(v.split(_CHUNK) for v in values), strict=True)])


def key_words(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high word of the seed."""
    return seed & MASK, (seed >> 32) & MASK


def as_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as a 0-dim int64 tensor on the device; None: a new one from torch's generator."""
    if seed is None:
        return torch.randint(2**62, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be int64, got {seed.dtype}")
        if seed.dim() != 0:
            raise ValueError(f"seed must have shape [], got {list(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on {device}, as the data, got {seed.device}")
    elif isinstance(seed, int) and not isinstance(seed, bool):
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed must fit in int64, got {seed}")
        seed = torch.full((), seed, dtype=torch.int64, device=device)
    else:
        raise TypeError(f"seed must be a 0-dim int64 tensor or an int, got {type(seed).__name__}")
    return seed
