"""Low-latency dispatches that are void: one rank's selections cannot be served, and all ranks get the error for that operation.

On the CPU engine the host refuses such selections before it launches; here it looks away, so that kernels find out, as on GPUs.
"""
import pytest
import ranks
from case import Case, dispatch_inputs, run_round
from engine import make_buffer, on_gpu
from rejection import blind_host

from pyep import EPRoutingError

M, H, LOCAL, K = 8, 64, 4, 3                                     # a shape whose kernels test_low_latency.py compiles too
MODES = {"direct": {}, "reduced": dict(weighted=True), "rank-major": dict(layout="rank_major"), "fp8": dict(fp8="fp8", hidden=128)}


def case_of(comm, **mode):
    fields = dict(seed=3, max_tokens=M, hidden=H, experts=LOCAL * comm.size, topk=K, tokens=(M,) * comm.size)
    return Case(**fields | mode)


def dispatch_void(buf, case, wrong, hook=False):
    """Dispatch after `wrong(topk_idx)` has changed the selections of the last rank; what the error of this rank says."""
    x, topk_idx, weights, _ = case.make()
    wrong(topk_idx[-1])
    inputs = dispatch_inputs(buf.rank, case, x, topk_idx, weights)
    with pytest.raises(EPRoutingError) as caught:
        got = buf.low_latency_dispatch(**inputs, return_recv_hook=hook)
        if hook:
            got.hook()
        got.event.synchronize()
    return str(caught.value)


def select(token, k, expert):
    def wrong(topk_idx):
        topk_idx[token, k] = expert
    return wrong


def crowd(topk_idx):
    """Every selection of the same expert: K times as many rows as there is room for."""
    topk_idx[:] = 1


def nearly_crowd(topk_idx):
    """One row too many: each token selects expert 1 once, and one of them twice."""
    topk_idx[:] = 1, 2, 3
    topk_idx[5, 2] = 1


WRONG = {                                                        # by what is wrong: how, and what the error says on that rank
    "none such": (select(5, 1, 1000), "names expert 1000 for token 5"),
    "the next": (select(0, 0, LOCAL * 3), f"names expert {LOCAL * 3} for token 0"),         # of 3 ranks
    "negative": (select(7, 2, -2), "names expert -2 for token 7"),
    "64 bits": (select(2, 0, (1 << 32) + 3), "names expert 3 for token 2"),
    "negative of 64 bits": (select(2, 0, 3 - (1 << 32)), "names expert 3 for token 2"),
    "crowd": (crowd, f"selects expert 1 more than num_max_dispatch_tokens_per_rank = {M} times"),
    "one too many": (nearly_crowd, "selects expert 1 more than"),
}


def void_and_well(comm, mode, names, hook=False):
    """Void dispatches among others, on one buffer."""
    case = case_of(comm, **mode)
    with make_buffer(comm, M, case.hidden, case.experts, K, timeout_s=20) as buf, blind_host():
        run_round(buf, case)
        for name in names:
            wrong, words = WRONG[name]
            for _ in range(2):                                   # of either parity
                said = dispatch_void(buf, case, wrong, hook)
                assert f"rank {comm.size - 1} " in said and "void" in said, said
                assert (words if comm.rank == comm.size - 1 else "its own error says which") in said, said
            run_round(buf, case, hooks=(hook, hook))


@pytest.mark.parametrize("hook", [False, True], ids=["", "hook"])
def test_all_ranks_hear_of_it_and_go_on(hook):
    ranks.run(3, void_and_well, {}, list(WRONG), hook)


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_every_mode(mode):
    names = ["none such", "negative of 64 bits"] + ["crowd"] * (mode != "rank-major")
    ranks.run(2, void_and_well, MODES[mode], names)


def repeat_where_there_is_room(comm):
    case = case_of(comm, tokens=(M // K,) * comm.size, routing="repeated")
    with make_buffer(comm, M, H, case.experts, K) as buf, blind_host():
        run_round(buf, case)


def test_a_token_may_name_an_expert_twice():
    ranks.run(2, repeat_where_there_is_room)


def crowd_rank_major(comm):
    case = case_of(comm, **MODES["rank-major"])
    with make_buffer(comm, M, H, case.experts, K) as buf, blind_host():
        x, topk_idx, weights, _ = case.make()
        for idx in topk_idx:
            crowd(idx)
        buf.low_latency_dispatch(**dispatch_inputs(buf.rank, case, x, topk_idx, weights)).event.synchronize()


def test_rows_by_rank_have_room_for_any_selections():
    ranks.run(2, crowd_rank_major)


def both_ranks(comm):
    """Two ranks at once: each host says what is wrong with its own."""
    case = case_of(comm)
    with make_buffer(comm, M, H, case.experts, K, timeout_s=20) as buf, blind_host():
        x, topk_idx, weights, _ = case.make()
        for rank, idx in enumerate(topk_idx):
            idx[rank, 0] = 100 + rank
        with pytest.raises(EPRoutingError, match="void"):
            buf.low_latency_dispatch(**dispatch_inputs(buf.rank, case, x, topk_idx, weights)).event.synchronize()
        run_round(buf, case)


def test_several_ranks_at_once():
    ranks.run(2, both_ranks)


def void_on_wide_shapes(comm):
    for mode in {}, MODES["fp8"]:
        void_and_well(comm, mode, ["none such", "one too many"])
    return "done"


@pytest.mark.skipif(on_gpu(), reason="there launches are always wide")
def test_many_threads():
    done = ranks.launch(2, void_on_wide_shapes, env={"PYEP_CPU_SHAPE": "3,8,4"}, timeout=300)
    assert done.results == ["done"] * 2, done.stderr


@pytest.mark.skipif(on_gpu(), reason="about the ports of the CPU engine")
def test_between_nodes():
    done = ranks.launch(2, void_on_wide_shapes, env={"PYEP_RANKS_PER_NODE": "1"}, timeout=300)
    assert done.results == ["done"] * 2, done.stderr


def refused_by_the_host(comm):
    """What nobody has told to be void is no error of a later operation."""
    case = case_of(comm)
    with make_buffer(comm, M, H, case.experts, K, timeout_s=20) as buf:
        x, topk_idx, weights, _ = case.make()
        topk_idx[comm.rank][0, 0] = 99
        with pytest.raises(ValueError, match="topk_idx has values"):
            buf.low_latency_dispatch(**dispatch_inputs(buf.rank, case, x, topk_idx, weights))
        run_round(buf, case)


@pytest.mark.skipif(on_gpu(), reason="there the host does not look")
def test_the_host_looks_first():
    ranks.run(2, refused_by_the_host)
