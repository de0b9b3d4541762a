"""What the doctor says of one thing."""
from typing import NamedTuple


class Finding(NamedTuple):
    """what: the thing.  found: what there is of it, in words; lines after the first stand below it.

    fix: the line that mends it, if it wants mending.  optional: pyep runs here without it; `why` it might be wanted is in `found`.
    """

    what: str
    found: str
    fix: str = ""
    optional: bool = False


class Section(NamedTuple):
    """A title and the findings below it."""

    title: str
    findings: list


def examine(what, look, *args):
    """The list of `Finding`s of a function that looks at something; if it fails, one that says so, for the report goes on.

    what: the thing's name, for that case.  look: a function of `args`; it returns a `Finding` or a list of them.
    """
    try:
        found = look(*args)
    except Exception as error:
        return [Finding(what, f"could not be looked at: {type(error).__name__}: {error}")]
    return [found] if isinstance(found, Finding) else found
