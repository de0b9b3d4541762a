"""`--plot`: latency and bandwidth over the quantity of the first sweep, with the bound drawn in."""
import matplotlib

matplotlib.use("Agg")                                            # no display
from matplotlib import pyplot, ticker

from .report import shape

STYLES = "-", "--", "-.", ":"


def draw(args, machine, results):
    """Write the PNG."""
    (swept, values), *others = args.sweep
    figure, (latency, bandwidth) = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(args.benchmark.rows)}
    named = [name for name, _ in others] + ["array"] * (len(args.arrays) > 1)
    for i, (label, group) in enumerate(series(results, named).items()):
        group.sort(key=lambda result: result[swept])
        curves(latency, bandwidth, swept, group, label, colors, STYLES[i % len(STYLES)])
        bounds(latency, swept, group, "bound" if i == 0 else None, args.benchmark.rows, colors)
    if args.link_gbps:
        bandwidth.axhline(args.link_gbps, color="black", linewidth=1, linestyle=":", label=f"link, {args.link_gbps:g} GB/s")
    in_logarithms(latency)
    bandwidth.set_ylim(bottom=0)
    finish(latency, swept, values, "microseconds, slowest rank")
    finish(bandwidth, swept, values, "wire GB/s per rank")
    where = f"{machine['ranks']} ranks, {' + '.join(machine['devices'])} ({args.transport_name})"
    what = f"{args.benchmark.title.capitalize()}: {args.benchmark.operation(args)}"
    figure.suptitle(f"{what}\n{where}: {shape(args)}", fontsize=10)
    figure.savefig(args.plot, format="png", dpi=120)
    pyplot.close(figure)


def series(results, others):
    """The results of each curve, by its label: the mode, and what the sweeps after the first say.  Not what the host needs."""
    found = {}
    for result in results:
        if result["mode"] != "host":
            label = ", ".join([result["mode"], *(f"{name} {result[name]}" for name in others)])
            found.setdefault(label, []).append(result)
    return found


def curves(latency, bandwidth, swept, group, label, colors, style):
    x = [result[swept] for result in group]
    for name, color in colors.items():
        found = [result[name] for result in group]
        look = dict(color=color, linestyle=style, marker=".", label=f"{name}, {label}")
        latency.plot(x, [figures["latency_us"]["max"] for figures in found], **look)
        if "gbps" in found[0]:
            bandwidth.plot(x, [figures["gbps"]["wire"]["per_rank"] for figures in found], **look)


def bounds(latency, swept, group, label, rows, colors):
    """One for each set of phases that a row moves."""
    x = [result[swept] for result in group]
    first = {parts: name for name, parts in reversed(rows.items()) if parts}
    for name in first.values():
        latency.plot(x, [result[name]["bound_us"] for result in group], color=colors[name], linewidth=1, linestyle=":",
                     label=label and f"{name}, {label}")


def in_logarithms(axes):
    """A logarithmic y axis with numbers along it, also where all that is drawn lies between two powers of ten."""
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8) if top < 10 * bottom else ticker.LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom, top)


def finish(axes, swept, values, what):
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), labels=[str(value) for value in sorted(values)])
    axes.minorticks_off()
    axes.set_xlabel(f"{swept} a rank" if swept == "tokens" else swept)
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, handlelength=3, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
