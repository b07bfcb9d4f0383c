"""The largest keep ratio within a latency, on staircases of a made-up machine."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spot_vit.measure import staircase
from spot_vit.measure.staircase import largest_within

PATCHES = 196


def tokens(ratio: float) -> int:
    return math.floor(PATCHES * Fraction(str(ratio)))


class Machine:
    """A model on a machine that works in tiles of tokens.

    Args:
        tile: tokens that cost as much as one.
        pruning: milliseconds that scoring takes, unless all tokens stay.
        noise: standard deviation of a pass, as a share.
        odd: milliseconds more at some numbers of tokens.
    """

    def __init__(
        self,
        tile: int = 32,
        pruning: float = 0.0,
        noise: float = 0.0,
        odd: Callable[[int], float] = lambda count: 0.0,
        seed: int = 0,
    ) -> None:
        self.tile, self.pruning, self.noise, self.odd = tile, pruning, noise, odd
        self.random = random.Random(seed)
        self.passes: list[float] = []

    def ms(self, ratio: float) -> float:
        count = tokens(ratio)
        scored = self.pruning if count < PATCHES else 0.0
        return 1.0 + math.ceil(count / self.tile) + scored + self.odd(count)

    def __call__(self, ratios: Sequence[float]) -> list[list[float]]:
        self.passes += ratios
        return [
            [self.ms(ratio) * max(0.2, self.random.gauss(1, self.noise)) for _ in range(7)]
            for ratio in ratios
        ]


@given(tile=st.integers(1, 80), target=st.floats(1.5, 8.0), pruning=st.sampled_from([0.0, 0.4]))
def test_the_edge_of_the_highest_step_within_the_target(tile: int, target: float, pruning: float):
    machine = Machine(tile, pruning)
    every = {k / 1000: machine.ms(k / 1000) for k in range(6, 1001)}
    within = [ratio for ratio, ms in every.items() if ms <= target]
    if not within:
        with pytest.raises(ValueError, match="is out of reach"):
            largest_within(machine, target, least=Fraction(6, 1000), tokens=tokens)
        return
    found = largest_within(machine, target, least=Fraction(6, 1000), tokens=tokens)
    assert every[found] <= target
    assert found == max(within)  # no token fewer than the step allows
    assert len(machine.passes) < 40


def test_a_dense_model_within_the_target_is_all_that_is_timed():
    machine = Machine(pruning=5.0)
    for target in (8.0, 1e9):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert largest_within(machine, target, tokens=tokens) == 1.0
    assert set(machine.passes) == {1.0}


def test_fewer_tokens_that_take_longer_do_not_hide_more():
    """Odd numbers of tokens are slow here; a search by halves would end at the first of them."""
    machine = Machine(tile=1, odd=lambda count: 30.0 * (90 <= count < 110))
    found = largest_within(machine, 151.0, tokens=tokens)
    assert tokens(found) == 150


def test_pruning_that_slows_the_model_down():
    """Clearly below the dense cost it is an error; within noise of it the dense model is taken."""
    machine = Machine(tile=196, pruning=0.5)  # a tiny model: 2 ms however many tokens there are
    with pytest.raises(ValueError, match=r"dense model takes 2 ms, and pruning slows it down here"):
        largest_within(machine, 1.5, least=Fraction(6, 1000), tokens=tokens)
    noisy = Machine(tile=196, pruning=0.5, noise=0.03)
    with pytest.warns(
        RuntimeWarning, match=r"slows this model down here \(batch 1\): keep="
    ) as said:
        found = {
            largest_within(noisy, 1.99, least=Fraction(6, 1000), tokens=tokens, where=" (batch 1)")
            for _ in range(20)
        }
    assert found == {1.0}
    assert "the dense model" in str(said[0].message) and str(said[0].message).count(" ms") == 3


@given(
    seed=st.integers(0, 2**32), noise=st.sampled_from([0.01, 0.05, 0.3]), target=st.floats(1.5, 9.0)
)
def test_noise_neither_crashes_nor_costs_more_than_itself(seed: int, noise: float, target: float):
    machine = Machine(pruning=0.3, noise=noise, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            found = largest_within(machine, target, least=Fraction(6, 1000), tokens=tokens)
        except ValueError:
            assert target < 2.3 * (1 + 3 * noise)  # one step of tokens, scored
            return
    assert 0.006 <= found <= 1
    assert machine.ms(found) <= target * (1 + 3 * noise)


def test_a_step_is_taken_whole_though_its_times_scatter():
    """A target within noise of a step: nearly always its upper edge, where 128 tokens are left."""
    edges = []
    for seed in range(40):
        machine = Machine(noise=0.01, seed=seed)
        edges.append(tokens(largest_within(machine, 5.03, tokens=tokens)))
    assert sum(edge == 128 for edge in edges) >= 36
    assert max(edges) <= 128


def test_ratios_with_the_same_tokens_are_timed_once():
    machine = Machine(tile=1)
    found = largest_within(
        machine, 100.0, tokens=lambda ratio: math.floor(16 * Fraction(str(ratio)))
    )
    sparse = {ratio for ratio in machine.passes if ratio < 1}
    keys = [math.floor(16 * Fraction(str(ratio))) for ratio in sparse]
    assert len(keys) == len(set(keys)) and found < 1


def test_a_model_of_one_patch_has_nothing_to_prune():
    machine = Machine()
    with pytest.raises(ValueError, match="out of reach"):
        largest_within(machine, 1.0, least=Fraction(1), tokens=tokens)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([100.0], 0.0),
        ([100.0, 102.0], 2 * math.sqrt(2) * 0.93 * 1.0 / math.sqrt(2) / 101.0),
        ([104.0, 100.0, 102.0, 101.0, 103.0], 2 * math.sqrt(2) * 0.93 * 2.0 / math.sqrt(5) / 102.0),
        ([1.0, 9.0], staircase.NOISE_LIMIT),
    ],
    ids=["one", "two", "five", "limit"],
)
def test_noise_is_two_standard_errors_of_the_difference_of_medians(
    samples: list[float], expected: float
) -> None:
    found = staircase._Measured(lambda ratios: [samples for _ in ratios], tokens)
    found.measure([1.0])
    assert found.noise == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "down", "up"),
    [(123.4, "123", "124"), (9.87654, "9.87", "9.88"), (0.012345, "0.0123", "0.0124"),
     (0.0, "0", "0"), (2.5, "2.5", "2.5")],
)  # fmt: skip
def test_printed_bounds_can_be_reached(value: float, down: str, up: str) -> None:
    assert (staircase.printed(value, up=False), staircase.printed(value, up=True)) == (down, up)


def test_why_nothing_fits_is_said() -> None:
    flat = Machine(tile=PATCHES)
    with pytest.raises(ValueError, match=r"the dense model takes 2 ms, and pruning slows it down"):
        largest_within(flat, 1.5, least=Fraction(1, 10), tokens=tokens)
    with pytest.raises(ValueError, match="keep from 1 to 1 costs 2 to 2 ms"):
        largest_within(flat, 1.5, least=Fraction(1), tokens=tokens)
