"""When an operation begins, who waits for its end; and waiting for it later."""
import pyep

from .shapes import chance, pick
from .world import Running, wait_for_inputs


class Operation:
    """One step.  weight: how often it is drawn, beside others.  It is drawn in `__init__`, by which nothing is changed yet."""

    weight = 1

    def __init__(self, world, held, rng):
        self.world, self.held, self.buf, self.me = world, held, held.buf, held.buf.rank
        self.late = pick(rng, range(world.comm.size)) if chance(rng, 0.1) else None       # the rank that the others wait for
        self.name = "first buffer: " if held.born < 0 else f"buffer of step {held.born}: "

    @staticmethod
    def may(world, held):
        """Whether it can be run now."""
        return True

    def run(self):
        """Run it on the buffer and compare what comes back with the oracle."""
        raise NotImplementedError


class Timing:
    """One way to begin and to end an operation."""

    def __init__(self, rng, hooks):
        """hooks: whether the operation has them."""
        self.hook = hooks and chance(rng, 0.4)
        self.async_finish = not self.hook and chance(rng, 0.3)
        self.previous = pick(rng, ("", "", "", "captured", "last"))          # which event to wait for

    def __str__(self):
        words = ["hook"] * self.hook + ["async_finish"] * self.async_finish
        return ", ".join(words + [f"previous_event {self.previous}"] * bool(self.previous))

    @property
    def needs_out(self):
        """Whether low-latency operations must be given the array to write."""
        return self.async_finish and bool(self.previous)

    def options(self, held, like):
        """As arguments of an operation whose inputs are there, all of them: an event covers only what came before; like: one."""
        options = dict(async_finish=self.async_finish)
        if self.hook:
            options["return_recv_hook"] = True
        if self.previous == "captured":
            options["previous_event"] = pyep.Buffer.capture(like)
        elif self.previous == "last" and held.event is not None:
            wait_for_inputs()
            options["previous_event"] = held.event
        return options

    def ended(self, held, born, words, event, complete):
        """Compare the results, now or when the event was waited for."""
        held.event = event
        if self.async_finish:
            held.running.append(Running(born, words, event, complete))
        else:
            complete()


class Wait(Operation):
    """Wait for an operation with async_finish, not always the first one, on the stream or on the host."""

    weight = 3

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.running, self.on_host = world.choose(held.running), chance(rng, 0.5)

    @staticmethod
    def may(world, held):
        return bool(held.running)

    def __str__(self):
        return f"{self.name}wait on the {'host' if self.on_host else 'stream'} for {self.running.words}"

    def run(self):
        self.held.running.remove(self.running)
        self.running.finish(self.on_host)
