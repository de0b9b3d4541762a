"""What makes a benchmark: the class that each of them fills in."""


class Benchmark:
    """A benchmark measures the operations of a kind, at one point of a sweep after the other.

    name, title     on the command line; in words
    defaults        the point that is measured if nothing else is asked for: a NamedTuple of whole numbers, with at least `tokens`,
                    `hidden`, `topk` and `experts`.  Each field can be set with an option, and swept
    environment     by field (or "experts_per_rank"): the environment variable that changes the default
    iterations      by engine: how many operations in a row, or in a graph
    rows            by the name of each row of the table: the phases ("dispatch", "combine") whose bytes it moves
    host_rows       the names of the rows of the mode "host", which have times only
    options         the names of the benchmark's own options, for the JSON
    legend          what the rows are: lines for below the table, with {iterations} to fill in

    Instances have no state: rank 0 reads the options and sends them to the others, the benchmark among them.
    """

    def rows_of(self, mode):
        """The rows of the table in a mode, as `rows`."""
        return dict.fromkeys(self.host_rows, ()) if mode == "host" else self.rows

    def add_options(self, add):
        """Declare its own options; `add` is argparse's add_argument."""
        raise NotImplementedError

    def complete(self, args):
        """Fill in what depends on other options; ValueError where some do not fit.  The points are known by now."""

    def operation(self, args):
        """The operations' mode in words, for the head of the report."""
        raise NotImplementedError

    def make_buffer(self, point, args, comm):
        """A `Buffer` with the memory that a point needs."""
        raise NotImplementedError

    def make_operations(self, buf, library, point, args):
        """The operations of a point.

        An object with `phases` (by name, the `traffic.Phase` of dispatch and of combine), `prepare(modes)` (compiles what is
        timed later), `calls(mode)` (by the name of a row, the function to time), `differences(modes)` (sentences on what differs
        between this rank's results and the oracle's) and `waited()` (seconds that the host has spent so far in waiting for the
        GPU).  Collective, all but the last.
        """
        raise NotImplementedError
