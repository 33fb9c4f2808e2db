"""A page to look at every unit: what it fires on, when the gate keeps it, what it writes.

    python -m interp.browse out/local_k2            writes out/local_k2/browse.html
    python -m interp.browse out/*                   a page for each run
    python -m interp.browse out/baseline out/local_k2 --page both.html    one page, side by side

The page is one file that needs no server and no network. It shows every neuron (L3N17) and every
attention unit of every layer: a channel of the heads' outputs (L3A17) or, with attn_unit=head, a
whole head (L3H4), whose activation is the norm of its output. Measured on held-out text:

    kept       the share of tokens at which the gate keeps the unit in the ablated stream
    fires      the share of tokens at which it is active in the clean stream: a neuron above 0, an
               attention unit further from 0 than the root mean square of its layer's units there
    snippets   its strongest activations in the clean stream, one per story, with the gate's marks
    writes     the tokens whose logits its output weights raise and lower the most, see lens()
    neighbours the units whose output weights have the largest cosine with its own
    stories    for each token, the units that are kept there; without a gate, the strongest ones

Graphs, explanations and gate usage are shown if interp.n2g, interp.explain and interp.units have
written them for the same weights. Otherwise the page shows the command that makes them. At most
--windows windows of text are read. An interrupted call leaves no page: repeat the command.

Shape letters: W windows of T tokens, L layers, M neurons and A attention units in each, together
its U units in this order, N = L U, k units kept in a layer, K snippets of a unit, n tokens of a
batch or of all stories, C channels of the residual stream, H heads, D = C / H, V.
"""

import argparse
import base64
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import config as knobs
from eval import centred, open_runs, run_parser
from interp.activations import (
    TOKENS, UNITS, Site, Strongest, Text, kept_units, read_sites, read_windows, token_text,
    windows_at)
from interp.results import ROOT, digests, read_json, result_path, write_text
from prepare import UserError, load_tokenizer, load_tokens

TEMPLATE = ROOT / "assets" / "browse.html"
LEFT, RIGHT = 15, 8  # tokens of a snippet on both sides of the strongest one
WIDTH = LEFT + 1 + RIGHT  # at most 32: a bit for each of them in a uint32
LISTED = 8  # tokens that a unit promotes, and that it suppresses
NEAR = 6  # neighbours of a unit
AT_ONCE = 2**26  # activations in memory at a time: 256 MB
STRONGEST = 2  # neurons, and attention units, that a story shows in a layer without a gate
GRAPH = 24  # nodes of a graph that are shown, at most
# what the page shows from the files of other experiments, of each neuron or kind of units
EXPLANATION = ("layer", "neuron", "explanation", "score", "random_score", "reason")
SCORES = ("layer", "neuron", "precision", "recall", "f1")
USAGE = ("dead", "entropy", "effective", "mutual_information", "counted_information",
         "shuffled_information", "token_share", "stability")

# ------------------------------------------------------------------------------- units of a model


class Units:
    """The units of some layers of a model: in each layer neurons, then attention units."""

    def __init__(self, model, layers):
        self.model, self.config = model, model.config
        self.layers = layers
        self.M = 4 * model.config.n_embd
        self.A = model.config.attn_units
        self.U = self.M + self.A
        self.sites = [Site(model, layer, site) for layer in layers for site in UNITS]

    def read(self, idx):
        """idx (B, T) -> what UNITS read (B, T, L, M + C)."""
        x = read_sites(self.sites, idx)
        return x.unflatten(-1, (len(self.layers), -1))

    def heads(self, x):
        """What read returns -> the outputs of the heads (..., H, D)."""
        channels = x[..., self.M :]  # (..., C)
        return channels.unflatten(-1, (self.config.n_head, -1))

    def activations(self, x):
        """What read returns -> (..., U)."""
        if self.config.attn_unit == "dim":
            return x
        neurons = x[..., : self.M]
        heads = self.heads(x).norm(dim=-1)  # (..., H)
        return torch.cat((neurons, heads), -1)

    def split(self, values):
        """(..., U) -> those of neurons (..., M), and of attention units (..., A)."""
        return values.split((self.M, self.A), -1)

    def sizes(self, activations):
        """Activations (..., U) -> their sizes, without the sign for attention units; and a bool:
        where units fire."""
        neurons, attention = self.split(activations)
        attention = attention.abs()
        mean_square = attention.square().mean(-1, keepdim=True)  # (..., 1)
        fires = attention > mean_square.sqrt()
        sizes = torch.cat((neurons, attention), -1)
        return sizes, torch.cat((neurons > 0, fires), -1)

    def kept(self, idx):
        """idx (B, T) -> the numbers of the units that the gates keep, (B, T, L, k)."""
        kept = kept_units(self.model, idx)
        attention = kept["attn"] + self.M
        return torch.cat((kept["mlp"], attention), -1)

    def writes(self, outputs):
        """What units write into the residual stream per unit of activation: (N, C).

        A neuron or a channel writes its row of output weights; a head its outputs (L, H, D) W_O.
        """
        found = []
        for place, layer in enumerate(self.layers):
            block = self.model.transformer["h"][layer]
            neurons = block.mlp.c_proj.weight.T  # (M, C)
            attention = block.attn["attention"].out_proj.weight.T  # (C, C), from heads' channels
            if self.config.attn_unit == "head":
                rows = attention.unflatten(0, (self.A, -1))  # (H, D, C)
                attention = torch.einsum("hd,hdc->hc", outputs[place], rows)
            found += [neurons, attention]
        return torch.cat(found).cpu()


@torch.no_grad()
def measure_layers(units, text, count, title):
    """All that is measured on a Text about the N units of these layers: arrays (N, ...).
    count: K, snippets of each unit."""
    fired = tokens = products = squares = 0
    best, outputs = Strongest(count), None
    for x, positions, stories in text.read(units.read, title=title):  # x (n, L, M + C)
        sizes, fires = units.sizes(units.activations(x))  # (n, L, U) each
        fired += fires.sum(0)
        tokens += len(x)
        best.add(sizes.flatten(1), positions, stories)
        if units.config.attn_unit == "head":
            z = units.heads(x).cpu().double()  # (n, L, H, D); MPS has no float64
            norm = z.norm(dim=-1, keepdim=True)  # (n, L, H, 1)
            products += (norm * z).sum(0)
            squares += norm.square().sum(0)
            # per unit of norm, by least squares: the m for which norm(z) m is nearest to z
            outputs = (products / squares.clamp_min(1e-30)).float().to(x.device)  # (L, H, D)

    def activate(idx):
        return units.activations(units.read(idx)).flatten(2)  # (B, T, N)

    peaks, positions = best.found()  # (N, K) each
    snippets = text.snippets(activate, positions, LEFT, RIGHT)
    found = snippet_arrays(snippets, positions.numpy(), peaks.numpy(), text)
    found["fires"] = fired.flatten().cpu().double() / tokens
    found["largest"] = peaks[:, 0]
    found["writes"] = units.writes(outputs)  # (N, C)
    return found


def measure_units(model, text, count, title):
    """The same for all layers of a model, as many of them in a pass as fit into AT_ONCE."""
    every = Units(model, range(model.config.n_layer))
    step = max(1, AT_ONCE // (TOKENS * every.U))
    parts, arrays = [], {}
    for first in every.layers[::step]:
        layers = every.layers[first : first + step]
        parts.append(measure_layers(Units(model, layers), text, count, title))
    for name in parts[0]:
        arrays[name] = np.concatenate([part[name] for part in parts])
    return arrays


def snippet_arrays(snippets, positions, peaks, text):
    """K snippets of each of N units as arrays (N, K); length 0 where a unit does not fire.

    begin: the place of the first token, if all windows are concatenated. peak: which token is the
    strongest. values (N, K, WIDTH): activations; 127 stands for the unit's largest one.
    """
    shape = positions.shape
    length = np.zeros(shape, np.uint8)
    peak = np.zeros(shape, np.uint8)
    values = np.zeros((*shape, WIDTH), np.float32)
    for unit, place in np.argwhere(peaks > 0):
        snippet = snippets[unit][place]
        length[unit, place] = len(snippet.tokens)
        peak[unit, place] = snippet.peak
        values[unit, place, : len(snippet.values)] = snippet.values
    counted_from = text.starts + text.context  # (W)
    windows = np.searchsorted(counted_from, positions, side="right") - 1  # (N, K)
    offsets = positions - text.starts[windows]  # (N, K), of the strongest token in its window
    largest = np.maximum(peaks[:, :1], 1e-30)  # (N, 1)
    values = 127 * values / largest[..., None]
    values = np.rint(values).clip(-127, 127).astype(np.int8)
    begin = windows * text.T + offsets - peak
    return {"begin": begin, "length": length, "peak": peak, "values": values}


def gate_arrays(units, text, begin, length, title):
    """How often the gates keep each of N units, kept (N), and at which tokens of its snippets,
    begin and length (N, K): marks (N, K), bit i stands for token i."""
    N, parts = len(begin), []
    layers = np.arange(0, N, units.U)[:, None]  # (L, 1): the first unit of each
    batches = read_windows(units.kept, text.tokens, text.starts, text.T, text.device, title)
    for _, kept in batches:
        kept = kept.cpu().numpy() + layers  # (B, T, L, k), numbers below N
        parts.append(kept.reshape(kept.shape[0] * text.T, -1))
    kept = np.concatenate(parts)  # (W T, L k)
    places = np.arange(len(kept))  # (W T)
    counted = kept[places % text.T >= text.context]
    rates = np.bincount(counted.ravel(), minlength=N) / len(counted)
    keys = (places[:, None] * N + kept).ravel()  # of every place and unit kept there, rising
    i = np.arange(WIDTH, dtype=np.uint32)
    shown = (begin[..., None] + i) * N  # (N, K, WIDTH)
    shown += np.arange(N)[:, None, None]
    nearest = np.searchsorted(keys, shown).clip(max=len(keys) - 1)
    marked = (keys[nearest] == shown) & (i < length[..., None])
    marks = (marked << i).sum(-1, dtype=np.uint32)  # (N, K)
    return {"kept": rates, "marks": marks}


# ---------------------------------------------------------------------------------- what they write


@torch.no_grad()
def lens(model, writes):
    """The logit lens (nostalgebraist 2020) of weights: writes (N, C) -> tokens and logits, each
    (N, 2 LISTED), first the most promoted tokens, then the most suppressed ones.

    (w - mean w) * gain of ln_f, times the unembedding, minus the mean over the vocabulary: how an
    activation of 1 moves the logits directly, up to the scale by which ln_f divides.
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
    return torch.cat(tokens), torch.cat(values)


@torch.no_grad()
def neighbours(writes):
    """writes (N, C) -> for each unit the NEAR others with the largest cosine, and it, (N, NEAR).

    Centred over channels, as LayerNorm sees them; neurons and attention units of all layers.
    """
    rows = F.normalize(centred(writes, -1), dim=-1)  # (N, C)
    count = min(NEAR, len(rows) - 1)
    others, cosines = [], []
    for own in torch.arange(len(rows)).split(512):
        cosine = rows[own] @ rows.T  # (512, N)
        cosine.scatter_(-1, own[:, None], -2.0)  # not itself
        top = cosine.topk(count)
        others.append(top.indices)
        cosines.append(top.values)
    return torch.cat(others), torch.cat(cosines)


# -------------------------------------------------------------------------------------- the stories


def evenly(count, total):
    """At most count of the numbers below total, evenly spread."""
    return np.linspace(0, total, min(count, total), endpoint=False, dtype=int)


def pick_stories(tokens, eot, T, count):
    """At most count stories of a text, evenly spread, whole ones if any fit: a list of arrays of at
    most T tokens. An end-of-text comes before each."""
    text = np.append(eot, tokens)
    begins = np.flatnonzero(text == eot)
    stories = [story for story in np.split(text, begins) if len(story) > 1]
    chosen = [story for story in stories if len(story) <= T] or stories
    places = evenly(count, len(chosen))
    return [chosen[place][:T] for place in places]


@torch.no_grad()
def read_stories(units, stories, writes, device):
    """Which units to show at every token of the stories: units and activations, each (n, L, k).

    The kept ones or, without a gate, the STRONGEST of each kind. The unit that writes most,
    |a| |w|, comes first. writes: (N, C)
    """
    lengths = writes.norm(dim=-1).to(device)  # (N)
    lengths = lengths.view(-1, units.U)  # (L, U)
    found, values = [], []
    for story in stories:
        idx = torch.from_numpy(story)[None].to(device)  # (1, T + 1)
        activations = units.activations(units.read(idx))[0, 1:]  # (T, L, U)
        written = activations.abs() * lengths
        if units.config.ablation == "none":
            neurons, attention = units.split(written)
            neurons = neurons.topk(STRONGEST).indices
            attention = attention.topk(min(STRONGEST, units.A)).indices
            shown = torch.cat((neurons, attention + units.M), -1)  # (T, L, k)
        else:
            shown = units.kept(idx)[0, 1:]  # (T, L, k)
        written = written.gather(-1, shown)  # (T, L, k)
        order = written.argsort(dim=-1, descending=True, stable=True)
        shown = shown.gather(-1, order)
        found.append(shown)
        values.append(activations.gather(-1, shown))
    return torch.cat(found).cpu(), torch.cat(values).cpu()


# ------------------------------------------------------------------- what other experiments found


def read_result(run, file):
    """The content of a result file beside a run; None if there is none for these weights."""
    path = result_path(run.path, file)
    result = read_json(path) if path.exists() else {}
    weights = digests(run.model.state_dict())
    return result if weights.items() <= result.items() else None


def picked(entry, names):
    return {name: entry.get(name) for name in names}


def shown_graph(entry):
    """What is shown of an entry of n2g_neurons.json: scores, and at most GRAPH nodes."""
    graph = entry["graph"] or {"nodes": [], "edges": []}
    nodes = sorted(graph["nodes"], key=lambda node: (-node["activating"], -node["importance"]))
    shown = nodes[:GRAPH]
    names = {node["id"] for node in shown}
    edges = [ends for ends in graph["edges"] if {ends["source"], ends["target"]} <= names]
    return {**picked(entry, SCORES), "nodes": shown, "edges": edges,
            "left_out": len(nodes) - len(shown)}


def findings(run):
    """What other experiments found for the weights of this run; None if one was not run."""
    n2g = read_result(run, "n2g_neurons.json")
    explain = read_result(run, "explain_neurons.json")
    units = read_result(run, "units.json")
    return {
        "n2g": n2g and [shown_graph(entry) for entry in n2g["neurons"]],
        "explain": explain and [picked(entry, EXPLANATION) for entry in explain["neurons"]],
        "usage": units and {kind: picked(use, USAGE) for kind, use in units["kinds"].items()}}


# -------------------------------------------------------------------------------------- the page


def packed(arrays):
    """Arrays as the page reads them: {name: {"type", "data": numbers, little-endian, in base64}}.
    Numbers are bytes, float32, or uint32 for places, units and tokens."""
    found = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.itemsize > 1:
            array = array.astype("<f4" if array.dtype.kind == "f" else "<u4")
        text = base64.b64encode(array.tobytes()).decode()
        found[name] = {"type": array.dtype.name, "data": text}
    return found


def measure_run(run, stories, args, device):
    """A run as the page reads it: a dict of facts, and of packed arrays."""
    found = findings(run)
    model = run.model.to(device)
    tokens = load_tokens(run.folder, "val")
    T = model.config.block_size
    context = T // 4  # tokens before every one that counts
    starts = np.arange(0, len(tokens) - T + 1, T - context)
    starts = starts[evenly(args.windows, len(starts))]
    text = Text(tokens, run.meta["eot"], T, device, context, starts)
    arrays = measure_units(model, text, args.snippets, f"{run.path}: units")
    writes = torch.from_numpy(arrays.pop("writes"))  # (N, C)
    units = Units(model, range(model.config.n_layer))
    if model.config.ablation != "none":
        arrays |= gate_arrays(
            units, text, arrays["begin"], arrays["length"], f"{run.path}: gates")
    arrays["text_tokens"] = windows_at(tokens, starts, T, "cpu").numpy()  # (W, T)
    arrays["lens_tokens"], arrays["lens_values"] = lens(model, writes)
    arrays["near"], arrays["cosines"] = neighbours(writes)
    shown, values = read_stories(units, stories, writes, device)
    arrays |= {"story_units": shown, "story_values": values}
    return {
        "run": run.path, "step": run.step, "config": vars(model.config),
        "tokens": len(starts) * (T - context), "arrays": packed(arrays), **found}


def write_page(path, runs, args, device):
    """Measure these runs, in this order, and write their page."""
    first = runs[0]
    tokenizer = load_tokenizer(first.tokenizer)
    T = min(run.model.config.block_size for run in runs)
    tokens = load_tokens(first.folder, "val")
    stories = pick_stories(tokens, first.meta["eot"], T, args.stories)
    story_tokens = np.concatenate([story[1:] for story in stories])
    data = packed({"story_tokens": story_tokens}) | {
        "width": WIDTH,
        "story_lengths": [len(story) - 1 for story in stories],
        "texts": [token_text(tokenizer, token) for token in range(tokenizer.n_vocab)],
        "runs": [measure_run(run, stories, args, device) for run in runs]}
    text = json.dumps(data, separators=(",", ":"))
    for letter in "<>&":  # so that a story with </script> cannot end the page's script
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


# ------------------------------------------------------------------------------- the command line


def html(path):
    """For argparse: a page that can be written."""
    if Path(path).suffix != ".html" or not Path(path).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is no .html in an existing folder")
    return Path(path)


def main():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--page", type=html, metavar="FILE", help="one page of all these runs, side by side")
    add("--windows", type=knobs.positive, default=400, help="windows of text, at most (400)")
    add("--snippets", type=knobs.positive, default=8, help="snippets of each unit, at most (8)")
    add("--stories", type=knobs.positive, default=8, help="stories to show, at most (8)")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    runs = open_runs(args.runs, args.data)
    if args.page:
        checksums = {run.meta["checksum"] for run in runs}
        if len(checksums) > 1:
            raise UserError("these runs have different data: give the same data for all of them "
                            "with --data, or leave out --page")
        write_page(args.page, runs, args, device)
    else:
        for run in runs:
            write_page(result_path(run.path, "browse.html"), [run], args, device)


if __name__ == "__main__":
    knobs.cli(main)
