"""`python -m pyep doctor`: on one rank and several, with packages missing, with and without MPI."""
import importlib.metadata
import importlib.util
import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import ranks

from pyep.__main__ import main
from pyep.channels import infiniband
from pyep.channels.nodes import Nodes
from pyep.choices import install
from pyep.doctor import OneRank, hardware, report, software
from pyep.doctor import ranks as doctor_of_ranks
from pyep.doctor.finding import Finding, Section, examine

cpu_only = pytest.mark.skipif(os.environ.get("PYEP_DEVICE") == "cuda", reason="what there is of the CPU engine")


def doctor(comm):
    """The command on ranks that are already there: exit status, stdout."""
    with redirect_stdout(io.StringIO()) as out:
        status = main(["doctor"], comm)
    return status, out.getvalue()


def on_nodes(comm, per_node):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", per_node)
        return doctor(comm)


def line_of(text, what):
    """What stands behind a name, where it occurs first."""
    line = next(line for line in text.splitlines() if line.startswith(f"  {what} "))
    return line.removeprefix(f"  {what} ").strip()


def section_of(text, title):
    """The lines below a title."""
    lines = text.splitlines()
    start = lines.index(title) + 1
    return lines[start:lines.index("", start)]


# ---- on ranks --------------------------------------------------------------------------------------------------------

@cpu_only
def test_one_rank():
    status, text = doctor(OneRank())
    assert status == 0 and text.endswith("Nothing must be fixed.\n")
    assert line_of(text, "engine") == "cpu"
    assert "numba " in line_of(text, "packages")
    assert line_of(text, "rank 0").endswith("node 0, CPU, transport host")
    assert "num_rdma_bytes=" in line_of(text, "low latency")
    assert "from each rank to each" not in text


@cpu_only
def test_ranks_of_two_nodes():
    """Rank 0 prints one table; the others print nothing."""
    (status, text), *others = ranks.run(3, on_nodes, "2")
    assert status == 0 and others == [(0, "")] * 2
    assert [line.split() for line in section_of(text, "from each rank to each")[1:5]] == [
        ["0", "1", "2"], ["0", ".", "shared", "mpi"], ["1", "shared", ".", "mpi"], ["2", "mpi", "mpi", "."]]
    assert line_of(text, "shared").endswith("(2 pairs)") and line_of(text, "mpi").endswith("(4 pairs)")
    assert [line_of(text, f"rank {rank}").split(", ")[1] for rank in range(3)] == ["node 0", "node 0", "node 1"]
    assert "3 ranks" in line_of(text, "MPI")


def test_nodes_that_cannot_be():
    (status, text), *_ = ranks.run(2, on_nodes, "none")
    assert status == 1 and "PYEP_RANKS_PER_NODE is 'none'" in "\n".join(section_of(text, "to be fixed"))


def test_an_engine_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PYEP_DEVICE", "abacus")
    status, text = doctor(OneRank())
    assert status == 1 and line_of(text, "engine").startswith("none")
    fixes = section_of(text, "to be fixed")
    assert any("PYEP_DEVICE is 'abacus'; expected cpu or cuda" in line for line in fixes)


# ---- as a user runs it -----------------------------------------------------------------------------------------------

def command(n=None, code=None):
    """The finished process; code: Python that runs first."""
    run = ["-c", f"{code}\nimport sys; sys.argv = ['pyep', 'doctor']\nfrom pyep.__main__ import script; script()"]
    line = [sys.executable, *(run if code else ["-m", "pyep", "doctor"])]
    if n:
        line = [*ranks.mpiexec(), "-n", str(n), *line]
    return subprocess.run(line, env=ranks.environment(), capture_output=True, text=True, timeout=120)


@cpu_only
def test_the_command():
    done = command(n=2)
    assert done.returncode == 0, done
    assert done.stdout.count("Nothing must be fixed.") == 1 and "2 ranks" in line_of(done.stdout, "MPI")


@cpu_only
@pytest.mark.parametrize("blocked", ["mpi4py.MPI", "mpi4py"])
def test_without_mpi(blocked):
    """PyTorch's groups do without it."""
    torch = importlib.util.find_spec("torch") is not None
    done = command(code=f"import sys; sys.modules[{blocked!r}] = None")
    assert done.returncode == (0 if torch else 1), done
    assert line_of(done.stdout, "MPI").startswith("does not start: ")
    section = section_of(done.stdout, "optional" if torch else "to be fixed")
    assert any("pip install --editable '.[mpi]'" in line for line in section)


OPTIONAL = "cuda", "cupy", "mscclpp", "torch", "tabulate", "tqdm", "matplotlib", "cuda.bindings", "numba_cuda"


@cpu_only
def test_with_nothing_but_the_cpu_packages():
    hide = f"""
import importlib.metadata, sys
for name in {OPTIONAL}: sys.modules[name] = None
version = importlib.metadata.version
def of_cpu(name):
    if name in ("pyep", "numpy", "numba", "llvmlite", "ml_dtypes", "mpi4py"): return version(name)
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = of_cpu"""
    done = command(code=hide)
    assert done.returncode == 0, done
    assert line_of(done.stdout, "for PyTorch") == "not installed: torch (needed for its tensors)"
    assert line_of(done.stdout, "MSCCL++").startswith("MSCCL++ is not installed")
    wanted = section_of(done.stdout, "optional")
    for fix in ("'.[cuda]'", "'.[torch]'", "'.[bench]'", "git+https://github.com/microsoft/mscclpp"):
        assert any(fix in line for line in wanted), wanted


# ---- single findings -------------------------------------------------------------------------------------------------

def test_memory():
    """Between nodes four boxes for each of two port peers, of one and a half times a half of 14 MiB."""
    within, between = (doctor_of_ranks.memory(Nodes(of, 0)).found for of in ((0, 0, 0, 0), (0, 0, 1, 1)))
    assert within.startswith("28 MiB for 128 tokens a rank") and "nodes" not in within
    assert between == within + ", and 168 MiB for what travels between nodes"


def test_what_fails_while_looking():
    def look():
        raise RuntimeError("blind")
    assert examine("moon", look) == [Finding("moon", "could not be looked at: RuntimeError: blind")]


def test_a_needed_package_is_missing(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = software.packages(software.GROUPS[0])
    assert found.fix.startswith("pip install --editable .  #") and not found.optional
    assert "not installed: numpy, numba" in found.found


@pytest.mark.parametrize("driver, device, optional", [(False, "", True), (True, "", False), (True, "cpu", True)])
def test_packages_of_gpus_are_needed_where_there_is_one(monkeypatch, driver, device, optional):
    monkeypatch.setattr(software, "has_driver", lambda: driver)
    monkeypatch.setattr(software, "version_of", lambda name: None)
    monkeypatch.setenv("PYEP_DEVICE", device)
    assert software.packages(next(g for g in software.GROUPS if g.use == "on GPUs")).optional == optional


class Runtime:
    """CUDA's runtime of a host with three GPUs, of which the last does not reach the others."""

    @staticmethod
    def cudaGetDeviceCount():
        return 0, 3

    @staticmethod
    def cudaDeviceCanAccessPeer(device, peer):
        return 0, int(device != 2 and peer != 2)


def test_gpus_that_do_not_reach_each_other(monkeypatch):
    monkeypatch.setattr(hardware, "cuda_runtime", Runtime)
    found = hardware.peer_access()
    table = [line.split() for line in found.found.splitlines()[1:]]
    assert table == [["0", "1", "2"], ["0", "yes", "yes", "no"], ["1", "yes", "yes", "no"], ["2", "no", "no", "yes"]]
    assert "topo -p2p" in found.fix


def test_gpus_that_all_reach_each_other(monkeypatch):
    monkeypatch.setattr(hardware, "cuda_runtime", Runtime)
    monkeypatch.setattr(Runtime, "cudaGetDeviceCount", staticmethod(lambda: (0, 2)))
    assert hardware.peer_access() == Finding("peer access", "all 2 GPUs access each other's memory")


def test_adapters(monkeypatch):
    monkeypatch.setattr(infiniband, "ports", lambda: [infiniband.Port("mlx5_0", 1, "DOWN", "InfiniBand", "10 Gb/sec")])
    found = hardware.adapters()
    assert found[0] == Finding("mlx5_0/1", "DOWN, InfiniBand, 10 Gb/sec")
    assert found[1].found == "no port is active" and "ibstat" in found[1].fix


# ---- the report ------------------------------------------------------------------------------------------------------

def test_what_differs_between_ranks():
    same, other = Finding("driver", "CUDA 13.0"), Finding("driver", "CUDA 12.4", "a newer one")
    by_rank = [[Section("GPUs", found)] for found in ([same], [same], [other], [other])]
    assert report.merged(by_rank) == [Section("GPUs", [same, other._replace(found="CUDA 12.4 (ranks 2, 3)")])]


def test_what_must_be_fixed(capsys):
    table = "row reaches column\n   0 1\n 0 . x"
    sections = [Section("a", [Finding("pairs", table), Finding("one", "gone", "get it"), Finding("two", "gone", "or not", True)]),
                Section("nothing", []), Section("b", [Finding("one", "gone", "get it")])]
    report.write(sections)
    text = capsys.readouterr().out
    assert report.status(sections) == 1 and "Nothing must be fixed" not in text and "nothing" not in text
    assert [line.split() for line in section_of(text, "to be fixed")] == [["one", "get", "it"]]
    assert [line.split() for line in section_of(text, "optional")] == [["two", "or", "not"]]
    first, *rest = (line for line in section_of(text, "a")[:3])
    below = first.index("row")
    assert [line[below:] for line in rest] == ["   0 1", " 0 . x"]


def test_a_library_of_a_toolkit(monkeypatch):
    """NVVM need not be a package."""
    def load(name):
        if name != "nvvm":
            raise RuntimeError("not found")
        return SimpleNamespace(abs_path="/toolkit/libnvvm.so")
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", SimpleNamespace(load_nvidia_dynamic_lib=load))
    group = software.GROUPS[1]
    for missing, fix in (["nvidia-nvvm"], ""), (["nvidia-nvvm", "nvidia-nvjitlink"], install("cuda")):
        monkeypatch.setattr(software, "version_of", lambda name: None if name in missing else "1.0")
        finding = software.packages(group)
        assert "nvidia-nvvm /toolkit/libnvvm.so" in finding.found and finding.fix == fix
