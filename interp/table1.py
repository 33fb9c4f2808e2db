"""Table 1 of the paper, from runs of our own: circuits, autoencoders, perplexity and L1.

    python interp/acdc.py out/*        the circuits of these runs
    python interp/sae.py out/*         their autoencoders
    python interp/table1.py out/*      both beside perplexity and L1, and beside the paper's numbers

Runs that differ only in the seed are one row: the mean ± the sample standard deviation. What an
experiment has not looked at prints -. The table is printed, and saved as table1.md, table1.csv and
table1.png in the folder that holds the first run. Of several thresholds (acdc.py --tau) or
coefficients (sae.py --l1, --k) the first counts.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import csv
import io
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as knobs
from eval import (
    AVERAGED, COLUMNS, ablation, cells, check_range, check_writable, evaluate_run, group_seeds,
    join_seeds, measuring_parser, number, open_tasks, print_table)
from interp.results import fingerprint, read_result, refuse_mixed, result_path
from model import replace_file
from prepare import UserError

# a number of the paper's table -> what it is called in a row of ours, and how it is printed
PAPER_NUMBERS = {
    "edges": ("edges", ".1f"),
    "SAE L0": ("l0", ".2f"),
    "CE score": ("ce_score", ".2f"),
    "ppl": ("ppl_clean", ".2f"),
    "L1": ("l1", ".3f"),
}
# (ablation, k_attn and k_mlp) -> these numbers, in this order
PAPER = {
    ("none", 0): (79, 7.22, 0.63, 5.73, 0.44),
    ("global", 8): (70, 5.22, 0.65, 6.97, 0.74),
    ("global", 4): (41, 4.9, 0.67, 6.73, 0.72),
    ("global", 2): (30, 4.57, 0.71, 6.66, 0.73),
    ("global", 1): (38, 5.48, 0.66, 6.49, 0.62),
    ("local", 8): (36, 5.0, 0.72, 6.47, 0.67),
    ("local", 4): (30, 4.01, 0.65, 6.58, 0.76),
    ("local", 2): (54, 4.9, 0.70, 6.55, 0.71),
    ("local", 1): (36, 5.33, 0.69, 6.58, 0.70),
}
NOTES = ("± is the sample standard deviation over the seeds of a row",
         "the paper's models are of another size and data; its ppl is per GPT-2 token")


# ----------------------------------------------------------------------- what the experiments found


def circuit_numbers(result):
    """Of acdc.json: the size of its first circuit, and how often the model knows the answer."""
    first = result["circuits"][0]
    return {"edges": float(first["edges"]), "connected": float(first["connected"]),
            "ioi_exact": float(result["ioi_exact"])}


def sae_numbers(result):
    """Of sae.json: means over the autoencoders of the first coefficient, one a seed.

    A score that one of them lacks is left out.
    """
    first = result["saes"][0]
    coefficient = "l1" if "l1" in first else "k"
    rows = [row for row in result["saes"] if row[coefficient] == first[coefficient]]
    numbers = {}
    for name in ("l0", "ce_score"):
        values = [row[name] for row in rows]
        if None not in values:
            numbers[name] = sum(values) / len(values)
    return numbers


EXPERIMENTS = {"acdc": circuit_numbers, "sae": sae_numbers}
FOUND = ("edges", "connected", "ioi_exact", "l0", "ce_score")  # the names of all these numbers


def read_experiment(name, run):
    """(result, numbers): what NAME.json beside the run's checkpoint says; None where there is none.

    Raises UserError when it is damaged or of other weights.
    """
    path = result_path(run.path, f"{name}.json")
    if not path.exists():
        return None
    result = read_result(path)
    if result["checkpoint"] != fingerprint(run.model):
        raise UserError(f"{path} is not of the checkpoint that {run.path} has now: make it again "
                        f"with --force; it came from python {result['command']}")
    try:
        numbers = EXPERIMENTS[name](result)
        result["warnings"] = [str(warning) for warning in result["warnings"]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: delete it, and make it again") from None
    return result, numbers


def read_experiments(runs):
    """A dict of numbers for every run, and notes: how they were found, and what is wrong with them.

    Raises UserError on results that do not belong in one table.
    """
    found, notes = [{} for _ in runs], []
    for name in EXPERIMENTS:
        settings_of, warnings = {}, []
        for place, run in enumerate(runs):
            experiment = read_experiment(name, run)
            if experiment is None:
                continue
            result, numbers = experiment
            found[place] |= numbers
            settings_of[run.path] = result["settings"]
            warnings += [f"warning: {run.path}: {warning}" for warning in result["warnings"]]
        if settings_of:
            refuse_mixed(settings_of)
            settings = next(iter(settings_of.values())).items()
            words = [f"{knob} {value}" for knob, value in settings if value is not None]
            notes.append(f"{name}: {', '.join(words)}; of a list, the first")
        notes += warnings
    return found, notes


def refuse_other_texts(tasks):
    """Raises UserError when two runs would be measured on different data."""
    first = tasks[0]
    for task in tasks[1:]:
        if task.meta["checksum"] != first.meta["checksum"]:
            raise UserError(f"{first.run.path} is measured on {first.data}, {task.run.path} on "
                            f"{task.data}, which are other texts: tabulate them apart")


# ---------------------------------------------------------------------------------------- the table


def in_paper(row):
    """{heading: number} of the paper's model like this one; empty when it has none."""
    if row["k_attn"] != row["k_mlp"]:
        return {}
    if row["ablation"] != "none" and (row["attn_unit"], row["gate"]) != ("dim", "softmax"):
        return {}
    return dict(zip(PAPER_NUMBERS, PAPER.get((row["ablation"], row["k_mlp"]), ())))


def paper_number(heading, name):
    """A column of the paper's number, where ours stands beside it."""
    def show(row):
        return str(in_paper(row).get(heading, "-")) if name in row else "-"
    return show


def table1_columns():
    """(heading, row -> text), each number of ours followed by the paper's."""
    columns = [column for column in COLUMNS if column[0] in ("run", "ablation", "seeds")]
    for heading, (name, form) in PAPER_NUMBERS.items():
        columns.append((heading, number(name, form)))
        columns.append((f"paper {heading}", paper_number(heading, name)))
    columns.append(("connected edges", number("connected", ".1f")))
    columns.append(("IOI answers exact", number("ioi_exact", ".0%")))
    return columns


def markdown(table, notes):
    """The table as text for table1.md, the notes below it."""
    heading, *rows = cells(table, table1_columns())
    lines = [f"| {' | '.join(row)} |\n" for row in (heading, ["---"] * len(heading), *rows)]
    return "".join(lines + [f"\n{note}\n" for note in notes])


def spreadsheet(table):
    """The table as text for table1.csv, with every digit."""
    names = ["run", "ablation", "k_attn", "k_mlp", "n"]
    for name, _ in PAPER_NUMBERS.values():
        names += [name, f"{name}_sd"]
    names += ["connected", "ioi_exact"]
    headings = ["seeds" if name == "n" else name for name in names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings + [f"paper {heading}" for heading in PAPER_NUMBERS])
    for row in table:
        papers = in_paper(row)
        writer.writerow([row.get(name) for name in names]
                        + [papers.get(heading) for heading in PAPER_NUMBERS])
    return text.getvalue()


def draw_table1(table):
    """A column for every number, each with a scale of its own. -> the bytes of a .png

    Above ours, a dot for a seed and a bar for their mean; below the paper's.
    """
    from matplotlib.figure import Figure

    ours = set().union(*table)
    shown = [(heading, name) for heading, (name, _) in PAPER_NUMBERS.items() if name in ours]
    figure = Figure(figsize=(2.6 * len(shown) + 1, 5.5), layout="constrained")
    grid = figure.subplots(2, len(shown), sharex=True, squeeze=False)
    labels = [ablation(row).replace("none", "baseline") for row in table]
    for (heading, name), (above, below) in zip(shown, grid.T):
        for x, row in enumerate(table):
            values = [one[name] for one in row["rows"] if name in one]
            above.plot([x] * len(values), values, "o", color="tab:blue", alpha=0.5)
            if name in row:
                above.plot([x - 0.3, x + 0.3], [row[name]] * 2, color="tab:blue")
            below.plot(x, in_paper(row).get(heading, math.nan), "s", color="0.4")
        above.set_title(heading, fontsize="medium")
        below.set_xticks(range(len(table)), labels, rotation=60, ha="right", fontsize="small")
    grid[0, 0].set_ylabel("here")
    grid[1, 0].set_ylabel("paper")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def save_together(contents):
    """{path: bytes}. Where one of them finds no room, none takes its place: they are one result."""
    with ExitStack() as stack:
        for path, content in contents.items():
            file = stack.enter_context(replace_file(path))
            file.write(content)
            file.flush()  # a full disk shows here, when nothing has been replaced yet


def main():
    args = measuring_parser(__doc__).parse_args()
    check_range(args, "batch_size", 1)
    device = knobs.pick_device(args.device)
    tasks = open_tasks(args.runs, args.data)
    refuse_other_texts(tasks)
    found, notes = read_experiments([task.run for task in tasks])
    groups = group_seeds(tasks)
    target = Path(tasks[0].run.path).absolute().parent / "table1"
    for kind in (".md", ".csv", ".png"):
        check_writable(target.with_suffix(kind))

    rows = []
    for task, numbers in zip(tasks, found):
        rows.append(evaluate_run(task, args.batch_size, device) | numbers)
    table = join_seeds(rows, groups, AVERAGED + FOUND)
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print_table(table, table1_columns())
        print(*NOTES, *notes, sep="\n")
    save_together({
        target.with_suffix(".md"): markdown(table, notes).encode(errors="replace"),
        target.with_suffix(".csv"): spreadsheet(table).encode(errors="replace"),
        target.with_suffix(".png"): draw_table1(table)})
    if not args.json:
        print(f"saved as {target.with_suffix('.md')}, .csv, .png")


if __name__ == "__main__":
    knobs.cli(main)
