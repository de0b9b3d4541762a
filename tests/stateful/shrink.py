"""Leave out the steps that a failure does not need.

    PYTHONPATH=.:tests python -m stateful.shrink --ranks 3 --seed 5 --steps 0:813

Every try is a job of its own, since a failure may leave ranks that hang or are gone.  Half of the steps are left out, then a
quarter, an eighth and so on; the last step stays (`ddmin` of Zeller and Hildebrandt, without its complements).
"""
import argparse
import os

import ranks

from .__main__ import options
from .campaign import numbers_of, run, text_of

LIMIT = 300.0                           # seconds for a try; one that hangs has failed too


def fails(arguments, numbers):
    """Whether these steps fail, and in which words."""
    finished = ranks.launch(arguments.ranks, run, arguments.seed, text_of(numbers), arguments.all_modes, timeout=LIMIT)
    errors = [text[text.rindex("AssertionError: "):] for text in finished.errors.values() if "AssertionError: " in text]
    hung = [rank for rank, result in enumerate(finished.results) if result is None]
    return errors[0] if errors else f"ranks {hung} hang or are gone" if hung else ""


def shrink(numbers, still_fails):
    """The steps that are left when none of the parts of them may be left out any more; `still_fails(numbers)`."""
    size = len(numbers) // 2
    while size:
        begin = 0
        while begin < len(numbers) - 1:
            rest = numbers[:begin] + numbers[min(begin + size, len(numbers) - 1):]
            if still_fails(rest):
                numbers = rest
            else:
                begin += size
        size //= 2
    return numbers


def main():
    parser = options(argparse.ArgumentParser(prog="stateful.shrink", description=__doc__))
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("PYEP_DEVICE", "cpu")
    words = ""

    def still_fails(numbers):
        nonlocal words
        failure = fails(arguments, numbers)
        words = failure or words
        print(f"{len(numbers)} steps: {'fail' if failure else 'right'}", flush=True)
        return bool(failure)
    numbers = numbers_of(arguments.steps)
    if not still_fails(numbers):
        raise SystemExit("these steps are right: nothing to leave out")
    print(f"steps {text_of(shrink(numbers, still_fails))} fail:\n{words}")


if __name__ == "__main__":
    main()
