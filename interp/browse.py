"""A page to look at each neuron: what it fires on, when the gate keeps it, what it writes.

    python interp/browse.py out/local_k2            writes out/local_k2/browse.html
    python interp/browse.py out/*                   a page for each run
    python interp/browse.py out/baseline out/local_k2 --page both.html     side by side on one page

The page is one file that needs no server and no network. It shows every unit of every layer, that
is every neuron (L3N17) and every attention unit: a channel of the heads' outputs (L3A17) or, with
attn_unit=head, a whole head (L3H4), whose activation is the norm of its output. From held-out text:

    kept       the share of tokens at which the gate keeps the unit in the ablated stream
    fires      the share of tokens at which it is active in the clean stream: a neuron above 0, an
               attention unit further from 0 than the root mean square of its layer's at that token
    snippets   its strongest moments, one a story: the clean stream's activations, the gate's marks
    writes     the tokens whose logits its output weights raise and lower the most, see lens()
    neighbours the units whose output weights point the same way: the cosine, see neighbours()
    stories    token by token, the units that are kept there; without gates those that write most

Graphs, explanations and gate usage are shown where interp/n2g.py, interp/explain.py and
interp/units.py have left them beside the same weights; else the page says which command makes them.

Nothing is kept of a page that is interrupted: the same command begins again. Of the text at most
--windows are read, so that the paper's geometry takes less than 2 minutes on 2 cores.

Shape letters: W windows of T tokens, L layers, M neurons and A attention units in each, which are
its U units in this order, N = L U, k units kept of a layer, K snippets of a unit, S stories, n
tokens of a batch or of all stories, C channels of the residual stream, H heads, D = C / H, V.
"""

import base64
import hashlib
import json
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts interp/ there
import config as knobs
from eval import centred, trained_with
from interp.common import ablation, check_range, check_writable, open_tasks, run_parser
from interp.activations import (
    TOKENS, UNITS, Site, Strongest, Text, kept_units, read_sites, read_windows, windows_at)
from interp.results import check_finite, fits, is_of, read_json, result_path, write_text
from prepare import UserError, load_tokenizer

TEMPLATE = ROOT / "assets" / "browse.html"
MARK = '<meta name="generator" content="interp/browse.py">'  # what tells a page from other files
LEFT, RIGHT = 15, 8  # tokens of a snippet on both sides of the strongest one
WIDTH = LEFT + 1 + RIGHT  # at most 32: a bit for each of them in a uint32
LISTED = 8  # tokens that a unit promotes, and that it suppresses
NEAR = 6  # neighbours of a unit
AT_ONCE = 2**26  # activations in memory at a time: 256 MB
STRONGEST = 2  # neurons, and attention units, that a story shows of a layer without gates
GRAPH = 24  # nodes of a graph that are shown, at most
# other experiments' files: their script, what is read, and what that must look like
FINDINGS = {
    "n2g": ("n2g_neurons.json", {"neurons": [{"layer": int, "neuron": int}]}),
    "explain": ("explain_neurons.json", {"neurons": [{"layer": int, "neuron": int}]}),
    "units": ("units.json", {"kinds": {"attn": dict, "mlp": dict}})}
NUMBER = (int, float, type(None))


# -------------------------------------------------------------------------------- units of a layer


def unit_activations(x, config):
    """What UNITS read side by side, x (..., M + C) -> activations (..., U)."""
    if config.attn_unit == "dim":
        return x
    neurons, channels = x.split((4 * config.n_embd, config.n_embd), -1)
    heads = channels.unflatten(-1, (config.n_head, -1)).norm(dim=-1)  # (..., H)
    return torch.cat((neurons, heads), -1)


def strength(activations, M):
    """How strong activations (..., U) are: those of attention units may have either sign."""
    return torch.cat((activations[..., :M], activations[..., M:].abs()), -1)


def fires(strengths, M):
    """Where units of these strengths (..., U) fire: bool (..., U). See the head of this file."""
    neurons, attention = strengths[..., :M], strengths[..., M:]
    bar = attention.square().mean(-1, keepdim=True).sqrt()  # (..., 1)
    return torch.cat((neurons > 0, attention > bar), -1)


def kept_of_both_kinds(model, idx):
    """idx (B, T) -> the units that the gates keep, (B, T, L, k): neurons, then attention units."""
    kept = kept_units(model, idx)
    return torch.cat((kept["mlp"], kept["attn"] + 4 * model.config.n_embd), -1)


def read_kept(model, text, title):
    """The units that the gates keep at every token of all windows: (W, T, L, k) uint16."""
    activate = partial(kept_of_both_kinds, model)
    found = []
    for _, kept in read_windows(
            activate, text.tokens, text.starts, text.T, text.device, title=title):
        found.append(kept.cpu().numpy().astype(np.uint16))
    return np.concatenate(found)


def rates(kept, U):
    """How often units are kept: kept (W, T, L, k) -> shares of the W T tokens, (N)."""
    W, T, L, _ = kept.shape
    counts = []
    for layer in range(L):
        units = kept[:, :, layer].flatten()  # (W T k)
        counts.append(np.bincount(units, minlength=U))
    return np.concatenate(counts) / (W * T)


class HeadOutputs:
    """What the heads of a layer put out on average, for each unit of their norm.

    The m (D) that makes norm(z) m as near as can be, by least squares, to a head's outputs z (D):
    sum norm(z) z / sum norm(z)^2.
    """

    def __init__(self):
        self.products = self.squares = 0

    def add(self, z):
        """z (n, H, D)"""
        norm = z.double().norm(dim=-1, keepdim=True)  # (n, H, 1)
        self.products += (norm * z).sum(0)
        self.squares += norm.square().sum(0)

    def mean(self):
        """(H, D) float32"""
        return (self.products / self.squares.clamp_min(1e-30)).float()


def directions(model, layer, heads):
    """What units write into the residual stream for each unit of their activation: (U, C).

    Of a neuron or a channel its row of output weights; of a head, m W_O with the m of HeadOutputs.
    """
    block = model.transformer["h"][layer]
    neurons = block.mlp.c_proj.weight.T  # (M, C)
    attention = block.attn["attention"].out_proj.weight.T  # (C, C), from channels of the heads
    if model.config.attn_unit == "head":
        rows = attention.unflatten(0, (model.config.n_head, -1))  # (H, D, C)
        attention = torch.einsum("hd,hdc->hc", heads.mean(), rows)
    return torch.cat((neurons, attention))


@torch.no_grad()
def measure_layers(model, layers, text, count, title):
    """What a Text says about the units of these layers, N of them: arrays of the first dimension N.

    count: K
    """
    config, M, L = model.config, 4 * model.config.n_embd, len(layers)
    sites = [Site(model, layer, site) for layer in layers for site in UNITS]
    fired, tokens, best = 0, 0, Strongest(count)
    heads = [HeadOutputs() for _ in layers]
    for x, positions, stories in text.read(partial(read_sites, sites), title=title):
        x = x.unflatten(-1, (L, -1))  # (n, L, M + C)
        strengths = strength(unit_activations(x, config), M)  # (n, L, U)
        fired += fires(strengths, M).sum(0)
        tokens += len(x)
        best.add(strengths.flatten(1), positions, stories)
        if config.attn_unit == "head":
            z = x[..., M:].unflatten(-1, (config.n_head, -1))  # (n, L, H, D)
            for layer, outputs in enumerate(heads):
                outputs.add(z[:, layer])

    def activate(idx):
        x = read_sites(sites, idx).unflatten(-1, (L, -1))  # (B, T, L, M + C)
        return unit_activations(x, config).flatten(2)  # (B, T, N)

    peaks, positions = best.found()  # (N, K) each
    snippets = text.snippets(activate, positions, LEFT, RIGHT)
    found = snippet_arrays(snippets, positions.numpy(), peaks.numpy(), text)
    found["fires"] = fired.flatten().cpu().numpy() / tokens
    found["largest"] = peaks[:, 0].numpy()
    writes = [directions(model, layer, outputs) for layer, outputs in zip(layers, heads)]
    found["directions"] = torch.cat(writes).cpu().numpy()  # (N, C)
    return found


def measure_units(model, text, count, title):
    """The same for all layers of a model, as many of them in a pass as fit into AT_ONCE."""
    config, found = model.config, []
    units = 4 * config.n_embd + config.attn_units
    step = max(1, AT_ONCE // (TOKENS * units))
    for first in range(0, config.n_layer, step):
        layers = range(config.n_layer)[first : first + step]
        name = f"{title}: units from layer {first}"
        found.append(measure_layers(model, layers, text, count, name))
    joined = {}
    for name in found[0]:
        joined[name] = np.concatenate([arrays[name] for arrays in found])
    return joined


def snippet_arrays(snippets, positions, peaks, text):
    """K snippets of each of N units as arrays (N, K); length 0 where a unit does not fire.

    begin: the place of the first token in the windows one after the other. peak: which token is
    the strongest. values (N, K, WIDTH): activations in 127ths of the unit's largest one.
    """
    windows = np.searchsorted(text.starts + text.context, positions, side="right") - 1  # (N, K)
    offsets = positions - text.starts[windows]  # (N, K): the strongest token in its window
    begin = np.zeros(positions.shape, np.uint32)
    length = np.zeros(positions.shape, np.uint8)
    peak = np.zeros(positions.shape, np.uint8)
    values = np.zeros((*positions.shape, WIDTH), np.float32)
    for unit, place in np.argwhere(peaks > 0):
        snippet = snippets[unit][place]
        first = offsets[unit, place] - snippet.peak
        begin[unit, place] = windows[unit, place] * text.T + first
        length[unit, place] = len(snippet.tokens)
        peak[unit, place] = snippet.peak
        values[unit, place, : len(snippet.values)] = snippet.values
    largest = np.maximum(peaks[:, :1, None], 1e-30)  # (N, 1, 1)
    values = np.rint(127 * values / largest).clip(-127, 127)
    return {"begin": begin, "length": length, "peak": peak, "values": values.astype(np.int8)}


def marks(begin, length, kept):
    """At which tokens of their snippets, begin and length (N, K), the gate keeps the units.

    kept (W, T, L, k) -> uint32 (N, K): bit i stands for token i.
    """
    W, T, L, _ = kept.shape
    i = np.arange(WIDTH, dtype=np.uint32)
    found = []
    for layer, first in enumerate(np.split(begin, L)):  # (U, K)
        won = kept[:, :, layer].reshape(W * T, -1)  # (W T, k)
        places = np.minimum(first[..., None] + i, W * T - 1)  # (U, K, WIDTH)
        units = np.arange(len(first))[:, None, None, None]
        found.append((won[places] == units).any(-1))
    marked = np.concatenate(found) & (i < length[..., None])  # (N, K, WIDTH)
    return (marked.astype(np.uint32) << i).sum(-1, dtype=np.uint32)


# ---------------------------------------------------------------------------------- what they write


@torch.no_grad()
def lens(model, writes):
    """The logit lens (nostalgebraist 2020) of weights: writes (N, C) -> tokens and logits, each
    (N, 2 LISTED), first the most promoted tokens, then the most suppressed ones.

    (w - mean w) * gain of ln_f, times the unembedding, less the mean over the vocabulary (no
    softmax sees it): how an activation of 1 moves the logits if nothing else reads it on the way,
    but for the scale by which ln_f divides.
    """
    gain = model.transformer["ln_f"].weight.cpu()
    unembedding = model.lm_head.weight.cpu()  # (V, C)
    count = min(LISTED, len(unembedding) // 2)
    tokens, values = [], []
    for rows in (centred(writes, -1) * gain).split(256):
        logits = centred(rows @ unembedding.T, -1)  # (256, V)
        raised = logits.topk(count)
        lowered = logits.topk(count, largest=False)
        tokens.append(torch.cat((raised.indices, lowered.indices), -1))
        values.append(torch.cat((raised.values, lowered.values), -1))
    return torch.cat(tokens).numpy(), torch.cat(values).numpy()


@torch.no_grad()
def neighbours(writes):
    """writes (N, C) -> for each unit the NEAR others with the largest cosine, and it, (N, NEAR).

    Centred over channels, as LayerNorm sees them; neurons and attention units of all layers.
    """
    rows = F.normalize(centred(writes, -1), dim=-1)  # (N, C)
    others, cosines = [], []
    for part, own in zip(rows.split(512), torch.arange(len(rows)).split(512)):
        cosine = (part @ rows.T).scatter_(-1, own[:, None], -2.0)  # (512, N): not itself
        top = cosine.topk(min(NEAR, len(rows) - 1))
        others.append(top.indices)
        cosines.append(top.values)
    return torch.cat(others).numpy(), torch.cat(cosines).numpy()


# -------------------------------------------------------------------------------------- the stories


def spread(count, total):
    """At most count of the numbers below total, evenly over them."""
    return np.linspace(0, total, min(count, total), endpoint=False, dtype=int)


def pick_stories(tokens, eot, T, count):
    """Stories of a text, spread evenly, whole ones where they fit: windows (S, T) and lengths (S).

    An end-of-text comes before each of them and fills the window behind it.
    """
    ends = np.append(np.flatnonzero(tokens == eot), len(tokens))
    begins = np.append(0, ends[:-1] + 1)
    sizes = ends - begins
    chosen = np.flatnonzero((0 < sizes) & (sizes < T))
    if not len(chosen):
        chosen = np.flatnonzero(sizes)
    chosen = chosen[spread(count, len(chosen))]
    lengths = np.minimum(sizes[chosen], T - 1)
    windows = np.full((len(chosen), T), eot, np.int64)
    for window, begin, length in zip(windows, begins[chosen], lengths):
        window[1 : length + 1] = tokens[begin : begin + length]
    return windows, lengths


def units_to_show(written, M, idx, model):
    """The units of every layer and token of idx (1, T + 1), its first left out: (T, L, k).

    The kept ones or, without gates, the STRONGEST of a kind by what they write, (T, L, U).
    """
    if model.config.ablation != "none":
        return kept_of_both_kinds(model, idx)[0, 1:]
    neurons, attention = written[..., :M], written[..., M:]
    strongest = neurons.topk(min(STRONGEST, M)).indices
    others = attention.topk(min(STRONGEST, attention.size(-1))).indices
    return torch.cat((strongest, others + M), -1)


@torch.no_grad()
def read_stories(model, windows, lengths, writes, device):
    """Which units to show at every token of the stories: units and activations, each (n, L, k).

    What writes most, |a| |w|, comes first. writes: (L, U, C)
    """
    config, M = model.config, 4 * model.config.n_embd
    sites = [Site(model, layer, site) for layer in range(config.n_layer) for site in UNITS]
    sizes = writes.norm(dim=-1).to(device)  # (L, U)
    units, values = [], []
    for window, length in zip(windows, lengths):
        idx = torch.from_numpy(window[None, : length + 1]).to(device)  # (1, T + 1)
        x = read_sites(sites, idx)[0, 1:].unflatten(-1, (config.n_layer, -1))  # (T, L, M + C)
        activations = unit_activations(x, config)  # (T, L, U)
        written = activations.abs() * sizes
        shown = units_to_show(written, M, idx, model)  # (T, L, k)
        order = written.gather(-1, shown).sort(dim=-1, descending=True, stable=True).indices
        shown = shown.gather(-1, order)
        units.append(shown.cpu().numpy())
        values.append(activations.gather(-1, shown).cpu().numpy())
    return np.concatenate(units), np.concatenate(values)


# ------------------------------------------------------------------- what other experiments found


def read_finding(run, name, form):
    """A result file beside a run; None where there is none of these weights. Raises UserError."""
    path = result_path(run.path, name)
    if not path.exists():
        return None
    found = read_json(path)
    if not fits(found, {"checkpoint": str, **form}):
        raise UserError(f"{path} is damaged: delete it, and make it again")
    return found if is_of(found, run.model) else None


def importance(node):
    """What to sort the nodes of a graph by, the ones to show first."""
    return (not node["activating"], -(node["importance"] or 0))


def graph_of(entry):
    """What is shown of an entry of n2g_neurons.json, at most GRAPH nodes of it, or None."""
    graph = entry.get("graph")
    node = {"id": str, "activating": bool, "importance": NUMBER}
    if not fits(graph, {"nodes": [node], "edges": [{"source": str, "target": str}]}):
        return None
    nodes = sorted(graph["nodes"], key=importance)
    shown = nodes[:GRAPH]
    places = {node["id"]: place for place, node in enumerate(shown)}
    edges = []
    for edge in graph["edges"]:
        ends = [places.get(edge["source"]), places.get(edge["target"])]
        if None not in ends:
            edges.append(ends)
    return {"nodes": [list(map(node.get, ("id", "activating", "importance"))) for node in shown],
            "edges": edges, "left_out": len(nodes) - len(shown)}


def picked(entry, names):
    """Those of the names that an entry has, with what it has there."""
    return {name: entry[name] for name in names if name in entry}


def findings(run):
    """What the page says of single neurons and layers, by the script that found it.

    Where it has not, the command that does. Raises UserError on a damaged file.
    """
    config, found, commands = run.model.config, {}, {}
    for script, (name, form) in FINDINGS.items():
        found[script] = read_finding(run, name, form)
        of_gates = script == "units"
        if not found[script] and not (of_gates and config.ablation == "none"):
            commands[script] = f"python interp/{script}.py {shlex.quote(str(run.path))}"
    graphs, texts, usage = {}, {}, {}
    for entry in found["n2g"]["neurons"] if found["n2g"] else ():
        name = f"L{entry['layer']}N{entry['neuron']}"
        graphs[name] = picked(entry, ("precision", "recall", "f1")) | {"graph": graph_of(entry)}
    for entry in found["explain"]["neurons"] if found["explain"] else ():
        name = f"L{entry['layer']}N{entry['neuron']}"
        texts[name] = picked(entry, ("explanation", "score", "random_score", "reason"))
    for kind, facts in found["units"]["kinds"].items() if found["units"] else ():
        by_layer = [name for name in facts if fits(facts[name], [NUMBER])]
        usage[kind] = picked(facts, by_layer)
    return {"graphs": graphs, "explanations": texts, "usage": usage, "commands": commands}


# -------------------------------------------------------------------------------------- the page


def choose_windows(task, count, device):
    """The Text that a run is looked at on: at most count windows, spread evenly.

    A quarter of a window stands before every token that counts.
    """
    T = task.run.model.config.block_size
    context = T // 4
    starts = np.arange(0, len(task.tokens) - T + 1, T - context)
    starts = starts[spread(count, len(starts))]
    return Text(task.tokens, task.meta["eot"], T, device, context, starts)


def describe(run, text, count):
    """What the page says of a run beside its arrays. count: K"""
    config = run.model.config
    gated = config.ablation != "none"
    recipe = trained_with(run) | {"k_mlp": config.k_mlp if gated else 0}
    return {
        "recipe": ablation(recipe).replace("none", "baseline"), "step": run.step, "gated": gated,
        "layers": config.n_layer, "neurons": 4 * config.n_embd, "attention": config.attn_units,
        "attn_unit": config.attn_unit, "snippets": count,
        "tokens": len(text.starts) * (text.T - text.context)}


def measure_run(task, windows, lengths, args, device):
    """A run as the page knows it: a dict of facts, and of arrays by their name in the template.

    windows (S, T), lengths (S): the stories. Those arrays that hold tokens are called *tokens.
    """
    run, config, title = task.run, task.run.model.config, str(task.run.path)
    check_finite(run)
    found = findings(run)  # before minutes pass
    model = run.model.to(device)
    text = choose_windows(task, args.windows, device)
    arrays = measure_units(model, text, args.snippets, title)
    writes = torch.from_numpy(arrays.pop("directions"))  # (N, C)
    if config.ablation != "none":
        kept = read_kept(model, text, f"{title}: gates")  # (W, T, L, k)
        U = len(writes) // config.n_layer
        arrays["kept"] = rates(kept[:, text.context :], U)
        arrays["marks"] = marks(arrays["begin"], arrays["length"], kept)
    arrays["text_tokens"] = windows_at(text.tokens, text.starts, text.T, "cpu").numpy()
    arrays["lens_tokens"], arrays["lens_values"] = lens(model, writes)
    arrays["near"], arrays["cosines"] = neighbours(writes)
    by_layer = writes.unflatten(0, (config.n_layer, -1))  # (L, U, C)
    arrays["story_units"], arrays["story_values"] = read_stories(
        model, windows, lengths, by_layer, device)
    facts = describe(run, text, arrays["begin"].shape[-1])
    return {"run": str(run.path), **found, **facts, "arrays": arrays}


def packed(array):
    """An array as the page reads it: its type, and its numbers, little-endian, in base64.

    Fractions in float32; whole numbers of more than a byte, which are places, in uint32.
    """
    if array.dtype.itemsize > 1:
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.uint32)
    numbers = array.astype(array.dtype.newbyteorder("<"))
    return {"type": array.dtype.name, "data": base64.b64encode(numbers.tobytes()).decode()}


def page_data(runs, windows, lengths, tokenizer):
    """What the template's script reads: these runs, with only those tokens that it can show."""
    stories = [window[1 : length + 1] for window, length in zip(windows, lengths)]
    listed = {"story_tokens": np.concatenate(stories)}
    used = [listed["story_tokens"]]
    for run in runs:
        used += [run["arrays"][name].flatten() for name in ("text_tokens", "lens_tokens")]
    used = np.unique(np.concatenate(used))  # (tokens), rising
    texts = []
    for token in used.tolist():
        text = tokenizer.decode_single_token_bytes(token)
        texts.append(text.decode(errors="backslashreplace"))  # a token may end within a letter

    def shown(arrays):
        for name in arrays:
            if name.endswith("tokens"):
                arrays[name] = np.searchsorted(used, arrays[name])
        return {name: packed(array) for name, array in arrays.items()}

    return {"texts": texts, "width": WIDTH, "story_lengths": lengths.tolist(), **shown(listed),
            "runs": [run | {"arrays": shown(run["arrays"])} for run in runs]}


def render(data):
    """The page: the template with this data in it.

    No text of a story can end the script it stands in, as JSON needs none of < > & and letters
    beyond ASCII, and the page may run this script and no other.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = hashlib.sha256(content.encode()).digest()
        policy.append(f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'")
    text = json.dumps(data, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    page = template.replace("DATA", text, 1)  # first, as a digest may spell that
    return page.replace("POLICY", "; ".join(policy), 1)


def check_page(path):
    """Raises UserError when path cannot be written, or is a file that is no earlier page."""
    if os.path.isfile(path):  # False, not an error, for a name that is too long
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(1000):
                raise UserError(f"{path} is there and no page of this program: "
                                f"delete it, or name another with --page")
    check_writable(path)


def write_page(path, tasks, args, device):
    """Measures these runs, in this order, and writes their page."""
    first = tasks[0]
    tokenizer = load_tokenizer(first.run.tokenizer)
    T = min(task.run.model.config.block_size for task in tasks)
    windows, lengths = pick_stories(first.tokens, first.meta["eot"], T, args.stories)
    runs = [measure_run(task, windows, lengths, args, device) for task in tasks]
    write_text(path, render(page_data(runs, windows, lengths, tokenizer)))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


# ------------------------------------------------------------------------------- the command line


def parse_arguments(argv):
    """The command line. Raises UserError on what cannot work."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--page", metavar="FILE", help="one page of all these runs, side by side (.html)")
    add("--data", help="prepared data whose held-out text to use (default: the run's own)")
    add("--windows", type=int, default=400, help="windows of text to read, at most (default 400)")
    add("--snippets", type=int, default=8, help="snippets of each unit, at most (default 8)")
    add("--stories", type=int, default=8, help="stories to show token by token (default 8)")
    args = parser.parse_args(argv)
    for name, most in (("windows", 100_000), ("snippets", 100), ("stories", 1000)):
        check_range(args, name, 1, most)
    if args.page is not None and Path(args.page).suffix != ".html":
        raise UserError(f"--page={args.page} must end in .html")
    return args


def pages_of(tasks, page):
    """[(path, its tasks)]: a page for each run, or this one for all. Raises UserError."""
    paths = [result_path(task.run.path, "browse.html") for task in tasks]
    seen = set()
    for task, path in zip(tasks, paths):
        if path.resolve() in seen:
            raise UserError(f"{task.run.path} is given twice: give it once")
        seen.add(path.resolve())
    if page is None:
        return [(path, [task]) for path, task in zip(paths, tasks)]
    first = tasks[0]
    for task in tasks:
        if task.meta["checksum"] != first.meta["checksum"]:
            raise UserError(f"{first.run.path} and {task.run.path} have different data: name "
                            f"what to show both on with --data, or leave out --page")
    return [(Path(page), tasks)]


def main():
    args = parse_arguments(sys.argv[1:])
    device = knobs.pick_device(args.device)
    tasks = open_tasks(args.runs, args.data)
    pages = pages_of(tasks, args.page)
    for path, _ in pages:
        check_page(path)
    for path, shown in pages:
        write_page(path, shown, args, device)


if __name__ == "__main__":
    knobs.cli(main)
