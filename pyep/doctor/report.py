"""What rank 0 prints."""
import textwrap

from .finding import Section

NAMES, WIDTH = 18, 114                 # columns of what was looked at, and of a line


def merged(found_by_rank):
    """The sections of all ranks as one: what differs from rank 0's is told with the ranks that it was found on."""
    result = []
    for sections in zip(*found_by_rank):
        first = sections[0].findings
        others = {}
        for rank, section in enumerate(sections[1:], 1):
            for finding in section.findings:
                if finding not in first:
                    others.setdefault(finding, []).append(rank)
        more = [f._replace(found=f"{f.found} (ranks {', '.join(map(str, ranks))})") for f, ranks in others.items()]
        result.append(Section(sections[0].title, [*first, *more]))
    return result


def write(sections):
    """Print everything, and in the end what to do."""
    for section in sections:
        if section.findings:
            print(section.title, *(lines(f) for f in section.findings), sep="\n", end="\n\n")
    findings = [finding for section in sections for finding in section.findings]
    for title, optional in (("to be fixed", False), ("optional", True)):
        todo = list(dict.fromkeys((f.what, f.fix) for f in findings if f.fix and f.optional == optional))
        if todo:                                                 # not wrapped: lines to be copied
            print(title, *(f"  {what:<{NAMES}}  {fix}" for what, fix in todo), sep="\n", end="\n\n")
    if not status(sections):
        print("Nothing must be fixed.", flush=True)


def lines(finding):
    """A finding as text; below its first line, which is wrapped, may stand a table."""
    first, *table = finding.found.split("\n")
    below = " " * (NAMES + 4)
    return "\n".join([textwrap.fill(f"  {finding.what:<{NAMES}}  {first}", WIDTH, subsequent_indent=below, break_on_hyphens=False),
                      *(below + line for line in table)])


def status(sections):
    """The exit status: 1 if something must be fixed."""
    return int(any(f.fix and not f.optional for section in sections for f in section.findings))
