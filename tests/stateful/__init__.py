"""A stateful random test of `Buffer`: thousands of operations in random order, each compared with the oracle, bit for bit.

What single operations do is tested elsewhere; here it is what they do after, and between, others.  A *step* is one operation on all
ranks.  Everything in it is a function of the seed, the number of the step and the state before it, so every rank draws the same
operation and makes all ranks' inputs, and a seed replays a run:

    PYTHONPATH=.:tests mpiexec -n 3 python -m mpi4py -m stateful --seed 5 --steps 0:2000
    PYTHONPATH=.:tests python -m stateful.shrink --ranks 3 --seed 5 --steps 0:813        # which of these steps does it take?

Steps can be left out (`--steps 0:40,97,812`): those that remain draw the same kind of operation and choose the same of what is
held, wherever that is still possible.  `--tell` prints each before it is run, for a failure that ends the process.

Hypothesis' RuleBasedStateMachine is not used: its rules run in one process, which would have to tell the ranks one by one what to
do (there and back for each step, and inputs would travel) and could not go on once some ranks hang; and its runs are as long as
what it can shrink, fifty steps, where this finds what takes hundreds.

world.py            what is held: buffers, results, handles, hooks, events
shapes.py           shapes and modes that are tried
waiting.py          when an operation begins and who waits for its end
promises.py         what `Buffer` promises, where that differs between versions
low_latency.py, high_throughput.py, refused.py, buffers.py: the operations
campaign.py         the steps, one after another, and the words of a failure
shrink.py           leaves out the steps that a failure does not need
"""
