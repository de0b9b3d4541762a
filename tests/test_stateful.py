"""Random sequences of all operations of a `Buffer`, or of two, against the oracle: see `stateful`."""
import os

import pytest
import ranks
from stateful.campaign import OPERATIONS, numbers_of, run, text_of
from stateful.shrink import shrink

EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", 100))       # as many times four steps on 2 ranks, and half as many on others
LIMIT = 600                                                     # seconds for a run: kernels may have to be compiled


@pytest.mark.parametrize("n, steps", [(1, 50), (2, 400), (3, 100), (4, 50)])
def test_random_sequences(n, steps):
    """By default a few hundred steps in the modes that other tests compile; in a campaign runs of a thousand, in all modes."""
    steps, all_modes = steps * EXAMPLES // 100, EXAMPLES > 100
    for seed, begin in enumerate(range(0, steps, 1000)):
        counts = ranks.run(n, run, seed, f"0:{min(1000, steps - begin)}", all_modes, timeout=LIMIT)
        assert all(c == counts[0] for c in counts)
        assert n != 2 or set(counts[0]) == {kind.__name__ for kind in OPERATIONS}, "an operation was never run"


def test_steps_are_text():
    assert numbers_of("0:3,7,9:11") == [0, 1, 2, 7, 9, 10]
    assert text_of([0, 1, 2, 7, 9, 10]) == "0:3,7,9:11"


def test_shrinking():
    """What is needed stays, and the step that fails; here two others."""
    assert shrink(list(range(100)), lambda numbers: {17, 64, 99} <= set(numbers)) == [17, 64, 99]
