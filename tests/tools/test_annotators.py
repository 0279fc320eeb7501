"""Simulated annotators keep their promises about labels, flips and tastes."""

import numpy as np
import pytest

from t2i_align.testbed.oracle import Verdict
from t2i_align.testbed.vision import Seen, View
from tools.testbed.annotators import TRAITS, Biased, Expert, Noisy, Person, sample_people, traits


def verdict(rewards, views=None):
    rewards = np.asarray(rewards, float)
    views = views or tuple(View((), "gray", 0.0) for _ in rewards)
    return Verdict(rewards, rewards, np.zeros(len(rewards)), rewards, {}, tuple(views))


def seen(colour="red", size="large", x=32.0, y=32.0):
    return Seen(colour, "circle", size, x, y, 10.0, 1.0, 0.2)


def test_the_expert_prefers_the_higher_reward_and_ties_within_the_margin():
    labels = Expert(margin=0.02).label(verdict([0.9, 0.4, 0.50]), verdict([0.4, 0.9, 0.51]), np.random.default_rng(0))
    assert labels.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.4])
def test_flip_rate(flip):
    """Of 20,000 clear pairs a share `flip` is wrong; four standard errors are 0.014 at most."""
    rng = np.random.default_rng(1)
    labels = Noisy(flip=flip).label(verdict(np.full(20_000, 0.9)), verdict(np.full(20_000, 0.1)), rng)
    assert abs((labels == 0).mean() - flip) <= 4 * np.sqrt(flip * (1 - flip) / 20_000)


def test_bradley_terry():
    """A difference of 0.2 at temperature 0.1 is preferred with probability sigmoid(2) = 0.8808."""
    rng = np.random.default_rng(2)
    labels = Noisy(temperature=0.1).label(verdict(np.full(20_000, 0.7)), verdict(np.full(20_000, 0.5)), rng)
    assert abs(labels.mean() - 0.8808) < 0.0092


@pytest.mark.parametrize(
    "options", [{"flip": 0.6}, {"flip": -0.1}, {"temperature": 0.0}, {"flip": 0.1, "temperature": 1.0}]
)
def test_impossible_noise_is_an_error(options):
    with pytest.raises(ValueError):
        Noisy(**options)


def test_traits_by_hand():
    """Two objects: one of them big, one warm, mean x = 24, so (32 - 24) / 32 = 0.25; mean y = 40, so -0.25."""
    view = View((seen("red", "large", 16, 32), seen("blue", "small", 32, 48)), "white", 0.0)
    row = dict(zip(TRAITS, traits([view])[0], strict=True))
    assert row == {"white": 1, "black": 0, "big": 0.5, "warm": 0.5, "crowded": 0, "left": 0.25, "high": -0.25}


def test_the_biased_annotator_falls_for_a_bright_background():
    bright, gray = (View((seen(),), name, 0.0) for name in ("white", "gray"))
    first, second = verdict([0.5], (gray,)), verdict([0.4], (bright,))
    rng = np.random.default_rng(0)
    assert Expert().label(first, second, rng).tolist() == [1.0]
    assert Biased(strength=0.3).label(first, second, rng).tolist() == [0.0]


def test_people_share_their_types_taste():
    people = sample_people(40, types=4, spread=0.1, seed=3)
    weights = np.asarray([p.weights for p in people])
    kinds = np.asarray([p.type_id for p in people])
    within = max(np.linalg.norm(weights[kinds == k] - weights[kinds == k].mean(0), axis=1).max() for k in range(4))
    centres = np.asarray([weights[kinds == k].mean(0) for k in range(4)])
    between = min(np.linalg.norm(a - b) for i, a in enumerate(centres) for b in centres[:i])
    assert 0 < within < between
    assert people == sample_people(40, types=4, spread=0.1, seed=3) != sample_people(40, types=4, spread=0.1, seed=4)
    with pytest.raises(ValueError, match="2 people of 4 types"):
        sample_people(2, types=4)


def test_opposite_tastes_disagree():
    warm, cold = (View((seen(colour),), "gray", 0.0) for colour in ("red", "blue"))
    weights = [0.0] * len(TRAITS)
    weights[TRAITS.index("warm")] = 1.0
    rng = np.random.default_rng(0)
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        person = Person(0, 0, tuple(sign * w for w in weights))
        assert person.label(verdict([0.5], (warm,)), verdict([0.5], (cold,)), rng).tolist() == [expected]
