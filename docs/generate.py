"""Writes the generated parts of README.md and of the pages, from kdfast/papers.py and benchmarks/results.

`python docs/generate.py` writes them anew; `tests/test_docs.py` fails where one is stale. A generated part stands
between `<!-- NAME:start -->` and `<!-- NAME:end -->`; the text around it is written by hand.
"""

import csv
import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import kdfast  # noqa: E402
from benchmarks import predict, report  # noqa: E402
from kdfast.papers import KINDS, PAPERS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DIGITS = RESULTS / "digits" / "accuracy.csv"
MACHINE = "amd-epyc-2-cores"  # of the chart and the claims; the page on benchmarks has all machines
CHART = ROOT / "docs" / "assets" / "speed.svg"
SHOWN = ("KD", "DKD", "JSD", "DML", "AT", "FitNets", "OFD", "AB", "SP", "FSP", "RKD", "CRD")  # of the chart


# ---- what the results say --------------------------------------------------------------------------------------------
def results(machine):
    """The results files of a machine, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{machine}/*.json"))]


def first_cases(machine):
    """Loss -> (shape, implementation -> figure), each at the first of its shapes; not those of other libraries."""
    found = {}
    for family in results(machine):
        for (loss, shape), figures in report.cases(family).items():
            if family["family"] not in ("compat", "step") and "kdfast" in figures:
                found.setdefault(loss, (shape, figures))
    return found


def machine_name(machine):
    """As the results call it, with its cores and torch."""
    about = results(machine)[0]["machine"]
    return f"{about['device']}{report.cores_of(about)}, torch {about['torch']}"


def device(machine):
    """The processor alone."""
    return results(machine)[0]["machine"]["device"].replace("(R)", "")


def accuracies():
    """Name in `kdfast compare` -> accuracy on the digits and its standard deviation over seeds, in percent."""
    found = {}
    with DIGITS.open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["loss"], []).append(float(row["accuracy_percent"]))
    return {name: (statistics.fmean(values), statistics.stdev(values)) for name, values in found.items()}


def percent(accuracy):
    return "{:.1f} ± {:.1f}".format(*accuracy)


def times(ratio):
    """6.8 or 119."""
    return f"{ratio:.0f}" if ratio >= 99.5 else f"{ratio:.1f}"


# ---- claims and chart ------------------------------------------------------------------------------------------------
def claims():
    """Four sentences with numbers, each from committed files."""
    cases = first_cases(MACHINE)
    eager = [report.speed_up(figures, "eager") for _, figures in cases.values()]
    compiled = [x for _, figures in cases.values() if (x := report.speed_up(figures, "compile"))]
    shape, rkd = cases["RKD"]
    large = {name: report.significant(rkd[name]["peak_bytes"] / 1e6) for name in ("eager", "kdfast")}
    steps = next(r for path in sorted(RESULTS.glob("*/step.json")) if (r := json.loads(path.read_text())))
    step = report.cases(steps, steps=True)
    images, crd = next((shape, figures) for (loss, shape), figures in step.items() if loss == "CRD")
    golden = sorted((ROOT / "tests" / "golden").rglob("*.npz"))
    return "\n".join(
        [
            "- **Fast.** With kernels, in float32, at the first of each loss's shapes in the benchmarks: forward and "
            f"backward of {len(eager)} losses and variants take {times(min(eager))} to "
            f"{times(max(eager))} times less time than eager PyTorch (median {times(statistics.median(eager))}), and "
            f"{times(min(compiled))} to {times(max(compiled))} times less than `torch.compile` "
            f"(median {times(statistics.median(compiled))}), on {machine_name(MACHINE)}, with the widest instruction "
            "set that it has. No narrower set is in the results yet.",
            f"- **Small.** RKD of {shape} needs {large['kdfast']} MB beside its inputs, eager PyTorch "
            f"{large['eager']} MB: its B³ angles never exist together.",
            f"- **Felt in training.** A whole step from ResNet-34 to ResNet-18 with CRD, on {images}, takes "
            f"{crd['kdfast']['median'] * 1e3:.0f} ms instead of {crd['eager']['median'] * 1e3:.0f}, and "
            f"{crd['kdfast']['peak_bytes'] / 1e6:.0f} MB instead of {crd['eager']['peak_bytes'] / 1e6:.0f}, on "
            f"{steps['machine']['device']}"
            f"{report.cores_of(steps['machine'])}.",
            f"- **Right.** Values and gradients are compared with {len(golden)} files of numbers from official code, "
            "in float64, and with each paper's formula. The bits are the same on every run and for any number of "
            "threads.",
        ]
    )


STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#24292f}.small{font-size:12px;"
    "fill:#57606a}.grid{stroke:#8c959f;stroke-opacity:.3}.eager{fill:#2f6f9f}.compile{fill:#d98e32}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.eager{fill:#5aa5dd}}"
)


def chart():
    """How many times faster than eager PyTorch and torch.compile, as SVG; a logarithmic scale."""
    cases = first_cases(MACHINE)
    left, width, row, top, most = 250, 400, 34, 52, 200
    height = top + row * len(SHOWN) + 34

    def x(ratio):
        return left + width * math.log(max(ratio, 1.0)) / math.log(most)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {height}" role="img" '
        'aria-label="How many times faster kdfast is than eager PyTorch and torch.compile">',
        f"<style>{STYLE}</style>",
        f'<text x="0" y="16">Times faster, forward + backward</text>'
        f'<rect class="eager" x="{left}" y="6" width="12" height="12"/><text x="{left + 18}" y="16">than eager</text>'
        f'<rect class="compile" x="{left + 110}" y="6" width="12" height="12"/>'
        f'<text x="{left + 128}" y="16">than torch.compile</text>',
    ]
    for ratio in (1, 2, 5, 10, 20, 50, 100):
        out.append(
            f'<line class="grid" x1="{x(ratio):.1f}" y1="{top - 8}" x2="{x(ratio):.1f}" y2="{height - 30}"/>'
            f'<text class="small" x="{x(ratio):.1f}" y="{top - 14}" text-anchor="middle">{ratio}</text>'
        )
    for number, name in enumerate(SHOWN):
        shape, figures = cases[name]
        y = top + row * number
        out.append(f'<text x="0" y="{y + 16}">{name}</text><text class="small" x="72" y="{y + 16}">{shape}</text>')
        for offset, over in ((2, "eager"), (14, "compile")):
            if ratio := report.speed_up(figures, over):
                end = max(x(ratio), left + 2)
                out.append(
                    f'<rect class="{over}" x="{left}" y="{y + offset}" width="{end - left:.1f}" height="11"/>'
                    f'<text class="small" x="{end + 5:.1f}" y="{y + offset + 10}">{times(ratio)}</text>'
                )
    out.append(f'<text class="small" x="0" y="{height - 8}">{machine_name(MACHINE)}, float32</text></svg>')
    return "\n".join(out) + "\n"


# ---- the losses ------------------------------------------------------------------------------------------------------
def page_of(kind):
    return kind.replace(" ", "-")


def heading(paper):
    return paper.name if paper.label == paper.name else f"{paper.name} ({paper.label})"


def anchor(paper):
    """Of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w -]", "", heading(paper).lower()).replace(" ", "-")


def link(paper, folder=""):
    return f"{folder}{page_of(paper.kind)}.md#{anchor(paper)}"


def is_class(paper):
    return paper.call.startswith(f"{paper.name}(")


def glance():
    """README's list: what each loss takes. What one loss alone takes comes last in its kind, as "others"."""
    groups = {}
    for kind in KINDS:
        papers = [paper for paper in PAPERS if paper.kind == kind]
        taken = [paper.inputs for paper in papers]
        for paper in sorted(papers, key=lambda paper: taken.count(paper.inputs) == 1):
            groups.setdefault((kind, paper.inputs if taken.count(paper.inputs) > 1 else "others"), []).append(paper)
    rows = ["| kind | inputs | losses |", "|---|---|---|"]
    for (kind, inputs), papers in groups.items():
        inputs = papers[0].inputs if len(papers) == 1 else inputs
        rows.append(f"| {kind} | {inputs} | {', '.join(map(_glanced, papers))} |")
    return "\n".join(rows)


def _glanced(paper):
    name = f"[`{paper.name}`]" if is_class(paper) else f"[{paper.label}]"
    known = paper.label.casefold().replace(" ", "") == paper.name.casefold() or not is_class(paper)
    return f"{'' if known else paper.label + ' '}{name}({link(paper, 'docs/losses/')})"


def index():
    """All methods, a table for each kind."""
    of_digits, parts = accuracies(), []
    for kind in KINDS:
        parts.append(f"## {kind.capitalize()}\n\n[{KINDS[kind]}]({page_of(kind)}.md)\n")
        parts.append("| method | paper | digits, % | x eager |\n|---|---|---:|---:|")
        for paper in (paper for paper in PAPERS if paper.kind == kind):
            digits = ", ".join(percent(of_digits[name]) for name in paper.compare if name in of_digits) or "-"
            speeds = speed(paper)
            ratio = times(report.speed_up(speeds[0][1][1], "eager")) if speeds else "-"
            name = f"[{heading(paper)}]({link(paper)})"
            parts.append(f"| {name} | {paper.title}. {paper.source} | {digits} | {ratio} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def digits_note():
    of_digits = accuracies()
    return (
        "Digits: test accuracy of `kdfast compare --loss all`, 25 epochs, mean and standard deviation over three "
        f"seeds. A student alone has {percent(of_digits['student'])} %, the teacher {percent(of_digits['teacher'])} %. "
        "With three seeds, differences below a percent say little.\n\n"
        "x eager: how many times faster than eager PyTorch, forward and backward, at the first shape that was "
        f"measured, on {machine_name(MACHINE)} or, where it was not measured there, on the CPU that its section names."
    )


def digits_table():
    """What `kdfast compare --loss all` finds."""
    of_digits = accuracies()
    cells = [
        f"| `{name}` | {percent(value)} " for name, value in of_digits.items() if name not in ("teacher", "student")
    ]
    columns = 2
    length = -(-len(cells) // columns)
    cells += ["| | "] * (length * columns - len(cells))
    lines = ["".join(cells[i + length * column] for column in range(columns)) + "|" for i in range(length)]
    return "\n".join(["| loss | accuracy % " * columns + "|", "|---|---:" * columns + "|", *lines])


def speed(paper):
    """Machine -> (shape, figures) of a loss that was measured; the chart's machine first."""
    machines = sorted({path.parent.name for path in report.measured(RESULTS)}, key=lambda m: (m != MACHINE, m))
    found = {machine: first_cases(machine) for machine in machines}
    return [(machine, cases[paper.bench]) for machine, cases in found.items() if paper.bench in cases]


def section(paper):
    """One loss."""
    of_digits = accuracies()
    licence = {"": "", "none": ", no licence stated"}.get(paper.licence, f", {paper.licence}")
    code = f"[{paper.code}](https://github.com/{paper.code}){licence}" if paper.code else ""
    ops = ", ".join(f"`kdfast.ops.{op}`" for op in paper.ops) or "plain PyTorch"
    digits = "; ".join(f"{percent(of_digits[name])} % (`{name}`)" for name in paper.compare if name in of_digits)
    rows = {
        "Call": f"`kdfast.{paper.call}`",
        "Inputs": paper.inputs,
        "Runs on": ops,
        "Code": code,
        "Where it differs": paper.differs,
        "Digits": digits,
        "Study": paper.study and f"`kdfast study {paper.study}`",
        "Speed": "; ".join(
            f"{times(report.speed_up(figures, 'eager'))} times faster than eager at {shape} ({device(machine)})"
            for machine, (shape, figures) in speed(paper)
        ),
    }
    table = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items() if text]
    classes = [*[paper.name] * is_class(paper), *paper.also]
    return "\n".join(
        [
            f"## {heading(paper)}\n",
            f"*{paper.title}.* {paper.source}.\n",
            f"$$\n{paper.equation}\n$$\n",
            "| | |\n|---|---|",
            *table,
            f"\n```python\n{paper.example}\n```\n",
            *(f"::: {where(name)}\n    options:\n      heading_level: 4\n" for name in classes),
        ]
    )


def sections(kind):
    return "\n".join(section(paper) for paper in PAPERS if paper.kind == kind).rstrip()


def where(name):
    """The module of kdfast's `name`, and the name in it: the site reads sources and runs none."""
    found = functools.reduce(getattr, name.split("."), kdfast)
    return f"{found.__module__}.{found.__qualname__}"


def ops():
    """The functions of kdfast.ops."""
    return "\n".join(f"::: {where(f'ops.{name}')}\n" for name in kdfast.ops.__all__ if name[0].islower()).rstrip()


# ---- files -----------------------------------------------------------------------------------------------------------
PARTS = {
    "README.md": {"claims": claims, "losses": glance},
    "docs/index.md": {"claims": claims},
    "docs/losses/index.md": {"losses": index, "note": digits_note},
    "docs/compare.md": {"digits": digits_table},
    "docs/api.md": {"ops": ops},
    "docs/cuda.md": {"predicted": predict.summary},
    **{f"docs/losses/{page_of(kind)}.md": {"losses": lambda kind=kind: sections(kind)} for kind in KINDS},
}


def generated(page):
    """The page as it should be."""
    text = (ROOT / page).read_text()
    for name, make in PARTS[page].items():
        pattern = rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} needs one part between <!-- {name}:start --> and <!-- {name}:end -->")
    return text


def main():
    for page in PARTS:
        (ROOT / page).write_text(generated(page))
    CHART.write_text(chart())
    report.update_readme(ROOT / "docs/benchmarks.md", *report.measured(RESULTS))


if __name__ == "__main__":
    main()
