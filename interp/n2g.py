"""Neuron2Graph: what makes each neuron of the clean stream fire, as a small graph (Table 2).

    python interp/n2g.py out/baseline out/local_k2          all neurons; tables side by side
    python interp/n2g.py out/local_k2 --draw 3.17,5.2       also draw two graphs: block.neuron
    python interp/n2g.py out/* --plot graphs.png            each metric by layer, a line a run
    python interp/n2g.py out/local_k2 --substitutes distilbert --fill_mask models/distilbert

A neuron is a unit of an MLP after its activation function. For each of them (Foote et al. 2023):
    snippets    its 20 strongest moments in training text, one a story, from strong to weak: the
                1st, 3rd, 5th, ... to fit and the others to hold out, so that both are as strong
    prune       the shortest end of the text up to that token, the pivot, that alone, behind an
                end-of-text, keeps half of the activation
    importance  1 - a(pivot | token masked) / a(pivot) of each token; from 0.5 on it is important
    augment     up to 5 other tokens in place of each important one, if half of a(pivot) stays
    graph       important tokens -> ... -> pivot, tokens of one name as one node; and a trie, which
                predicts in the snippets held out where the neuron reaches half of its maximum
The pivot itself is neither judged important nor replaced.

Writes into the run folder n2g.json (every metric by layer), n2g_neurons.json (every graph) and
n2g.png. What is there already with the same settings is not made again. Nothing here is random.
Ctrl-C and SIGTERM save and leave; the same command again goes on behind the last block done.

Means are over the neurons with a graph, and over all neurons, where one without a graph counts 0:
the paper does not say which. Its graphs have self-loops (--self_loops): a token that needs no
context points to itself. Entropy and diversity grow with the size of a pool, so of several models
they are printed for equally many tokens drawn from each pool (their exact expectation).
Density, too, depends on size: graphs of few nodes are dense. So it tells models apart only beside
the share of neurons with a graph and the out-degree. Precision, recall and F1 are of text around
strong moments: in any text, where a neuron is mostly silent, precision is lower. Their means are
over the neurons that have one; where a trie predicts nothing, recall and F1 are 0 and there is no
precision.

Shape letters: B prompts or windows of T tokens, U neurons of a block, K snippets of each.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts interp/ there
import config as knobs
from eval import find_data, open_run, run_paths
from interp.common import (
    check_picture, check_range, check_writable, column, parse_list, print_table, run_parser,
    save_figure)
from interp.activations import TOKENS, Site, Stopped, Strongest, Text, check_stop, read_sites
from interp.results import MAYBE, NUMBER, Job, fits, read_neurons, results_of
from prepare import EOT, UserError, load_tokenizer, load_tokens

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of the ends of a snippet that prune tries, in tokens
REACH = LENGTHS[-1]
SUBSTITUTES = 5  # tried in place of an important token
SCANNED = 2**26  # activations in memory at a time when all neurons look for their snippets
IGNORE, END = -1, -2  # in a trie, beside tokens: any token; a path ends here


# ------------------------------------------------------------------------------- reading prompts


def batches_by_length(prompts):
    """Lists of different prompts of one length, some TOKENS tokens each: none needs padding."""
    groups = defaultdict(list)
    for prompt in dict.fromkeys(prompts):
        groups[len(prompt)].append(prompt)
    for length, group in groups.items():
        step = max(1, TOKENS // length)
        for first in range(0, len(group), step):
            yield group[first : first + step]


class AtPivot:
    """The neurons of a block at the last token of prompts, each behind an end-of-text.

    activate: idx (B, T) -> (B, T, U), such as Site.read.
    """

    def __init__(self, activate, eot, device, stop=None, title=None):
        self.activate, self.eot, self.device = activate, eot, device
        self.stop, self.title = stop, title

    def __call__(self, prompts, units):
        """prompts: n tuples of tokens; units: n neurons -> their activations (n)."""
        units, values = np.array(units, dtype=np.int64), np.zeros(len(units))
        asked = defaultdict(list)  # prompt: the places in units that ask for it
        for place, prompt in enumerate(prompts):
            asked[(self.eot, *prompt)].append(place)
        with tqdm(total=len(asked), desc=self.title, unit=" prompts", unit_scale=True, leave=False,
                  disable=self.title is None) as bar:
            for batch in batches_by_length(asked):
                check_stop(self.stop)
                idx = torch.tensor(batch, device=self.device)  # (B, T)
                x = self.activate(idx)[:, -1].cpu().double().numpy()  # (B, U)
                rows = np.repeat(np.arange(len(batch)), [len(asked[prompt]) for prompt in batch])
                places = np.concatenate([asked[prompt] for prompt in batch])
                values[places] = x[rows, units[places]]
                bar.update(len(batch))
        return values


# ----------------------------------------------------------------------------------- substitutes

# Each source takes queries, (tokens of a text, a place in it), and gives for each the tokens that
# could stand there instead, the likeliest first.


def without(candidates, token, eot):
    """The first SUBSTITUTES of them that are others than this token and no end-of-text."""
    others = [candidate for candidate in candidates if candidate not in (token, eot)]
    return others[:SUBSTITUTES]


def no_substitutes(queries):
    return [[] for _ in queries]


class Ngrams:
    """Tokens that a corpus has between the same two neighbours, then those after the left one.

    The more frequent ones first, of equals those of lower number.
    """

    def __init__(self, tokens, eot):
        stream = np.concatenate(([eot], tokens)).astype(np.int64)
        self.eot = eot
        self.between = ranked(stream[:-2] << 16 | stream[2:], stream[1:-1])  # tokens are uint16
        self.after = ranked(stream[:-1], stream[1:])

    def __call__(self, queries):
        return [self.look_up(text, place) for text, place in queries]

    def look_up(self, text, place):
        """The tokens for this place of a text, which is not its last one."""
        left = text[place - 1] if place else self.eot
        found = [*self.most(self.between, left << 16 | text[place + 1]),
                 *self.most(self.after, left)]
        return without(dict.fromkeys(found), text[place], self.eot)

    def most(self, table, key):
        """As many as could be needed: up to SUBSTITUTES may be known from the other table, and two
        are not wanted."""
        keys, tokens = table
        low, high = np.searchsorted(keys, (key, key + 1))
        return tokens[low : min(high, low + 2 * SUBSTITUTES + 2)].tolist()


def ranked(keys, tokens):
    """Pairs of a key and a token, each once, by key and then from frequent to rare: two arrays."""
    pairs, counts = np.unique(keys << 16 | tokens, return_counts=True)
    order = np.lexsort((pairs, -counts, pairs >> 16))
    return pairs[order] >> 16, pairs[order] & 0xFFFF


class NextTokens:
    """The tokens that a model itself expects there, from those before in its clean stream."""

    def __init__(self, model, eot, device, stop=None):
        self.model, self.eot, self.device, self.stop = model, eot, device, stop

    @torch.no_grad()
    def __call__(self, queries):
        contexts = [(self.eot, *text[:place]) for text, place in queries]
        likeliest = {}
        for batch in batches_by_length(contexts):
            check_stop(self.stop)
            hidden, _, _ = self.model.clean_pass(torch.tensor(batch, device=self.device))
            for part in range(0, len(batch), 1024):  # of GPT-2's vocabulary: 206 MB of logits
                logits = self.model.lm_head(hidden[part : part + 1024, -1])  # (B, V)
                best = logits.topk(min(SUBSTITUTES + 2, logits.size(-1))).indices.tolist()
                likeliest.update(zip(batch[part : part + 1024], best))
        return [without(likeliest[context], text[place], self.eot)
                for context, (text, place) in zip(contexts, queries)]


class FillMask:
    """What a masked language model of transformers, such as DistilBERT, puts there (the paper's).

    name: a local folder or a name on the Hugging Face hub. Its words become tokens of ours, those
    that are single ones, with the leading space and the capital of the token that they replace.
    Raises UserError where it cannot be had.
    """

    def __init__(self, name, tokenizer, device):
        try:
            import transformers
            self.words = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModelForMaskedLM.from_pretrained(name).to(device).eval()
        except ImportError:
            raise UserError("--substitutes=distilbert needs a library: "
                            "pip install transformers") from None
        except Exception as error:  # no network, no such folder, a damaged file: one advice
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--fill_mask={name} cannot be loaded, give a folder or a name on the "
                            f"hub that has a masked language model: {reason}") from None
        self.tokenizer, self.device = tokenizer, device
        self.stop = None
        self.kept = {}  # (text, place): its tokens; blocks ask alike

    @torch.no_grad()
    def __call__(self, queries, batch_size=64, considered=50):
        """batch_size texts at a time; considered: how many of its words are looked at."""
        asked = [query for query in dict.fromkeys(queries) if query not in self.kept]
        for first in range(0, len(asked), batch_size):
            check_stop(self.stop)
            batch = asked[first : first + batch_size]
            inputs = self.words([self.masked(*query) for query in batch], padding=True,
                                truncation=True, return_tensors="pt").to(self.device)
            logits = self.model(**inputs).logits  # (B, T, words)
            at_mask = logits[inputs["input_ids"] == self.words.mask_token_id]  # (B, words)
            best = at_mask.topk(min(considered, at_mask.size(-1))).indices.tolist()
            for (text, place), words in zip(batch, best):
                self.kept[text, place] = self.as_tokens(words, text[place])
        return [self.kept[query] for query in queries]

    def masked(self, text, place):
        """The text with a mask in this place."""
        before, after = list(text[:place]), list(text[place + 1 :])
        decode = self.tokenizer.decode
        return f"{decode(before)} {self.words.mask_token}{decode(after)}"

    def as_tokens(self, words, token):
        """Words, by number, as our tokens, for the place of this one."""
        original = self.tokenizer.decode([token])
        space = " " if original.startswith(" ") else ""
        found = []
        for word in self.words.convert_ids_to_tokens(words):
            if word in self.words.all_special_tokens:
                continue
            inside = word.startswith("##")  # a piece that goes on a word
            text = word.removeprefix("##")
            if original.strip().istitle():
                text = text.capitalize()
            tokens = self.tokenizer.encode_ordinary(text if inside else space + text)
            if len(tokens) == 1:
                found += tokens
        return without(dict.fromkeys(found), token, self.tokenizer.eot_token)


# ---------------------------------------------------------------------- what makes a neuron fire


@dataclass
class Example:
    """A strong moment of a neuron, and which of the tokens before it matter."""

    unit: int
    value: float  # the activation in the text
    text: tuple  # up to REACH tokens of the story, the last one is the pivot
    prompt: tuple = ()  # the end of it that prune keeps; () where none keeps enough
    base: float = 0.0  # the activation of that alone
    importance: list = field(default_factory=list)  # of each token of the prompt
    important: list = field(default_factory=list)  # places in the prompt, rising, no pivot
    fillers: list = field(default_factory=list)  # (place, token) that do as well

    def filled(self, place, token):
        """The prompt with this token in this place."""
        return (*self.prompt[:place], token, *self.prompt[place + 1 :])

    def variants(self):
        """The prompt, and with each one of its fillers."""
        return [self.prompt, *(self.filled(*filler) for filler in self.fillers)]

    def pool(self):
        """The pivot and the tokens in important places."""
        fillers = [token for _, token in self.fillers]
        return [self.prompt[-1], *(self.prompt[place] for place in self.important), *fillers]


def prune(at_pivot, examples, threshold):
    """Sets prompt and base: the shortest end of the text that keeps threshold of the activation,
    lengths as in LENGTHS or the whole text. -> the examples in which one does."""
    waiting = examples
    for length in LENGTHS:
        ends = [one.text[-length:] for one in waiting]
        values = at_pivot(ends, [one.unit for one in waiting])
        for one, end, value in zip(waiting, ends, values):
            if value >= threshold * one.value:
                one.prompt, one.base = end, float(value)
        waiting = [one for one in waiting if not one.prompt and len(one.text) > length]
    return [one for one in examples if one.prompt]


def weigh(at_pivot, examples, mask, level):
    """Sets importance, 1 - a(pivot | token masked) / a(pivot), and which places are important."""
    masked, units = [], []
    for one in examples:
        masked += [one.filled(place, mask) for place in range(len(one.prompt))]
        units += [one.unit] * len(one.prompt)
    values = iter(at_pivot(masked, units))
    for one in examples:
        one.importance = [1 - float(next(values)) / one.base for _ in one.prompt]
        context = one.importance[:-1]
        one.important = [place for place, share in enumerate(context) if share >= level]


def augment(at_pivot, examples, substitutes, threshold):
    """Sets fillers: substitutes of important tokens with which threshold of the activation stays.

    substitutes: queries -> for each its tokens.
    """
    places = [(one, place) for one in examples for place in one.important]
    skipped = [len(one.text) - len(one.prompt) for one, _ in places]  # of the text, before prompts
    queries = [(one.text, skip + place) for (one, place), skip in zip(places, skipped)]
    tried = []
    for (one, place), tokens in zip(places, substitutes(queries)):
        tried += [(one, place, token) for token in tokens]
    prompts = [one.filled(place, token) for one, place, token in tried]
    values = at_pivot(prompts, [one.unit for one, _, _ in tried])
    for (one, place, token), value in zip(tried, values):
        if value >= threshold * one.base:
            one.fillers.append((place, token))


# -------------------------------------------------------------------------------- the prediction


def path_of(prompt, important):
    """The tokens from the pivot backwards to the first important one, IGNORE for unimportant."""
    path = [prompt[-1]]
    first = important[0] if important else len(prompt)
    for place in range(len(prompt) - 2, first - 1, -1):
        path.append(prompt[place] if place in important else IGNORE)
    return path


class Trie:
    """Paths of tokens, each with the activation that it stands for."""

    def __init__(self):
        self.root = {}

    def add(self, path, value):
        node = self.root
        for token in path:
            node = node.setdefault(token, {})
        node[END] = max(value, node.get(END, value))

    def predict(self, tokens, place, node=None):
        """The largest activation of the paths that tokens end with at this place; 0 without one."""
        node = self.root if node is None else node
        best = node.get(END, 0.0)
        if place < 0:
            return best
        for token in (tokens[place], IGNORE):
            if token in node:
                best = max(best, self.predict(tokens, place - 1, node[token]))
        return best


def trie_of(examples):
    """All variants of a neuron's examples."""
    trie = Trie()
    for one in examples:
        for prompt in one.variants():
            trie.add(path_of(prompt, one.important), one.value)
    return trie


def judge(trie, peak, held_out):
    """How well a trie tells where the neuron reaches half of its peak: -> precision, recall, F1.

    held_out: (tokens, values) of pieces of text, with a value for each of the last tokens; the
    others are context. None where nothing is predicted, or is there to be found.
    """
    bar, both, predicted, actual = peak / 2, 0, 0, 0
    for tokens, values in held_out:
        for place, value in enumerate(values, len(tokens) - len(values)):
            fires = value >= bar
            told = tokens[place] in trie.root and trie.predict(tokens, place) >= bar
            both += fires and told
            predicted += told
            actual += fires
    return {"precision": both / predicted if predicted else None,
            "recall": both / actual if actual else None,
            "f1": 2 * both / (predicted + actual) if predicted + actual else None}


# -------------------------------------------------------------------------------------- the graph


def graph_of(examples, name, self_loops=False):
    """nx.DiGraph: important tokens -> ... -> pivot of all variants. name: token -> its string.

    Nodes: activating, whether it is ever a pivot, and its largest importance; a filler has that of
    the token whose place it takes. self_loops: with a pivot that needs no context pointing to
    itself, and with tokens that follow themselves.
    """
    graph = nx.DiGraph()
    for one in examples:
        places = [*one.important, len(one.prompt) - 1]
        for prompt in one.variants():
            nodes = [name(prompt[place]) for place in places]
            for node, place in zip(nodes, places):
                known = graph.nodes.get(node, {"importance": one.importance[place]})
                graph.add_node(node, importance=max(known["importance"], one.importance[place]))
                graph.nodes[node].setdefault("activating", False)
            graph.nodes[nodes[-1]]["activating"] = True
            edges = list(zip(nodes, nodes[1:])) or [(nodes[0], nodes[0])]
            graph.add_edges_from(edge for edge in edges if self_loops or edge[0] != edge[1])
    return graph


METRICS = ("density", "transitivity", "edges_to_activating", "edges_per_activating_node",
           "out_degree")


def metrics(graph):
    """{name: number} of a graph: METRICS, None where there is no node to divide by.

    density m / (n (n - 1)) of n nodes and m edges; transitivity 3 triangles / triads, undirected;
    edges into activating nodes, all of them and per such node; out-degree m / n.
    """
    n, m = graph.number_of_nodes(), graph.number_of_edges()
    activating = [node for node, is_pivot in graph.nodes(data="activating") if is_pivot]
    edges = sum(degree for _, degree in graph.in_degree(activating))
    return {"density": float(nx.density(graph)),
            "transitivity": float(nx.transitivity(graph.to_undirected())),
            "edges_to_activating": edges,
            "edges_per_activating_node": edges / len(activating) if activating else None,
            "out_degree": m / n if n else None}


# ------------------------------------------------------------------------------ a layer's numbers

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
    """Which of TYPES a token's string is. A word that goes on is one without a leading space and
    in small letters; words that can be several things are what they mostly are."""
    word = token.strip()
    if token == EOT or not any(letter.isalnum() for letter in word):
        return PUNCTUATION
    if word.startswith("'"):
        return TYPE_OF.get(word.lower(), FRAGMENT)
    if token[0] != " " and not token[0].isupper() and not token[0].isdigit():
        return FRAGMENT
    return TYPE_OF.get(word.lower(), CONTENT)


def subsampled(counts, size):
    """The expected entropy, in bits, and number of types of `size` tokens drawn without putting
    back from a pool with these counts (of diversity: Hurlbert 1971, rarefaction). Exact.

    k of a type's c tokens are drawn with the hypergeometric probability
    C(c, k) C(N - c, size - k) / C(N, size); entropy is the mean of -sum k/size log2 k/size.
    """
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


def mean(values):
    """None where there are none."""
    return float(np.mean(values)) if values else None


def pool_facts(pool):
    """pool: {token string: how often it is a pivot or in an important place} -> its numbers."""
    total = sum(pool.values())
    kinds = Counter()
    for token, count in pool.items():
        kinds[token_type(token)] += count
    entropy, diversity = subsampled(list(pool.values()), total) if total else (None, 0)
    return {"entropy": entropy, "diversity": diversity, "pool_size": total,
            "types": {kind: kinds[kind] / total if total else None for kind in TYPES}}


def graph_facts(neurons):
    """The numbers of a layer, or of a model, from its entries of n2g_neurons.json."""
    drawn = [one for one in neurons if one["graph"]]
    facts = {"neurons": len(neurons), "non_empty": len(drawn)}
    for name in METRICS:
        facts[f"{name}_mean_all"] = mean([one[name] or 0 for one in neurons])
        facts[f"{name}_mean_non_empty"] = mean([one[name] for one in drawn])
    nodes = sum(len(one["graph"]["nodes"]) for one in drawn)
    edges = sum(len(one["graph"]["edges"]) for one in drawn)
    facts["out_degree_pooled"] = edges / nodes if nodes else None
    for name in ("precision", "recall", "f1"):
        facts[name] = mean([one[name] for one in neurons if one[name] is not None])
    return facts


# ---------------------------------------------------------------------------------------- one run


class Inputs(NamedTuple):
    """What the job of a run reads."""

    tokens: np.ndarray  # training text
    tokenizer: object
    mask: int  # the token that masks
    substitutes: str
    fill_mask: FillMask | None


def token_name(tokenizer, token):
    """A token as a string: bytes that are no UTF-8 by their number, so that names differ."""
    return tokenizer.decode_single_token_bytes(token).decode(errors="backslashreplace")


def text_of(job, device):
    """The training text for all neurons to look for their snippets."""
    tokens, T = job.inputs.tokens, job.run.model.config.block_size
    if T < 2:
        raise UserError(f"{job.run.path} sees one token: no context can make its neurons fire")
    # every token that counts has so many before it in its window: what prune can keep, at most
    return Text(tokens, job.inputs.tokenizer.eot_token, T, device, context=min(REACH, T // 2))


class Moments(NamedTuple):
    """The strongest moments of a block's neurons: every other one, from the first on, is to fit."""

    values: torch.Tensor  # (U, K), the activations, largest first
    positions: torch.Tensor  # (U, K), where in the text
    held_out: list  # for each neuron the Snippets around its other moments


def groups_of(sites):
    """Lists of Sites to read in one pass: as many blocks as SCANNED allows."""
    widest = max((site.d for site in sites), default=1)
    together = max(1, SCANNED // (TOKENS * widest))
    return [sites[first : first + together] for first in range(0, len(sites), together)]


def strongest(sites, text, count, stop=None, title=None):
    """The strongest moments of the neurons of L blocks: -> values and positions (L, U, K), CPU."""
    found = []
    for group in groups_of(sites):
        best = Strongest(count)
        for x, positions, stories in text.read(partial(read_sites, group), stop, title):
            best.add(x, positions, stories)
        found.append(best.found())
    values, positions = (torch.cat(parts) for parts in zip(*found))  # (L * U, K)
    form = (len(sites), sites[0].d)
    return values.unflatten(0, form), positions.unflatten(0, form)


def moments_of(sites, text, values, positions, stop=None, title=None):
    """Yields the Moments of these blocks one by one. values, positions: what strongest found."""
    done = 0
    for group in groups_of(sites):
        places = positions[done : done + len(group)]  # (blocks, U, K)
        held_out = places[:, :, 1::2].flatten(0, 1)  # (blocks * U, K)
        snippets = text.snippets(partial(read_sites, group), held_out, text.context,
                                 text.context - 1, stop, title)
        for site, of_block in zip(group, places):
            yield Moments(values[done], of_block, snippets[: site.d])
            snippets = snippets[site.d :]
            done += 1


def examples_of(text, unit, values, positions):
    """The Examples of a neuron, where it fires at all: of lists of activations and positions."""
    examples = []
    for value, position in zip(values, positions):
        if value > 0:
            tokens = tokens_before(text, position + 1)
            examples.append(Example(unit, value, tuple(tokens)))
    return examples


def tokens_before(text, position):
    """Up to text.context tokens before this position, of the story that the last one is of."""
    last = position - 1
    low, high = text.piece(last, max(0, position - text.context), text.context, 0)
    return text.tokens[low:high].tolist()


def piece_of(text, snippet, position):
    """(tokens, values) of a Snippet around this position, as judge takes them: before its tokens
    come those before it in its story."""
    first = position - snippet.peak  # where the snippet begins
    return tokens_before(text, first + 1)[:-1] + snippet.tokens, snippet.values


def graphs_of_layer(job, site, text, moments, substitutes, stop=None, title=None):
    """The neurons of a block, from their Moments: -> a dict of their entries in n2g_neurons.json,
    the pool of their tokens, and which share of the snippets to fit prune kept."""
    settings, inputs = job.settings, job.inputs
    values, positions = moments.values, moments.positions.tolist()
    at_pivot = AtPivot(site.read, inputs.tokenizer.eot_token, text.device, stop, title)
    units = []  # the examples of each neuron
    for unit, places in enumerate(positions):
        units.append(examples_of(text, unit, values[unit, ::2].tolist(), places[::2]))
    examples = list(chain.from_iterable(units))
    kept = prune(at_pivot, examples, settings["threshold"])
    weigh(at_pivot, kept, inputs.mask, settings["importance"])
    augment(at_pivot, kept, substitutes, settings["threshold"])

    name = cache(partial(token_name, inputs.tokenizer))
    neurons, pool = [], Counter()
    for unit, (examples_of_unit, snippets) in enumerate(zip(units, moments.held_out)):
        fitted = [one for one in examples_of_unit if one.prompt]
        for one in fitted:
            pool.update(map(name, one.pool()))
        held_out = []
        for snippet, place, value in zip(snippets, positions[unit][1::2], values[unit, 1::2]):
            if value > 0:
                held_out.append(piece_of(text, snippet, place))
        peak = values[unit, 0].item()
        graph = graph_of(fitted, name, settings["self_loops"])
        entry = {"layer": site.layer, "neuron": unit, "peak": peak,
                 "graph": nx.node_link_data(graph, edges="edges") if fitted else None}
        neurons.append(entry | judge(trie_of(fitted), peak, held_out) | metrics(graph))
    return {"neurons": neurons, "pool": dict(pool.most_common()),
            "pruned": len(kept) / len(examples) if examples else None}


def find_graphs(job, title, device, stop):
    """All graphs of one run, or the rest of them -> its facts. Raises Stopped."""
    settings, model = job.settings, job.run.model.to(device)
    sites = [Site(model, layer, "mlp_act") for layer in settings["layer"]]
    text = text_of(job, device)
    state, began = job.state, time.time()
    if state is None:
        values, positions = strongest(
            sites, text, settings["snippets"], stop, f"{title}: strongest moments")
        state = {"values": values, "positions": positions, "layers": [], "seconds": 0.0}
    spent = state["seconds"]

    def save():
        state["seconds"] = spent + time.time() - began
        job.save(state)

    if not state["layers"]:
        save()
    substitutes = source_of(job, device, stop)
    done = len(state["layers"])
    rest = moments_of(sites[done:], text, state["values"][done:], state["positions"][done:], stop,
                      f"{title}: what is held out")
    for site, moments in zip(sites[done:], rest):
        found = graphs_of_layer(
            job, site, text, moments, substitutes, stop, f"{title}: block {site.layer}")
        state["layers"].append(json.dumps(found))  # a text: torch reads long lists slowly
        save()
    found = [json.loads(layer) for layer in state["layers"]]
    facts = all_facts(settings["layer"], found) | {"seconds": spent + time.time() - began}
    neurons = [one for layer in found for one in layer["neurons"]]
    job.save_neurons(neurons)
    draw_layers(job.path(".png"), [{"run": str(job.run.path), **facts}])
    return facts


def source_of(job, device, stop):
    """Where substitutes for a run come from."""
    inputs = job.inputs
    eot = inputs.tokenizer.eot_token
    if inputs.substitutes == "ngram":
        return Ngrams(inputs.tokens, eot)
    if inputs.substitutes == "lm":
        return NextTokens(job.run.model, eot, device, stop)
    if inputs.substitutes == "none":
        return no_substitutes
    inputs.fill_mask.stop = stop
    return inputs.fill_mask


def all_facts(layers, found):
    """The facts of n2g.json from what graphs_of_layer found in these layers."""
    rows, neurons, pool = [], [], Counter()
    for layer, one in zip(layers, found):
        head = {"layer": layer, "pruned": one["pruned"]}
        rows.append(head | graph_facts(one["neurons"]) | pool_facts(one["pool"])
                    | {"pool": one["pool"]})
        neurons += one["neurons"]
        pool.update(one["pool"])
    return {"layers": rows, "all": graph_facts(neurons) | pool_facts(pool)}


# --------------------------------------------------------------------------- results and pictures

FACTS = {"neurons": int, "non_empty": int, "precision": MAYBE, "recall": MAYBE, "f1": MAYBE,
         "entropy": MAYBE, "diversity": NUMBER, "types": dict, "out_degree_pooled": MAYBE}
FACTS |= {f"{name}_mean_{over}": MAYBE for name in METRICS for over in ("all", "non_empty")}
STATE = {"values": torch.Tensor, "positions": torch.Tensor, "layers": list, "seconds": NUMBER}
NEURON = {"layer": int, "neuron": int, "peak": NUMBER, "graph": object}


def is_result(result):
    """Whether a result has the layers that its settings ask for, and what is printed of them."""
    form = {"layers": [{"layer": int, "pool": dict, **FACTS}], "all": FACTS, "seconds": NUMBER}
    if not fits(result, form):
        return False
    return [row["layer"] for row in result["layers"]] == result["settings"]["layer"]


def is_state(state):
    """Whether find_graphs can go on from it."""
    return fits(state, STATE) and fits(state["layers"], [str])


def by_two_means(name, form=".3f"):
    """A column of a metric: its mean over the neurons with a graph, and over all of them."""
    def show(row):
        means = [row.get(f"{name}_mean_non_empty"), row.get(f"{name}_mean_all")]
        return " / ".join("-" if value is None else format(value, form) for value in means)
    return show


def share_with_graph(row):
    return f"{row['non_empty'] / row['neurons']:.1%}"


COLUMNS = [  # heading, how to print it; a column that no row has is left out
    ("run", column("run")),
    ("block", column("layer")),
    ("neurons", column("neurons", ",")),
    ("with a graph", share_with_graph),
    ("density", by_two_means("density")),
    ("transitivity", by_two_means("transitivity")),
    ("edges to activating", by_two_means("edges_to_activating", ".2f")),
    ("per activating node", by_two_means("edges_per_activating_node", ".2f")),
    ("out-degree", by_two_means("out_degree")),
    ("pooled", column("out_degree_pooled", ".3f")),
]
TOKEN_COLUMNS = [
    ("run", column("run")),
    ("block", column("layer")),
    ("entropy", column("entropy", ".2f")),
    ("diversity", column("diversity", ",.0f")),
    ("of tokens", column("pool_size", ",")),
    ("precision", column("precision", ".3f")),
    ("recall", column("recall", ".3f")),
    ("F1", column("f1", ".3f")),
    ("seconds", column("seconds", ".0f")),
]


def share_of(kind):
    """A column: how much of a pool is of this type."""
    def show(row):
        share = row["types"][kind]
        return "-" if share is None else f"{share:.1%}"
    return show


TYPE_COLUMNS = [("run", column("run"))] + [(kind, share_of(kind)) for kind in TYPES]


def equal_pools(rows, pools):
    """Rows with the entropy and diversity of as many tokens of each pool as the smallest has."""
    size = min(sum(pool.values()) for pool in pools)
    if not size:
        return [row | {"entropy": None, "diversity": None, "pool_size": 0} for row in rows]
    equal = []
    for row, pool in zip(rows, pools):
        entropy, diversity = subsampled(list(pool.values()), size)
        equal.append(row | {"entropy": entropy, "diversity": diversity, "pool_size": size})
    return equal


def table_rows(results):
    """A row for every model, and then one for each of its blocks, those of one block together."""
    heads = [{"run": result["run"]} for result in results]
    pools = []
    for result in results:
        pool = Counter()
        for row in result["layers"]:
            pool.update(row["pool"])
        pools.append(pool)
    models = []
    for head, result in zip(heads, results):
        models.append(head | {"layer": "all", "seconds": result["seconds"]} | result["all"])
    rows = equal_pools(models, pools)
    for blocks in zip(*(result["layers"] for result in results)):
        blocks = [head | row for head, row in zip(heads, blocks)]
        rows += equal_pools(blocks, [row["pool"] for row in blocks])
    return rows


def print_results(results):
    rows = table_rows(results)
    print_table(rows, COLUMNS)
    settings = results[0]["settings"]  # of all of them: they have the same
    loops = "with" if settings["self_loops"] else "without"
    print(f"two means: over the neurons with a graph / over all neurons; pooled: all edges / all "
          f"nodes; graphs {loops} self-loops\n")
    print_table(rows, TOKEN_COLUMNS)
    print("entropy in bits, diversity in types, of so many of the tokens that are pivots or in "
          "important places\n"
          "precision, recall, F1: means over neurons, in snippets held out, at half the maximum\n")
    print_table(rows[: len(results)], TYPE_COLUMNS)
    print(f"substitutes: {settings['substitutes']}")


PICTURED = {"density": "density", "transitivity": "transitivity",
            "edges_to_activating": "edges to activating nodes", "out_degree": "out-degree"}
ALONE = {"entropy": "entropy of the pool, bits", "diversity": "token types in the pool",
         "f1": "F1 in snippets held out"}


def draw_layers(path, results):
    """Each metric by block, a colour a run."""
    from matplotlib.figure import Figure  # here, so that --help need not wait for it

    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    blocks = [row["layer"] for row in results[0]["layers"]]
    for number, result in enumerate(results):
        style = {"color": f"C{number % 10}", "marker": "o", "markersize": 3}
        rows = result["layers"]
        for axes, (name, title) in zip(panels, PICTURED.items()):
            line = numbers_of(rows, f"{name}_mean_non_empty")
            axes.plot(blocks, line, label=result["run"], **style)
            axes.plot(blocks, numbers_of(rows, f"{name}_mean_all"), "--", **style)
            axes.set_title(title)
        for axes, (name, title) in zip(panels[len(PICTURED) :], ALONE.items()):
            axes.plot(blocks, numbers_of(rows, name), **style)
            axes.set_title(title)
        panels[-1].plot(blocks, [row["non_empty"] / row["neurons"] for row in rows], **style)
        panels[-1].set_title("share of neurons with a graph")
    for axes in panels:
        axes.set(xlabel="block", xticks=blocks)
        axes.grid(alpha=0.3)
    figure.suptitle("graphs of neurons; solid: over neurons with a graph, dashed: over all")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small", frameon=False)
    save_figure(path, figure)


def numbers_of(rows, name):
    """For a line: not a number where there is none."""
    return [np.nan if row[name] is None else row[name] for row in rows]


def draw_graphs(path, neurons, title):
    """The graphs of these entries of n2g_neurons.json, one below the other, pivots on the right."""
    from matplotlib.figure import Figure

    heights = [1.2 + 0.3 * max(map(len, columns_of(one).values()), default=1) for one in neurons]
    figure = Figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(neurons), squeeze=False, height_ratios=heights)[:, 0]
    for axes, one in zip(panels, neurons):
        draw_graph(axes, one)
    figure.suptitle(title)
    save_figure(path, figure)


def columns_of(neuron):
    """{how many edges to the nearest pivot: these nodes} of a graph; tokens in order."""
    if not neuron["graph"]:
        return {}
    graph = nx.node_link_graph(neuron["graph"], edges="edges")
    pivots = {node for node, is_pivot in graph.nodes(data="activating") if is_pivot}
    steps = nx.multi_source_dijkstra_path_length(graph.reverse(), pivots)
    columns = defaultdict(list)
    for node in sorted(graph, key=lambda node: (-graph.nodes[node]["importance"], node)):
        columns[steps[node]].append(node)
    return columns


def draw_graph(axes, neuron):
    """One graph; pivots are red, and edges point to the right or down a column."""
    spots = {}
    for step, nodes in columns_of(neuron).items():
        for row, node in enumerate(nodes):
            spots[node] = -step, (len(nodes) - 1) / 2 - row
    graph = neuron["graph"] or {"nodes": [], "edges": []}
    for edge in graph["edges"]:
        arrow = {"arrowstyle": "->", "color": "0.6", "shrinkA": 14, "shrinkB": 14}
        axes.annotate("", spots[edge["target"]], spots[edge["source"]], arrowprops=arrow)
    for node in graph["nodes"]:
        color = "tab:red" if node["activating"] else "tab:blue"
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": color}
        shown = node["id"].replace("\n", "↵").replace("$", r"\$").replace(" ", "·")
        axes.text(*spots[node["id"]], shown, ha="center", va="center", fontsize=8, bbox=box)
    xs, ys = zip(*spots.values()) if spots else ((0,), (0,))
    axes.set(xlim=(min(xs) - 0.5, max(xs) + 0.5), ylim=(min(ys) - 1, max(ys) + 1))
    axes.set_axis_off()
    f1 = "-" if neuron["f1"] is None else f"{neuron['f1']:.2f}"
    axes.set_title(f"block {neuron['layer']}, neuron {neuron['neuron']}: "
                   f"up to {neuron['peak']:.2f}, F1 {f1}", loc="left", fontsize="medium")


# ------------------------------------------------------------------------------- the command line


def parse_arguments():
    """The command line. Raises UserError."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--data", help="prepared data to use (default: the run's own)")
    add("--tokens", type=int, default=1_000_000,
        help="training tokens, from the first on, in which snippets are looked for (1000000)")
    add("--layer", help="blocks, from 0, with commas between them (default: all)")
    add("--snippets", type=int, default=20, help="of each neuron, half of them held out (20)")
    add("--threshold", type=float, default=0.5,
        help="prune, augment: the share of the activation to keep (0.5)")
    add("--importance", type=float, default=0.5, help="from which on a token is important (0.5)")
    add("--mask_token", default=EOT, help="what masks a token: another one (end-of-text)")
    add("--substitutes", choices=("ngram", "distilbert", "lm", "none"), default="ngram",
        help="other tokens: seen between the same neighbours, guessed by a masked language model "
             "(the paper), by the model itself, or none (ngram)")
    add("--fill_mask", default="distilbert-base-uncased", metavar="NAME",
        help="distilbert: a folder, or a name on the hub (distilbert-base-uncased)")
    add("--self_loops", action="store_true", help="keep edges from a token to itself")
    add("--draw", metavar="NEURONS",
        help="draw these graphs of each run, such as 3.17,5.2: block.neuron, to n2g_graphs.png")
    add("--plot", metavar="FILE", help="one picture of all these runs (.png, .pdf or .svg)")
    add("--force", action="store_true",
        help="replace results made with other settings or of other weights")
    args = parser.parse_args()
    check_range(args, "tokens", 1)
    check_range(args, "snippets", 2, 1000)
    for name in ("threshold", "importance"):
        check_range(args, name, 0.001, 1)
    if args.substitutes != "distilbert" and args.fill_mask != parser.get_default("fill_mask"):
        raise UserError("--fill_mask has no effect without --substitutes=distilbert: drop it")
    if args.layer is not None:
        args.layer = sorted(parse_list("--layer", args.layer, int))
    args.draw = parse_neurons(args.draw) if args.draw is not None else []
    check_picture(args.plot)
    return args


def parse_neurons(text):
    """"3.17,5.2" -> [(3, 17), (5, 2)]. Raises UserError."""
    neurons = []
    for word in text.split(","):
        block, _, neuron = word.partition(".")
        if not (block.isdecimal() and neuron.isdecimal()):
            raise UserError(f"--draw={text} must name neurons as block.neuron, with commas between "
                            f"them, such as 3.17,5.2")
        neurons.append((int(block), int(neuron)))
    return neurons


def masking_token(tokenizer, text):
    """The one token that this text is. Raises UserError."""
    tokens = tokenizer.encode(text, allowed_special={EOT})
    if len(tokens) != 1:
        raise UserError(f"--mask_token={text!r} is {len(tokens)} tokens of this tokenizer: "
                        f"give one that is a single token")
    return tokens[0]


def open_job(path, args, load, device):
    """A run as a Job with its Inputs, looked over. Raises UserError or ModelError.

    load: load_tokens or the like.
    """
    run = open_run(path)
    folder, meta = find_data(run, args.data)
    config, tokenizer = run.model.config, load_tokenizer(run.tokenizer)
    layers = args.layer or list(range(config.n_layer))
    for layer in layers:
        Site(run.model, layer, "mlp_act")  # or there is no such block
    for layer, neuron in args.draw:
        if layer not in layers or neuron >= 4 * config.n_embd:
            raise UserError(f"--draw={layer}.{neuron}: {path} has blocks "
                            f"{', '.join(map(str, layers))} here, and in each the neurons 0 to "
                            f"{4 * config.n_embd - 1}")
    source = args.substitutes
    settings = {
        "data": meta["checksum"], "tokens": args.tokens, "layer": layers,
        "snippets": args.snippets, "threshold": args.threshold, "importance": args.importance,
        "mask_token": args.mask_token, "self_loops": args.self_loops,
        "substitutes": f"{source}: {args.fill_mask}" if source == "distilbert" else source}
    mask = masking_token(tokenizer, args.mask_token)
    job = Job(run, "n2g", settings, {"_neurons.json": partial(read_neurons, entry=NEURON)},
              [".png"], args.force, is_result, is_state)
    if args.draw:  # it may be the only thing left to write
        check_writable(job.path("_graphs.png"))
    if job.result:
        return job  # it reads nothing more
    fill_mask = FillMask(args.fill_mask, tokenizer, device) if source == "distilbert" else None
    job.inputs = Inputs(load(folder, "train")[: args.tokens], tokenizer, mask, source, fill_mask)
    text_of(job, device)  # or there is too little text
    return job


def draw_chosen(job, chosen):
    """Draws the graphs of these neurons, (block, neuron) each, of a finished job."""
    found = read_neurons(job.path("_neurons.json"), NEURON)["neurons"]
    by_place = {(one["layer"], one["neuron"]): one for one in found}
    path = job.path("_graphs.png")
    draw_graphs(path, [by_place[place] for place in chosen], str(job.run.path))
    print(f"graphs: {path}")


def main():
    args = parse_arguments()
    device = knobs.pick_device(args.device)
    load = cache(load_tokens)  # every byte of it is verified: once
    jobs = [open_job(path, args, load, device) for path in run_paths(args.runs)]
    stop = knobs.StopRequest()
    try:
        results = results_of(jobs, partial(find_graphs, device=device, stop=stop), device)
    except Stopped:
        raise SystemExit("stopped: the same command again goes on from here") from None
    print_results(results)
    for job in jobs if args.draw else ():
        draw_chosen(job, args.draw)
    if args.plot:
        draw_layers(args.plot, results)


if __name__ == "__main__":
    knobs.cli(main)
