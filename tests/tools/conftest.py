"""What the tests of how bases are made share."""

import numpy as np
import pytest

from t2i_align.testbed.scenes import sample_scene
from tools.testbed.sd import SD


@pytest.fixture(scope="module")
def sd():
    return SD()


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(40)]
