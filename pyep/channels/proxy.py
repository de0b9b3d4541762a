"""The proxy of the CPU engine: a thread that serves the triggers of a FIFO, and brings in what the peers' proxies send.

It never waits for a peer, and needs neither the main thread nor the peers' to call MPI.
"""
import ctypes
import os
import threading
import time

from ..errors import EPTransportError
from .handles import MAX_MEMORIES

IN_FLIGHT = 64                          # messages to a peer that MPI has not sent yet, at most: it may be stuck
# A proxy that finds nothing to do yields the core YIELDS times, then takes SHORT_NAPS short naps, which is about a quarter of a
# second, then long ones: it then costs some percent of a core.
YIELDS, SHORT_NAPS = 20, 5000
NAP_S, LONG_NAP_S = 20e-6, 500e-6
END_S = 1.0                             # how long `end` waits for the thread, which then ends by itself
PR_SET_TIMERSLACK = 29


class Proxy:
    """One FIFO (`pyep.channels.fifo.Fifo`), and the thread that serves it.

    links: the channels that it serves, `pyep.channels.link.Link`s, by their number in triggers.  error: what ended it, or None.
    """

    def __init__(self, fifo, links, failed):
        """failed: [1] int64, the word that ends all waits of this rank, to be set if this fails."""
        if len(links) >= MAX_MEMORIES:
            raise EPTransportError(f"a proxy would serve {len(links)} channels, but triggers tell only {MAX_MEMORIES - 1} peers' "
                                   "memories apart: set PYEP_NUM_PROXIES to more")
        self.links, self.error = links, None
        self._fifo, self._failed, self._last = fifo, failed, None
        self._thread, self._stopping, self._ended = None, False, False
        self._leaving, self._said_goodbye, self._until = False, False, (0, 0)

    # ---- the thread's life -----------------------------------------------------------------------------------------------

    @property
    def runs(self):
        return self._thread is not None and self._thread.is_alive()

    def start(self):
        """Start the thread, also after `stop`."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pyep proxy", daemon=True)
        self._thread.start()

    def stop(self):
        """End the thread.  Triggers stay in the FIFO."""
        self._stopping = True
        if self.runs:
            self._thread.join()

    def leave(self, patience_s, timeout_s):
        """Serve what is in the FIFO, say goodbye to all peers, wait for theirs, and end; does not wait for that.

        Without the peers' goodbyes it ends after patience_s if all is sent, after timeout_s if not.
        """
        now = time.monotonic()
        self._until, self._leaving = (now + patience_s, now + timeout_s), True

    def join(self, timeout_s):
        """Wait until the thread has ended, but no longer than `timeout_s`."""
        if self.runs:
            self._thread.join(timeout_s)
        if not self.runs:
            self._release()

    def drain(self, timeout_s):
        """Wait until what was pushed is sent, but no longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.runs and not self._all_sent():
            if time.monotonic() > deadline:
                break
            time.sleep(1e-3)

    def end(self):
        """Stop for good; idempotent.  What peers still send is lost."""
        self._stopping = self._ended = True
        if self._thread is not threading.current_thread():       # else garbage is collected in the thread itself: see `_run`
            self.join(END_S)

    def state(self):
        """What to know of it when a peer does not answer."""
        life = f"has failed: {self.error}" if self.error else "runs" if self.runs else "does not run"
        return f"{self._fifo.state()}, last trigger {self._last or 'none'}; the proxy {life}"

    # ---- what it does ----------------------------------------------------------------------------------------------------

    def _run(self):
        wake_in_time()
        idle = 0
        try:
            while not (self._stopping or self._all_closed() or self._has_waited()):
                idle = 0 if self._work() else idle + 1
                rest(idle)
        except Exception as error:
            self.error = error
            self._failed[0] = 1
        if self._ended or self._leaving:
            self._release()

    def _release(self):
        for link in self.links:
            link.release()

    def _all_sent(self):
        return self._fifo.empty and not any(link.in_flight for link in self.links)

    def _all_closed(self):
        """Whether all is sent and received, goodbyes included."""
        return self._said_goodbye and all(link.closed and not link.in_flight for link in self.links)

    def _has_waited(self):
        """Whether this one leaves, and the peers' goodbyes are not waited for any more."""
        patience, end = self._until
        return self._leaving and time.monotonic() > (patience if self._all_sent() else end)

    def _work(self):
        """Serve what there is: whether there was anything."""
        worked, trigger = False, self._fifo.next()
        while trigger is not None and all(link.in_flight < IN_FLIGHT for link in self.links):
            self.serve(trigger)
            self._fifo.pop()
            worked, trigger = True, self._fifo.next()
        if self._leaving and not self._said_goodbye and trigger is None:
            for link in self.links:
                link.say_goodbye()
            self._said_goodbye = True
        for link in self.links:
            worked |= link.progress()
        return worked

    def serve(self, trigger):
        """Begin what a trigger asks for."""
        self._last, number = trigger, trigger.semaphore
        if number >= len(self.links) or (trigger.source_memory, trigger.destination_memory) != memories(number):
            raise EPTransportError(f"a kernel pushed a trigger that is none: {trigger}")
        self.links[number].serve(trigger, self._fifo.position)


def memories(number):
    """The numbers of the memories that channel `number` of a proxy reads and writes: this rank's, and that peer's."""
    return 0, 1 + number


def rest(idle):
    """Leave the core to others; idle: how often in a row there was nothing to do."""
    if 0 < idle <= YIELDS:
        os.sched_yield()
    elif idle:
        time.sleep(NAP_S if idle <= SHORT_NAPS else LONG_NAP_S)


def wake_in_time():
    """Let this thread sleep as long as it says: else Linux adds up to 50 us."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)
