"""Neuron2Graph (Foote et al. 2023): a graph of what makes each neuron fire. Table 2 of the paper.

    python -m interp.n2g out/baseline out/local_k2     all neurons; the runs in one table
    python -m interp.n2g out/* --plot graphs.png       each metric by layer, one line per run
    python -m interp.n2g out/local_k2 --substitutes distilbert-base-uncased       as in the paper

A neuron is a unit of an MLP after its activation function, in the clean stream. For each neuron:
    snippets    Its 20 strongest activations in training text, at most one per story. The 1st, 3rd,
                5th, ... are used below, the others are held out.
    prune       Of each snippet, the shortest text up to the strongest token (the pivot) that still
                gives half of the activation, read alone after an end-of-text.
    importance  1 - a(pivot | token replaced by end-of-text) / a(pivot), for each token before the
                pivot. The token is important if this is at least 0.5.
    augment     Up to 5 substitutes for each important token, kept if half of a(pivot) remains.
    graph       Edges from each important token to the next, the last one to the pivot. Tokens with
                the same text are one node.
    trie        The same paths predict where the neuron reaches half of its maximum in the held-out
                snippets: precision, recall, F1.

Written beside the checkpoint: n2g.json (metrics by layer), n2g.png, n2g_neurons.json (all graphs;
interp.browse shows them). The same command continues after an interruption. Nothing here is random.

How to read the metrics:
- The paper does not say whether neurons without a graph count. n2g.json has both: *_mean_non_empty
  (only neurons with a graph; printed) and *_mean_all (a neuron without a graph counts 0).
- The paper's graphs have self-loops (--self_loops): a pivot without context points to itself.
- Small graphs are dense. Read density together with the share of neurons with a graph.
- Entropy and diversity grow with the pool of tokens. interp.tables compares equal pool sizes.
- The held-out snippets are text around strong activations. Precision in other text is lower. A trie
  that predicts nothing has no precision, and F1 0.

Shapes: B prompts of T tokens, U neurons, K snippets per neuron.
"""

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import config as knobs
from eval import open_runs, plain, print_table, run_parser, save_figure
from interp.activations import TOKENS, Site, Strongest, Text, read_sites, token_text
from interp.results import Result, list_of, measure_all
from prepare import EOT, UserError, load_tokenizer, load_tokens

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # lengths that prune tries, in tokens
SUBSTITUTES = 5  # tried for each important token
SCANNED = 2**26  # activations in memory at a time; as many layers as fit are read in one pass
IGNORE, END = -1, -2  # keys in a trie beside tokens: any token; the end of a path
METRICS = ("density", "transitivity", "edges_to_activating", "edges_per_activating_node",
           "out_degree")

# ------------------------------------------------------------------------------- reading prompts


def batches_by_length(prompts):
    """Lists of prompts of one length, about TOKENS tokens each, so that none needs padding."""
    groups = defaultdict(list)
    for prompt in prompts:
        groups[len(prompt)].append(prompt)
    for length, group in groups.items():
        step = max(1, TOKENS // length)
        for first in range(0, len(group), step):
            yield group[first : first + step]


class AtPivot:
    """The activations of a layer's neurons at the last token of prompts.

    activate: idx (B, T) -> (B, T, U), such as Site.read. title: of the progress bar.
    """

    def __init__(self, activate, eot, device, title):
        self.activate, self.eot, self.device, self.title = activate, eot, device, title

    def __call__(self, prompts, units):
        """n prompts (tuples of tokens) and n neurons -> n activations. Each different prompt is
        read once, after an end-of-text."""
        asked = defaultdict(list)  # {prompt: its places in prompts}
        for place, prompt in enumerate(prompts):
            asked[(self.eot, *prompt)].append(place)
        values = [0.0] * len(prompts)
        with tqdm(total=len(asked), desc=self.title, unit=" prompts", unit_scale=True,
                  leave=False) as bar:
            for batch in batches_by_length(asked):
                idx = torch.tensor(batch, device=self.device)  # (B, T)
                x = self.activate(idx)[:, -1].cpu().numpy()  # (B, U)
                for prompt, row in zip(batch, x):
                    for place in asked[prompt]:
                        values[place] = row[units[place]].item()
                bar.update(len(batch))
        return values


# ----------------------------------------------------------------------------------- substitutes

# A source of substitutes takes queries, pairs of (tokens of a text, a place in it), and returns for
# each query the tokens that could stand in this place, the likeliest first.


def without(candidates, token, eot):
    """The first SUBSTITUTES candidates that are neither this token nor end-of-text."""
    others = [candidate for candidate in candidates if candidate not in (token, eot)]
    return others[:SUBSTITUTES]


class Ngrams:
    """Tokens that occur in a text between the same two neighbours, then after the same left one.

    Frequent tokens first; of equally frequent ones the lower number first.
    """

    def __init__(self, tokens, eot):
        stream = np.concatenate(([eot], tokens)).astype(np.int64)
        self.eot = eot
        self.between = ranked(stream[:-2] << 16 | stream[2:], stream[1:-1])  # tokens are uint16
        self.after = ranked(stream[:-1], stream[1:])

    def __call__(self, queries):
        return [self.look_up(text, place) for text, place in queries]

    def look_up(self, text, place):
        """The tokens for a place of a text, not its last place."""
        left = text[place - 1] if place else self.eot
        found = self.most(self.between, left << 16 | text[place + 1]) + self.most(self.after, left)
        return without(dict.fromkeys(found), text[place], self.eot)

    def most(self, table, key):
        """The first tokens of a key, enough for SUBSTITUTES: as many again may be in the other
        table too, and the token itself and end-of-text are not wanted."""
        keys, tokens = table
        low, high = np.searchsorted(keys, (key, key + 1))
        return tokens[low : min(high, low + 2 * SUBSTITUTES + 2)].tolist()


def ranked(keys, tokens):
    """Different (key, token) pairs, sorted by key, then from frequent to rare: two arrays."""
    pairs, counts = np.unique(keys << 16 | tokens, return_counts=True)
    order = np.lexsort((pairs, -counts, pairs >> 16))
    return pairs[order] >> 16, pairs[order] & 0xFFFF


class FillMask:
    """The words that a masked language model of transformers predicts, such as DistilBERT.

    name: a folder or a name on the Hugging Face hub. A word counts if it is one token of our
    tokenizer, written with the leading space and the capital letter of the token it replaces.
    """

    def __init__(self, name, tokenizer, device):
        import transformers  # optional

        try:
            self.words = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModelForMaskedLM.from_pretrained(name).to(device).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--substitutes={name} is neither ngram nor a folder or name on the "
                            f"hub with a masked language model: {reason}") from None
        self.tokenizer, self.device = tokenizer, device
        self.known = {}  # {query: its tokens}: layers ask for the same ones

    @torch.no_grad()
    def __call__(self, queries, batch_size=64, considered=50):
        """batch_size: texts at a time. considered: likeliest words of the model to look at."""
        asked = [query for query in dict.fromkeys(queries) if query not in self.known]
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            inputs = self.words([self.masked(*query) for query in batch], padding=True,
                                truncation=True, return_tensors="pt").to(self.device)
            logits = self.model(**inputs).logits  # (B, T, words)
            at_mask = logits[inputs["input_ids"] == self.words.mask_token_id]  # (B, words)
            best = at_mask.topk(min(considered, at_mask.size(-1))).indices.tolist()
            for (text, place), words in zip(batch, best):
                self.known[text, place] = self.as_tokens(words, text[place])
        return [self.known[query] for query in queries]

    def masked(self, text, place):
        """The text with a mask in this place."""
        before = self.tokenizer.decode(list(text[:place]))
        after = self.tokenizer.decode(list(text[place + 1 :]))
        return f"{before} {self.words.mask_token}{after}"

    def as_tokens(self, words, token):
        """Numbers of words -> our tokens that can replace this token."""
        original = self.tokenizer.decode([token])
        space = " " if original.startswith(" ") else ""
        found = []
        for word in self.words.convert_ids_to_tokens(words):
            if word in self.words.all_special_tokens:
                continue
            text = word.removeprefix("##")  # a piece that continues a word
            if original.strip().istitle():
                text = text.capitalize()
            tokens = self.tokenizer.encode_ordinary(text if word.startswith("##") else space + text)
            if len(tokens) == 1:
                found += tokens
        return without(dict.fromkeys(found), token, self.tokenizer.eot_token)


# --------------------------------------------------------------------- prune, importance, augment


@dataclass
class Example:
    """A strong activation of a neuron, and which tokens before it matter."""

    unit: int
    value: float  # the activation in the training text
    text: tuple  # the tokens of the story up to the pivot, at most LENGTHS[-1]
    prompt: tuple = ()  # the end of text that prune keeps; empty if no end keeps enough
    base: float = 0.0  # the activation at the end of the prompt alone
    importance: list = field(default_factory=list)  # of each token of the prompt
    important: list = field(default_factory=list)  # places of important tokens, without the pivot
    fillers: list = field(default_factory=list)  # (place, token): accepted substitutes

    def filled(self, place, token):
        """The prompt with this token in this place."""
        return (*self.prompt[:place], token, *self.prompt[place + 1 :])

    def variants(self):
        """The prompt, and the prompt with each filler."""
        return [self.prompt, *(self.filled(*filler) for filler in self.fillers)]

    def pool(self):
        """The pivot, the important tokens and the fillers."""
        important = [self.prompt[place] for place in self.important]
        return [self.prompt[-1], *important, *(token for _, token in self.fillers)]


def prune(at_pivot, examples, threshold):
    """Set prompt and base: the shortest end of the text that keeps this share of the activation.

    Returns the examples in which one does. The lengths are LENGTHS, or the whole text.
    """
    waiting = examples
    for length in LENGTHS:
        ends = [example.text[-length:] for example in waiting]
        values = at_pivot(ends, [example.unit for example in waiting])
        for example, end, value in zip(waiting, ends, values):
            if value >= threshold * example.value:
                example.prompt, example.base = end, value
        waiting = [example for example in waiting
                   if not example.prompt and len(example.text) > length]
    return [example for example in examples if example.prompt]


def weigh(at_pivot, examples, level):
    """Set importance, 1 - a(pivot | token masked) / a(pivot), and the places that reach this level.

    The mask is end-of-text. The pivot has an importance, but does not count as important.
    """
    masked, units = [], []
    for example in examples:
        places = range(len(example.prompt))
        masked += [example.filled(place, at_pivot.eot) for place in places]
        units += [example.unit] * len(places)
    values = iter(at_pivot(masked, units))
    for example in examples:
        example.importance = [1 - next(values) / example.base for _ in example.prompt]
        context = example.importance[:-1]
        example.important = [place for place, share in enumerate(context) if share >= level]


def augment(at_pivot, examples, substitutes, threshold):
    """Set fillers: the substitutes of important tokens that keep this share of the activation."""
    places, queries = [], []
    for example in examples:
        skipped = len(example.text) - len(example.prompt)  # tokens of the text before the prompt
        places += [(example, place) for place in example.important]
        queries += [(example.text, skipped + place) for place in example.important]
    tried = []
    for (example, place), tokens in zip(places, substitutes(queries)):
        tried += [(example, place, token) for token in tokens]
    prompts = [example.filled(place, token) for example, place, token in tried]
    values = at_pivot(prompts, [example.unit for example, _, _ in tried])
    for (example, place, token), value in zip(tried, values):
        if value >= threshold * example.base:
            example.fillers.append((place, token))


# ---------------------------------------------------------------------------------- trie, graph


def path_of(prompt, important):
    """The tokens from the pivot back to the first important one, IGNORE for unimportant ones."""
    path = [prompt[-1]]
    first = important[0] if important else len(prompt)
    for place in range(len(prompt) - 2, first - 1, -1):
        path.append(prompt[place] if place in important else IGNORE)
    return path


class Trie:
    """Paths of tokens, each with an activation."""

    def __init__(self, examples=()):
        """With the paths of all variants of a neuron's examples."""
        self.root = {}
        for example in examples:
            for prompt in example.variants():
                self.add(path_of(prompt, example.important), example.value)

    def add(self, path, value):
        node = self.root
        for token in path:
            node = node.setdefault(token, {})
        node[END] = max(value, node.get(END, value))

    def predict(self, tokens, place, node=None):
        """The largest activation of the paths that end at this place, read backwards; 0 if none."""
        node = self.root if node is None else node
        best = node.get(END, 0.0)
        if place < 0:
            return best
        for token in (tokens[place], IGNORE):
            if token in node:
                best = max(best, self.predict(tokens, place - 1, node[token]))
        return best


def judge(trie, peak, held_out):
    """Precision, recall and F1 of the prediction that a neuron reaches half of its peak.

    held_out: pairs of tokens and activations of the last of these tokens; the tokens before them
    are context. A ratio with nothing to divide by is None.
    """
    level, both, predicted, actual = peak / 2, 0, 0, 0
    for tokens, values in held_out:
        for place, value in enumerate(values, len(tokens) - len(values)):
            fires = value >= level
            # most tokens are not a pivot: they need no search
            expected = tokens[place] in trie.root and trie.predict(tokens, place) >= level
            both += fires and expected
            predicted += expected
            actual += fires
    return {"precision": both / predicted if predicted else None,
            "recall": both / actual if actual else None,
            "f1": 2 * both / (predicted + actual) if predicted + actual else None}


def graph_of(examples, name, self_loops=False):
    """The nx.DiGraph of a neuron: important tokens -> ... -> pivot of all variants.

    name: token -> its text. Nodes have the attributes activating (is it a pivot of an example?) and
    importance (the largest; a filler has the importance of the token it replaces). self_loops: keep
    edges of a token to itself, and give one to pivots without context.
    """
    importance, pivots, edges = {}, set(), []
    for example in examples:
        places = [*example.important, len(example.prompt) - 1]
        for prompt in example.variants():
            nodes = [name(prompt[place]) for place in places]
            for node, place in zip(nodes, places):
                here = example.importance[place]
                importance[node] = max(here, importance.get(node, here))
            pivots.add(nodes[-1])
            edges += list(pairwise(nodes)) or [(nodes[0], nodes[0])]
    graph = nx.DiGraph()
    for node, largest in importance.items():
        graph.add_node(node, importance=largest, activating=node in pivots)
    graph.add_edges_from(edge for edge in edges if self_loops or edge[0] != edge[1])
    return graph


def metrics(graph):
    """{name: number} for METRICS of a graph with n nodes and m edges; None for 0 / 0.

    density: m / (n (n - 1)). transitivity: 3 triangles / triads, edges taken as undirected.
    edges_to_activating: edges that end in activating nodes. out_degree: m / n.
    """
    n, m = graph.number_of_nodes(), graph.number_of_edges()
    activating = [node for node, is_pivot in graph.nodes(data="activating") if is_pivot]
    edges = sum(degree for _, degree in graph.in_degree(activating))
    return {"density": float(nx.density(graph)),
            "transitivity": float(nx.transitivity(graph.to_undirected())),
            "edges_to_activating": edges,
            "edges_per_activating_node": edges / len(activating) if activating else None,
            "out_degree": m / n if n else None}


# ----------------------------------------------------------------------------- a layer's numbers

PUNCTUATION, FRAGMENT, CONTENT = "punctuation or newline", "word fragment", "content"
WORDS = {
    "article": "a an the",
    "preposition": "about above across after against along among around at before behind below "
                   "beneath beside besides between beyond by down during except for from in inside "
                   "into like near of off on onto out outside over past through throughout to "
                   "toward towards under underneath until up upon via with within without",
    "conjunction": "and or but nor so yet because if when whenever while although though unless "
                   "since as than whether",
    "pronoun": "i you he she it we they me him her us them my your his its our their mine yours "
               "hers ours theirs myself yourself himself herself itself ourselves yourselves "
               "themselves this that these those who whom whose which what someone somebody "
               "something everyone everybody everything anyone anybody anything nobody nothing",
    "auxiliary": "am is are was were be been being have has had having do does did will would "
                 "shall should can could may might must ought cannot 'm 's 're 've 'll 'd 't",
}
TYPES = (PUNCTUATION, *WORDS, FRAGMENT, CONTENT)
TYPE_OF = {word: kind for kind, words in WORDS.items() for word in words.split()}


def token_type(token):
    """The one of TYPES that a token's text is. A fragment has no leading space and begins with a
    small letter. A word that can be of several types has its most frequent one."""
    word = token.strip()
    if token == EOT or not any(letter.isalnum() for letter in word):
        return PUNCTUATION
    if word.startswith("'"):
        return TYPE_OF.get(word.lower(), FRAGMENT)
    if token[0] != " " and not token[0].isupper() and not token[0].isdigit():
        return FRAGMENT
    return TYPE_OF.get(word.lower(), CONTENT)


def entropy_of(counts):
    """Shannon entropy, in bits, of a pool with these counts; None of an empty one."""
    bits, total = 0.0, sum(counts)
    for count, types in Counter(counts).items():
        share = count / total
        bits -= types * (share * float(np.log2(share)))
    return bits if total else None


def pool_facts(pool):
    """pool: {text of a token: how often it is a pivot or in an important place} -> its numbers.

    The paper's neuron entropy and token diversity, and the share of each of TYPES.
    """
    total = pool.total()
    kinds = Counter()
    for token, count in pool.items():
        kinds[token_type(token)] += count
    return {"entropy": entropy_of(pool.values()), "diversity": len(pool), "pool_size": total,
            "types": {kind: kinds[kind] / total if total else None for kind in TYPES}}


def mean(values):
    return float(np.mean(values)) if values else None


def graph_facts(neurons):
    """The numbers of a layer, or of a model, from its entries of n2g_neurons.json."""
    with_graph = [entry for entry in neurons if entry["graph"]]
    facts = {"neurons": len(neurons), "non_empty": len(with_graph)}
    for name in METRICS:
        facts[f"{name}_mean_all"] = mean([entry[name] or 0 for entry in neurons])
        facts[f"{name}_mean_non_empty"] = mean([entry[name] for entry in with_graph])
    nodes = sum(len(entry["graph"]["nodes"]) for entry in with_graph)
    edges = sum(len(entry["graph"]["edges"]) for entry in with_graph)
    facts["out_degree_pooled"] = edges / nodes if nodes else None
    for name in ("precision", "recall", "f1"):
        facts[name] = mean([entry[name] for entry in neurons if entry[name] is not None])
    return facts


# --------------------------------------------------------------------------------------- one run


class Moments(NamedTuple):
    """The strongest activations of a layer's neurons. The 1st, 3rd, 5th, ... make the graphs."""

    layer: int
    values: torch.Tensor  # (U, K), largest first
    positions: torch.Tensor  # (U, K) in the training text
    held_out: list  # for each neuron the Snippets of the 2nd, 4th, ...


def groups_of(sites):
    """Lists of Sites to read in one pass, as many layers as SCANNED allows."""
    together = max(1, SCANNED // (TOKENS * sites[0].d))
    return [sites[first : first + together] for first in range(0, len(sites), together)]


def strongest(activate, text, count, title=None):
    """The `count` strongest activations of each neuron: values and positions, each (U, K)."""
    best = Strongest(count)
    for x, positions, stories in text.read(activate, title):
        best.add(x, positions, stories)
    return best.found()


def story_until(text, position):
    """Up to text.context tokens of one story that end at this position."""
    start = max(0, position + 1 - text.context)
    low, high = text.piece(position, start, text.context, 0)
    return text.tokens[low:high].tolist()


def examples_of(text, moments):
    """The Examples of the 1st, 3rd, ... snippets in which a neuron fires, neuron by neuron."""
    values, positions = moments.values[:, ::2], moments.positions[:, ::2]
    examples = []
    for unit, place in (values > 0).nonzero().tolist():
        tokens = story_until(text, positions[unit, place].item())
        examples.append(Example(unit, values[unit, place].item(), tuple(tokens)))
    return examples


def held_out_of(text, moments, unit):
    """The held-out snippets in which this neuron fires, in the form that judge takes."""
    values, positions = moments.values[unit, 1::2], moments.positions[unit, 1::2]
    pieces = []
    for snippet, value, position in zip(moments.held_out[unit], values, positions.tolist()):
        first = position - snippet.peak  # where the snippet begins
        if value > 0:
            tokens = story_until(text, first)[:-1] + snippet.tokens
            pieces.append((tokens, snippet.values))
    return pieces


def graphs_of_layer(at_pivot, text, moments, substitutes, name, settings):
    """A dict: the layer's entries of n2g_neurons.json, its pool of tokens, and the share of the
    examples that prune kept. name: token -> its text."""
    examples = examples_of(text, moments)
    kept = prune(at_pivot, examples, settings["threshold"])
    weigh(at_pivot, kept, settings["importance"])
    augment(at_pivot, kept, substitutes, settings["threshold"])

    of_units, pool = defaultdict(list), Counter()
    for example in kept:
        of_units[example.unit].append(example)
        pool.update(map(name, example.pool()))
    neurons = []
    for unit, peak in enumerate(moments.values[:, 0].tolist()):
        graph = graph_of(of_units[unit], name, settings["self_loops"])
        neurons.append({
            "layer": moments.layer, "neuron": unit, "peak": peak,
            "graph": nx.node_link_data(graph, edges="edges") if of_units[unit] else None,
            **judge(Trie(of_units[unit]), peak, held_out_of(text, moments, unit)),
            **metrics(graph)})
    return {"neurons": neurons, "pool": dict(pool.most_common()),
            "pruned": len(kept) / len(examples) if examples else None}


def measure(result, title, device):
    """The graphs of all neurons of a run: writes them and a picture. -> the facts of n2g.json."""
    run, settings = result.run, result.key["settings"]
    model, tokenizer = run.model.to(device), load_tokenizer(run.tokenizer)
    eot, T = tokenizer.eot_token, model.config.block_size
    tokens = load_tokens(run.folder, "train")[: settings["tokens"]]
    # every counted token has at least this much context: as much as prune can keep
    text = Text(tokens, eot, T, device, context=min(LENGTHS[-1], T // 2))
    if settings["substitutes"] == "ngram":
        substitutes = Ngrams(tokens, eot)
    else:
        substitutes = FillMask(settings["substitutes"], tokenizer, device)
    name = cache(partial(token_text, tokenizer))

    state = result.state or {"moments": [], "layers": {}}
    layers = state["layers"]  # {layer: JSON of its graphs}: torch.load is slow with long lists
    sites = [Site(model, layer, "mlp_act") for layer in settings["layer"]]
    for number, group in enumerate(groups_of(sites)):
        activate = partial(read_sites, group)
        if number == len(state["moments"]):
            count = settings["snippets"]
            state["moments"].append(strongest(activate, text, count, f"{title}: snippets"))
            result.save(state)
        if group[-1].layer in layers:
            continue
        values, positions = state["moments"][number]  # (U, K), U of all layers of the group
        held_out = text.snippets(activate, positions[:, 1::2], text.context, text.context - 1,
                                 f"{title}: held-out snippets")
        for place, site in enumerate(group):
            if site.layer in layers:
                continue
            units = slice(place * site.d, (place + 1) * site.d)
            moments = Moments(site.layer, values[units], positions[units], held_out[units])
            at_pivot = AtPivot(site.read, eot, device, f"{title}: layer {site.layer}")
            found = graphs_of_layer(at_pivot, text, moments, substitutes, name, settings)
            layers[site.layer] = json.dumps(found)
            result.save(state)

    facts, neurons = summarize({layer: json.loads(found) for layer, found in layers.items()})
    result.write("_neurons.json", neurons=neurons)
    draw_layers(result.path(".png"), table([{"run": run.path, **facts}]))
    return facts


def summarize(layers):
    """{layer: what graphs_of_layer found} -> the facts of n2g.json, and the entries of all."""
    rows, neurons, pools = [], [], Counter()
    for layer, found in layers.items():
        pool = Counter(found["pool"])
        rows.append({"layer": layer, "pruned": found["pruned"], **graph_facts(found["neurons"]),
                     **pool_facts(pool), "pool": found["pool"]})
        neurons += found["neurons"]
        pools += pool
    return {"layers": rows, "all": graph_facts(neurons) | pool_facts(pools)}, neurons


# ----------------------------------------------------------------------------- tables and pictures

GRAPHS = {  # columns of the tables: entry of a row, its format
    "run": "", "layer": "", "neurons": ",", "with_graph": ".1%",
    "density": ".3f", "transitivity": ".3f", "edges_to_activating": ".2f",
    "edges_per_activating_node": ".2f", "out_degree": ".3f", "out_degree_pooled": ".3f"}
POOLS = {
    "run": "", "layer": "", "entropy": ".2f", "diversity": ",", "pool_size": ",",
    "precision": ".3f", "recall": ".3f", "f1": ".3f"}
PANELS = {  # of the picture: entry of a row, title
    "density": "density", "transitivity": "transitivity",
    "edges_to_activating": "edges into activating nodes", "out_degree": "out-degree",
    "entropy": "entropy of the token pool, bits", "diversity": "different tokens in the pool",
    "f1": "F1 on held-out snippets", "with_graph": "share of neurons with a graph"}


def table(results):
    """A DataFrame: for all layers together and then for each layer, a row for every run.

    Metrics are means over the neurons with a graph.
    """
    of_runs = [[{"layer": "all", **facts["all"]}, *facts["layers"]] for facts in results]
    rows = []
    for together in zip(*of_runs):
        for facts, row in zip(results, together):
            means = {name: row[f"{name}_mean_non_empty"] for name in METRICS}
            share = row["non_empty"] / row["neurons"]
            rows.append({**row, **means, **row["types"], "run": facts["run"], "with_graph": share})
    return pd.DataFrame(rows)


def print_results(frame, settings):
    print_table(frame, GRAPHS)
    loops = "with" if settings["self_loops"] else "without"
    print(f"means over the neurons with a graph, {loops} self-loops; out_degree_pooled: all edges "
          f"/ all nodes\n")
    print_table(frame, POOLS)
    print("entropy in bits, diversity in different tokens, of the pool_size tokens that are pivots "
          "or in important places\nprecision, recall, f1: means over the neurons that have one, at "
          "half of the maximum, on held-out snippets\n")
    print_table(frame[frame["layer"] == "all"], {"run": "", **dict.fromkeys(TYPES, ".1%")})
    print(f"types of these tokens; substitutes: {settings['substitutes']}")


def draw_layers(path, frame):
    """Each of PANELS by layer, one line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    frame = frame[frame["layer"] != "all"]
    for run, rows in frame.groupby("run", sort=False):
        for axes, name in zip(panels, PANELS):
            axes.plot(rows["layer"].tolist(), rows[name].astype(float), marker="o", markersize=3,
                      label=plain(run))
    for axes, title in zip(panels, PANELS.values()):
        axes.set(title=title, xlabel="layer", xticks=frame["layer"].unique().tolist())
        axes.grid(alpha=0.3)
    figure.suptitle("neuron graphs, means over the neurons with a graph")
    figure.legend(handles=panels[0].lines[:6], loc="outside lower center", frameon=False)
    save_figure(path, figure)


# ---------------------------------------------------------------------------- the command line


def fraction(text):
    """For argparse: a number above 0, at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def main():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--tokens", type=knobs.positive, default=1_000_000,
        help="how many training tokens to search for snippets, from the start (1000000)")
    add("--layer", type=list_of(int), help="from 0, separated by commas (default: all)")
    add("--snippets", type=knobs.positive, default=20,
        help="per neuron, half of them held out (20)")
    add("--threshold", type=fraction, default=0.5,
        help="share of the activation that prune and augment must keep (0.5)")
    add("--importance", type=fraction, default=0.5, help="smallest of important tokens (0.5)")
    add("--substitutes", default="ngram", metavar="NAME",
        help="ngram: tokens seen between the same neighbours (default); or a masked language model "
             "of transformers, a folder or a name on the hub (the paper: distilbert-base-uncased)")
    add("--self_loops", action="store_true", help="keep edges from a token to itself")
    add("--plot", type=knobs.picture, metavar="FILE", help="one picture of all these runs")
    add("--force", action="store_true",
        help="measure again, and replace results of other settings or weights")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    names = ("tokens", "snippets", "threshold", "importance", "substitutes", "self_loops")
    settings = {name: getattr(args, name) for name in names}
    results = []
    for run in open_runs(args.runs, args.data):
        layers = sorted(args.layer or range(run.model.config.n_layer))
        of_run = {"data": run.meta["checksum"], "layer": layers, **settings}
        results.append(Result(run, "n2g", of_run, args.force, ["_neurons.json", ".png"]))
    frame = table(measure_all(results, partial(measure, device=device), device))
    print_results(frame, settings)
    if args.plot:
        draw_layers(args.plot, frame)


if __name__ == "__main__":
    knobs.cli(main)
