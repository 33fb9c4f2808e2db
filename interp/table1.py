"""Table 1 of the paper, from runs of our own: circuits, autoencoders, perplexity and L1.

    python interp/acdc.py out/*        the circuits of these runs
    python interp/sae.py out/*         their autoencoders
    python interp/table1.py out/*      both beside perplexity and L1, and beside the paper's numbers

Runs that differ only in the seed are one row: the mean ± the sample standard deviation. A row is
called after its ablation and whatever else it was trained with that other rows were not. What an
experiment has not looked at prints -. Of several thresholds (acdc.py --tau), coefficients (sae.py
--l1, --k) or places the first counts; the numbers at equal quality are interpolated between all of
them.

The table is printed, and saved as table1.md, table1.csv and table1.png in the folder that holds all
the runs. Beside them bargain.png draws what interpretability costs: clean perplexity across, and
up, fewer edges, a better autoencoder, a better ablated stream; what no run has is left out.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import csv
import io
import json
import math
import os
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as knobs
from eval import (
    AVERAGED, averages, cells, check_range, check_writable, column, evaluate_run, group_seeds,
    join_seeds, measuring_parser, name_recipes, number, open_tasks, print_table, trained_with)
from interp.acdc import EDGES_FOR, edges_at_equal_kl
from interp.results import fingerprint, read_result, refuse_mixed, result_path
from interp.sae import AT_L0, coefficient, place, score_at_l0
from model import replace_file
from prepare import UserError

# the heading of a number in the paper's table -> its name in a row of ours, and how it is printed
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
# the same of numbers that the paper does not have
FURTHER_NUMBERS = {
    "connected edges": ("connected", ".1f"),
    **{f"edges for KL <= {kl:g}": (name, ".1f") for name, kl in EDGES_FOR.items()},
    f"CE score at L0 = {AT_L0}": ("ce_score_at_l0", ".2f"),
    "IOI answers exact": ("ioi_exact", ".0%"),
    "by the ablated stream": ("ablated_exact", ".0%"),
    "ppl ablated": ("ppl_ablated", ".2f"),
}
# the panels of bargain.png: the name of a number, its axis, whether less of it is better
BARGAIN = (
    ("edges_kl_0.3", "edges for KL <= 0.3 (interpolated)", True),
    ("ce_score_at_l0", f"CE score at L0 = {AT_L0} (interpolated)", False),
    ("ppl_ablated", "ablated perplexity", True),
)
NOTES = ("± is the sample standard deviation over the seeds of a row",
         "the paper's models are of another size and data; its ppl is per GPT-2 token")


# ----------------------------------------------------------------------- what the experiments found


def circuit_numbers(result):
    """Of acdc.json: the size of its first circuit, edges at equal KL, how often both streams know
    the answer."""
    first = result["circuits"][0]
    numbers = {"edges": float(first["edges"]), "connected": float(first["connected"]),
               "ioi_exact": float(result["ioi_exact"])}
    if result["ablated_exact"] is not None:  # the baseline has no such stream
        numbers["ablated_exact"] = float(result["ablated_exact"])
    return numbers | edges_at_equal_kl(result)


def sae_numbers(result):
    """Of sae.json: means over the autoencoders of the first place, one a seed: of the first
    coefficient, and at one L0.

    A score that one of them lacks is left out.
    """
    first = result["saes"][0]
    here = [row for row in result["saes"] if place(row) == place(first)]
    numbers = {"l0": [], "ce_score": [], "ce_score_at_l0": []}
    for row in here:
        if coefficient(row) == coefficient(first):  # one a seed
            sweep = [other for other in here if other["seed"] == row["seed"]]
            numbers["l0"].append(row["l0"])
            numbers["ce_score"].append(row["ce_score"])
            numbers["ce_score_at_l0"].append(score_at_l0(sweep, AT_L0))
    return {name: sum(values) / len(values) for name, values in numbers.items()
            if None not in values}


EXPERIMENTS = {"acdc": circuit_numbers, "sae": sae_numbers}
FOUND = ("edges", "connected", "ioi_exact", "ablated_exact", *EDGES_FOR,
         "l0", "ce_score", "ce_score_at_l0")  # the names of all these numbers
# what their settings are followed by, in the notes
READING = {
    "acdc": "of several tau the first; edges for a KL: interpolated between all, edges against "
            "log KL, on held-out prompts if any, of models that know the answers; a seed whose "
            "circuits are all worse than that KL is left out, so (1 of 3) flatters a row",
    "sae": "of a list, the first; the CE score at an L0: interpolated between all, and left out "
           "where the sweep does not reach it"}


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
        raise UserError(f"{path} is damaged, or of an earlier version: delete it, "
                        f"and make it again") from None
    return result, numbers


def read_experiments(runs):
    """A dict of numbers for every run, and notes: how they were found, and what is wrong with them.

    Raises UserError on results that do not belong in one table.
    """
    found, notes = [{} for _ in runs], []
    for name in EXPERIMENTS:
        settings_of, warnings = {}, []
        for run, numbers_of_run in zip(runs, found):
            experiment = read_experiment(name, run)
            if experiment is None:
                continue
            result, numbers = experiment
            numbers_of_run |= numbers
            settings_of[run.path] = result["settings"]
            warnings += [f"warning: {run.path}: {warning}" for warning in result["warnings"]]
        if settings_of:
            refuse_mixed(settings_of)
            settings = next(iter(settings_of.values())).items()
            words = [f"{knob} {value}" for knob, value in settings if value is not None]
            notes.append(f"{name}: {', '.join(words)}; {READING[name]}")
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
    recipe = row["attn_unit"], row["gate"], row["ramp_end"]
    if row["ablation"] != "none" and recipe != ("dim", "softmax", 0):
        return {}
    return dict(zip(PAPER_NUMBERS, PAPER.get((row["ablation"], row["k_mlp"]), ())))


def paper_number(heading, name):
    """A column of the paper's number, where ours stands beside it."""
    def show(row):
        return str(in_paper(row).get(heading, "-")) if name in row else "-"
    return show


def table1_columns():
    """(heading, row -> text), each number of ours followed by the paper's."""
    columns = [("run", column("run")), ("recipe", column("recipe")), ("seeds", column("n"))]
    for heading, (name, form) in PAPER_NUMBERS.items():
        columns.append((heading, number(name, form)))
        columns.append((f"paper {heading}", paper_number(heading, name)))
    for heading, (name, form) in FURTHER_NUMBERS.items():
        columns.append((heading, number(name, form)))
    return columns


def markdown(table, notes):
    """The table as text for table1.md, the notes below it."""
    heading, *rows = cells(table, table1_columns())
    lines = [f"| {' | '.join(row)} |\n" for row in (heading, ["---"] * len(heading), *rows)]
    return "".join(lines + [f"\n{note}\n" for note in notes])


def spreadsheet(table):
    """The table as text for table1.csv, with every digit."""
    names = ["run", "recipe", "ablation", "k_attn", "k_mlp", "n"]
    for name, _ in (*PAPER_NUMBERS.values(), *FURTHER_NUMBERS.values()):
        names += [name, f"{name}_sd"]
    headings = ["seeds" if name == "n" else name for name in names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings + [f"paper {heading}" for heading in PAPER_NUMBERS])
    for row in table:
        papers = in_paper(row)
        writer.writerow([row.get(name) for name in names]
                        + [papers.get(heading) for heading in PAPER_NUMBERS])
    return text.getvalue()


# ------------------------------------------------------------------------------------- the pictures


def as_png(figure):
    """The bytes of a .png of a matplotlib figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def draw_table1(table):
    """A column for every number, each with a scale of its own. -> the bytes of a .png

    Above ours, a dot for a seed and a bar for their mean; below the paper's.
    """
    from matplotlib.figure import Figure

    ours = set().union(*table)
    shown = [(heading, name) for heading, (name, _) in PAPER_NUMBERS.items() if name in ours]
    labels = [row["recipe"] for row in table]
    width = max(2.6, 0.25 * len(table))  # inches; a letter of the labels is some 0.07 high
    size = width * len(shown) + 1, 4.5 + 0.07 * max(map(len, labels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(shown), sharex=True, squeeze=False)
    for (heading, name), (above, below) in zip(shown, grid.T):
        for x, row in enumerate(table):
            values = [one[name] for one in row["rows"] if name in one]
            above.plot([x] * len(values), values, "o", color="tab:blue", alpha=0.5)
            if name in row:
                above.plot([x - 0.3, x + 0.3], [row[name]] * 2, color="tab:blue")
            below.plot(x, in_paper(row).get(heading, math.nan), "s", color="0.4")
        above.set_title(heading, fontsize="medium")
        below.set_xticks(range(len(table)), labels, rotation=90, fontsize="small")
    grid[0, 0].set_ylabel("here")
    grid[1, 0].set_ylabel("paper")
    return as_png(figure)


def draw_bargain(table):
    """What interpretability costs, a panel for each of BARGAIN that is in the table.

    -> the bytes of a .png, or None where no panel is.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ours = set().union(*table)
    shown = [panel for panel in BARGAIN if panel[0] in ours]
    if not shown:
        return None
    figure = Figure(figsize=(4.2 * len(shown) + 0.5, 4.5 + 0.1 * len(table)), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for (name, label, less_is_better), axes in zip(shown, panels):
        for row, color in zip(table, colormaps["tab20"].colors * len(table)):
            draw_recipe(axes, row, name, color)
        axes.set(xlabel="clean perplexity", ylabel=label)
        if less_is_better:
            axes.invert_yaxis()  # up is better in every panel
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle("up and to the left is better; a hollow mark lacks this number of some seeds, "
                    "a dotted line of all", fontsize="medium")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small",
                  frameon=False)
    return as_png(figure)


def draw_recipe(axes, row, name, color):
    """A dot for every seed of a row that has this number, and their mean ± deviation."""
    seeds = [one for one in row["rows"] if name in one]
    if not seeds:
        axes.axvline(row["ppl_clean"], color=color, ls=":", label=row["recipe"])
        return
    axes.plot([one["ppl_clean"] for one in seeds], [one[name] for one in seeds], ".", color=color)
    mean = averages(seeds, ("ppl_clean", name))
    filled = color
    if len(seeds) < len(row["rows"]):  # the others may be worse than all that was measured
        filled = "none"
    axes.errorbar(mean["ppl_clean"], mean[name], xerr=mean["ppl_clean_sd"], yerr=mean[f"{name}_sd"],
                  fmt="o", ms=8, color=color, mfc=filled, label=row["recipe"])


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
    folder = Path(os.path.commonpath([Path(task.run.path).absolute().parent for task in tasks]))
    names = ("table1.md", "table1.csv", "table1.png", "bargain.png")
    for name in names:
        check_writable(folder / name)

    rows = []
    for task, numbers in zip(tasks, found):
        rows.append(evaluate_run(task, args.batch_size, device) | numbers)
    name_recipes(rows, [trained_with(task.run) for task in tasks])
    table = join_seeds(rows, groups, AVERAGED + FOUND)
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print_table(table, table1_columns())
        print(*NOTES, *notes, sep="\n")
    contents = dict(zip(names, (
        markdown(table, notes).encode(errors="replace"),
        spreadsheet(table).encode(errors="replace"), draw_table1(table), draw_bargain(table))))
    saved = {folder / name: content for name, content in contents.items() if content}
    save_together(saved)
    if not args.json:
        print(f"saved in {folder}: {', '.join(path.name for path in saved)}")


if __name__ == "__main__":
    knobs.cli(main)
