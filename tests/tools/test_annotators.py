"""Simulated annotators keep their promises about labels, flips and tastes."""

import numpy as np
import pytest

from t2i_align.testbed.oracle import Verdict
from t2i_align.testbed.vision import Seen, View
from tools.testbed.annotators import TRAITS, Annotator, biased, traits


def verdict(rewards, views=None):
    rewards = np.asarray(rewards, float)
    views = views or tuple(View((), "gray", 0.0) for _ in rewards)
    return Verdict(rewards, rewards, np.zeros(len(rewards)), rewards, {}, tuple(views))


def seen(colour="red", size="large", x=32.0, y=32.0):
    return Seen(colour, "circle", size, x, y, 10.0, 1.0, 0.2)


def label(annotator, first, second):
    return annotator.label(first, second, np.random.default_rng(1))


def test_the_expert_prefers_the_higher_reward_and_ties_within_the_margin():
    labels = label(Annotator(margin=0.02), verdict([0.9, 0.4, 0.50]), verdict([0.4, 0.9, 0.51]))
    assert labels.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("noise", "second", "expected"),
    [
        ({"flip": 0.0}, 0.1, 1.0),
        ({"flip": 0.1}, 0.1, 0.9),
        ({"flip": 0.4}, 0.1, 0.6),
        ({"temperature": 0.1}, 0.7, 0.8808),  # a difference of 0.2: sigmoid(2)
    ],
)
def test_noisy_labels_are_right_at_their_rate(noise, second, expected):
    """Of 20,000 pairs, within four standard errors."""
    labels = label(Annotator(**noise), verdict(np.full(20_000, 0.9)), verdict(np.full(20_000, second)))
    assert abs(labels.mean() - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000)


@pytest.mark.parametrize(
    "options", [{"flip": 0.6}, {"flip": -0.1}, {"temperature": 0.0}, {"flip": 0.1, "temperature": 1.0}]
)
def test_impossible_noise_is_an_error(options):
    with pytest.raises(ValueError):
        Annotator(**options)


def test_traits_by_hand():
    """Two objects: one of them big, one warm, mean x = 24, so (32 - 24) / 32 = 0.25; mean y = 40, so -0.25."""
    view = View((seen("red", "large", 16, 32), seen("blue", "small", 32, 48)), "white", 0.0)
    row = dict(zip(TRAITS, traits([view])[0], strict=True))
    assert row == {"white": 1, "black": 0, "big": 0.5, "warm": 0.5, "crowded": 0, "left": 0.25, "high": -0.25}


def test_a_taste_outweighs_the_reward():
    """White is worth 0.3 to the biased annotator, more than the 0.1 by which the gray image is better."""
    gray, white = (View((seen(),), name, 0.0) for name in ("gray", "white"))
    first, second = verdict([0.5], (gray,)), verdict([0.4], (white,))
    assert label(Annotator(), first, second) == 1.0 and label(biased(0.3), first, second) == 0.0
    dark = Annotator(weights=tuple(-0.3 * (trait == "white") for trait in TRAITS))
    assert label(dark, first, second) == 1.0 and label(dark, second, first) == 0.0
