"""Table 2 of the paper, from runs of our own: neuron graphs, explanations, use of units.

    python interp/n2g.py out/*                the neuron graphs of these runs
    python interp/explain.py out/*            how well their neurons can be explained
    python interp/units.py out/*              how their gates use units, where they have any
    python interp/table2.py out/*             all of them beside each other, a row for each recipe
    python interp/table2.py out/* --layers    a row for each recipe and layer

Runs that differ only in the seed are one row: the mean ± the sample standard deviation. A row is
called after its ablation and whatever else it was trained with that other rows were not. What an
experiment has not looked at prints -; nothing is measured here. The paper's own numbers do not
stand beside ours: its two models were measured with different thresholds.

The table is printed, and saved as table2.md, table2.csv and table2.png, or with --layers as
table2_layers.md and so on, in the folder that holds all the runs.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as knobs
from interp.common import describe_task, number
from interp.n2g import equal_pools
from interp.tables import (
    Experiment, Table, as_png, draw_seeds, entry, open_runs, over_seeds, publish,
    read_experiments, seeds_entries)
from prepare import UserError

# heading -> the name of a number in a row, and how it is printed
GRAPHS = {"with a graph": ("with_graph", ".1%")}
for metric, form in {"density": ".3f", "transitivity": ".3f", "edges to activating": ".2f",
                     "edges per activating node": ".2f", "out-degree": ".3f"}.items():
    name = metric.replace(" ", "_").replace("-", "_")
    GRAPHS[metric] = f"{name}_mean_non_empty", form
    GRAPHS[f"{metric}, all"] = f"{name}_mean_all", form
GRAPHS |= {
    "out-degree, pooled": ("out_degree_pooled", ".3f"),
    "entropy": ("entropy", ".2f"),
    "diversity": ("diversity", ",.0f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "F1": ("f1", ".3f"),
}
SCORES = {
    "score": ("score", ".3f"),
    "random text alone": ("score_random", ".3f"),
    "random weights": ("score_control", ".3f"),
    "score by a language model": ("score_llm", ".3f"),
    "its random text alone": ("score_llm_random", ".3f"),
    "its random weights": ("score_llm_control", ".3f"),
}
USE = {}
for kind, words in {"attn": "attention", "mlp": "neurons"}.items():
    USE[f"{words}: dead"] = f"{kind}_dead", ".1f"
    USE[f"{words}: entropy"] = f"{kind}_entropy", ".2f"
    USE[f"{words}: token share"] = f"{kind}_token_share", ".1%"
    USE[f"{words}: stability"] = f"{kind}_stability", ".3f"
PARTS = [GRAPHS, SCORES, USE]
NAMES = [name for name, _ in chain(*map(dict.values, PARTS))]
NOTES = ("± is the sample standard deviation over the seeds of a row",
         "metrics of graphs: means over the neurons that have one; all: over all neurons, 0 for "
         "those without; pooled: all edges / all nodes",
         "of a gate: means over layers; random weights: the same geometry before training")
ABREAST = 6  # panels in a row of the picture


# ----------------------------------------------------------------------- what the experiments found


def summary(result, layer):
    """Of "all" neurons, or those of one layer; None of a layer that the result has not."""
    if layer is None:
        return result["all"]
    for row in result["layers"]:
        if row["layer"] == layer:
            return row
    return None


def known(numbers):
    """Without those that are None."""
    return {name: float(value) for name, value in numbers.items() if value is not None}


def graph_numbers(result, layer=None):
    """Of n2g.json: what it says of all layers or of one, and a pool, {token: count}, of which
    entropy and diversity are taken once it is known how large those of other runs are."""
    found = summary(result, layer)
    if found is None:
        return {}
    numbers = {name: found[name] for _, (name, _) in list(GRAPHS.items())[1:]}
    numbers["with_graph"] = found["non_empty"] / found["neurons"]
    pool = Counter()
    for row in result["layers"]:
        if layer in (None, row["layer"]):
            pool.update({str(token): int(count) for token, count in row["pool"].items()})
    return known(numbers) | {"pool": pool}


def level_pools(found):
    """Puts entropy and diversity of equally many tokens of all pools in the place of the pools.

    found: the numbers of every run.
    """
    with_pool = [numbers for numbers in found if "pool" in numbers]
    pools = [numbers.pop("pool") for numbers in with_pool]
    if not pools:
        return
    for numbers, level in zip(with_pool, equal_pools([{} for _ in pools], pools)):
        for name in ("entropy", "diversity"):
            numbers.pop(name, None)
        numbers |= known(level)


def score_numbers(result, layer=None, name="score"):
    """Of explain.json: mean scores of the model and of a random one."""
    found = summary(result, layer)
    if found is None:
        return {}
    control = {"mean": None}
    if result["control"] is not None:
        control = summary(result["control"], layer)
    return known({name: found["mean"], f"{name}_random": found["random_mean"],
                  f"{name}_control": control["mean"]})


def use_numbers(result, layer=None):
    """Of units.json: means over layers, or of one."""
    numbers = {}
    for kind in ("attn", "mlp"):
        for name in ("dead", "entropy", "token_share", "stability"):
            values = result["kinds"][kind][name]
            if layer is not None:
                values = values[layer : layer + 1]
            values = [value for value in values if value is not None]
            if values:
                numbers[f"{kind}_{name}"] = sum(values) / len(values)
    return numbers


def experiments(layer=None):
    """What the table reads: of all layers, or of one."""
    return {
        "n2g": Experiment(
            partial(graph_numbers, layer=layer),
            "entropy and diversity of as many tokens of every run's pool as the smallest has"),
        "explain": Experiment(
            partial(score_numbers, layer=layer), "mean scores over neurons that have one"),
        "explain_openai": Experiment(
            partial(score_numbers, layer=layer, name="score_llm"),
            "mean scores over neurons that have one"),
        "units": Experiment(partial(use_numbers, layer=layer), "shares less what chance gives")}


# ---------------------------------------------------------------------------------------- the table


def draw_table2(table):
    """A panel for every number: a dot for a seed, a bar for their mean. -> the bytes of a .png"""
    from matplotlib.figure import Figure

    ours = set().union(*table)
    numbers = chain(*map(dict.items, PARTS))  # (heading, (name, form))
    shown = [(heading, name) for heading, (name, _) in numbers if name in ours]
    labels = [row["recipe"] for row in table]
    if "layer" in table[0]:
        labels = [f"{row['recipe']}, layer {row['layer']}" for row in table]
    lines = -(-len(shown) // ABREAST)  # rounded up
    width = max(2.6, 0.25 * len(table))  # inches; a letter of the labels is some 0.07 high
    size = width * ABREAST, 2.2 * lines + 0.07 * max(map(len, labels))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, ABREAST, squeeze=False).flatten()
    for (heading, name), axes in zip(shown, panels):
        draw_seeds(axes, table, name)
        axes.set_title(heading, fontsize="medium")
    for axes in panels:
        axes.set_xlim(-0.6, len(table) - 0.4)
        axes.set_xticks(range(len(table)), [])
    for axes in panels[-ABREAST:]:
        axes.set_xticks(range(len(table)), labels, rotation=90, fontsize="small")
    for axes in panels[len(shown) :]:  # empty, but for the names below it
        axes.set(frame_on=False, yticks=[])
    return as_png(figure)


def columns_of(part):
    """(heading, row -> text) of GRAPHS or another."""
    return [(heading, number(*what)) for heading, what in part.items()]


def make_table(name):
    """The Table, its files called like this."""
    parts = [columns_of(part) for part in PARTS]
    entries = [("layer", entry("layer")), *seeds_entries(NAMES)]
    return Table(name, parts, entries, {f"{name}.png": draw_table2}, NOTES)


def rows_of(runs, layer=None):
    """A row for every recipe, of all layers or of one, and notes."""
    found, notes = read_experiments(experiments(layer), runs)
    level_pools(found)
    rows = over_seeds(runs, [describe_task(task) for task in runs.tasks], found)
    if layer is not None:
        rows = [row | {"layer": layer} for row in rows]
    return rows, notes


def layers_of(runs):
    """A row for every recipe and layer, and notes."""
    deepest = max(task.run.model.config.n_layer for task in runs.tasks)
    found = [rows_of(runs, layer) for layer in range(deepest)]
    tables = [rows for rows, _ in found]
    return list(chain(*zip(*tables))), found[0][1]


# ------------------------------------------------------------------------------- the command line


def parse_arguments():
    """The command line. Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    add = parser.add_argument
    add("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    add("--data", help="prepared data of the runs (default: their own)")
    add("--layers", action="store_true", help="a row for each layer")
    add("--json", action="store_true", help="print JSON and no more")
    return parser.parse_args()


def main():
    args = parse_arguments()
    table = make_table("table2_layers" if args.layers else "table2")
    runs = open_runs(table, args.runs, args.data)
    rows, notes = layers_of(runs) if args.layers else rows_of(runs)
    if not set().union(*rows) & set(NAMES):
        raise UserError("no experiment has looked at any of these runs: first do so with "
                        "interp/n2g.py, interp/explain.py or interp/units.py")
    publish(table, rows, notes, runs.folder, args.json)


if __name__ == "__main__":
    knobs.cli(main)
