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

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as knobs
from interp.acdc import EDGES_FOR, edges_at_equal_kl
from interp.common import averages, check_range, evaluate_task, measuring_parser, number
from interp.sae import AT_L0, coefficient, place, score_at_l0
from interp.tables import (
    Experiment, Table, as_png, draw_seeds, open_runs, over_seeds, publish, read_experiments,
    seeds_entries)

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


# how these numbers were read, for the notes
READING = {
    "acdc": "of several tau the first; edges for a KL: interpolated between all, edges against "
            "log KL, on held-out prompts if any, of models that know the answers; a seed whose "
            "circuits are all worse than that KL is left out, so (1 of 3) flatters a row",
    "sae": "of a list, the first; the CE score at an L0: interpolated between all, and left out "
           "where the sweep does not reach it"}


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
    columns = []
    for heading, (name, form) in PAPER_NUMBERS.items():
        columns.append((heading, number(name, form)))
        columns.append((f"paper {heading}", paper_number(heading, name)))
    for heading, (name, form) in FURTHER_NUMBERS.items():
        columns.append((heading, number(name, form)))
    return columns


def papers_entry(heading):
    """Of the spreadsheet: the paper's number, also where we have none."""
    def value(row):
        return in_paper(row).get(heading)
    return value


def table1_spreadsheet():
    """(heading, row -> value)."""
    names = [name for name, _ in (*PAPER_NUMBERS.values(), *FURTHER_NUMBERS.values())]
    papers = [(f"paper {heading}", papers_entry(heading)) for heading in PAPER_NUMBERS]
    return seeds_entries(names) + papers


# ------------------------------------------------------------------------------------- the pictures


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
        draw_seeds(above, table, name)
        for x, row in enumerate(table):
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


# ------------------------------------------------------------------------------- the command line


EXPERIMENTS = {"acdc": Experiment(circuit_numbers, READING["acdc"]),
               "sae": Experiment(sae_numbers, READING["sae"])}
TABLE1 = Table(
    "table1", [table1_columns()], table1_spreadsheet(),
    {"table1.png": draw_table1, "bargain.png": draw_bargain}, NOTES)


def main():
    args = measuring_parser(__doc__).parse_args()
    check_range(args, "batch_size", 1)
    device = knobs.pick_device(args.device)
    runs = open_runs(TABLE1, args.runs, args.data)
    found, notes = read_experiments(EXPERIMENTS, runs)
    rows = [evaluate_task(task, args.batch_size, device) for task in runs.tasks]
    publish(TABLE1, over_seeds(runs, rows, found), notes, runs.folder, args.json)


if __name__ == "__main__":
    knobs.cli(main)
