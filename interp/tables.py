"""Tables 1 and 2 of the paper for your own runs. Table 1 has the paper's numbers beside yours.

First run the experiments that you want in the tables, on run folders of train.py, in any order:

    python -m interp.circuits out/*           Table 1: circuits by the paper's method
    python -m interp.circuits out/* --method eap      Table 1: units that three tasks need
    python -m interp.sae out/*                Table 1: sparse autoencoders (SAEs)
    python -m interp.unlearn out/*            Table 1: what it costs to remove a concept
    python -m interp.n2g out/*                Table 2: neuron graphs
    python -m interp.explain out/*            Table 2: how well neurons can be explained
    python -m interp.units out/*              Table 2: how the gates use their units
    python -m interp.tables out/*             both tables; measures perplexity and L1 first
    python -m interp.tables out/* --layers    Table 2 only, with one row for each layer

Runs that differ only in the seed are one row: mean ± sample standard deviation. If an experiment
used several thresholds, coefficients or places, "edges", "SAE L0" and "CE score" are of the first.

Saved in the folder that holds all runs: table1 and table2 (or table2_layers) as .md, as .csv with
every digit; and tradeoff.png: interpretability and ablated perplexity against clean perplexity.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import config as knobs
from eval import (
    RECIPE, describe_run, differences, measure_run, open_runs, over_seeds, plain, print_table,
    run_parser, save_figure, text_table)
from interp.results import common_folder, read_results, result_path, write_text
from prepare import UserError

IN_PAPER = ("edges", "SAE L0", "CE score", "ppl_clean", "l1")
PAPER = {  # its Table 1: (ablation, k_attn and k_mlp) -> these numbers
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
# the parts of a table, printed below each other: {column: format}
HEAD = dict.fromkeys(("run", "layer", "ablation", "k_attn", "k_mlp", "differs", "n"), "")
TABLE1 = [{
    "answers exact": ".0%", "edges": ".1f", "paper edges": ".4g", "connected edges": ".1f",
    "edges for KL <= 0.1": ".1f", "edges for KL <= 0.3": ".1f", "edges for KL <= 1": ".1f",
    "units for names": ".0f", "units for pronouns": ".0f", "units for objects": ".0f",
    "nats lost at L0 = 3": ".3f", "CE score at L0 = 3": ".2f",
    "unlearning, retain": ".4f", "unlearning, siblings": ".3f",
    "logits edit, retain": ".4f", "logits edit, siblings": ".3f",
    "SAE L0": ".2f", "paper SAE L0": ".4g", "CE score": ".2f", "paper CE score": ".4g",
    "ppl_clean": ".2f", "paper ppl_clean": ".4g", "ppl_ablated": ".2f",
    "l1": ".3f", "paper l1": ".4g"}]
GRAPHS = {"with_graph": ".1%"}
for name, form in {"density": ".3f", "transitivity": ".3f", "edges_to_activating": ".2f",
                   "edges_per_activating_node": ".2f", "out_degree": ".3f"}.items():
    GRAPHS |= {f"{name}_mean_non_empty": form, f"{name}_mean_all": form}
GRAPHS |= {"out_degree_pooled": ".3f", "entropy": ".2f", "diversity": ",.0f",
           "precision": ".3f", "recall": ".3f", "f1": ".3f"}
SCORES, USE = {}, {}
for name in ("score", "llm_score"):
    SCORES |= dict.fromkeys((name, f"{name}_random", f"{name}_control"), ".3f")
for name, form in dict(dead=".1f", entropy=".2f", token_share=".1%", stability=".3f").items():
    USE |= {f"attn_{name}": form, f"mlp_{name}": form}
TABLE2 = [GRAPHS, SCORES, USE]
TRADEOFFS = {  # name of a number: label of its axis
    "edges for KL <= 0.3": "edges of a circuit with KL <= 0.3",
    "nats lost at L0 = 3": "loss increase on SAE reconstructions, nats",
    "ppl_ablated": "ablated perplexity"}
NOTES1 = [
    "± is the sample standard deviation over the seeds of a row; (1 of 3): one of 3 seeds has it",
    "paper: its model with the same ablation and k, of another size and data; ppl per GPT-2 token",
    "answers exact: how often the right answer is the likeliest; if rarely, circuits say little",
    "edges for KL <= x: interpolated over thresholds, on held-out prompts if any, of models that "
    "know the answers; a seed that does not reach this KL is left out: its row looks too good",
    "units for names, pronouns, objects: the fewest with f >= 0.8, of models that know the task",
    "unlearning: loss increase, nats, on other stories and on sibling words where removing units "
    "(ranking fisher) raises the loss on a concept's words by 0.5, mean over concepts; logits "
    "edit: where the logits of these words are lowered instead",
    "nats lost at L0 = 3: loss increase when SAE reconstructions with 3 active features replace a "
    "layer's output (interpolated); lower is better",
    "CE score: 1 - this increase / the increase when the output is zeroed"]
NOTES2 = NOTES1[:1] + [
    "the paper measured its two models with different thresholds: its numbers are not shown",
    "non_empty: over neurons with a graph; all: over all, 0 without one; pooled: all edges / all "
    "nodes; entropy (bits), diversity (token types): of equally many tokens of each run",
    "score: correlation of predicted and true activations, mean over neurons; random: on random "
    "text only; control: of a model with random weights",
    "attn, mlp: the units that the gates keep, means over layers; dead: units that are never kept; "
    "token_share, stability: 0 is what chance gives"]

# ----------------------------------------------------------------------- what the experiments found


def circuit_numbers(result, layer):
    """Of acdc.json: its first circuit, edges at equal KL, how often the answers are right."""
    first = result["circuits"][0]
    numbers = {f"edges for KL <= {kl}": edges for kl, edges in result["edges_at_kl"].items()}
    return numbers | {"edges": first["edges"], "connected edges": first["connected"],
                      "answers exact": result["exact"]}


def unit_numbers(result, layer):
    """Of eap.json: how many units each task needs; None for one that the model does not know."""
    return {f"units for {row['task']}": row.get("size")
            for row in result["rows"] if row["level"] == "units"}


def unlearning_numbers(result, layer):
    """Of unlearn.json: what removing a concept costs, by the ranking fisher and by its control."""
    fisher, logits = result["mean"]["fisher"], result["mean"]["logits"]
    return {"unlearning, retain": fisher["retain"], "unlearning, siblings": fisher["siblings"],
            "logits edit, retain": logits["retain"], "logits edit, siblings": logits["siblings"]}


def sae_numbers(result, layer):
    """Of sae.json: means over seeds at its first place, at one L0 and for the first coefficient."""
    at_l0, saes = result["at_l0"]["places"][0], pd.DataFrame(result["saes"])
    *_, alike = next(iter(saes.groupby(["layer", "site", "l1"], sort=False)))  # one for each seed
    l0, score = alike[["l0", "ce_score"]].astype(float).mean(skipna=False)
    return {"nats lost at L0 = 3": at_l0["nats_lost"], "CE score at L0 = 3": at_l0["ce_score"],
            "SAE L0": l0, "CE score": score}


def part_of(result, layer):
    """What a result says of one layer, or of all for None; empty for a layer that it lacks."""
    layers = {row["layer"]: row for row in result["layers"]}
    return result["all"] if layer is None else layers.get(layer, {})


def graph_numbers(result, layer):
    """Of n2g.json; with "pool" {token: count} for numbers_of."""
    found, pool = part_of(result, layer), Counter()
    if not found:
        return {}
    for row in result["layers"] if layer is None else [found]:
        pool.update(row["pool"])
    numbers = {name: found.get(name) for name in GRAPHS}
    return numbers | {"with_graph": found["non_empty"] / found["neurons"], "pool": pool}


def score_numbers(name, result, layer):
    """Of explain.json or explain_openai.json: mean scores."""
    found = part_of(result, layer)
    control = part_of(result["control"] or {"all": {}, "layers": []}, layer)
    return {name: found.get("mean"), f"{name}_random": found.get("random_mean"),
            f"{name}_control": control.get("mean")}


def use_numbers(result, layer):
    """Of units.json: means over the layers that have a number, or of one layer."""
    numbers, layers = {}, slice(layer, None if layer is None else layer + 1)
    for name in USE:
        kind, number = name.split("_", 1)
        numbers[name] = pd.Series(result["kinds"][kind][number][layers], dtype=float).mean()
    return numbers


# {name of a result file: function of the result and a layer (None: all layers)}
EXPERIMENTS1 = {"acdc": circuit_numbers, "eap": unit_numbers, "unlearn": unlearning_numbers,
                "sae": sae_numbers}
EXPERIMENTS2 = {"n2g": graph_numbers, "units": use_numbers,
                "explain": partial(score_numbers, "score"),
                "explain_openai": partial(score_numbers, "llm_score")}


def read_experiments(runs, experiments):
    """Their results, [(place of a run, path, function of a layer)], and notes on them."""
    found, notes = [], []
    for name, function in experiments.items():
        paths = [result_path(run.path, f"{name}.json") for run in runs]
        places = [place for place, path in enumerate(paths) if path.exists()]
        results = read_results([paths[place] for place in places])
        notes += [f"settings of {name}: {one['settings']}" for one in results[:1]]  # of all
        for place, result in zip(places, results):
            found.append((place, paths[place], partial(function, result)))
            for warning in result.get("warnings", ()):
                notes.append(f"warning: {result['run']}: {warning}")
    return found, notes


def subsampled(counts, size):
    """The expected entropy, in bits, and number of types of `size` tokens drawn without replacement
    from a pool with these counts: exact (rarefaction, Hurlbert 1971). Of a type's c tokens, k are
    drawn with the hypergeometric probability C(c, k) C(N - c, size - k) / C(N, size)."""
    N = sum(counts)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, N + 1)))))

    def log_choose(n, k):
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    entropy = diversity = 0.0
    for c, types in Counter(counts).items():
        k = np.arange(max(1, size - (N - c)), min(c, size) + 1)
        ways = log_choose(c, k) + log_choose(N - c, size - k)
        p = np.exp(ways - log_choose(N, size))
        entropy -= types * (p @ (k / size * np.log2(k / size)))
        diversity += types * p.sum()
    return float(entropy), float(diversity)


def numbers_of(runs, found, layer=None):
    """A DataFrame with a row of numbers for each run. found: from read_experiments."""
    numbers = [{} for _ in runs]
    for place, path, numbers_at in found:
        try:
            numbers[place] |= numbers_at(layer)
        except KeyError as error:  # a file that an older version wrote
            raise UserError(f"{path} has no {error}: make it again with --force") from None
    pooled = [one for one in numbers if "pool" in one]
    size = min((one["pool"].total() for one in pooled), default=0)
    for one in pooled:  # entropy and diversity of equally many tokens
        counts = list(one.pop("pool").values())
        one["entropy"], one["diversity"] = subsampled(counts, size) if size else (None, None)
    return pd.DataFrame(numbers).astype(float).dropna(axis=1, how="all")


# -------------------------------------------------------------------- tables, picture, command line


def paper_numbers(row):
    """{"paper x": the paper's x} for each x of this row; empty if the paper has no such model."""
    numbers = PAPER.get((row["ablation"], row["k_mlp"]), ())
    gate = (row["attn_unit"], row["gate"], row["ramp_end"]) == ("dim", "softmax", 0)
    if row["k_attn"] != row["k_mlp"] or not (gate or row["ablation"] == "none"):
        return {}
    return {f"paper {name}": number for name, number in zip(IN_PAPER, numbers) if name in row}


def markdown(texts):
    """A DataFrame of texts as a Markdown table. | and $ in the name of a run are escaped."""
    rows = [list(texts), ["---"] * len(texts.columns)]
    rows += texts.replace(r"([|$])", r"\\\1", regex=True).values.tolist()
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def publish(folder, name, frame, parts, notes):
    """Print over_seeds(frame), save it as NAME.md and .csv. -> the table. parts: as TABLE1."""
    table = over_seeds(frame)
    table["differs"] = differences(table)
    table = table.join(pd.DataFrame([paper_numbers(row) for row in table.to_dict("records")]))
    texts, columns = [], [*HEAD]
    for part in parts:
        known = {one: form for one, form in part.items() if one in table}
        if known:
            print_table(table, HEAD | known)
            print()
            texts.append(markdown(text_table(table, HEAD | known)))
            columns += [one + end for one in known for end in ("", "_sd", "_n")]
    if not texts:
        print(f"no results for {name}: --help lists the commands that make them")
        return table
    print(*notes, "", sep="\n")
    write_text(folder / f"{name}.md", "\n\n".join([*texts, *notes]) + "\n")
    write_text(folder / f"{name}.csv", table.filter(columns).to_csv(index=False))
    return table


def draw_tradeoff(path, frame, table, title):
    """Clean perplexity against each of TRADEOFFS: a circle ± deviation for each row."""
    shown = [name for name in TRADEOFFS if name in table]
    if not shown:
        return
    figure = Figure(figsize=(4.2 * len(shown) + 0.5, 4.2), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    groups = frame.groupby([*frame.filter(RECIPE)], sort=False)  # the rows of the table
    for name, axes in zip(shown, panels):
        rows = zip(table["run"][:6], groups[["ppl_clean", name]])  # more are hard to distinguish
        for place, (run, (_, seeds)) in enumerate(rows):
            label = plain(Path(run).name.removesuffix("_seed*"))
            (x, y), (x_sd, y_sd) = seeds.dropna().mean(), seeds.dropna().std()
            filled = "none" if seeds[name].isna().any() else f"C{place}"
            axes.errorbar(x, y, y_sd, x_sd, "o", color=f"C{place}", mfc=filled, label=label)
        axes.set(xlabel="clean perplexity", ylabel=TRADEOFFS[name])
        axes.locator_params(nbins=5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title, parse_math=False)
    save_figure(path, figure)


def main():
    parser = run_parser(__doc__)
    parser.add_argument("--layers", action="store_true", help="Table 2 only, a row for each layer")
    parser.add_argument("--title", default="down and to the left is better; hollow: some seeds "
                        "lack this number", help="of tradeoff.png")
    args = parser.parse_args()
    device, runs = knobs.pick_device(args.device), open_runs(args.runs, args.data)
    if len({run.meta["checksum"] for run in runs}) > 1:
        raise UserError("these runs have different data: make a table for each of them")
    rows = pd.DataFrame([describe_run(run) for run in runs])
    over_seeds(rows)  # refuses repeated seeds before anything is measured
    folder = common_folder(Path(run.path).parent for run in runs)
    found, notes2 = read_experiments(runs, EXPERIMENTS2)
    if args.layers:
        layers = range(max(run.model.config.n_layer for run in runs))
        frames = [rows.join(numbers_of(runs, found, layer)).assign(layer=layer) for layer in layers]
        return publish(folder, "table2_layers", pd.concat(frames), TABLE2, NOTES2 + notes2)
    found1, notes1 = read_experiments(runs, EXPERIMENTS1)
    numbers = numbers_of(runs, found1 + found)
    frame = pd.DataFrame([measure_run(run, 8, device) for run in runs]).join(numbers)
    table = publish(folder, "table1", frame, TABLE1, NOTES1 + notes1)
    draw_tradeoff(folder / "tradeoff.png", frame, table, args.title)
    publish(folder, "table2", frame, TABLE2, NOTES2 + notes2)


if __name__ == "__main__":
    knobs.cli(main)
