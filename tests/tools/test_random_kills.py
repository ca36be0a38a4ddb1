"""A worker, a node and a driver killed at a random moment: no image is lost or repeated, and no process is left.

Three kills here, and twenty with `python tools/random_kills.py`.
"""

import random

import pytest

import random_kills

pytestmark = pytest.mark.tools


@pytest.mark.parametrize("victim", random_kills.VICTIMS)
def test_random_kill_costs_no_epoch_and_no_image(victim):
    seed = random.randrange(10_000)
    rng = random.Random(seed)
    moment = rng.uniform(0, 20)
    print(f"seed {seed}: {victim} after {moment:.1f} s of fit()")  # shown when the test fails
    outcome = random_kills.run(victim, moment, rng)
    assert 0 < outcome.loss < 2, "it should be less than that of guessing, 2.3"
