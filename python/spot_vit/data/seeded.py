"""Random numbers of a sample as a function of where it stands, whoever draws them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def seed_of(*words: int) -> int:
    """A seed below 2**63 made of integers: whoever changes one, or their order, gets another."""
    state = len(words)
    for word in words:  # the finaliser of SplitMix64 after each word
        state = (state + (word & _WORD) * _GOLDEN + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


def plant(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's CPU generator, which transforms of pictures draw from.

    CUDA's generators are left alone: ``torch.manual_seed`` would seed them too.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_states() -> Iterator[None]:
    """Puts the states of the generators that `plant` seeds back when the block ends."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
