"""Compiles kernels in processes of their own: where LLVM aborts, it ends the process that it is in."""
import concurrent.futures
import os
import pathlib
import pickle
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from typing import NamedTuple

from pyep.kernels import cpu
from pyep.kernels.op import CUDA

LIMIT = 600                                     # seconds for one kernel: then the compiler is taken to hang
KERNELS = 30                                    # of one process: all that it has compiled stays in its memory, up to a GB


class Job(NamedTuple):
    """A kernel to be compiled; its function is one that a module has by its name."""

    name: str                                   # for people
    fn: object
    machine: object                             # a `Cpu`, or CUDA
    threads: int                                # of a block
    constants: dict


def compile_all(jobs, processes=None, note=lambda job, error: None):
    """Compile with nothing in the disk cache, in as many processes as there are cores: [(job, what went wrong)].

    note: called after each job; error: what went wrong, or None.
    """
    waiting, wrong = queue.SimpleQueue(), []
    for job in jobs:
        waiting.put(job)

    def work():
        with Compiler(folder) as compiler:
            while not waiting.empty():
                try:
                    job = waiting.get_nowait()
                except queue.Empty:                              # another thread was quicker
                    return
                error = compiler.compile(job)
                if error:
                    wrong.append((job, error))
                note(job, error)
    count = processes or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    return wrong


class Compiler:
    """A process that compiles one kernel after another; a fresh one once it has died, or has compiled many."""

    def __init__(self, folder):
        """folder: for the disk cache."""
        self._folder, self._process, self._said, self._compiled = folder, None, None, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._end()

    def compile(self, job):
        """What went wrong, or None."""
        if self._compiled == KERNELS:
            self._end()
        if self._process is None:
            self._start()
        self._compiled += 1
        limit = threading.Timer(LIMIT, self._process.kill)
        limit.start()
        try:
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            status = self._process.wait()
            ended_by = signal.Signals(-status).name if status < 0 else f"status {status}"
            self._said.seek(0)
            said = self._said.read()[-2000:]
            self._end()
            return f"the process ended by {ended_by} while it compiled this: {said}"
        finally:
            limit.cancel()

    def _start(self):
        here = pathlib.Path(__file__).resolve().parent
        environment = dict(os.environ, PYEP_CACHE=self._folder, PYTHONPATH=os.pathsep.join([str(here), str(here.parent)]))
        self._said, self._compiled = tempfile.TemporaryFile("w+", errors="replace"), 0
        self._process = subprocess.Popen([sys.executable, "-m", "compiling"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._said, env=environment)

    def _end(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._said.close()
            self._process = None


# ---- in the process --------------------------------------------------------------------------------------------------

def compile_one(job):
    """As the engines do it; for a GPU there need be none."""
    if job.machine == CUDA:
        from pyep.kernels import cuda
        cuda.link(cuda.ptx(job.fn, job.threads, **job.constants))
    else:
        cpu.compile_kernel(job.fn, job.machine, job.constants)


def main():
    """Compile what comes in, and answer what went wrong, or None."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                                                # what else is printed
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            compile_one(job)
            wrong = None
        except Exception:
            wrong = traceback.format_exc()
        pickle.dump(wrong, answers)
        answers.flush()


if __name__ == "__main__":
    main()
