"""Run the body of a test on real MPI ranks, started from pytest.

    def body(comm, width):                      # a module-level function of a test module
        return comm.rank * width

    def test_it():
        assert ranks.run(2, body, 10) == [0, 10]

`run` keeps one `mpiexec` per number of ranks alive between tests. `launch` starts one for a single call whose ranks may
die or stall. Both start this file on every rank. Each rank connects to a Unix socket of the parent and gets its
requests from there: no rank needs another one to receive a request or to report, so a rank that raised is heard while
the others hang.
"""
import atexit
import contextlib
import dataclasses
import faulthandler
import functools
import importlib.util
import os
import pickle
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TIMEOUT = float(os.environ.get("PYEP_TEST_TIMEOUT", 120))  # seconds for one call
START = 120.0  # seconds until all ranks have connected
GRACE = 5.0  # seconds that the other ranks of a pool get once one has failed
LEAVE = 10.0  # seconds for MPI_Finalize and the end of mpiexec
FORWARD = 5.0  # seconds until mpiexec has forwarded what ranks write
TAG = "PYEP_TEST_JOB"  # in the environment of every process of a job: the job's name
# Whatever its options, MPICH's launcher kills a job of which a rank died by a signal; with -disable-auto-cleanup it
# sends SIGUSR1 to the others when one has ended early. A shell between the launcher and the rank turns the signal into
# an exit status and ignores SIGUSR1, which its child inherits.
OUTLIVED = ["sh", "-c", 'trap "" USR1; "$@"; exit $?', "sh"]
_pools = {}


class RanksFailed(Exception):
    """Some ranks raised, died or did not answer; `errors` has the traceback, or what happened, by rank."""

    def __init__(self, n, errors):
        alike = {}  # the ranks by text: four equal tracebacks are shown once
        for rank, text in sorted(errors.items(), key=lambda item: ("\n" not in item[1], item[0])):  # tracebacks first
            alike.setdefault(text.rstrip(), []).append(rank)
        super().__init__("".join(f"\n--- rank {str(who)[1:-1]} of {n}: {text}" for text, who in alike.items()))
        self.errors = errors


@dataclasses.dataclass
class Finished:
    """What `launch` saw. `results[rank]` is the value, the traceback's text, or None if the rank died or stalled."""

    returncode: int  # of mpiexec; -SIGKILL when the job had to be killed
    stdout: str
    stderr: str
    results: list
    errors: dict  # the traceback's text by rank, of the ranks that raised


def run(n, function, *args, timeout=None, **kwargs):
    """Call `function(comm, *args, **kwargs)` on the n ranks of a pool and return the results by rank."""
    request = request_for(function, args, kwargs)
    pool = _pools.pop(n, None) or Job(n)
    try:
        values, errors, silent = pool.call(request, timeout, GRACE)
        if not silent:  # otherwise a rank hangs or is dead, and the next call starts a fresh pool
            _pools[n] = pool
    finally:
        if n not in _pools:
            pool.kill()
        pool.relay()
    if errors or silent:
        raise RanksFailed(n, errors | silent)
    return [values[rank] for rank in range(n)]


def launch(n, function, *args, timeout=None, env=None, mpiexec_args=()):
    """Call `function(comm, *args)` on n fresh ranks that may die (os._exit, SIGKILL) or stall (SIGSTOP).

    Returns when every rank has answered, died or is stopped, at the latest after `timeout` seconds; what is left of
    the job is then killed.
    """
    request = request_for(function, args, {})
    job = Job(n, env, [*survive(), *mpiexec_args], OUTLIVED)
    try:
        values, errors, _ = job.call(request, timeout)
        job.leave(finalize=len(values) == n)  # MPI_Finalize waits for the ranks that are gone
    finally:
        job.kill()
    results = [values.get(rank, errors.get(rank)) for rank in range(n)]
    return Finished(job.process.returncode, *job.output(), results, errors)


@atexit.register
def close_pools():
    """End every pool in good order."""
    while _pools:
        _, pool = _pools.popitem()
        try:
            pool.leave(finalize=True)
        finally:
            pool.kill()
            pool.relay()


class Job:
    """One mpiexec, its ranks' connections, and its output."""

    def __init__(self, n, env=None, mpiexec_args=(), prefix=()):
        self.n, self.ranks, self.pids, self.hung, self.tidy = n, {}, {}, [], True
        self.files, self.seen = [tempfile.TemporaryFile(), tempfile.TemporaryFile()], [0, 0]
        # Only this user can enter the directory, so that whoever connects may be trusted.
        with tempfile.TemporaryDirectory(prefix="pyep-") as folder, socket.socket(socket.AF_UNIX) as listener:
            self.name = folder
            listener.bind(f"{folder}/parent")
            listener.listen(n)
            listener.settimeout(0.2)
            command = [sys.executable, "-m", "mpi4py", __file__, f"{folder}/parent"]
            self.process = subprocess.Popen(
                [*mpiexec(), *mpiexec_args, "-n", str(n), *prefix, *command], stdin=subprocess.DEVNULL,
                stdout=self.files[0], stderr=self.files[1], start_new_session=True,  # Ctrl-C is for pytest alone
                env=environment() | (env or {}) | {TAG: self.name})
            try:
                self.accept(listener, time.monotonic() + START)
            except BaseException:
                self.kill()
                self.relay()
                raise

    def accept(self, listener, deadline):
        """Wait for all ranks to connect."""
        while len(self.ranks) < self.n:
            with contextlib.suppress(TimeoutError):
                connection = Connection(listener.accept()[0].detach())
                rank, pid = connection.recv()
                self.ranks[rank], self.pids[rank] = connection, pid
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{len(self.ranks)} of {self.n} ranks started: {shlex.join(self.process.args)}")

    def call(self, request, timeout=None, grace=None):
        """Send the request to every rank; return values, tracebacks and what befell the silent ranks, by rank."""
        values, errors, silent = {}, {}, {}
        timeout = TIMEOUT if timeout is None else timeout
        for connection in self.ranks.values():
            with contextlib.suppress(BrokenPipeError):  # a dead rank: recv sees it below
                connection.send((self.tidy, *request))
        deadline = time.monotonic() + timeout
        waiting = {connection: rank for rank, connection in self.ranks.items()}
        while waiting and time.monotonic() < deadline:
            for connection in wait(list(waiting), 0.1):
                rank = waiting.pop(connection)
                try:
                    raised, answer = connection.recv()
                    (errors if raised else values)[rank] = pickle.loads(answer)
                except (EOFError, ConnectionResetError):
                    silent[rank] = "died"
            if grace and (errors or silent):
                deadline, grace = min(deadline, time.monotonic() + grace), None
            if all(stopped(self.pids[rank]) for rank in waiting.values()):
                break
        self.hung, self.tidy = list(waiting.values()), not errors
        if waiting:
            silent |= {rank: f"no answer (time limit {timeout} s); its stack is in stderr" for rank in waiting.values()}
            self.show_stacks(waiting.values())
        return values, errors, silent

    def show_stacks(self, ranks):
        """Have ranks that hang write their Python stacks to stderr."""
        before, deadline = self.written(), time.monotonic() + FORWARD
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGUSR2)
        while self.written() == before and time.monotonic() < deadline and not all(stopped(self.pids[rank]) for rank in ranks):
            time.sleep(0.05)
        time.sleep(0.3)  # for the rest

    def written(self):
        """How many bytes of the ranks' stderr mpiexec has forwarded."""
        return os.fstat(self.files[1].fileno()).st_size

    def leave(self, finalize):
        """Tell the ranks that do not hang to end, with or without MPI_Finalize, and wait for that."""
        deadline = time.monotonic() + LEAVE
        leaving = [connection for rank, connection in self.ranks.items() if rank not in self.hung]
        for connection in leaving:
            with contextlib.suppress(BrokenPipeError):
                connection.send(finalize)
        while leaving and time.monotonic() < deadline:
            for connection in wait(leaving, 0.1):  # end of file: the rank has ended
                leaving.remove(connection)
        if not self.hung:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0, deadline - time.monotonic()))

    def kill(self):
        """Kill what is left of the job."""
        deadline = time.monotonic() + LEAVE
        while kill_processes(self.name) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.process.wait(LEAVE)
        for connection in self.ranks.values():
            connection.close()

    def output(self):
        """What the job has written to stdout and to stderr since the last call of this method."""
        news = []
        for i, file in enumerate(self.files):  # pread: the job writes at the file position that it shares with us
            data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size - self.seen[i], self.seen[i])
            self.seen[i] += len(data)
            news.append(data.decode(errors="replace"))
        return news

    def relay(self):
        """Print the job's output where pytest captures it for the running test."""
        for stream, text in zip((sys.stdout, sys.stderr), self.output()):
            stream.write(text)


@functools.cache
def mpiexec():
    """The launcher's command: PYEP_MPIEXEC, or the mpiexec beside this Python, or the one on PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    command = os.environ.get("PYEP_MPIEXEC") or (str(beside) if beside.exists() else shutil.which("mpiexec"))
    if not command:
        raise RuntimeError("no mpiexec found: install an MPI (pip install mpich) or set PYEP_MPIEXEC")
    return shlex.split(command)


@functools.cache
def survive():
    """The launcher's options that keep the other ranks alive when one dies."""
    version = subprocess.run([*mpiexec(), "--version"], capture_output=True, text=True, env=environment()).stdout
    if "HYDRA" in version:
        return ["-disable-auto-cleanup"]
    return ["--enable-recovery", "--mca", "orte_abort_on_non_zero_status", "0"]


def environment():
    """The environment of a job."""
    path = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        # Open MPI 4 and 5 as root, and with more ranks than cores; other launchers ignore these
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }


def stopped(pid):
    """Whether the process is stopped by a signal."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def processes(job):
    """The ids of the job's live processes."""
    # Launchers put each rank into a session of its own, and a rank outlives the process that started it: neither the
    # process group nor the tree of processes holds them all, the inherited environment does.
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if f"{TAG}={job}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill_processes(job):
    """Kill the job's processes, but not the one that calls this, and return their ids."""
    pids = [pid for pid in processes(job) if pid != os.getpid()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def request_for(function, args, kwargs):
    """What a rank needs for the call: the module's name and file, the qualified name in it, the pickled arguments."""
    if not getattr(function, "__qualname__", "<").replace(".", "").isidentifier():
        raise ValueError(f"{function!r} is not a module-level function: other processes cannot find it")
    module = sys.modules[function.__module__]
    return module.__name__, module.__file__, function.__qualname__, pickle.dumps((args, kwargs))


# What follows runs on the ranks.


def serve(address):
    """Answer the parent's requests until it says to leave."""
    import mpi4py

    mpi4py.rc.finalize = False  # at the end the parent says whether MPI_Finalize would return
    from mpi4py import MPI

    for stream in (sys.stdout, sys.stderr):  # whole lines, and a rank that dies has written what it printed
        stream.reconfigure(line_buffering=True, write_through=False)
    connection = Client(address)
    connection.send((MPI.COMM_WORLD.rank, os.getpid()))
    threading.Thread(target=die_with_parent, args=(connection.fileno(),), daemon=True).start()
    faulthandler.register(signal.SIGUSR2)
    request, comm = False, None

    @atexit.register  # before any test module registers something: this runs last
    def end():
        if request is True:
            MPI.Finalize()
        connection.close()  # tells the parent that this rank has ended

    # A call has a communicator of its own, so that messages left by a failed call do not meet the next call's; for the
    # same reason that one is never freed, as its context would be used again. A fault job does not get here twice:
    # freeing may wait for ranks that are gone.
    while isinstance(request := connection.recv(), tuple):
        tidy, *call = request
        with contextlib.suppress(BaseException):  # `answer` will see it again
            module(*call[:2])  # before the ranks meet: it takes long, and longer on some
        if comm and tidy:
            comm.Free()
        comm = MPI.COMM_WORLD.Dup()
        connection.send(answer(comm, *call))


def die_with_parent(descriptor):
    """End the job when the parent is gone, even if the main thread waits in MPI or another rank is stopped."""
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.poll()
    kill_processes(os.environ[TAG])
    os._exit(1)


def answer(comm, name, path, qualname, arguments):
    """Call the function; return whether it raised, and the pickled result or traceback."""
    try:
        function = functools.reduce(getattr, qualname.split("."), module(name, path))
        args, kwargs = pickle.loads(arguments)  # after the import: they may be of the module's own classes
        return False, pickle.dumps(function(comm, *args, **kwargs))
    except BaseException as error:  # SystemExit and pytest's own exceptions too: the parent must hear of them
        error.__traceback__ = error.__traceback__.tb_next or error.__traceback__
        return True, pickle.dumps("".join(traceback.format_exception(error)))


def module(name, path):
    """The module of that file, under the name that it has in pytest, so that pickled classes are found."""
    found = sys.modules.get(name)
    if getattr(found, "__file__", None) != path:
        spec = importlib.util.spec_from_file_location(name, path, loader=rewriting_loader())
        found = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(found)
        except BaseException:
            del sys.modules[name]
            raise
    return found


@functools.cache
def rewriting_loader():
    """pytest's loader, for which a failed assert shows its values; None (the usual loader) if pytest has moved it."""
    try:
        from _pytest.assertion import install_importhook
        from _pytest.config import get_config

        return install_importhook(get_config())
    except (ImportError, AttributeError):
        return None


if __name__ == "__main__":
    serve(sys.argv[1])
