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


def seen(what, look, *args):
    """The `Finding`s of a function that looks at something; if it fails, a finding that says so: a doctor must not fall ill."""
    try:
        found = look(*args)
    except Exception as error:
        return [Finding(what, f"could not be looked at: {type(error).__name__}: {error}")]
    return [found] if isinstance(found, Finding) else found
