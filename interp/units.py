"""How the gate of a self-ablating model uses its units, on held-out text.

    python -m interp.units out/local_k2                         means over layers
    python -m interp.units out/local_k2 out/global_k2 --layers  several runs, a row for each layer
    python -m interp.units out/*_k2 --plot units.png            one picture of all these runs

At every token and in every layer the gate keeps k of N units in the ablated stream. Below, U is one
of these k, drawn at random. Logarithms are to base 2, so information is in bits.

    rate           of one unit: the share of tokens at which it is kept
    dead           the number of units that are never kept
    entropy        H(U): log k if always the same units are kept, log N if all equally often
    effective      2^H(U): this many units, kept equally often, have the same entropy
    mutual_information
                   I(token; U): what the current token alone tells about the choice
    token_share    mutual_information as a share of its largest possible value, H(U) - log k: 1 if
                   the token decides which units are kept, 0 if it has no influence
    stability      whether a token keeps the same units in other contexts. The mean overlap
                   |A and B| / k of the units kept at two places with the same token, corrected for
                   the overlap of any two places (as Cohen's kappa, 1960). Tokens that occur once
                   do not count
    dependence     I(U; U') of the choices of two layers, divided by that of two draws from one
                   layer: 1 if they choose alike, whatever the units are called, 0 if independently.
                   next_layer is the dependence of a layer and the one after it

The last four are corrected for chance: 0 is what random choices give. Information counted in a
finite text is too large; if most tokens are rare, the error is larger than the true value. So it is
counted again after the choices of each layer are shuffled over the text, and (counted - shuffled) /
(largest - shuffled) is reported (adjusted mutual information: Vinh, Epps and Bailey 2010). This is
exact if the token has no influence and if it decides everything. In between it is too small; the
error falls with the length of the text.

The choices of random gates depend on the token too. So each model has a second row, "untrained": a
model of the same geometry with random weights.

Writes units.json and units.png beside the checkpoint. An interrupted call continues.

Shape letters: n tokens of the text, V token types in it, L layers, N units of a layer, k kept.
"""

import math
import sys
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd

import config as knobs
from eval import open_runs, plain, print_table, run_parser, save_figure
from interp.activations import held_out_windows, kept_units, read_windows, untrained, windows_at
from interp.results import Result, measure_all
from prepare import UserError, load_tokens

KINDS = {"attn": "attention units", "mlp": "neurons"}
BY_LAYER = ("dead", "entropy", "effective", "mutual_information", "token_share", "stability")
COLUMNS = {  # of the table: name, format
    "run": "", "units": "", "keeps": "", "layer": "", "dead": ".1f", "entropy": ".2f",
    "effective": ".1f", "mutual_information": ".2f", "token_share": ".1%", "stability": ".3f",
    "next_layer": ".3f"}
PANELS = {"entropy": "entropy, bits", "token_share": "share decided by the token",
          "stability": "stability", "next_layer": "dependence on the next layer"}
SPARSE = 0.5  # information is uncertain if chance alone gives this share of its largest value

# ---------------------------------------------------------------------------- what the gate chooses


def units_of(config):
    """{kind: the number of units that compete in the gate of a layer}."""
    return {"attn": config.attn_units, "mlp": 4 * config.n_embd}


def read_kept(model, text, starts, device, title=None):
    """What the gates keep at every token of the windows that begin at starts:
    {kind: (L, n, k), numbers of units}."""
    parts = {kind: [] for kind in KINDS}
    activate = partial(kept_units, model.to(device))
    for _, kept in read_windows(activate, text, starts, model.config.block_size, device, title):
        for kind, units in kept.items():  # (B, T, L, k)
            units = units.flatten(0, 1).transpose(0, 1)  # (L, B T, k)
            parts[kind].append(units.cpu().numpy().astype(np.uint16))
    return {kind: np.concatenate(pieces, 1) for kind, pieces in parts.items()}


# --------------------------------------------------------------------------------------- statistics


def count_pairs(a, b, size):
    """How often each number in a (n, i) and each number in b (n, j) occur at the same token:
    (max a + 1, size)."""
    rows = int(a.max()) + 1
    counts = np.zeros(rows * size, np.int64)
    for left in a.T:
        keys = left.astype(np.int64) * size  # (n)
        for right in b.T:
            counts += np.bincount(keys + right, minlength=rows * size)
    return counts.reshape(rows, size)


def entropy(counts):
    """Of the distribution that these counts are proportional to, in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def information(joint):
    """H(a) + H(b) - H(a, b) in bits, from count_pairs(a, b). Too large in a finite text."""
    return entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint)


def above_chance(found, chance, largest):
    """Where found lies between chance, 0, and largest, 1. None if chance is the largest value."""
    if largest - chance < 1e-9:
        return None
    return (found - chance) / (largest - chance)


def stability(uses, joint, k):
    """See the top of this file; None if every token occurs once. It is unbiased, so in a short text
    it can be a little below 0.

    uses (V): how often each token occurs; joint (V, N): how often each unit is kept there.
    """
    uses, joint = uses[uses > 1], joint[uses > 1]
    n = uses.sum()
    if not n:
        return None
    types, units = joint.nonzero()  # (pairs) each
    counts, places = joint[types, units], uses[types]  # (pairs) each
    both_keep = counts * (counts - 1) / (places * (places - 1))  # at two places of one type
    same_type = (places * both_keep).sum() / (n * k)  # a type counts as often as it occurs
    kept = joint.sum(0)  # (N)
    any_type = (kept * (kept - 1)).sum() / (n * (n - 1) * k)
    return above_chance(float(same_type), float(any_type), 1)


def layer_facts(tokens, kept, shuffled, N):
    """{name: number or list} of one layer. tokens (n): numbers of types; kept (n, k); shuffled
    (n, k): the same rows in another order."""
    k = kept.shape[1]
    counts = np.bincount(kept.ravel(), minlength=N)  # (N)
    largest = entropy(counts) - math.log2(k)  # what all kept units tell about U
    joint = count_pairs(tokens[:, None], kept, N)  # (V, N)
    found = information(joint)
    chance = information(count_pairs(tokens[:, None], shuffled, N))
    share = above_chance(found, chance, largest)
    return {"rate": (counts / len(tokens)).tolist(), "dead": int((counts == 0).sum()),
            "entropy": entropy(counts), "effective": 2 ** entropy(counts),
            "mutual_information": None if share is None else share * largest,
            "counted_information": found, "shuffled_information": chance,
            "token_share": share, "stability": stability(np.bincount(tokens), joint, k)}


def dependence(kept, shuffled, N):
    """Of every two layers: L lists of L numbers or None. kept, shuffled (L, n, k): each layer
    shuffled in its own order."""
    L = len(kept)
    own = [information(count_pairs(layer, layer, N)) for layer in kept]
    found = np.eye(L).tolist()
    for a, b in combinations(range(L), 2):
        counted = information(count_pairs(kept[a], kept[b], N))
        chance = information(count_pairs(shuffled[a], shuffled[b], N))
        found[a][b] = found[b][a] = above_chance(counted, chance, (own[a] + own[b]) / 2)
    return found


def use_of_units(tokens, kept, units, seed):
    """All statistics: {kind: {name: a list with an entry for each layer}}.

    tokens (n); kept {kind: (L, n, k)}; units {kind: N}; seed: of the shuffling.
    """
    kinds, generator = {}, np.random.default_rng(seed)
    types = np.unique(tokens, return_inverse=True)[1]  # (n), numbers below V
    for kind, choices in kept.items():
        N = units[kind]
        shuffled = [generator.permutation(layer) for layer in choices]
        layers = [layer_facts(types, *pair, N) for pair in zip(choices, shuffled)]
        kinds[kind] = {"units": N, "kept": choices.shape[2]}
        for name in layers[0]:
            kinds[kind][name] = [facts[name] for facts in layers]
        kinds[kind]["dependence"] = dependence(choices, shuffled, N)
    return kinds


def warnings(use):
    """One sentence for each layer whose numbers are uncertain."""
    for kind, facts in use.items():
        for layer, chance in enumerate(facts["shuffled_information"]):
            largest = facts["entropy"][layer] - math.log2(facts["kept"])
            if chance > SPARSE * largest > 1e-9:  # 0 up to rounding if always the same are kept
                yield (f"{KINDS[kind]} of layer {layer}: in a text of this length chance alone "
                       f"gives {chance:.1f} of {largest:.1f} bits, so mutual_information and "
                       f"token_share are uncertain: use more --windows")


# ------------------------------------------------------------------------------ table and pictures


def layer_table(results):
    """A DataFrame with a row for each run, trained or not, kind of units, and layer."""
    tables = []
    for result in results:
        for model, name in (("kinds", ""), ("untrained", ", untrained")):
            for kind, use in result[model].items():
                table = pd.DataFrame({name: use[name] for name in BY_LAYER}, dtype=float)
                beside = np.diag(np.array(use["dependence"], float), 1)  # (L - 1)
                table["next_layer"] = pd.Series(beside)
                table["layer"] = table.index
                table["run"], table["units"] = result["run"] + name, KINDS[kind]
                table["keeps"] = f"{use['kept']} of {use['units']}"
                tables.append(table)
    return pd.concat(tables, ignore_index=True)


def draw_units(path, results):
    """A row of panels for each kind: sorted rates, one line per layer, then statistics by layer.
    Dotted lines are the untrained models."""
    from matplotlib.figure import Figure

    table = layer_table(results)
    figure = Figure(figsize=(17, 7), layout="constrained")
    for (kind, name), (rates, *others) in zip(KINDS.items(), figure.subplots(2, 1 + len(PANELS))):
        of_kind = table[table["units"] == name]
        for place, result in enumerate(results):
            color, label = f"C{place}", plain(result["run"])
            for layer in np.sort(result["kinds"][kind]["rate"])[:, ::-1]:  # the busiest first
                rates.plot(np.arange(1, 1 + len(layer)), layer, color=color, alpha=0.5)
            for run, style in ((f"{result['run']}, untrained", ":"), (result["run"], "-")):
                layers = of_kind[of_kind["run"] == run]
                for axes, measured in zip(others, PANELS):
                    axes.plot(layers["layer"], layers[measured], style, marker=".", color=color,
                              label=label if style == "-" else None)
        rates.set(title=f"{name}: share of tokens", xlabel="units of a layer, the busiest first",
                  yscale="log", xscale="log")
        for axes, title in zip(others, PANELS.values()):
            axes.set(title=title, xlabel="layer")
            axes.set_ylim(min(0, axes.get_ylim()[0]))
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in (rates, *others):
            axes.grid(alpha=0.3)
    lines, names = others[0].get_legend_handles_labels()
    lines, names = lines[:5], names[:5]  # and "untrained": six entries at most
    lines += rates.plot([], [], ":", color="0.3")
    figure.legend(lines, [*names, "untrained"], loc="outside lower center", ncols=3)
    save_figure(path, figure)


# --------------------------------------------------------------------------------- the command line


def measure_use(result, title, device):
    """The facts of units.json of one run."""
    run, seed = result.run, result.key["settings"]["seed"]
    config = run.model.config
    text, T = load_tokens(run.folder, "val"), config.block_size
    starts = held_out_windows(text, T, result.key["settings"]["windows"])
    tokens = windows_at(text, starts, T, "cpu").flatten().numpy()  # (n)
    facts = result.state or {}
    models = {"kinds": run.model, "untrained": untrained(config, seed)}
    for name, model in models.items():
        if name not in facts:
            kept = read_kept(model, text, starts, device, f"{title}: {name}")
            facts[name] = use_of_units(tokens, kept, units_of(config), seed)
            result.save(facts)
    facts |= {"tokens": len(tokens), "warnings": list(warnings(facts["kinds"]))}
    draw_units(result.path(".png"), [{"run": run.path, **facts}])
    return facts


def gated_runs(runs):
    """The runs that have a gate. Raises UserError if none has."""
    gated = [run for run in runs if run.model.config.ablation != "none"]
    if not gated:
        raise UserError(f"{runs[0].path} has ablation=none, so it has no gate to measure")
    for run in runs:
        if run not in gated:
            print(f"{run.path} has no gate: skipped", file=sys.stderr)
    return gated


def main():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--windows", type=knobs.positive, default=1024,
        help="held-out windows of block_size tokens, at most (default 1024)")
    add("--seed", type=int, default=0, help="of the shuffling and of untrained models (default 0)")
    add("--layers", action="store_true", help="a row for each layer instead of their mean")
    add("--plot", type=knobs.picture, metavar="FILE", help="one picture of all these runs")
    add("--force", action="store_true", help="replace results of other settings or weights")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    results = []
    for run in gated_runs(open_runs(args.runs, args.data)):
        settings = {"data": run.meta["checksum"], "windows": args.windows, "seed": args.seed}
        results.append(Result(run, "units", settings, args.force, [".png"]))
    facts = measure_all(results, partial(measure_use, device=device), device)
    table = layer_table(facts)
    if not args.layers:
        groups = table.groupby(["run", "units", "keeps"], sort=False, as_index=False)
        table = groups.mean().drop(columns="layer")
    print_table(table, COLUMNS)
    if not args.layers:
        print("means over layers; --layers prints each")
    for result in facts:
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")
    if args.plot:
        draw_units(args.plot, facts)


if __name__ == "__main__":
    knobs.cli(main)
