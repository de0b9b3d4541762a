"""Which board a Buffer's ranks meet on: that of their process group, or of their communicator."""
import sys


def open_board(group, comm):
    """The board of a torch.distributed process group or an mpi4py communicator, exactly one of which is not None; counts an attempt
    to make a Buffer.  TypeError or ValueError if there is none, naming the argument."""
    if (group is None) == (comm is None):
        what = "neither group nor comm is given" if group is None else "both group and comm are given"
        raise ValueError(f"{what}; expected either group= (torch.distributed; before init_process_group its default group is None) "
                         "or comm= (mpi4py), and not both")
    if comm is None:
        from .store_board import board_of
        board = board_of(group)
    else:
        check_comm(comm)
        from .mpi_board import board_of
        board = board_of(comm)
    board.attempts += 1
    return board


def check_comm(comm):
    """TypeError or ValueError unless it is a communicator of which this rank is a member."""
    MPI = sys.modules.get("mpi4py.MPI")                          # who has a communicator has imported it
    if MPI is None or not isinstance(comm, MPI.Comm):
        hint = "; pass a torch.distributed process group as group=" if type(comm).__name__ == "ProcessGroup" else ""
        raise TypeError(f"comm is {comm!r}; expected an mpi4py communicator{hint}")
    if comm == MPI.COMM_NULL:
        raise ValueError("comm is MPI.COMM_NULL; expected an mpi4py communicator of which this rank is a member")
    if comm.Is_inter():
        raise ValueError("comm is an intercommunicator; expected one of a single group of ranks")
