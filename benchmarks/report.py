"""Turns the figures of one benchmark run into a results file, tables, a chart and the README's table.

The results file (JSON) is the record; the tables and the chart are made from it and from nothing else.
`python -m benchmarks.report README.md RESULTS.json ...` writes the README's block anew.
"""

import json
import math
import os
import re
import statistics
import sys
import textwrap
from pathlib import Path

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
IMPLEMENTATIONS = ("eager", "compile", "fallback", "kdfast", "liger")
SHORT_DTYPES = {"float32": "", "bfloat16": " bf16", "float16": " fp16"}
UNSTEADY = 0.25
FITTED = 4  # sizes to which an exponent is fitted: the smallest are all overhead
COLOURS = {"eager": "#9aa5b1", "compile": "#d98e32", "fallback": "#5a9367", "kdfast": "#2f6f9f", "liger": "#8a5a9b"}
UNITS = {"copy": "B/s", "matmul": "FLOP/s", "gather": "B/s"}
SHARES = {
    "copy": "the bytes the work has to move at least, per second, as a share of a large copy (over 100 % where a cache "
    "holds the tensors)",
    "matmul": "the operations the work takes at least, per second, as a share of a large matrix product",
    "gather": "the bytes of the rows the work has to read, per second, as a share of reading random rows of a large "
    "table (over 100 % where a cache holds the banks)",
}
NAMES = {"eager": "eager PyTorch", "compile": "torch.compile", "fallback": "kdfast's plain-PyTorch fallback"}
STATISTICS = ("median", "q1", "q3", "rounds")
FIGURE = ("loss", "shape", "dtype", "implementation", "phase")  # what tells a figure from others
STEPS = textwrap.fill(
    "A whole training step: the teacher's forward, the student's, cross-entropy and the loss, backward, the optimizer. "
    "Median milliseconds with the loss in eager PyTorch and with kdfast's; of them what the loss alone takes, forward "
    "and backward, on such features; how long the step is beside that of the first row; how many times faster the step "
    "with kdfast's loss is; peak extra memory, eager / kdfast.",
    110,
)


# ---- from pytest-benchmark's JSON to the results file ----------------------------------------------------------------
def collect(raw, family):
    """The results of one run: machine, ceilings, and every figure with its median, quartiles and rounds."""
    groups = {"ceiling": [], "loss": [], "host": []}
    turns = {}
    for benchmark in raw["benchmarks"]:
        info = benchmark["extra_info"]
        what = tuple(str(info.get(name)) for name in ("kind", "name", *FIGURE))
        turns.setdefault(what, []).append(benchmark)
    for benchmarks in turns.values():
        info = dict(benchmarks[0]["extra_info"])
        groups[info.pop("kind")].append(info | pooled([benchmark["stats"] for benchmark in benchmarks]))

    for ceiling in groups["ceiling"]:
        ceiling["rate"] = ceiling["work"] / ceiling["median"]
    ceilings = {ceiling["name"]: ceiling["rate"] for ceiling in groups["ceiling"]}
    for figure in groups["loss"]:
        figure["rate"] = figure["floor"] / figure["median"]
        figure["share"] = figure["rate"] / ceilings[figure["ceiling"]] if figure["ceiling"] in ceilings else None
    return {
        "family": family,
        "machine": raw["machine_info"]["kdfast"],
        "date": raw["datetime"][:10],
        "ceilings": groups["ceiling"],
        "figures": groups["loss"],
        "host": groups["host"],
    }


def pooled(turns):
    """The statistics of all rounds of the turns."""
    if len(turns) == 1:
        return {name: turns[0][name] for name in STATISTICS}
    seconds = [round_ for stats in turns for round_ in stats["data"]]
    q1, median, q3 = statistics.quantiles(seconds, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}


def slug(results):
    """The device's name as a folder name."""
    machine = results["machine"]
    name = machine["device"] + (f" {machine['cores']} cores" if machine["kind"] == "cpu" else "")
    name += f" {machine['isa']}" if machine.get("isa") else ""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cores_of(machine):
    """A CPU's cores, threads, and the instruction set if one was chosen, in brackets."""
    if machine["kind"] != "cpu":
        return ""
    held = f", held to {machine['isa']}" if machine.get("isa") else ""
    return f" ({machine['cores']} cores, threads: {machine['threads']}{held})"


def save(results, folder, chart=True):
    """Write FAMILY.json, .md and, with `chart` and kernels, .png to `folder`/DEVICE; returns the JSON's path."""
    path = Path(folder) / slug(results) / f"{results['family']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
    if chart and any("kdfast" in figures for figures in cases(results).values()):
        draw(results, path.with_suffix(".png"))
    return path


def measured(folder):
    """The results files below a folder: of what was measured, not of what is predicted."""
    return sorted(path for path in Path(folder).glob("*/*.json") if path.parent.name != "predicted")


# ---- tables ----------------------------------------------------------------------------------------------------------
def cases(results, phase="both", steps=False):
    """(loss, shape with dtype) -> implementation -> figure, of one phase, in the order of measurement.

    Of losses, or of whole training `steps`.
    """
    table = {}
    for figure in results["figures"]:
        if figure["phase"] == phase and bool(figure.get("part")) == steps:
            key = figure["loss"], figure["shape"] + SHORT_DTYPES.get(figure["dtype"], f" {figure['dtype']}")
            table.setdefault(key, {})[figure["implementation"]] = figure
    return table


def speed_up(figures, over):
    """How many times faster kdfast is than the implementation `over`; None where either was not measured."""
    if "kdfast" not in figures or over not in figures:
        return None
    return figures[over]["median"] / figures["kdfast"]["median"]


def main_rows(results):
    """The one table: forward + backward of every case, a heading first."""
    table, shown, ceilings = cases(results), implementations(results), ceilings_of(results)
    others = [name for name in ("eager", "compile", "liger") if name in shown]
    limit = ceilings[0] if len(ceilings) == 1 else "limit"
    rows = [["loss", "shape", *shown, *(f"x {name}" for name in others), f"of {limit}", "extra MB"]]
    for (loss, shape), figures in table.items():
        any_figure = next(iter(figures.values()))
        times = [milliseconds(figures.get(name), any_figure["left_out"].get(name, "-")) for name in shown]
        ratios = [number(speed_up(figures, name), "{:.1f}") for name in others]
        limit = "" if len(ceilings) == 1 else f" {any_figure['ceiling']}"
        share = number(figures.get("kdfast", {}).get("share"), f"{{:.0%}}{limit}")
        rows.append([loss, shape, *times, *ratios, share, memory(figures)])
    return rows


def implementations(results):
    """The columns of the one table: all but those that no case has, liger where it was not measured."""
    figures = [figure for figures in cases(results).values() for figure in figures.values()]
    liger = any(figure["implementation"] == "liger" for figure in figures)
    left_out = {name for name in ("compile", "fallback") if all(f["left_out"].get(name) == "-" for f in figures)}
    return [name for name in IMPLEMENTATIONS if name not in left_out and (liger or name != "liger")]


def step_rows(results):
    """Whole training steps: milliseconds, of them the loss alone, and how long a step is beside the first loss's."""
    table, losses = cases(results, steps=True), cases(results)
    beside = next((loss for loss, _ in table), None)
    columns = [f"{name}{what}" for name in ("eager", "kdfast") for what in ("", ", loss", f" / {beside}")]
    rows, first = [["step with", "network's input", *columns, "x eager", "extra MB"]], {}
    for (loss, shape), figures in table.items():
        cells, alone = [], losses.get(tuple(next(iter(figures.values()))["part"]), {})
        for name in ("eager", "kdfast"):
            if figure := figures.get(name):
                first.setdefault(name, figure["median"])
            ratio = figure["median"] / first[name] if figure else None
            cells += [milliseconds(figure), milliseconds(alone.get(name)), number(ratio, "{:.2f}")]
        rows.append([loss, shape, *cells, number(speed_up(figures, "eager"), "{:.2f}"), memory(figures)])
    return rows


def phase_rows(results):
    """Every phase of every case: medians, kdfast's quartiles, and its rate."""
    rows = [["loss", "shape", "phase", "eager", "compile", "kdfast", "quartiles", f"G{unit_of(results)}"]]
    tables = {phase: cases(results, phase) for phase in ("forward", "backward", "both")}
    for key in tables["both"]:
        for phase, table in tables.items():
            if figures := table.get(key):
                ours = figures.get("kdfast")
                quartiles = " - ".join(significant(ours[q] * 1e3) for q in ("q1", "q3")) if ours else "-"
                moved = significant(ours["rate"] / 1e9) if ours else "-"
                times = [milliseconds(figures.get(name)) for name in ("eager", "compile", "kdfast")]
                rows.append([*key, phase, *times, quartiles, moved])
    return rows


def host_rows(results):
    """Microseconds that the host spends on a call."""
    table = {}
    for figure in results["host"]:
        table.setdefault(figure["loss"], {})[figure["phase"], figure["implementation"]] = figure["median"] * 1e6
    columns = [(phase, name) for phase in ("forward", "both") for name in ("eager", "kdfast")]
    headings = ["forward, eager", "forward, kdfast", "forward + backward, eager", "forward + backward, kdfast"]
    return [["loss", *headings]] + [
        [loss, *(number(figures.get(column), "{:.1f}") for column in columns)] for loss, figures in table.items()
    ]


def ceilings_of(results):
    """What bounds the work of these losses: names of harness.CEILINGS, without repetition."""
    return list(dict.fromkeys(figure["ceiling"] for figure in results["figures"] if not figure.get("part")))


def unit_of(results):
    """The unit of a rate, if the losses have but one."""
    units = {UNITS[name] for name in ceilings_of(results)}
    return units.pop() if len(units) == 1 else "/s (bytes or operations)"


def milliseconds(figure, otherwise="-"):
    return significant(figure["median"] * 1e3) if figure else otherwise


def significant(value, digits=3):
    """At least three significant digits without an exponent: 0.0123, 1.23, 1284."""
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def number(value, form):
    return "-" if value is None else form.format(value)


def memory(figures):
    """Peak extra memory of eager against kdfast."""
    peaks = [figures.get(name, {}).get("peak_bytes") for name in ("eager", "kdfast")]
    return " / ".join("-" if peak is None else significant(peak / 1e6) for peak in peaks)


def aligned(rows, text_columns, separator="  "):
    """Rows of text as lines with straight columns: the first `text_columns` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        separator.join(
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def markdown_table(rows, text_columns):
    """The same rows as a Markdown table."""
    lines = [f"| {line} |" for line in aligned(rows, text_columns, " | ")]
    marks = ["---" if index < text_columns else "---:" for index in range(len(rows[0]))]
    return "\n".join([lines[0], f"| {' | '.join(marks)} |", *lines[1:]])


def text(results):
    """The one table for a terminal, with what it was measured on and how steady it was; whole steps in another."""
    steps = step_rows(results)
    more = ["", *aligned(steps, 2), "", STEPS] if len(steps) > 1 else []
    return "\n".join([*aligned(main_rows(results), 2), "", caption(results), steadiness(results), *more])


def steadiness(results):
    """How many figures scatter so much that something else must have been running."""
    figures = results["figures"]
    unsteady = sum(figure["q3"] - figure["q1"] > UNSTEADY * figure["median"] for figure in figures)
    return f"Quartiles further apart than {UNSTEADY:.0%} of the median: {unsteady} of {len(figures)} figures."


def caption(results):
    """What the columns mean and what they were measured on."""
    machine = results["machine"]
    rates = {c["name"]: c for c in results["ceilings"]}
    copy = f", a large copy moves {rate(rates['copy'])}" if "copy" in rates else ""
    product = f", a large float32 matrix product does {rate(rates['matmul'])}" if "matmul" in rates else ""
    product += f", random rows are read at {rate(rates['gather'])}" if "gather" in rates else ""
    threads = cores_of(machine)
    liger = any(figure["implementation"] == "liger" for figure in results["figures"])
    peer = f", liger-kernel {machine.get('liger')}" if liger else ""
    driver = f"driver {machine['driver']}, " if machine.get("driver") else ""
    commit = f" at {machine['commit']}" if machine["commit"] else ""
    shown = [name for name in NAMES if name in implementations(results)]
    whose = "its" if "fallback" in shown else "kdfast's"
    measured = f"{', '.join(NAMES[name] for name in shown)} and {whose} kernels"
    words = (
        f"Forward + backward, float32 unless the shape says otherwise: median milliseconds of {measured}{peer}; how "
        f"many times faster the kernels are; {'; '.join(SHARES[name] for name in ceilings_of(results))}; peak extra "
        "memory, eager / kdfast. "
        f"Measured on {machine['device']}{threads}{copy}{product}; {driver}torch {machine['torch']}, "
        f"Python {machine['python']}, kdfast {machine['kdfast']}{commit}, {results['date']}."
    )
    return textwrap.fill(words, 110)


def rate(ceiling):
    """A ceiling's rate in giga- or tera-units."""
    scale, prefix = (1e12, "T") if ceiling["rate"] >= 1e12 else (1e9, "G")
    return f"{significant(ceiling['rate'] / scale)} {prefix}{ceiling['unit']}"


def markdown(results):
    """The full report of one device and family."""
    growth = [
        "## Growth",
        "Exponents of the batch size B in the time and the peak extra memory of forward + backward, fitted to these B.",
        markdown_table(growth_rows(results), 3),
    ]
    host = [
        "## Host overhead",
        "Microseconds a call on one thread and on inputs so small that the kernels cost nothing.",
        markdown_table(host_rows(results), 1),
    ]
    parts = [
        f"# {results['family']} on {results['machine']['device']}",
        markdown_table(main_rows(results), 2),
        caption(results),
        *(["## Whole steps", STEPS, markdown_table(steps, 2)] if len(steps := step_rows(results)) > 1 else []),
        *(growth if grows(results) else []),
        "## Forward and backward alone",
        f"Milliseconds; quartiles and G{unit_of(results)} are kdfast's.",
        markdown_table(phase_rows(results), 3),
        *(host if results["host"] else []),
    ]
    return "\n\n".join(parts) + "\n"


# ---- growth ----------------------------------------------------------------------------------------------------------
def grows(results):
    """Whether the figures are of one work in many sizes."""
    return any(figure["size"] for figure in results["figures"])


def curves(results, quantity):
    """loss -> implementation -> sizes and values of `quantity` ("median" or "peak_bytes"), forward + backward."""
    table = {}
    for figure in results["figures"]:
        if figure["phase"] == "both" and figure["size"] and figure[quantity]:
            sizes, values = table.setdefault(figure["loss"], {}).setdefault(figure["implementation"], ([], []))
            sizes.append(figure["size"])
            values.append(figure[quantity])
    return table


def exponent(sizes, values):
    """-> e of the least-squares fit of values ~ size^e to the largest sizes, and those sizes; (None, []) of one."""
    points = sorted(zip(sizes, values, strict=True))[-FITTED:]
    if len(points) < 2:
        return None, []
    x, y = ([math.log(value) for value in side] for side in zip(*points, strict=True))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, [size for size, _ in points]


def growth_rows(results):
    """How time and memory grow, of every loss and implementation."""
    time, memory_ = curves(results, "median"), curves(results, "peak_bytes")
    rows = [["loss", "implementation", "B", "time", "memory"]]
    for loss, implementations in time.items():
        for name, curve in implementations.items():
            slope, sizes = exponent(*curve)
            if sizes:
                of_memory, _ = exponent(*memory_.get(loss, {}).get(name, ([], [])))
                cells = number(slope, "{:.2f}"), number(of_memory, "{:.2f}")
                rows.append([loss, name, f"{sizes[0]} - {sizes[-1]}", *cells])
    return rows


# ---- chart -----------------------------------------------------------------------------------------------------------
def draw(results, path):
    """The chart of a family, growth or bars; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw_growth(plt, results) if grows(results) else draw_bars(plt, results)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_growth(plt, results):
    """Time and memory against the batch size, both logarithmic, one column a loss."""
    rows = [(curves(results, "median"), 1e3, "milliseconds"), (curves(results, "peak_bytes"), 1e-6, "peak extra MB")]
    losses = list(rows[0][0])
    figure, grid = plt.subplots(
        2, len(losses), figsize=(4 * len(losses), 6.4), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for (table, scale, label), line in zip(rows, grid, strict=True):
        line[0].set_ylabel(label)
        for loss, axes in zip(losses, line, strict=True):
            for name, (sizes, values) in table.get(loss, {}).items():
                slope, _ = exponent(sizes, values)
                text = name if slope is None else f"{name}, B^{slope:.1f}"
                axes.loglog(sizes, [scale * v for v in values], "o-", ms=3, lw=1.2, label=text, color=COLOURS[name])
            axes.set_title(loss, fontsize=10, loc="left")
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
    sizes = sorted({figure["size"] for figure in results["figures"] if figure["size"]})
    for axes in grid[-1]:
        axes.set_xlabel("batch size B")
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xticks([], minor=True)
    figure.suptitle(f"kdfast on {results['machine']['device']}, forward + backward", fontsize=10, x=0.01, ha="left")
    return figure


def draw_bars(plt, results):
    """How many times faster kdfast is than eager and torch.compile."""
    table = {key: figures for key, figures in cases(results).items() if "kdfast" in figures}
    bars = {key: [speed_up(figures, over) or 0 for over in ("eager", "compile")] for key, figures in table.items()}
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(bars)), layout="constrained")
    series = [(-0.2, "against eager", COLOURS["eager"]), (0.2, "against torch.compile", COLOURS["kdfast"])]
    for (offset, label, colour), heights in zip(series, zip(*bars.values(), strict=True), strict=True):
        drawn = axes.barh([row + offset for row in range(len(bars))], heights, 0.38, label=label, color=colour)
        axes.bar_label(drawn, [f"{h:.1f}" if h else "" for h in heights], padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{loss}  {shape}" for loss, shape in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("times faster, forward + backward")
    axes.set_title(f"kdfast on {results['machine']['device']}", fontsize=10, loc="left")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0.1, ncols=2, fontsize=9)
    return figure


# ---- README ----------------------------------------------------------------------------------------------------------
OVERVIEW = ["loss", "shape", "eager", "compile", "kdfast", "x eager", "x compile", "extra MB"]


def readme_block(readme_path, *json_paths, library=None):
    """What belongs between a page's marks: an overview of each device, or all figures of one `library`'s losses."""
    devices = {}
    for path in map(Path, json_paths):
        results = of_library(json.loads(path.read_text()), library)
        if results["figures"]:
            link = os.path.relpath(path.with_suffix(".md"), Path(readme_path).parent).replace(os.sep, "/")
            devices.setdefault(slug(results), []).append((link, results))
    if library is None:
        return "\n\n".join(overview(families) for families in devices.values())
    return "\n\n".join(
        f"{markdown_table(main_rows(results), 2)}\n\n{caption(results)}\n[All figures]({link})."
        for families in devices.values()
        for link, results in families
    )


def overview(families):
    """One device's (link, results): every loss at the first of its shapes, and whole training steps."""
    rows, steps = {}, []
    for _, results in families:
        if len(of_steps := step_rows(results)) > 1:
            steps += ["", markdown_table(of_steps, 2), "", STEPS]
            continue
        heading, *lines = main_rows(results)
        for line in lines:
            cells = dict(zip(heading, line, strict=True))
            rows.setdefault(cells["loss"], [cells.get(name, "-") for name in OVERVIEW])
    machine = families[0][1]["machine"]
    threads = cores_of(machine)
    words = (
        f"{machine['device']}{threads}, torch {machine['torch']}. Forward + backward, float32 unless the shape says "
        "otherwise, every loss at the first of its shapes: median milliseconds of eager PyTorch, torch.compile and "
        "kdfast; how many times faster kdfast is; peak extra memory, eager / kdfast. All shapes, forward and backward "
        "alone, the plain-PyTorch form, shares of the machine's limits and the host's overhead:"
    )
    links = ", ".join(f"[{results['family']}]({link})" for link, results in families)
    table = [markdown_table([OVERVIEW, *rows.values()], 2), ""] if rows else []
    return "\n".join([*table, textwrap.fill(words, 110), f"{links}.", *steps])


def of_library(results, library):
    """The results of the losses that kdfast.compat has of `library`, under their names there; None: of kdfast's own."""
    if library is None:
        return results if results["family"] != "compat" else results | {"figures": []}
    prefix = f"{library} "
    named = [figure for figure in results["figures"] if figure["loss"].startswith(prefix)]
    return results | {"figures": [figure | {"loss": figure["loss"].removeprefix(prefix)} for figure in named]}


def updated(readme_path, *json_paths):
    """The page with these results between its marks, of which the first may name a library."""
    path = Path(readme_path)
    parts = re.split(f"({START[:-4]}(?: (\\w+))? -->\n).*?({END})", path.read_text(), maxsplit=1, flags=re.DOTALL)
    if len(parts) == 1:
        raise ValueError(f"{path} has no block between {START} and {END}")
    before, start, library, end, after = parts
    return f"{before}{start}{readme_block(path, *json_paths, library=library)}\n{end}{after}"


def update_readme(readme_path, *json_paths):
    """Write the results between the marks of README.md or of another page."""
    Path(readme_path).write_text(updated(readme_path, *json_paths))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m benchmarks.report README.md RESULTS.json ...")
    update_readme(*sys.argv[1:])
