"""Circuits: the edges of a model that the indirect-object task needs (paper: Table 1).

    python -m interp.acdc out/local_k2                     tau 0.03, 64 prompts
    python -m interp.acdc out/*_seed? --tau 0.03,0.01,0.1 --plot frontier.png
                                                           several models and thresholds
    python -m interp.acdc out/local_k2 --orders 8          8 random orders of the edges too
    python -m interp.acdc out/local_k2 --prompts mine.json     your own prompts, a JSON list of
                        {"clean": TEXT, "corrupt": TEXT, "answer": " Tom", "wrong": " Sue"}

Task: "Then, Tom and Sue went to the park. Sue gave a ball to" -> " Tom". A corrupt prompt has other
names in the three places. A circuit is a set of edges. An edge in it carries what its source gives
in the circuit; every other edge carries what its source gives on the corrupt prompt.

The method is ACDC (Conmy et al. 2023) as the paper ran it. Its result depends on the order of the
edges, and in the paper's library a part of that order depends on Python's hash seed. Here the order
is fixed, and --orders shows how much it matters. One tau gives two models circuits of different
quality, so compare models at equal KL: edges_at_kl, interpolated between several taus.

Writes acdc.json and acdc.png beside the checkpoint. After Ctrl-C the same command continues.

Shape letters: B prompts, T positions, C channels, H heads, D = C / H, V vocabulary, S sources,
K circuits tried at a time.
"""

import json
import math
import random
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

import config as knobs
from eval import open_run, plain, print_table, save_figure
from interp.results import Result, digest, measure_all
from prepare import UserError, load_tokenizer, word_lists

TEMPLATES = (  # A and B in the order of their mention; G is the giver, one of the two
    "Then, {A} and {B} went to the {place}. {G} gave a {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {G} gave a {object} to",
    "When {A} and {B} got to the {place}, {G} gave a {object} to",
    "After {A} and {B} went to the {place}, {G} handed a {object} to",
    "While {A} and {B} were playing at the {place}, {G} showed a {object} to",
    "One day, {A} and {B} were at the {place}, and {G} brought a {object} to",
    "Soon, {A} and {B} found a {object} at the {place}. {G} gave the {object} to",
)
WINDOW = 16  # edges tried in one batch; of a larger one, more is thrown away when one is put back
GPU_WINDOW = 32  # the same on a GPU, where more is faster
RANDOM = 10  # random circuits of the same size that a circuit's KL is compared with
KNOWS = 0.5  # a model that is right in a smaller share of prompts has no circuit for the task
AT_KL = ("0.1", "0.3", "1")  # nats, at which models are compared
LEAST_KL = 1e-6  # float32 does not tell less from 0, which has no logarithm
ALL, LAST = slice(None), slice(-1, None)  # the positions of a node's input that count


# ----------------------------------------------------------------------------------------- the task


class Prompt(NamedTuple):
    clean: str
    corrupt: str  # the same with other names
    answer: str  # the right name
    wrong: str  # the other name of the clean text


class Tokens(NamedTuple):
    """Prompts as int64 tokens, padded on the left to the longest."""

    clean: torch.Tensor  # (B, T)
    corrupt: torch.Tensor  # (B, T)
    lengths: torch.Tensor  # (B), without padding
    answers: torch.Tensor  # (B)
    wrong: torch.Tensor  # (B)

    def rows(self, start, stop):
        return Tokens(*(tensor[start:stop] for tensor in self))


def single_tokens(words, tokenizer):
    """The words that are one token with a space before them."""
    return [word for word in words if len(tokenizer.encode_ordinary(f" {word}")) == 1]


def make_prompts(tokenizer, count, seed):
    """Distinct Prompts; the giver is named first in half of them.

    Each name of a corrupt prompt is drawn independently of the other two. Raises UserError on a
    vocabulary that lacks too many of our words.
    """
    rng, lists = random.Random(seed), word_lists()
    every_name = lists["girls"] + lists["more_girls"] + lists["boys"] + lists["more_boys"]
    names = single_tokens(every_name, tokenizer)
    places = single_tokens(lists["places"], tokenizer)
    objects = single_tokens(lists["objects"], tokenizer)
    if len(names) < 5 or not places or not objects:
        raise UserError(f"only {len(names)} of our names, {len(places)} places and {len(objects)} "
                        f"objects are single tokens of this tokenizer: give prompts of its own "
                        f"with --prompts FILE")
    prompts = {}  # by the clean text
    for turn in range(100 * count):
        round_number, template = divmod(turn, len(TEMPLATES))
        A, B = rng.sample(names, 2)
        giver, receiver = (A, B) if round_number % 2 else (B, A)
        words = {"place": rng.choice(places), "object": rng.choice(objects)}
        clean = TEMPLATES[template].format(A=A, B=B, G=giver, **words)
        if clean in prompts:
            continue
        others = [name for name in names if name not in (A, B)]
        first, second, third = (rng.choice(others) for _ in range(3))
        corrupt = TEMPLATES[template].format(A=first, B=second, G=third, **words)
        prompts[clean] = Prompt(clean, corrupt, f" {receiver}", f" {giver}")
        if len(prompts) == count:
            return list(prompts.values())
    raise UserError(f"our templates and this tokenizer's names make fewer than {count} different "
                    f"prompts: lower --count")


def read_prompts(path):
    """The Prompts of a --prompts file. Raises UserError."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return [Prompt(**row) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        keys = ", ".join(Prompt._fields)
        raise UserError(f"cannot read prompts from {path}, a JSON list of objects with {keys}: "
                        f"{error}") from None


def check_prompt(prompt, tokens, block_size):
    """Raises UserError where clean and corrupt cannot be compared position by position.

    tokens: a list for each text of the Prompt.
    """
    length, corrupt, *names = map(len, tokens)
    problem = ""
    if length != corrupt:
        problem = f"its corrupt prompt has {corrupt} tokens, not {length}: make them equally long"
    elif length > block_size:
        problem = f"it has {length} tokens, the model takes {block_size}"
    elif names != [1, 1]:
        problem = (f"{prompt.answer!r} and {prompt.wrong!r} must be single tokens, "
                   f"as a rule with a space in front")
    if problem:
        raise UserError(f"{prompt.clean!r}: {problem}")


def pad(rows):
    """Lists of tokens -> (B, T), with 0 on the left of the shorter ones."""
    T = max(map(len, rows))
    return torch.tensor([[0] * (T - len(row)) + row for row in rows])


def tokenize(prompts, tokenizer, block_size):
    """Prompts -> Tokens. Raises UserError on prompts that do not fit each other or the model."""
    rows = []
    for prompt in prompts:
        tokens = [tokenizer.encode_ordinary(text) for text in prompt]
        check_prompt(prompt, tokens, block_size)
        rows.append(tokens)
    clean, corrupt, answers, wrong = zip(*rows)
    lengths = torch.tensor([len(row) for row in clean])
    return Tokens(pad(clean), pad(corrupt), lengths, pad(answers)[:, 0], pad(wrong)[:, 0])


# ---------------------------------------------------------------------------------------- the graph


class Dest(NamedTuple):
    """Where an edge ends: one of the inputs of a node."""

    node: int
    part: str  # Q, K or V of a head; "" of an MLP and of Resid End, which have one input


class Edge(NamedTuple):
    source: int
    dest: Dest


class Graph:
    """Names and numbers of nodes and edges.

    Nodes are numbered in the order of computation: 0 is Resid Start (token + position embedding),
    then each block's heads and its MLP, last Resid End (what ln_f reads). A head's output is without
    the bias of out_proj, which is always there. Every node has an edge to each input of every node
    of a later stage, so a block's heads feed its own MLP. LayerNorm acts on the sum at each input.
    """

    def __init__(self, n_layer, n_head):
        self.n_layer, self.n_head, self.end = n_layer, n_head, 1 + n_layer * (n_head + 1)
        self.stages = []  # in forward order; the nodes of one cannot feed each other
        for first in range(1, self.end, n_head + 1):
            mlp = first + n_head
            self.stages += [range(first, mlp), [mlp]]
        self.stages.append([self.end])
        # the number of a node's stage, which is also that of its input in the residual stream
        self.stage = {node: at for at, nodes in enumerate(self.stages) for node in nodes}

    def place(self, node):
        """Block and head of a head; block and None of an MLP."""
        block, head = divmod(node - 1, self.n_head + 1)
        return block, head if head < self.n_head else None

    def is_head(self, node):
        return 0 < node < self.end and self.place(node)[1] is not None

    def dests(self, node):
        """The inputs of a node."""
        return [Dest(node, part) for part in ("QKV" if self.is_head(node) else [""])]

    def sources(self, node):
        """The nodes that feed this one: all of earlier stages."""
        return range(self.stages[self.stage[node]][0])

    def name(self, node, part=""):
        """Such as Resid Start, A0.3, A0.3.Q, MLP 0."""
        if node in (0, self.end):
            return "Resid End" if node else "Resid Start"
        block, head = self.place(node)
        if head is None:
            return f"MLP {block}"
        return f"A{block}.{head}.{part}".removesuffix(".")

    def edge_name(self, edge):
        return f"{self.name(edge.source)}->{self.name(*edge.dest)}"

    def connected(self, kept):
        """The kept edges that lie on a path from Resid Start to Resid End."""
        reached, reaching = {0}, {self.end}
        upwards = sorted(kept, key=lambda edge: edge.dest.node)
        for edge in upwards:
            if edge.source in reached:
                reached.add(edge.dest.node)
        for edge in reversed(upwards):
            if edge.dest.node in reaching:
                reaching.add(edge.source)
        return [edge for edge in kept if edge.source in reached and edge.dest.node in reaching]


# --------------------------------------------------------------------------------------- the metric


class Divergence:
    """KL(clean model || circuit) in nats, at the last position, mean over prompts.

    With p the clean model's distribution, E_p the mean over the vocabulary by it, and d the change
    of the logits, the circuit's log q is log p + d - log E_p[exp d], and so
        KL = E_p[log p - log q] = log E_p[exp d] - E_p[d]
    Nothing large cancels here, so fp32 keeps the digits of a small KL; only sums need float64.
    """

    def __init__(self, clean, unembed):
        """clean: what ln_f gives in the clean model, (B, C); unembed (C, V)."""
        p = (clean @ unembed).double().softmax(-1)  # (B, V)
        self.clean, self.unembed = clean, unembed
        self.log_p = p.log().to(clean.dtype)  # (B, V)
        self.p_unembed = p @ unembed.double().T  # (B, C), for E_p[d] without logits

    def __call__(self, circuits):
        """What ln_f gives in K circuits, (K, B, C) -> (K) float64."""
        change = circuits - self.clean  # (K, B, C)
        mean = (change.double() * self.p_unembed).sum(-1)  # (K, B), E_p[d]
        buffer = torch.empty_like(self.log_p)  # one circuit at a time: K x B x V would fit no cache
        log_mean_exp = []
        for row in change:
            logits = torch.addmm(self.log_p, row, self.unembed, out=buffer)  # (B, V), log p + d
            top = logits.amax(-1, keepdim=True)  # (B, 1)
            total = logits.sub_(top).exp_().sum(-1).double()  # (B)
            log_mean_exp.append(total.log() + top[:, 0].double())
        return (torch.stack(log_mean_exp) - mean).mean(-1)


# ---------------------------------------------------------------------------------------- the model


def attention_mask(position, window):
    """position (B, T), negative on padding -> (B, T, T): 0 where a query looks, -inf elsewhere."""
    T = position.size(1)
    query, key = torch.arange(T)[:, None], torch.arange(T)
    seen = (key <= query) & (key > query - window) & (position[:, None, :] >= 0)  # (B, T, T)
    seen |= torch.eye(T, dtype=torch.bool)  # padding sees itself: a row of -inf would give nan
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


class PatchedModel:
    """A GPT-Neo on pairs of prompts, computed node by node.

    weights: a GPTNeo's clean_state_dict(). windows: how many tokens each block sees.
    clean, corrupt, lengths: as in Tokens.
    """

    def __init__(self, weights, n_head, windows, clean, corrupt, lengths,
                 dtype=torch.float32, device="cpu"):
        self.graph = Graph(len(windows), n_head)
        self.weights = {}
        for name, value in weights.items():
            self.weights[name.removeprefix("transformer.")] = value.to(device, dtype)
        T = clean.size(1)
        position = torch.arange(T) - (T - lengths[:, None])  # (B, T), negative on padding
        self.masks = [attention_mask(position, window).to(device, dtype) for window in windows]
        self.heads = [self.split_heads(block) for block in range(len(windows))]
        self.unembed = self.weights["lm_head.weight"].T  # (C, V)

        position = position.clamp_min(0).to(device)
        # what every source gives, (S, B, T, C), and what every stage reads, a list of (B, T, C)
        self.clean, self.clean_residual = self.run(clean.to(device), position)
        self.corrupt, self.corrupt_residual = self.run(corrupt.to(device), position)
        clean_end = self.norm("ln_f", self.clean_residual[-1][:, -1])  # (B, C)
        self.divergence = Divergence(clean_end, self.unembed)

    def split_heads(self, block):
        """A block's matrices head by head: Q, K and V (H, C, D), O (H, D, C)."""
        heads, n_head = {}, self.graph.n_head
        for part, name in (("Q", "q_proj"), ("K", "k_proj"), ("V", "v_proj"), ("O", "out_proj")):
            matrix = self.weights[f"h.{block}.attn.attention.{name}.weight"].T  # (C, C)
            if part == "O":
                matrix = matrix.unflatten(0, (n_head, -1))  # (H, D, C)
            else:
                matrix = matrix.unflatten(1, (n_head, -1)).transpose(0, 1)  # (H, C, D)
            heads[part] = matrix.contiguous()
        return heads

    def norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def project(self, dest, x):
        """The first step of a node on one of its inputs (..., C).

        Of a head its queries, keys or values, (..., D); of an MLP the LayerNorm.
        """
        block, head = self.graph.place(dest.node)
        if head is None:
            return self.norm(f"h.{block}.ln_2", x)
        return self.norm(f"h.{block}.ln_1", x) @ self.heads[block][dest.part][head]

    def output(self, node, projected):
        """What a node gives, (..., B, T or 1, C), from the list of its projections."""
        block, head = self.graph.place(node)
        if head is None:
            hidden = self.linear(f"h.{block}.mlp.c_fc", projected[0])  # (..., B, T or 1, 4C)
            return self.linear(f"h.{block}.mlp.c_proj", F.gelu(hidden, approximate="tanh"))
        q, k, v = projected  # q (..., B, T or 1, D), k and v (..., B, T, D)
        mask = self.masks[block][:, -q.size(-2) :]  # (B, T or 1, T)
        scores = q @ k.transpose(-1, -2) + mask  # (..., B, T or 1, T); no 1/sqrt(D), as in GPT-Neo
        return scores.softmax(-1) @ v @ self.heads[block]["O"][head]

    def run(self, idx, position):
        """Tokens and positions (B, T) -> all sources' outputs (S, B, T, C), all stages' inputs."""
        x = self.weights["wte.weight"][idx] + self.weights["wpe.weight"][position]  # (B, T, C)
        outputs, residual = [x], []
        for stage in self.graph.stages[:-1]:
            residual.append(x)
            given = []
            for node in stage:
                projected = [self.project(dest, x) for dest in self.graph.dests(node)]
                given.append(self.output(node, projected))
            outputs += given
            x = x + sum(given)
            block, head = self.graph.place(stage[0])
            if head is not None:
                x = x + self.weights[f"h.{block}.attn.attention.out_proj.bias"]
        return torch.stack(outputs), [*residual, x]


# -------------------------------------------------------------------------------------- the circuit


class Attempt(NamedTuple):
    """A circuit without the first, the first two, ... of some edges: K of them."""

    edges: list  # K edges of one stage
    inputs: dict  # {Dest: (K, B, T or 1, C)} what it reads in each, where that has changed
    outputs: dict  # {node: (K, B, T or 1, C)} what it gives in each, where that has changed
    kl: list  # K floats


class Circuit:
    """Which edges of a patched model are removed, and what every node then reads and gives.

    Only what counts is computed. A node is live if it reaches Resid End over kept edges; the others
    change nothing. Of most inputs only the last position counts, as KL looks at no other: a node
    counts everywhere only if it reaches Resid End through a key or a value.
    """

    def __init__(self, model):
        self.model, self.graph = model, model.graph
        self.end = Dest(self.graph.end, "")
        self.set_removed([])

    def set_removed(self, removed):
        """Remove exactly these edges, and compute anew what follows."""
        graph = self.graph
        self.removed = defaultdict(list)  # {Dest: sources}
        for edge in removed:
            self.removed[edge.dest].append(edge.source)
        self.kept = {}  # {Dest of a live node: sources}
        self.live, self.everywhere = {graph.end}, set()
        for node in range(graph.end, 0, -1):
            if node not in self.live:
                continue
            for dest in graph.dests(node):
                gone = set(self.removed[dest])
                self.kept[dest] = [source for source in graph.sources(node) if source not in gone]
                self.live.update(self.kept[dest])
                if self.positions(dest) == ALL:
                    self.everywhere.update(self.kept[dest])
        self.current = self.model.clean.clone()  # (S, B, T, C), what every source gives
        self.changed = set()  # the sources that no longer give what they give in the clean model
        # {Dest: ...}, made when first needed: what it reads, (B, T or 1, C), and its projection
        self.inputs, self.projections = {}, {}
        for node in sorted(self.live - {0, graph.end}):
            if any(self.removed[dest] or not self.is_clean(dest) for dest in graph.dests(node)):
                self.set_output(node, self.output_of(node, {}))

    def positions(self, dest):
        """The positions of an input that count."""
        return ALL if dest.part in ("K", "V") or dest.node in self.everywhere else LAST

    def is_clean(self, dest):
        """Whether all kept sources of an input give what they give in the clean model."""
        return self.changed.isdisjoint(self.kept[dest])

    def set_output(self, node, output):
        """output (B, T or 1, C) is what this node gives from now on."""
        self.current[node][:, -output.size(-2) :] = output
        self.changed.add(node)

    def input_of(self, dest):
        """What an input reads, (B, T or 1, C), by the shorter of two sums.

        Either what it reads on the corrupt prompts, with every kept edge corrected; or, while its
        sources are clean, what it reads on the clean ones, with every removed edge corrupted.
        """
        if dest not in self.inputs:
            model, stage = self.model, self.graph.stage[dest.node]
            removed, kept = self.removed[dest], self.kept[dest]
            if len(removed) < len(kept) and self.is_clean(dest):
                x = model.clean_residual[stage]  # (B, T, C)
                change = model.corrupt[removed] - model.clean[removed]  # (removed, B, T, C)
            else:
                x = model.corrupt_residual[stage]
                change = self.current[kept] - model.corrupt[kept]  # (kept, B, T, C)
            self.inputs[dest] = (x + change.sum(0))[:, self.positions(dest)]
        return self.inputs[dest]

    def output_of(self, node, new):
        """What a node gives, (..., B, T or 1, C), when some of its inputs read something new.

        new: {Dest: (..., B, T or 1, C)}
        """
        projected = []
        for dest in self.graph.dests(node):
            if dest in new:
                projected.append(self.model.project(dest, new[dest]))
                continue
            if dest not in self.projections:
                self.projections[dest] = self.model.project(dest, self.input_of(dest))
            projected.append(self.projections[dest])
        return self.model.output(node, projected)

    def removals(self, edges):
        """What their inputs read after removing the first, the first two, ... of these edges.

        As the sweep goes from the end to the start, the sources of these edges are still clean.
        """
        inputs = {}
        for dest in dict.fromkeys(edge.dest for edge in edges):
            x, tries = self.input_of(dest), []
            for edge in edges:
                if edge.dest == dest:
                    change = self.model.corrupt[edge.source] - self.model.clean[edge.source]
                    x = x + change[:, self.positions(dest)]  # (B, T or 1, C)
                tries.append(x)
            inputs[dest] = torch.stack(tries)  # (K, B, T or 1, C)
        return inputs

    def attempt(self, edges):
        """An Attempt to remove the first, the first two, ... of these edges of one stage.

        K circuits in one batch. A removal changes its own input and what that still reaches: live
        nodes behind it, with a kept source that has changed. Only they are computed.
        """
        inputs, outputs = self.removals(edges), {}
        first = min(dest.node for dest in inputs)
        for node in sorted(node for node in self.live if node >= first):
            dests = self.graph.dests(node)
            for dest in dests:
                sources = [source for source in self.kept[dest] if source in outputs]
                if sources:
                    inputs[dest] = self.input_of(dest) + self.changes(sources, outputs, dest)
            new = {dest: inputs[dest] for dest in dests if dest in inputs}
            if new and node != self.graph.end:
                outputs[node] = self.output_of(node, new)
        end = self.model.norm("ln_f", inputs[self.end][:, :, -1])  # (K, B, C)
        return Attempt(edges, inputs, outputs, self.model.divergence(end).tolist())

    def changes(self, sources, outputs, dest):
        """How much new outputs of these sources change what an input reads: (K, B, T or 1, C)."""
        rows, change = self.positions(dest), 0
        for source in sources:
            change = change + (outputs[source][:, :, rows] - self.current[source][:, rows])
        return change

    def commit(self, attempt, count):
        """Remove the first count of the edges of an attempt, the last one made."""
        if count == 0:
            return
        for node, outputs in attempt.outputs.items():
            self.set_output(node, outputs[count - 1])
        swept = {edge.dest for edge in attempt.edges}
        for dest, inputs in attempt.inputs.items():
            self.projections.pop(dest, None)
            if dest in swept:
                self.inputs[dest] = inputs[count - 1]
            else:
                del self.inputs[dest]  # to be summed anew: adding up changes would drift
        for edge in attempt.edges[:count]:
            self.removed[edge.dest].append(edge.source)

    def read_out(self):
        """What ln_f gives at the last position, (B, C)."""
        return self.model.norm("ln_f", self.input_of(self.end)[:, -1])

    def kl(self):
        """KL(clean model || circuit), a float."""
        return self.model.divergence(self.read_out()[None]).item()

    def logits(self):
        """The circuit's logits at the last position, (B, V)."""
        return self.read_out() @ self.model.unembed


# ---------------------------------------------------------------------------------------- the sweep
#
# All of ACDC, one edge at a time:
#
#     kl = 0
#     for edge in order:
#         rise = KL(clean model || circuit without edge) - kl
#         if rise < tau:         the edge stays removed, and kl += rise, also where rise is negative
#         else:                  the edge is put back, kl stays
#
# The sweep below decides the same, but tries several edges in one batch, and fewer of them.


def sweep_order(graph, order="descending", rng=None):
    """Every edge, in the order in which the sweep tries them: stage by stage, from the end.

    Within a stage: heads ascending, Q, K, V, and the sources of each descending (as in ACDC) or
    ascending. With rng, a random.Random, the edges of every stage are shuffled instead.
    """
    edges = []
    for stage in reversed(graph.stages):
        stage_edges = []
        for node in stage:
            sources = graph.sources(node)
            if order == "descending":
                sources = sources[::-1]
            for dest in graph.dests(node):
                stage_edges += [Edge(source, dest) for source in sources]
        if rng is not None:
            rng.shuffle(stage_edges)
        edges += stage_edges
    return edges


def decide(circuit, edges, kl, tau):
    """The rule for the next edges, up to the first that is put back.

    -> a verdict for each, [whether it is kept, by how much its removal raised KL], and the new KL.

    All are tried in one batch, each with those before it removed too. That is what the rule asks
    for until one is put back; what was tried after it counts for nothing.
    """
    attempt = circuit.attempt(edges)
    verdicts, removed = [], 0
    for kl_without in attempt.kl:
        rise = kl_without - kl
        kept = not rise < tau
        verdicts.append([kept, rise])
        if kept:
            break
        kl, removed = kl_without, removed + 1
    circuit.commit(attempt, removed)
    return verdicts, kl


def sweep_stage(circuit, edges, tau, state, bar):
    """Decide the edges of the next stage. -> the state of the sweep after it, see discover."""
    began, done, state = time.time(), state["decided"], dict(state)
    # from scratch for every stage, so that a continued sweep is equal to the last bit
    circuit.set_removed([edge for edge, (kept, _) in zip(edges, done) if not kept])
    stage_of, left = circuit.graph.stage, edges[len(done) :]
    stage_edges = [edge for edge in left if stage_of[edge.dest.node] == stage_of[left[0].dest.node]]
    # All edges out of these nodes are decided. A node that keeps none has no effect at all, so that
    # removing an edge into it raises KL by exactly 0: no need to try.
    verdicts = {edge: [not 0.0 < tau, 0.0] for edge in stage_edges}
    untried = [edge for edge in stage_edges if edge.dest.node in circuit.live]
    bar.update(len(stage_edges) - len(untried))

    # On a CPU many edges cost more than one: begin with one after each that is put back.
    on_cpu = circuit.current.device.type == "cpu"
    smallest, largest = (1, WINDOW) if on_cpu else (GPU_WINDOW, GPU_WINDOW)
    size = smallest
    while untried:
        tried = untried[:size]
        decided, state["kl"] = decide(circuit, tried, state["kl"], tau)
        state["batches"] += 1
        state["evaluations"] += len(tried)
        state["margin"] = min(state["margin"], *(abs(rise - tau) for _, rise in decided))
        verdicts.update(zip(tried, decided))
        put_back, _ = decided[-1]
        size = smallest if put_back else min(2 * size, largest)
        untried = untried[len(decided) :]
        bar.update(len(decided))
    state["decided"] = done + [verdicts[edge] for edge in stage_edges]
    state["seconds"] += time.time() - began
    return state


def discover(circuit, edges, tau, state=None, save=lambda state: None):
    """ACDC's sweep over these edges, in this order -> the state it ends in, a dict of plain values:

    decided: a verdict for every edge so far, see decide. kl: of what is left of the model, in nats.
    margin: how close a rise of KL came to tau. evaluations, batches, seconds: what it took.

    save is called with the state after every stage. A given state is continued.
    """
    state = state or {"decided": [], "kl": 0.0, "margin": math.inf,
                      "evaluations": 0, "batches": 0, "seconds": 0.0}
    with tqdm(total=len(edges), initial=len(state["decided"]), unit=" edges",
              desc=f"tau {tau:g}", mininterval=1) as bar:
        while len(state["decided"]) < len(edges):
            state = sweep_stage(circuit, edges, tau, state, bar)
            save(state)
    return state


# --------------------------------------------------------------------------------------- the result


def accuracy(logits, tokens):
    """logits (B, V) -> the share of prompts in which the answer is the likeliest token, and in
    which it beats the wrong name."""
    rows = torch.arange(len(logits), device=logits.device)
    answers, wrong = tokens.answers.to(logits.device), tokens.wrong.to(logits.device)
    exact = logits.argmax(-1) == answers  # (B)
    right = logits[rows, answers] > logits[rows, wrong]  # (B)
    return exact.double().mean().item(), right.double().mean().item()


@torch.no_grad()
def ablated_logits(model, tokens):
    """The ablated stream's logits at the last position, (B, V).

    It knows of no padding, so it is given the prompts of one length at a time.
    """
    logits = model.lm_head.weight.new_empty(len(tokens.clean), model.config.vocab_size)  # (B, V)
    for length in tokens.lengths.unique().tolist():
        rows = tokens.lengths == length  # (B)
        idx = tokens.clean[rows, -length:].to(logits.device)  # without padding
        hidden, inputs, caches = model.clean_pass(idx)
        hidden, _ = model.ablated_pass(hidden, inputs, caches)  # (B, T, C)
        logits[rows.to(logits.device)] = model.lm_head(hidden[:, -1])
    return logits


def kl_without(circuit, removed):
    """The KL of a circuit without these edges."""
    circuit.set_removed(removed)
    return circuit.kl()


def random_removals(edges, kept, rng):
    """The edges that are missing in each of RANDOM circuits of so many kept edges."""
    removals = []
    for _ in range(RANDOM):
        chosen = set(rng.sample(range(len(edges)), kept))
        removals.append([edge for at, edge in enumerate(edges) if at not in chosen])
    return removals


def describe_model(model, circuits, tokens):
    """What a result says of the model itself, a dict. ablated_* are None without gates.

    circuits: {ending of names: Circuit of all edges}, "" on the prompts that circuits are found on,
    which are the tokens, and "_heldout" on others, if there are any.
    """
    exact, right = accuracy(circuits[""].logits(), tokens)
    everything = sweep_order(circuits[""].graph)
    facts = {"total": len(everything), "ioi_exact": exact, "ioi_right": right,
             "ablated_exact": None, "ablated_right": None}
    if model.config.ablation != "none":
        exact, right = accuracy(ablated_logits(model, tokens), tokens)
        facts |= {"ablated_exact": exact, "ablated_right": right}
    for ending, circuit in circuits.items():
        facts[f"kl_corrupt{ending}"] = kl_without(circuit, everything)
    return facts


def describe_circuit(circuits, edges, state, tokens, seed):
    """What a result says of the circuit that a sweep of these edges ended in, a dict.

    circuits, tokens: see describe_model.
    """
    graph = circuits[""].graph
    kept, removed = {}, {}  # {edge: by how much its removal raised KL}
    for edge, (put_back, rise) in zip(edges, state["decided"]):
        (kept if put_back else removed)[edge] = rise
    connected = graph.connected(kept)
    ends = {node for edge in connected for node in (edge.source, edge.dest.node)}
    facts = {"edges": len(kept), "connected": len(connected), "heads": sum(map(graph.is_head, ends))}
    facts |= {name: state[name] for name in ("margin", "evaluations", "batches", "seconds")}
    removals = random_removals(edges, len(kept), random.Random(seed))
    for ending, circuit in circuits.items():
        kls = [kl_without(circuit, others) for others in removals]
        facts[f"kl_random{ending}"] = statistics.mean(kls)
        facts[f"kl_random{ending}_sd"] = statistics.stdev(kls)
        facts[f"kl{ending}"] = kl_without(circuit, removed)
    facts["circuit_exact"], facts["circuit_right"] = accuracy(circuits[""].logits(), tokens)
    facts["circuit"] = {graph.edge_name(edge): rise for edge, rise in kept.items()}
    facts["removed"] = {graph.edge_name(edge): rise for edge, rise in removed.items()}
    return facts


def find_warnings(exact, first, dtype):
    """Why not to believe the first circuit, a line each."""
    warnings = []
    if exact < KNOWS:
        warnings.append("gives the right answer in under half of the prompts: "
                        "its circuit is not one for that task")
    if first["margin"] < 1e-5 and dtype == "float32":
        warnings.append("a decision came as close to tau as rounding: --dtype float64 settles it")
    return warnings


def load_prompts(run, args):
    """A run's Prompts and their Tokens. Raises UserError."""
    tokenizer = load_tokenizer(run.tokenizer)
    if args.prompts:
        prompts = read_prompts(args.prompts)
    else:
        prompts = make_prompts(tokenizer, 2 * args.count, args.seed)
    return prompts, tokenize(prompts, tokenizer, run.model.config.block_size)


def open_result(path, args):
    """The Result of a run. Raises UserError or ModelError."""
    run = open_run(path)
    prompts, tokens = load_prompts(run, args)
    settings = {
        "tau": args.tau, "orders": args.orders, "seed": args.seed, "dtype": args.dtype,
        "prompts": f"{args.prompts or 'templates'}, tokens {digest(tokens._asdict())}",
        "count": min(args.count, len(prompts)), "heldout": max(0, len(prompts) - args.count)}
    return Result(run, "acdc", settings, args.force, files=[".png"])


def find_circuits(result, title, args, device):
    """Find the circuits of one run, or continue -> the facts of its result."""
    prompts, tokens = load_prompts(result.run, args)
    model = result.run.model.to(device)
    config, weights = model.config, model.clean_state_dict()
    found_on, heldout = tokens.rows(0, args.count), tokens.rows(args.count, None)
    circuits = {}  # see describe_model
    for ending, part in {"": found_on, "_heldout": heldout}.items():
        if len(part.clean):
            patched = PatchedModel(weights, config.n_head, config.windows, *part[:3],
                                   getattr(torch, args.dtype), device)
            circuits[ending] = Circuit(patched)
    facts = describe_model(model, circuits, found_on)
    print(f"{title}: {facts['total']:,} edges; the answer is the likeliest token in "
          f"{facts['ioi_exact']:.0%} of the prompts", flush=True)

    state = result.state or {"circuits": [], "sweep": None}  # finished ones, the one in progress
    rows, sweep, graph = state["circuits"], state["sweep"], circuits[""].graph

    def save(sweep):
        result.save({"circuits": rows, "sweep": sweep})

    orders = ["descending", *range(args.orders)]  # a number is that of a random order
    to_find = [(tau, order) for tau in args.tau for order in orders]
    for tau, order in to_find[len(rows) :]:
        is_random = order != "descending"
        rng = random.Random(f"{args.seed} {order}") if is_random else None
        edges = sweep_order(graph, rng=rng)
        sweep = discover(circuits[""], edges, tau, sweep, save)
        row = describe_circuit(circuits, edges, sweep, found_on, args.seed)
        if is_random:  # the numbers alone: a sweep of 8 x 16 has 23,981 edges
            del row["circuit"], row["removed"]
        rows.append({"tau": tau, "order": order, **row})
        sweep = None
    facts |= {"circuits": rows, "prompts": [prompt._asdict() for prompt in prompts],
              "warnings": find_warnings(facts["ioi_exact"], rows[0], args.dtype)}
    facts["edges_at_kl"] = edges_at_kl(facts)
    draw_circuit(result.path(".png"), result.run.path, facts, graph)
    return facts


# ------------------------------------------------------------------------------------- the frontier


def measured_points(facts):
    """(edges, KL) of a model's circuits: the one without edges, then one a tau, in the fixed order.

    On held-out prompts, or on those they were found on where none are held out.
    """
    ending = "_heldout" if "kl_corrupt_heldout" in facts else ""
    fixed = [row for row in facts["circuits"] if row["order"] == "descending"]
    points = [(0, facts[f"kl_corrupt{ending}"])]
    points += [(row["edges"], row[f"kl{ending}"]) for row in fixed]
    return [(edges, max(kl, LEAST_KL)) for edges, kl in points]


def frontier(points):
    """Those of the (edges, KL) that are better than all with fewer edges: KL falls along them."""
    best = []
    for edges, kl in sorted(points):
        if not best or kl < best[-1][1]:
            best.append((edges, kl))
    return best


def edges_for_kl(points, kl):
    """How many edges a KL of at most kl takes, a float; None where these (edges, KL) do not say.

    Between two neighbours on the frontier log KL is taken to fall in a line, as it is drawn. A KL
    that the circuit without edges reaches takes 0; nothing else is guessed.
    """
    best = frontier(points)
    for (fewer, high), (more, low) in zip(best, best[1:]):
        if low <= kl <= high:
            return fewer + (more - fewer) * math.log(high / kl) / math.log(high / low)
    return 0.0 if kl >= best[0][1] else None


def edges_at_kl(facts):
    """{"0.1": edges_for_kl, ...} for every AT_KL.

    All None with a single tau, and for a model that does not know the answers: it needs next to no
    edges, for next to nothing.
    """
    points = measured_points(facts)
    if len(points) < 3 or facts["ioi_exact"] < KNOWS:
        return dict.fromkeys(AT_KL)
    return {kl: edges_for_kl(points, float(kl)) for kl in AT_KL}


# ------------------------------------------------------------------------------------- the pictures


COLORS = {"Q": "tab:red", "K": "tab:blue", "V": "tab:green", "": "0.35"}
LABELS = {"Q": "queries", "K": "keys", "V": "values", "": "an MLP or the end"}


def spot(graph, node):
    """Where a node is drawn, (x, y): blocks from bottom to top, heads left, MLPs right."""
    if node in (0, graph.end):
        return graph.n_head / 2, 2 * graph.n_layer + 1.5 if node else -0.5
    block, head = graph.place(node)
    return (graph.n_head + 0.5, 2 * block + 1.4) if head is None else (head, 2 * block + 0.6)


def draw_edges(axes, graph, rises):
    """rises: {kept Edge: how much KL its removal costs}; the more, the thicker."""
    connected, top = set(graph.connected(rises)), max(rises.values(), default=1)
    for edge, rise in sorted(rises.items(), key=lambda item: item[1]):
        (x0, y0), (x1, y1) = spot(graph, edge.source), spot(graph, edge.dest.node)
        x1 += {"Q": -0.15, "V": 0.15}.get(edge.dest.part, 0)  # a head's three inputs side by side
        axes.plot((x0, x1), (y0, y1), color=COLORS[edge.dest.part], alpha=0.65, zorder=1,
                  lw=0.6 + 4 * math.sqrt(max(rise, 0) / top), solid_capstyle="round",
                  ls="-" if edge in connected else ":")
    for part, label in LABELS.items():
        axes.plot([], [], color=COLORS[part], lw=2, label=f"into {label}")
    axes.plot([], [], color=COLORS[""], ls=":", label="dangling: on no path from start to end")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)


def draw_nodes(axes, graph, used):
    """The name of every node that has a kept edge, a dot for the others."""
    box = {"boxstyle": "round", "fc": "white", "ec": "black", "lw": 0.8}
    for node in range(graph.end + 1):
        x, y = spot(graph, node)
        if node in used:
            axes.text(x, y, graph.name(node), ha="center", va="center", fontsize=8, bbox=box,
                      zorder=3)
        else:
            axes.plot(x, y, "o", color="0.85", ms=4, zorder=2)
    axes.axis("off")


def draw_circuit(path, name, facts, graph):
    """The first circuit of a result."""
    from matplotlib.figure import Figure  # here, so that --help need not wait for it

    row = facts["circuits"][0]
    edges = {graph.edge_name(edge): edge for edge in sweep_order(graph)}
    rises = {edges[name]: rise for name, rise in row["circuit"].items()}
    size = max(6, 0.6 * graph.n_head + 3), max(4, 1.1 * graph.n_layer + 1.5)  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw_edges(axes, graph, rises)
    draw_nodes(axes, graph, {node for edge in rises for node in (edge.source, edge.dest.node)})
    axes.set_title(f"{plain(name)}\n{row['edges']} of {facts['total']:,} edges at tau "
                   f"{row['tau']:g}, KL {row['kl']:.2f}\nanswer exact: model "
                   f"{facts['ioi_exact']:.0%}, circuit {row['circuit_exact']:.0%}", loc="left",
                   fontsize="medium")
    save_figure(path, figure)


def draw_frontiers(path, results):
    """KL against edges: a line for every run, and a point for every tau, also off the line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    lines = []
    for result in results:
        points = measured_points(result)
        lines += axes.plot(*zip(*frontier(points)), label=plain(result["run"]))
        axes.plot(*zip(*points[1:]), "o", color=lines[-1].get_color())
    axes.set(yscale="log", xlabel="edges", ylabel="KL(model || circuit) in nats")
    axes.set_title("the lower, the better a circuit of so many edges", loc="left")
    axes.grid(alpha=0.3)
    figure.legend(handles=lines[:6], loc="outside right upper", frameon=False)
    save_figure(path, figure)


# --------------------------------------------------------------------------------- the command line

MODEL_COLUMNS = {  # entry of acdc.json: its format
    "run": "", "total": ",", "ioi_exact": ".0%", "ioi_right": ".0%", "ablated_exact": ".0%",
    "ablated_right": ".0%", "kl_corrupt": ".3f", "kl_corrupt_heldout": ".3f",
    **{f"edges_at_kl.{kl}": ".1f" for kl in AT_KL}}
CIRCUIT_COLUMNS = {
    "run": "", "tau": "g", "edges": ",", "random_orders": ".1f", "connected": ",", "heads": "",
    "kl": ".3f", "kl_random": ".3f", "kl_heldout": ".3f", "kl_random_heldout": ".3f",
    "circuit_exact": ".0%", "circuit_right": ".0%", "evaluations": ",", "seconds": ".0f"}


def circuit_rows(result):
    """A row per tau: the circuit of the fixed order, and how many edges random orders keep."""
    for tau in result["settings"]["tau"]:
        first, *others = [row for row in result["circuits"] if row["tau"] == tau]
        edges = pd.Series([row["edges"] for row in others], dtype=float)
        yield {"run": result["run"], **first,
               "random_orders": edges.mean(), "random_orders_sd": edges.std()}


def print_results(results):
    print()
    print_table(pd.json_normalize(results), MODEL_COLUMNS)
    print()
    rows = [row for result in results for row in circuit_rows(result)]
    print_table(pd.DataFrame(rows), CIRCUIT_COLUMNS)
    print("± is the sample standard deviation over random orders, or over random circuits of the "
          "same size.\nedges_at_kl: interpolated between the taus, on held-out prompts if there "
          "are any; - is out of their range,\nor of a model that does not know the answers.")
    for result in results:
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")


def numbers(text):
    """For argparse: 0.03,0.1 -> [0.03, 0.1]."""
    return [float(word) for word in text.split(",")]


def main():
    parser = knobs.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default %(default)s); not mps, which lacks float64")
    add("--tau", type=numbers, default="0.03",
        help="an edge stays removed if that raises KL by fewer nats (0.03); a list: 0.03,0.1")
    add("--orders", type=int, default=0, help="how many random orders to add (0)")
    add("--prompts", metavar="FILE", help="prompts of your own (default: our templates)")
    add("--count", type=knobs.positive, default=64, help="prompts to find circuits on (64); as "
        "many more, or the rest of a file, are held out")
    add("--seed", type=int, default=0, help="of prompts, random orders and random circuits (0)")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--plot", type=knobs.picture, metavar="FILE", help="plot KL against edges of all runs")
    add("--force", action="store_true", help="replace a result of other settings")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    results = [open_result(path, args) for path in args.runs]
    found = measure_all(results, partial(find_circuits, args=args, device=device), device)
    print_results(found)
    if args.plot:
        draw_frontiers(args.plot, found)


if __name__ == "__main__":
    knobs.cli(main)
