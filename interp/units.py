"""How the gate of a self-ablating model uses its units, on held-out text: specialisation, directly.

    python interp/units.py out/local_k2                         attention units and neurons
    python interp/units.py out/local_k2 out/global_k2 --layers  several runs, a row for each layer
    python interp/units.py out/*_k2 --plot units.png            one picture of all these runs
    python interp/units.py out/local_k2 --against out/local_k2/last.pt
                                                                do two checkpoints keep the same?

At every token and in every layer the gate keeps k of N units, in the ablated stream. Below, U is
one of these k, drawn at random, and all logarithms are to base 2. Of every layer and kind of units:

    rate           of a unit: the share of tokens at which it is kept
    dead           units that are never kept
    entropy        H(U): log k where always the same are kept, log N where all are kept alike
    effective      2^H(U): so many units, kept equally often, would have this entropy
    information    I(token; U), in bits: what the present token alone tells of the choice
    token share    the same as a share of all there is to tell, H(U) - log k: 1 where the token
                   decides which units are kept, 0 where it has no part in that
    stability      whether a token keeps the same units in other contexts. Of two places in the text
                   with the same token, the mean overlap |A and B| / k of what is kept, less what
                   any two places have in common, as a share of what is left to 1 (as Cohen's kappa,
                   1960). Types that come once have no second place, and are left out
    dependence     how much two layers' choices tell of each other, I(U; U'), as a share of what
                   two draws of one layer tell of each other: 1 where they choose alike, whatever
                   their units are called, 0 where they choose independently

Chance is 0 in the last four. Information counted in a finite text is too large, by more than there
is, where most tokens are rare. So it is counted again with the choices of each layer shuffled over
the text, which leaves nothing but that excess, and what is found is (found - shuffled) /
(most - shuffled) of the most there can be (adjusted mutual information: Vinh, Epps and Bailey
2010). That is exact for independent and for decided choices. In between it errs on the low side,
the less the longer the text is.

Beside each model stands one of the same geometry with random weights (row "untrained"), since
random gates, too, choose by what they read. It is what training began with only where a run was
not given other weights to begin with (init_from), and of one seed, so a single draw. Overlaps of
two checkpoints stand beside what two gates that keep units as often, but independently, have in
common: sum over units of both rates, / k.

Writes units.json and units.png beside the checkpoint, and units_overlap.json with --against. What
is there already with the same settings is not made again.

Shape letters: n tokens of the text, V vocabulary, L layers, N units of a layer, k kept of them.
"""

import math
import signal
import sys
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts interp/ there
import config as knobs
from eval import find_data, open_run, run_paths
from interp.common import (
    averages, check_picture, check_range, column, print_table, run_parser, save_figure)
from interp.activations import (
    held_out_windows, kept_units, read_windows, untrained, windows_at)
from interp.results import (
    MAYBE, NUMBER, Job, fingerprint, fits, gate_fingerprint, results_of)
from prepare import UserError, load_tokens

KINDS = {"attn": "attention units", "mlp": "neurons"}
PAIRS = 2**24  # counted at a time: 128 MB


# ---------------------------------------------------------------------------- what the gate chooses


class Choices(NamedTuple):
    """A text, token by token, and what the gate keeps there."""

    tokens: np.ndarray  # (n)
    kept: dict  # {kind: (L, n, k), numbers of units in their layer}


def units_of(config):
    """{kind: how many units of a layer compete in its gate}."""
    return {"attn": config.attn_units, "mlp": 4 * config.n_embd}


def read_choices(model, text, starts, device, title=None):
    """The Choices of a gated model at the windows of block_size tokens that begin at starts.

    In memory: one or two bytes for every unit that is kept.
    """
    T, units = model.config.block_size, units_of(model.config)
    tokens, parts = [], {kind: [] for kind in KINDS}
    batches = read_windows(partial(kept_units, model.to(device)), text, starts, T, device,
                           title=title)
    for part, kept in batches:
        tokens.append(windows_at(text, part, T, "cpu").flatten().numpy())  # (B T)
        for kind, numbers in kept.items():
            numbers = numbers.flatten(0, 1).transpose(0, 1)  # (L, B T, k)
            smallest = np.min_scalar_type(units[kind] - 1)  # the smallest type that holds them
            parts[kind].append(numbers.cpu().numpy().astype(smallest))
    kept = {kind: np.concatenate(pieces, 1) for kind, pieces in parts.items()}  # (L, n, k) each
    return Choices(np.concatenate(tokens), kept)


# --------------------------------------------------------------------------------------- statistics


class Joint(NamedTuple):
    """The pairs (a, b) that were seen, and how often; every field (pairs,)."""

    a: np.ndarray
    b: np.ndarray
    counts: np.ndarray


def count_pairs(a, b, size):
    """The Joint of a (n, i) and b (n, j), numbers under size: every a with every b of its row."""
    rows = max(1, PAIRS // (a.shape[1] * b.shape[1]))  # at a time: large k have many pairs
    keys, counts = zip(*(count_keys(a[first : first + rows], b[first : first + rows], size)
                         for first in range(0, len(a), rows)))
    keys, place = np.unique(np.concatenate(keys), return_inverse=True)
    counts = np.bincount(place, np.concatenate(counts)).astype(np.int64)  # exact below 2^53
    return Joint(keys // size, keys % size, counts)


def count_keys(a, b, size):
    """The numbers a * size + b of all these pairs, each once, and how often they come."""
    keys = (a[:, :, None].astype(np.int64) * size + b[:, None]).ravel()  # (n i j)
    if keys.max() >= len(keys):
        return np.unique(keys, return_counts=True)
    counts = np.bincount(keys)  # few possible pairs: count them all
    keys = counts.nonzero()[0]
    return keys, counts[keys]


def entropy(counts):
    """Of the distribution that these counts are proportional to, in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def information(joint):
    """The mutual information of a and b in bits, as counted: larger than it is, in a finite text.

    H(a) + H(b) - H(a, b)
    """
    a, b = np.bincount(joint.a, joint.counts), np.bincount(joint.b, joint.counts)
    return entropy(a) + entropy(b) - entropy(joint.counts)


def above_chance(found, chance, most):
    """Where found lies between chance, 0, and most, 1. None where chance is all there can be."""
    if most - chance < 1e-9:
        return None
    return (found - chance) / (most - chance)


def stability(tokens, joint, k):
    """Of the Joint of tokens and the k units kept at each: see the top of this file. In [0, 1] for
    an endless text; unbiased, so in a short one a little under 0 is possible. Or None."""
    uses = np.bincount(tokens)  # (V): places of each type
    again = uses[joint.a] > 1
    types, units, counts = (field[again] for field in joint)
    n = uses[uses > 1].sum()
    if not n:
        return None
    # of two different places of one type: sum over units of P(both keep it)
    both = counts * (counts - 1) / (uses[types] * (uses[types] - 1))  # (pairs,)
    same_type = (uses[types] * both).sum() / (n * k)  # a type counts as often as it comes
    kept = np.bincount(units, counts)  # (N): of any two different places
    any_type = (kept * (kept - 1)).sum() / (n * (n - 1) * k)
    return above_chance(float(same_type), float(any_type), 1)


def layer_facts(tokens, kept, shuffled, units):
    """What there is to say of the choices of one layer: kept (n, k), shuffled the same at other
    tokens. -> {name: number or list}"""
    k = kept.shape[1]
    counts = np.bincount(kept.ravel(), minlength=units)  # (N)
    most = entropy(counts) - math.log2(k)  # what the kept units tell of U
    joint = count_pairs(tokens[:, None], kept, units)
    found = information(joint)
    chance = information(count_pairs(tokens[:, None], shuffled, units))
    share = above_chance(found, chance, most)
    return {"rate": (counts / len(tokens)).tolist(), "dead": int((counts == 0).sum()),
            "entropy": entropy(counts), "effective": 2 ** entropy(counts),
            "mutual_information": None if share is None else share * most,
            "counted_information": found, "shuffled_information": chance,
            "token_share": share, "stability": stability(tokens, joint, k)}


def dependence(kept, shuffled, units):
    """How much the choices of every two layers tell of each other, L lists of L numbers or None.

    kept, shuffled (L, n, k): shuffled over the tokens, each layer in another order.
    """
    L = len(kept)
    own = [information(count_pairs(layer, layer, units)) for layer in kept]
    found = np.eye(L).tolist()
    for a, b in combinations(range(L), 2):
        told = information(count_pairs(kept[a], kept[b], units))
        chance = information(count_pairs(shuffled[a], shuffled[b], units))
        found[a][b] = found[b][a] = above_chance(told, chance, (own[a] + own[b]) / 2)
    return found


def use_of_units(choices, units, seed):
    """All statistics of Choices -> {kind: {name: a list, an entry a layer}}.

    units: see units_of. seed: of the shuffling.
    """
    kinds, generator = {}, np.random.default_rng(seed)
    for kind, kept in choices.kept.items():  # (L, n, k)
        shuffled = [generator.permutation(layer) for layer in kept]
        layers = [layer_facts(choices.tokens, *pair, units[kind]) for pair in zip(kept, shuffled)]
        kinds[kind] = {"units": units[kind], "kept": kept.shape[2]}
        for name in layers[0]:
            kinds[kind][name] = [facts[name] for facts in layers]
        kinds[kind]["dependence"] = dependence(kept, shuffled, units[kind])
    return kinds


def overlap_of(ours, theirs, units):
    """How much of what one of two Choices of one text keeps the other keeps as well.

    -> {kind: {"overlap": mean |A and B| / k, "chance": what their rates alone give}}, both lists,
    an entry a layer.
    """
    kinds = {}
    for kind in KINDS:
        found = {"overlap": [], "chance": []}
        for A, B in zip(ours.kept[kind], theirs.kept[kind]):  # (n, k) each
            n, k = A.shape
            common = sum((unit[:, None] == B).sum() for unit in A.T)
            p, q = (np.bincount(kept.ravel(), minlength=units[kind]) / n for kept in (A, B))  # (N)
            found["overlap"].append(float(common / (n * k)))
            found["chance"].append(float(p @ q / k))
        kinds[kind] = found
    return kinds


# --------------------------------------------------------------------------- results and pictures

OF_KIND = {  # of a result, what is printed, drawn and read by others of each kind of units
    "units": int, "kept": int, "rate": [[NUMBER]], "dead": [int], "entropy": [NUMBER],
    "effective": [NUMBER], "mutual_information": [MAYBE], "token_share": [MAYBE],
    "stability": [MAYBE], "dependence": [[MAYBE]]}
USE = dict.fromkeys(KINDS, OF_KIND)
RESULT = {"kinds": USE, "untrained": USE, "warnings": [str]}
PAIR = {"overlap": [NUMBER], "chance": [NUMBER]}
OVERLAP = {"against": str, "kinds": dict.fromkeys(KINDS, PAIR)}
AVERAGED = ("dead", "entropy", "effective", "mutual_information", "token_share", "stability",
            "next_layer")
SPARSE = 0.5  # where chance alone gives so much of the information there can be, it is uncertain


def is_result(result):
    """Whether a result has all that is printed of it."""
    return fits(result, RESULT)


def is_overlap(result):
    return fits(result, OVERLAP)


def layer_rows(use):
    """Of one kind: a dict for every layer, {name: number}, without those that are None."""
    rows = []
    for layer in range(len(use["rate"])):
        row = {"layer": layer, "next_layer": None}
        for name in AVERAGED:
            if name in use:
                row[name] = use[name][layer]
        if layer + 1 < len(use["rate"]):
            row["next_layer"] = use["dependence"][layer][layer + 1]
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def table_rows(results, by_layer=False):
    """A row for every model, trained or not, and kind: means over layers. Or one for each layer."""
    for result in results:
        names = {"kinds": result["run"], "untrained": f"{result['run']}, untrained"}
        for part, name in names.items():
            for kind, use in result[part].items():
                head = {"run": name, "kind": KINDS[kind]}
                head["keeps"] = f"{use['kept']} of {use['units']}"
                rows = layer_rows(use)
                for row in rows if by_layer else [averages(rows, AVERAGED)]:
                    yield head | row


COLUMNS = [  # heading, how to print it; a column that no row has is left out
    ("run", column("run")),
    ("units", column("kind")),
    ("keeps", column("keeps")),
    ("layer", column("layer")),
    ("dead", column("dead", ".1f")),
    ("entropy", column("entropy", ".2f")),
    ("effective units", column("effective", ".1f")),
    ("bits by token", column("mutual_information", ".2f")),
    ("token share", column("token_share", ".1%")),
    ("stability", column("stability", ".3f")),
    ("next layer", column("next_layer", ".3f")),
]
OVERLAP_COLUMNS = [
    ("run", column("run")),
    ("against", column("against")),
    ("units", column("kind")),
    ("layer", column("layer")),
    ("overlap", column("overlap", ".3f")),
    ("chance", column("chance", ".3f")),
]


def overlap_rows(results):
    """A row for every result, kind and layer."""
    for result in results:
        for kind, found in result["kinds"].items():
            head = {"run": result["run"], "against": result["against"], "kind": KINDS[kind]}
            for layer, pair in enumerate(zip(found["overlap"], found["chance"])):
                yield head | {"layer": layer} | dict(zip(("overlap", "chance"), pair))


def warnings(use):
    """What a reader of these numbers has to know, a sentence each."""
    for kind, found in use.items():
        for layer, entropy_of_layer in enumerate(found["entropy"]):
            most = entropy_of_layer - math.log2(found["kept"])
            chance = found["shuffled_information"][layer]
            if chance > SPARSE * most > 1e-9:  # 0, but for rounding: always the same are kept
                yield (f"{KINDS[kind]} of layer {layer}: so short a text has {chance:.1f} of "
                       f"{most:.1f} bits by chance, so bits and share of the token are uncertain: "
                       f"take more --windows")


def draw_units(path, results):
    """A row of panels for each kind: rates, sorted, a line a layer; then measures by layer.

    Dotted lines are of the models before training.
    """
    from matplotlib.figure import Figure

    panels = {"entropy": "entropy, bits", "token_share": "share decided by the token",
              "stability": "stability", "next_layer": "dependence with the next layer"}
    figure = Figure(figsize=(17, 7), layout="constrained")
    for (kind, name), (rates, *others) in zip(KINDS.items(), figure.subplots(2, 5)):
        for place, result in enumerate(results):
            for part, style in (("untrained", ":"), ("kinds", "-")):
                use, color = result[part][kind], f"C{place}"
                rows = layer_rows(use)
                for axes, measured in zip(others, panels):
                    values = [row.get(measured, math.nan) for row in rows]
                    axes.plot(values, style, marker=".", color=color)
            for layer in np.sort(use["rate"])[:, ::-1]:  # of the trained model, the busiest first
                rates.plot(np.arange(1, 1 + len(layer)), layer, color=color, alpha=0.5)
        rates.set(title=f"{name}: share of tokens", xlabel="units of a layer, the busiest first",
                  yscale="log", xscale="log")
        for axes, title in zip(others, panels.values()):
            axes.set(title=title, xlabel="layer")
            axes.set_ylim(min(0, axes.get_ylim()[0]))
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in (rates, *others):
            axes.grid(alpha=0.3)
    for place, result in enumerate(results):
        rates.plot([], [], color=f"C{place}", label=result["run"])
    rates.plot([], [], ":", color="0.3", label="before training")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    save_figure(path, figure)


# ---------------------------------------------------------------------------------------- one run


class Inputs(NamedTuple):
    """What the job of a run reads."""

    text: np.ndarray  # tokens, uint16
    starts: np.ndarray  # where windows begin


def measure_use(job, title, device):
    """The facts of units.json of one run."""
    text, starts = job.inputs
    model, seed = job.run.model, job.settings["seed"]
    units, facts = units_of(model.config), {}
    models = {"kinds": model, "untrained": untrained(model.config, seed)}
    for part, one in models.items():
        name = title if part == "kinds" else f"{title}, untrained"
        facts[part] = use_of_units(read_choices(one, text, starts, device, name), units, seed)
    facts["tokens"] = len(starts) * model.config.block_size
    facts["warnings"] = list(warnings(facts["kinds"]))
    draw_units(job.path(".png"), [{"run": str(job.run.path), **facts}])
    return facts


def measure_overlap(job, title, other, device):
    """The facts of units_overlap.json of one run. other: the eval.Run it is compared with."""
    text, starts = job.inputs
    ours = read_choices(job.run.model, text, starts, device, title)
    theirs = read_choices(other.model, text, starts, device, f"{title}, {other.path}")
    kinds = overlap_of(ours, theirs, units_of(other.model.config))
    return {"against": str(other.path), "against_step": other.step, "kinds": kinds}


def gated_runs(paths):
    """The runs of these paths that have a gate; what has none is said to be left out.

    Raises UserError where nothing is left.
    """
    runs, plain = [], []
    for path in run_paths(paths):
        run = open_run(path)
        (plain if run.model.config.ablation == "none" else runs).append(run)
    if not runs:
        raise UserError(f"{plain[0].path} has ablation=none, so there is no gate: give runs with "
                        f"local or global ablation")
    for run in plain:
        print(f"{run.path} has ablation=none, so there is no gate: left out", file=sys.stderr)
    return runs


def open_job(run, name, args, load, extra=None, **expected):
    """A run as a Job with its Inputs. extra: settings beside those of every job; expected: what a
    Job expects. load: load_tokens or the like. Raises UserError or ModelError."""
    folder, meta = find_data(run, args.data)
    settings = {"data": meta["checksum"], "windows": args.windows, "seed": args.seed}
    job = Job(run, name, settings | (extra or {}), force=args.force, **expected)
    if not job.result:
        text = load(folder, "val")
        job.inputs = Inputs(text, held_out_windows(text, run.model.config.block_size, args.windows))
    return job


def open_other(path, runs):
    """The run to compare all of these with. Raises UserError where they do not keep alike."""
    other = open_run(path)
    theirs = other.model.config
    for run in runs:
        ours = run.model.config
        for name in ("ablation", "n_layer", "n_embd", "attn_unit", "n_head", "k_attn", "k_mlp",
                     "block_size"):
            a, b = getattr(ours, name), getattr(theirs, name)
            if a != b and (name != "ablation" or b == "none"):
                raise UserError(f"--against={path} has {name}={b}, {run.path} {name}={a}: "
                                f"units can be compared of one geometry only")
        if other.tokenizer != run.tokenizer:
            raise UserError(f"--against={path} has another tokenizer than {run.path}")
    return other


# ------------------------------------------------------------------------------- the command line


def parse_arguments():
    """The command line. Raises UserError."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--data", help="prepared data to use (default: the run's own)")
    add("--windows", type=int, default=1024,
        help="held-out windows of block_size tokens, at most (1024)")
    add("--seed", type=int, default=0, help="of the shuffling and of untrained models (0)")
    add("--layers", action="store_true", help="a row for each layer, not their mean")
    add("--against", metavar="RUN",
        help="another checkpoint, such as last.pt: how much of what is kept do both keep?")
    add("--plot", metavar="FILE", help="one picture of all these runs (.png, .pdf or .svg)")
    add("--force", action="store_true",
        help="replace results made with other settings or of other weights")
    args = parser.parse_args()
    check_range(args, "windows", 1, 2**63 - 1)
    check_range(args, "seed", 0, 2**63 - 1)
    check_picture(args.plot)
    return args


def main():
    args = parse_arguments()
    device = knobs.pick_device(args.device)
    load = cache(load_tokens)  # once: every byte of it is verified
    runs = gated_runs(args.runs)
    gates = {run.path: gate_fingerprint(run.model) for run in runs}
    jobs = [open_job(run, "units", args, load, pictures=[".png"], is_result=is_result,
                     gates=gates[run.path]) for run in runs]
    overlaps = []
    if args.against is not None:
        other = open_other(args.against, runs)
        extra = {"against": fingerprint(other.model)}
        theirs = gate_fingerprint(other.model)
        overlaps = [open_job(run, "units_overlap", args, load, extra, is_result=is_overlap,
                             gates=f"{gates[run.path]} {theirs}") for run in runs]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    results = results_of(jobs, partial(measure_use, device=device), device)
    print_table(list(table_rows(results, args.layers)), COLUMNS)
    if not args.layers:
        print("means over layers; see --layers")
    if overlaps:
        measure = partial(measure_overlap, other=other, device=device)
        print()
        print_table(list(overlap_rows(results_of(overlaps, measure, device))), OVERLAP_COLUMNS)
    for result in results:
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")
    if args.plot is not None:
        draw_units(args.plot, results)


if __name__ == "__main__":
    knobs.cli(main)
