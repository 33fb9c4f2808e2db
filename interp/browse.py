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

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import base64
import hashlib
import json
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
from eval import ablation, centred, check_range, check_writable, open_tasks, run_parser, trained_with
from interp.activations import (
    TOKENS, UNITS, Site, Strongest, Text, read_sites, read_windows, windows_at)
from interp.results import fingerprint, fits, result_path, write_text
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
    "units": ("units.json", {"kinds": dict})}
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


@torch.no_grad()
def kept_units(model, idx):
    """idx (B, T) -> the units that the gates keep, (B, T, L, k): neurons, then attention units."""
    config = model.config
    hidden, inputs, caches = model.clean_pass(idx)
    _, masks = model.ablated_pass(hidden, inputs, caches)  # model.ablated(idx), without its logits
    kept = []
    for attn_mask, mlp_mask in masks:  # a layer's (B, T, A) and (B, T, M)
        attention = attn_mask.topk(config.k_attn).indices + mlp_mask.size(-1)
        kept.append(torch.cat((mlp_mask.topk(config.k_mlp).indices, attention), -1))
    return torch.stack(kept, 2)


def read_kept(model, text, title):
    """The units that the gates keep at every token of all windows: (W, T, L, k) uint16."""
    batches = read_windows(partial(kept_units, model), text.tokens, text.starts, text.T,
                           text.device, title=title)
    return np.concatenate([kept.cpu().numpy().astype(np.uint16) for _, kept in batches])


def rates(kept, U):
    """How often units are kept: kept (W, T, L, k) -> shares of the W T tokens, (N)."""
    W, T, L, _ = kept.shape
    counts = [np.bincount(kept[:, :, layer].flatten(), minlength=U) for layer in range(L)]
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
    config, M = model.config, 4 * model.config.n_embd
    sites = [Site(model, layer, site) for layer in layers for site in UNITS]
    fired, tokens, best = 0, 0, Strongest(count)
    heads = [HeadOutputs() for _ in layers]
    for x, positions, stories in text.read(partial(read_sites, sites), title=title):
        x = x.unflatten(-1, (len(layers), -1))  # (n, L, M + C)
        strengths = strength(unit_activations(x, config), M)  # (n, L, U)
        fired += fires(strengths, M).sum(0)
        tokens += len(x)
        best.add(strengths.flatten(1), positions, stories)
        for layer, outputs in enumerate(heads if config.attn_unit == "head" else []):
            outputs.add(x[:, layer, M:].unflatten(-1, (config.n_head, -1)))

    def activate(idx):
        x = read_sites(sites, idx).unflatten(-1, (len(layers), -1))  # (B, T, L, M + C)
        return unit_activations(x, config).flatten(2)  # (B, T, N)

    peaks, positions = best.found()  # (N, K) each
    snippets = text.snippets(activate, positions, LEFT, RIGHT)
    writes = [directions(model, layer, outputs) for layer, outputs in zip(layers, heads)]
    return {"fires": (fired.flatten().cpu().numpy() / tokens).astype(np.float32),
            "largest": peaks[:, 0].numpy().astype(np.float32),
            "directions": torch.cat(writes).cpu().numpy(),
            **snippet_arrays(snippets, positions.numpy(), peaks.numpy(), text)}


def measure_units(model, text, count, title):
    """The same for all layers of a model, as many of them in a pass as fit into AT_ONCE."""
    config = model.config
    step = max(1, AT_ONCE // (TOKENS * (4 * config.n_embd + config.attn_units)))
    found = []
    for first in range(0, config.n_layer, step):
        layers = range(first, min(first + step, config.n_layer))
        found.append(measure_layers(model, layers, text, count, f"{title}: units from layer {first}"))
    return {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}


def snippet_arrays(snippets, positions, peaks, text):
    """K snippets of each of N units as arrays (N, K); length 0 where a unit does not fire.

    begin: the place of the first token in the windows one after the other. peak: which token is
    the strongest. values (N, K, WIDTH): activations in 127ths of the unit's largest one.
    """
    windows = np.searchsorted(text.starts + text.context, positions, side="right") - 1  # (N, K)
    begin = np.zeros(positions.shape, np.uint32)
    length, peak = np.zeros((2, *positions.shape), np.uint8)
    values = np.zeros((*positions.shape, WIDTH), np.float32)
    for place in zip(*np.nonzero(peaks > 0)):
        snippet = snippets[place[0]][place[1]]
        first = positions[place] - snippet.peak - text.starts[windows[place]]  # in its window
        begin[place] = windows[place] * text.T + first
        length[place], peak[place] = len(snippet.tokens), snippet.peak
        values[place][: len(snippet.values)] = snippet.values
    scale = np.maximum(peaks[:, :1, None], 1e-30)
    values = np.rint(127 * values / scale).clip(-127, 127).astype(np.int8)
    return {"begin": begin, "length": length, "peak": peak, "values": values}


def marks(begin, length, kept):
    """At which tokens of their snippets, begin and length (N, K), the gate keeps the units.

    kept (W, T, L, k) -> uint32 (N, K): bit i stands for token i.
    """
    W, T, L, _ = kept.shape
    i, found = np.arange(WIDTH), []
    for layer, (first, size) in enumerate(zip(np.split(begin, L), np.split(length, L))):  # (U, K)
        won = kept[:, :, layer].reshape(W * T, -1)  # (W T, k)
        places = np.minimum(first[..., None] + i, W * T - 1)  # (U, K, WIDTH)
        units = np.arange(len(first))[:, None, None, None]
        marked = (won[places] == units).any(-1) & (i < size[..., None])  # (U, K, WIDTH)
        found.append((marked.astype(np.uint32) << i.astype(np.uint32)).sum(-1, dtype=np.uint32))
    return np.concatenate(found)


# ---------------------------------------------------------------------------------- what they write


@torch.no_grad()
def lens(model, writes):
    """The logit lens (nostalgebraist 2020) of weights: writes (N, C) -> tokens, values (N, 2 LISTED).

    (w - mean w) * gain of ln_f, times the unembedding, less the mean over the vocabulary (no
    softmax sees it): how an activation of 1 moves the logits if nothing else reads it on the way,
    but for the scale by which ln_f divides. First the LISTED most promoted tokens, then the most
    suppressed ones.
    """
    gain, unembedding = model.transformer["ln_f"].weight.cpu(), model.lm_head.weight.cpu()  # (V, C)
    count = min(LISTED, len(unembedding) // 2)
    found = []
    for part in (centred(writes, -1) * gain).split(256):
        logits = centred(part @ unembedding.T, -1)  # (256, V)
        raised, lowered = logits.topk(count), logits.topk(count, largest=False)
        found.append([torch.cat(pair, -1) for pair in zip(raised, lowered)])
    values, tokens = (torch.cat(rows).numpy() for rows in zip(*found))
    return tokens, values


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
    chosen = chosen[np.linspace(0, len(chosen), min(count, len(chosen)), endpoint=False, dtype=int)]
    lengths = np.minimum(sizes[chosen], T - 1)
    windows = np.full((len(chosen), T), eot, np.int64)
    for window, begin, length in zip(windows, begins[chosen], lengths):
        window[1 : length + 1] = tokens[begin : begin + length]
    return windows, lengths


@torch.no_grad()
def read_stories(model, windows, lengths, writes, device):
    """Which units to show at every token of the stories: units (n, L, k), activations (n, L, k).

    The kept ones or, without gates, the STRONGEST of a kind; what writes most, |a| |w|, first.
    writes: (L, U, C)
    """
    config, M = model.config, 4 * model.config.n_embd
    sites = [Site(model, layer, site) for layer in range(config.n_layer) for site in UNITS]
    sizes = writes.norm(dim=-1).to(device)  # (L, U)
    units, values = [], []
    for window, length in zip(windows, lengths):
        idx = torch.from_numpy(window[None, : length + 1]).to(device)
        x = read_sites(sites, idx)[0, 1:].unflatten(-1, (config.n_layer, -1))  # (T, L, M + C)
        activations = unit_activations(x, config)  # (T, L, U)
        written = activations.abs() * sizes
        if config.ablation == "none":
            neurons, attention = (part.topk(min(STRONGEST, part.size(-1))).indices
                                  for part in (written[..., :M], written[..., M:]))
            shown = torch.cat((neurons, attention + M), -1)
        else:
            shown = kept_units(model, idx)[0, 1:]
        order = written.gather(-1, shown).sort(dim=-1, descending=True, stable=True).indices
        shown = shown.gather(-1, order)  # (T, L, k)
        units.append(shown.cpu().numpy())
        values.append(activations.gather(-1, shown).cpu().numpy())
    return np.concatenate(units), np.concatenate(values)


# ------------------------------------------------------------------- what other experiments found


def read_finding(run, name, form):
    """A result file beside a run, or None where there is none of these weights. Raises UserError."""
    path = result_path(run.path, name)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not fits(found, {"checkpoint": str, **form}):
        raise UserError(f"{path} is damaged: delete it, and make it again")
    return found if found["checkpoint"] == fingerprint(run.model) else None


def graph_of(entry):
    """What is shown of an entry of n2g_neurons.json, at most GRAPH nodes of it, or None."""
    graph = entry.get("graph")
    node, edge = {"id": str, "activating": bool, "importance": NUMBER}, {"source": str, "target": str}
    if not fits(graph, {"nodes": [node], "edges": [edge]}):
        return None
    nodes = sorted(graph["nodes"], key=lambda node: (not node["activating"], -node["importance"]))
    places = {node["id"]: place for place, node in enumerate(nodes[:GRAPH])}
    edges = []
    for edge in graph["edges"]:
        if edge["source"] in places and edge["target"] in places:
            edges.append([places[edge["source"]], places[edge["target"]]])
    return {"nodes": [[node["id"], node["activating"], node["importance"]] for node in nodes[:GRAPH]],
            "edges": edges, "left_out": len(nodes) - len(places)}


def findings(run):
    """What the page says of single neurons and layers, by the script that found it.

    Where it has not, the command that does.
    """
    config, found, commands = run.model.config, {}, {}
    for script, (name, form) in FINDINGS.items():
        found[script] = read_finding(run, name, form)
        if found[script] is None and (script != "units" or config.ablation != "none"):
            commands[script] = f"python interp/{script}.py {shlex.quote(str(run.path))}"
    graphs, texts, usage = {}, {}, {}
    for entry in (found["n2g"] or {"neurons": []})["neurons"]:
        scores = {name: entry.get(name) for name in ("precision", "recall", "f1")}
        graphs[f"L{entry['layer']}N{entry['neuron']}"] = {"graph": graph_of(entry), **scores}
    for entry in (found["explain"] or {"neurons": []})["neurons"]:
        kept = ("explanation", "score", "random_score", "reason", "tokens")
        text = {name: entry[name] for name in kept if name in entry}
        texts[f"L{entry['layer']}N{entry['neuron']}"] = text
    for kind, lists in (found["units"] or {"kinds": {}})["kinds"].items():
        usage[kind] = {name: numbers for name, numbers in lists.items()
                       if fits(numbers, [NUMBER]) and len(numbers) == config.n_layer}
    return {"graphs": graphs, "explanations": texts, "usage": usage, "commands": commands}


# -------------------------------------------------------------------------------------- the page


def choose_windows(task, count, device):
    """The Text that a run is looked at on: at most count windows, spread evenly.

    A quarter of a window stands before every token that counts.
    """
    T = task.run.model.config.block_size
    starts = np.arange(0, len(task.tokens) - T + 1, T - T // 4)
    chosen = np.linspace(0, len(starts), min(count, len(starts)), endpoint=False, dtype=int)
    return Text(task.tokens, task.meta["eot"], T, device, T // 4, starts[chosen])


def measure_run(task, windows, lengths, args, device, title):
    """A run as the page knows it: a dict of facts, and of arrays by their name in the template.

    windows (S, T), lengths (S): the stories. Those arrays that hold tokens are called *tokens.
    """
    run, config = task.run, task.run.model.config
    if not all(weight.isfinite().all() for weight in run.model.parameters()):
        raise UserError(f"{run.path} has weights that are not finite: its training has diverged")
    facts = {"run": str(run.path), **findings(run)}  # before minutes pass
    model, gated = run.model.to(device), config.ablation != "none"
    text = choose_windows(task, args.windows, device)
    M, U = 4 * config.n_embd, 4 * config.n_embd + config.attn_units
    arrays = measure_units(model, text, args.snippets, title)
    writes = torch.from_numpy(arrays.pop("directions")).unflatten(0, (config.n_layer, -1))  # (L, U, C)
    if gated:
        kept = read_kept(model, text, f"{title}: gates")  # (W, T, L, k)
        arrays["kept"] = rates(kept[:, text.context :], U).astype(np.float32)
        arrays["marks"] = marks(arrays["begin"], arrays["length"], kept)
    arrays["text_tokens"] = windows_at(text.tokens, text.starts, text.T, "cpu").numpy()
    arrays["lens_tokens"], values = lens(model, writes.flatten(0, 1))
    arrays["lens_values"] = values.astype(np.float32)
    near, cosines = neighbours(writes.flatten(0, 1))
    arrays |= {"near": near.astype(np.uint32), "cosines": cosines.astype(np.float32)}
    shown, values = read_stories(model, windows, lengths, writes, device)
    arrays |= {"story_units": shown.astype(np.uint16), "story_values": values.astype(np.float32)}
    recipe = trained_with(run) | {"k_mlp": config.k_mlp if gated else 0}
    facts |= {"recipe": ablation(recipe).replace("none", "baseline"), "step": run.step,
              "layers": config.n_layer, "neurons": M, "attention": config.attn_units,
              "attn_unit": config.attn_unit, "gated": gated, "tokens": int(text.starts.size * (text.T - text.context)),
              "snippets": arrays["begin"].shape[-1]}
    return facts | {"arrays": arrays}


def packed(array):
    """An array as the page reads it: its type, and its numbers, little-endian, in base64."""
    numbers = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"type": array.dtype.name, "data": base64.b64encode(numbers.tobytes()).decode()}


def page_data(runs, windows, lengths, tokenizer):
    """What the template's script reads: these runs, with only those tokens that it can show."""
    stories = np.concatenate([window[1 : length + 1] for window, length in zip(windows, lengths)])
    everything = [stories]
    for run in runs:
        everything += [array.flatten() for name, array in run["arrays"].items() if name.endswith("tokens")]
    used = np.unique(np.concatenate(everything))  # (tokens), rising
    texts = [tokenizer.decode_single_token_bytes(int(token)).decode(errors="backslashreplace")
             for token in used]

    def known(tokens):
        return packed(np.searchsorted(used, tokens).astype(np.uint16))

    shown = []
    for run in runs:
        arrays = {name: known(array) if name.endswith("tokens") else packed(array)
                  for name, array in run["arrays"].items()}
        shown.append(run | {"arrays": arrays})
    return {"texts": texts, "width": WIDTH, "story_tokens": known(stories),
            "story_lengths": lengths.tolist(), "runs": shown}


def render(data):
    """The page: the template with this data in it.

    No text of a story can end the script it stands in, as JSON needs none of < > & and letters
    beyond ASCII, and the page may run this script and no other.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    text = json.dumps(data, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return template.replace("POLICY", "; ".join(policy), 1).replace("DATA", text, 1)


def check_page(path):
    """Raises UserError when path cannot be written, or is a file that is no earlier page."""
    if path.is_file():
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
    runs = [measure_run(task, windows, lengths, args, device, str(task.run.path)) for task in tasks]
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
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise UserError(f"{tasks[number].run.path} is given twice: give it once")
    if page is None:
        return [(path, [task]) for path, task in zip(paths, tasks)]
    for task in tasks:
        if task.meta["checksum"] != tasks[0].meta["checksum"]:
            raise UserError(f"{tasks[0].run.path} and {task.run.path} have different data: "
                            f"name what to show both on with --data, or leave out --page")
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
