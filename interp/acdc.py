"""Circuits: the edges of a model that the indirect-object task needs (paper: Table 1).

    python -m interp.acdc out/local_k2                          tau 0.03, 64 prompts
    python -m interp.acdc out/*_seed? --tau 0.03,0.01,0.1,0.3   several models at equal KL
    python -m interp.acdc out/local_k2 --orders 8               8 random orders of the edges too
    python -m interp.acdc out/local_k2 --prompts mine.json      a JSON list of prompts like
               {"clean": TEXT, "corrupt": TEXT, "answer": " Tom", "wrong": " Sue"}

Task: "Then, Tom and Sue went to the park. Sue gave a ball to" -> " Tom". A corrupt prompt has other
names in these three places. A circuit is a set of edges. An edge in it carries the output of its
source in the circuit; every other edge carries the output of its source on the corrupt prompt.

The method is ACDC (Conmy et al. 2023) as the paper ran it. Its result depends on the order of the
edges, part of which depends on Python's hash seed in the paper's library. Here the order is fixed,
and --orders shows how much it matters. One tau gives two models circuits of different quality, so
compare models at equal KL: edges_at_kl, interpolated between several taus.

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
from eval import open_run, plain, print_table, run_paths, save_figure
from interp.results import Result, digest, measure_all
from prepare import UserError, load_tokenizer, word_lists

TEMPLATES = (  # A is named first, B second; G is the giver, one of the two
    "Then, {A} and {B} went to the {place}. {G} gave a {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {G} gave a {object} to",
    "When {A} and {B} got to the {place}, {G} gave a {object} to",
    "After {A} and {B} went to the {place}, {G} handed a {object} to",
    "While {A} and {B} were playing at the {place}, {G} showed a {object} to",
    "One day, {A} and {B} were at the {place}, and {G} brought a {object} to",
    "Soon, {A} and {B} found a {object} at the {place}. {G} gave the {object} to",
)
WINDOW = 16  # edges tried in one batch; a larger one wastes more work when an edge is put back
RANDOM = 10  # random circuits of the same size that a circuit's KL is compared with
KNOWS = 0.5  # a model that is right in a smaller share of prompts has no circuit for the task
AT_KL = ("0.1", "0.3", "1")  # nats, at which models are compared
LEAST_KL = 1e-6  # a smaller KL is rounding in float32; 0 has no logarithm
ALL, LAST = slice(None), slice(-1, None)  # the positions of a node's input that matter


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


def make_prompts(tokenizer, count, seed):
    """Distinct Prompts; the giver is named first in half of them.

    Each name of a corrupt prompt is drawn independently of the other two. Raises UserError if too
    few of the words in assets/words.txt, with a space before them, are single tokens.
    """
    rng, lists = random.Random(seed), {}
    for kind, words in word_lists().items():
        lists[kind] = [word for word in words if len(tokenizer.encode_ordinary(f" {word}")) == 1]
    names = lists["girls"] + lists["more_girls"] + lists["boys"] + lists["more_boys"]
    places, objects = lists["places"], lists["objects"]
    if len(names) < 5 or not places or not objects:
        raise UserError("too few of our names, places and objects are single tokens of this "
                        "tokenizer: give prompts of its own with --prompts FILE")
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
    raise UserError(f"our words make fewer than {count} different prompts: lower --count")


def read_prompts(path):
    """The Prompts of a --prompts file. Raises UserError."""
    try:
        return [Prompt(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read prompts from {path}, a JSON list of objects with "
                        f"{', '.join(Prompt._fields)}: {error}") from None


def pad(rows):
    """Lists of tokens -> (B, T); shorter lists are filled with 0 on the left."""
    T = max(map(len, rows))
    return torch.tensor([[0] * (T - len(row)) + row for row in rows])


def tokenize(prompts, tokenizer, block_size):
    """Prompts -> Tokens. Raises UserError if clean and corrupt positions do not correspond."""
    rows = []
    for prompt in prompts:
        tokens = [tokenizer.encode_ordinary(text) for text in prompt]
        length, corrupt, *names = map(len, tokens)
        if not length == corrupt <= block_size or names != [1, 1]:
            raise UserError(
                f"{prompt.clean!r} has {length} tokens, its corrupt prompt {corrupt}, its names "
                f"{names}: texts must be equally long, of {block_size} tokens at most, and names "
                f"single tokens, as a rule with a space in front")
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
    then each block's heads and its MLP, last Resid End (what ln_f reads). A head's output lacks the
    bias of out_proj, which is always there. Every node has an edge to each input of every node of a
    later stage, so a block's heads feed its own MLP. LayerNorm acts on the sum at each input.
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
        """Block and head of a head; block and None of another node."""
        block, head = divmod(node - 1, self.n_head + 1)
        return block, head if node < self.end and head < self.n_head else None

    def dests(self, node):
        """The inputs of a node."""
        parts = [""] if self.place(node)[1] is None else "QKV"
        return [Dest(node, part) for part in parts]

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
        # the output of every source, (S, B, T, C), and the input of every stage, [(B, T, C), ...]
        self.clean, self.clean_residual = self.run(clean.to(device), position)
        self.corrupt, self.corrupt_residual = self.run(corrupt.to(device), position)
        self.end = self.norm("ln_f", self.clean_residual[-1][:, -1])  # (B, C)
        p = (self.end @ self.unembed).double().softmax(-1)  # (B, V)
        self.log_p = p.log().to(dtype)  # (B, V)
        self.p_unembed = p @ self.unembed.double().T  # (B, C), for E_p[d] without logits

    def split_heads(self, block):
        """A block's matrices head by head: Q, K and V (H, C, D), O (H, D, C)."""
        name, split = f"h.{block}.attn.attention", (self.graph.n_head, -1)
        heads = {"O": self.weights[f"{name}.out_proj.weight"].T.unflatten(0, split).contiguous()}
        for part in "QKV":
            matrix = self.weights[f"{name}.{part.lower()}_proj.weight"]  # (C, C), H * D rows
            heads[part] = matrix.unflatten(0, split).mT.contiguous()
        return heads

    def norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def project(self, dest, x):
        """The first step of a node on one of its inputs (..., C): a head computes its queries, keys
        or values, (..., D), an MLP its LayerNorm."""
        block, head = self.graph.place(dest.node)
        if head is None:
            return self.norm(f"h.{block}.ln_2", x)
        return self.norm(f"h.{block}.ln_1", x) @ self.heads[block][dest.part][head]

    def output(self, node, projected):
        """The output of a node, (..., B, T or 1, C), from the list of its projections."""
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

    def divergence(self, ends):
        """KL(clean model || circuit) in nats at the last position, mean over prompts, of K
        circuits: what ln_f gives in each, (K, B, C) -> (K) float64.

        With p the clean model's distribution, E_p the mean over the vocabulary by it, and d the
        change of the logits, the circuit's log q is log p + d - log E_p[exp d], and so
            KL = E_p[log p - log q] = log E_p[exp d] - E_p[d]
        Nothing large cancels here, so fp32 keeps the digits of a small KL; only sums need float64.
        """
        change = ends - self.end  # (K, B, C)
        mean = (change.double() * self.p_unembed).sum(-1)  # (K, B), E_p[d]
        buffer = torch.empty_like(self.log_p)  # one circuit at a time: K x B x V is too large
        log_mean_exp = []
        for row in change:
            logits = torch.addmm(self.log_p, row, self.unembed, out=buffer)  # (B, V), log p + d
            top = logits.amax(-1, keepdim=True)  # (B, 1)
            total = logits.sub_(top).exp_().sum(-1).double()  # (B)
            log_mean_exp.append(total.log() + top[:, 0].double())
        return (torch.stack(log_mean_exp) - mean).mean(-1)


# -------------------------------------------------------------------------------------- the circuit


class Circuit:
    """Which edges of a patched model are removed, and the inputs and outputs of every node then.

    Only what matters is computed. A node is live if it reaches Resid End over kept edges; the
    others change nothing. KL is measured at the last position, so most inputs matter only there:
    a node matters at all positions only if it reaches Resid End through a key or a value.
    """

    def __init__(self, model):
        self.model, self.graph = model, model.graph
        self.end = Dest(self.graph.end, "")
        self.set_removed([])

    def set_removed(self, removed):
        """Remove exactly these edges, and compute everything that follows from it."""
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
        self.current = self.model.clean.clone()  # (S, B, T, C), the output of every source
        self.changed = set()  # the sources whose output is no longer that in the clean model
        # {Dest: ...}, computed when first needed: its input, (B, T or 1, C), and the projection
        self.inputs, self.projections = {}, {}
        for node in sorted(self.live - {0, graph.end}):
            dests = graph.dests(node)
            if any(self.removed[dest] or self.changed & {*self.kept[dest]} for dest in dests):
                self.set_output(node, self.output_of(node, {}))

    def positions(self, dest):
        """The positions of an input that matter."""
        return ALL if dest.part in ("K", "V") or dest.node in self.everywhere else LAST

    def set_output(self, node, output):
        """Set the output of this node to output (B, T or 1, C)."""
        self.current[node][:, -output.size(-2) :] = output
        self.changed.add(node)

    def input_of(self, dest):
        """The value of an input, (B, T or 1, C), by the shorter of two sums.

        Either its value on the corrupt prompts, with every kept edge corrected; or, while its
        sources are clean, its value on the clean prompts, with every removed edge corrupted.
        """
        if dest not in self.inputs:
            model, stage = self.model, self.graph.stage[dest.node]
            removed, kept = self.removed[dest], self.kept[dest]
            if len(removed) < len(kept) and self.changed.isdisjoint(kept):
                x = model.clean_residual[stage]  # (B, T, C)
                change = model.corrupt[removed] - model.clean[removed]  # (removed, B, T, C)
            else:
                x = model.corrupt_residual[stage]
                change = self.current[kept] - model.corrupt[kept]  # (kept, B, T, C)
            self.inputs[dest] = (x + change.sum(0))[:, self.positions(dest)]
        return self.inputs[dest]

    def output_of(self, node, new):
        """The output of a node, (..., B, T or 1, C), when some of its inputs have new values,
        {Dest: (..., B, T or 1, C)}."""
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
        """Their inputs' values after removing the first, the first two, ... of these edges.

        The sweep goes from the end to the start, so the sources of these edges are still clean.
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
        """Try to remove the first, the first two, ... of these K edges of one stage.

        -> KL of these K circuits, a list, and what changes in each: inputs {Dest: value}, outputs
        {node: value}, (K, B, T or 1, C) each. All K are computed in one batch. Only live nodes that
        a removed edge or a changed kept source feeds are computed.
        """
        inputs, outputs = self.removals(edges), {}
        first = min(dest.node for dest in inputs)
        for node in sorted(node for node in self.live if node >= first):
            dests = self.graph.dests(node)
            for dest in dests:
                rows, change = self.positions(dest), 0
                changing = [source for source in self.kept[dest] if source in outputs]
                for source in changing:
                    new = outputs[source][:, :, rows]
                    old = self.current[source][:, rows]
                    change = change + (new - old)  # (K, B, T or 1, C)
                if changing:
                    inputs[dest] = self.input_of(dest) + change
            new = {dest: inputs[dest] for dest in dests if dest in inputs}
            if new and node != self.graph.end:
                outputs[node] = self.output_of(node, new)
        end = self.model.norm("ln_f", inputs[self.end][:, :, -1])  # (K, B, C)
        return self.model.divergence(end).tolist(), inputs, outputs

    def commit(self, edges, inputs, outputs):
        """Remove these edges, the first ones of the last attempt, which gave inputs and outputs."""
        number, stage = len(edges) - 1, self.graph.stage
        for node, output in outputs.items():
            self.set_output(node, output[number])
        for dest, x in inputs.items():
            self.projections.pop(dest, None)
            if stage[dest.node] == stage[edges[0].dest.node]:
                self.inputs[dest] = x[number]
            else:
                del self.inputs[dest]  # to be summed again: rounding errors would add up
        for edge in edges:
            self.removed[edge.dest].append(edge.source)

    def read_out(self):
        """The output of ln_f at the last position, (B, C)."""
        return self.model.norm("ln_f", self.input_of(self.end)[:, -1])

    def kl_without(self, removed):
        """KL(clean model || circuit) once exactly these edges are removed, a float."""
        self.set_removed(removed)
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
#         if rise < tau:         the edge stays removed, and kl += rise, even if rise is negative
#         else:                  the edge is put back, kl stays
#
# The sweep below decides the same, but tries several edges in one batch, and fewer of them.


def sweep_order(graph, rng=None):
    """Every edge, in the order in which the sweep tries them: stage by stage, from the end.

    Within a stage: heads ascending, Q, K, V, and the sources of each descending, as in ACDC. With
    rng, a random.Random, the edges of every stage are shuffled instead.
    """
    edges = []
    for stage in reversed(graph.stages):
        stage_edges = []
        for node in stage:
            for dest in graph.dests(node):
                stage_edges += [Edge(source, dest) for source in reversed(graph.sources(node))]
        if rng is not None:
            rng.shuffle(stage_edges)
        edges += stage_edges
    return edges


def decide(circuit, edges, kl, tau):
    """The rule for the next edges, up to the first that is put back.

    -> a verdict for each, [whether it is kept, by how much its removal raised KL], and the new KL.
    All are tried in one batch, each with those before it removed too. This follows the rule until
    an edge is put back; what was tried after that edge is not used.
    """
    kls, inputs, outputs = circuit.attempt(edges)
    verdicts, removed = [], 0
    for kl_without in kls:
        rise = kl_without - kl
        kept = not rise < tau
        verdicts.append([kept, rise])
        if kept:
            break
        kl, removed = kl_without, removed + 1
    if removed:
        circuit.commit(edges[:removed], inputs, outputs)
    return verdicts, kl


def sweep_stage(circuit, edges, tau, state, bar):
    """Decide the edges of the next stage. -> the state of the sweep after it, see discover."""
    began = time.time()
    done, state = state["decided"], dict(state)
    # from scratch for every stage, so that a continued sweep is bit-equal to an uninterrupted one
    circuit.set_removed([edge for edge, (kept, _) in zip(edges, done) if not kept])
    stage_of, left = circuit.graph.stage, edges[len(done) :]
    stage_edges = [edge for edge in left if stage_of[edge.dest.node] == stage_of[left[0].dest.node]]
    # All edges out of these nodes are decided. A node that keeps none has no effect, so removing
    # an edge into it raises KL by exactly 0 and need not be tried.
    verdicts = {edge: [not 0.0 < tau, 0.0] for edge in stage_edges}
    untried = [edge for edge in stage_edges if edge.dest.node in circuit.live]
    bar.update(len(stage_edges) - len(untried))

    # On a CPU a batch of edges costs more than one edge: after a put-back, start with one again.
    on_cpu = circuit.current.device.type == "cpu"
    smallest, largest = (1, WINDOW) if on_cpu else (2 * WINDOW, 2 * WINDOW)
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


def discover(circuit, edges, tau, state=None, save=lambda state: None, title="ACDC"):
    """ACDC's sweep over these edges, in this order -> the state it ends in, a dict of plain values:

    decided: a verdict for every edge so far, see decide. kl: of what is left of the model, in nats.
    margin: how close a rise of KL came to tau. batches, evaluations, seconds: what it took.
    save is called with the state after every stage. A given state is continued.
    """
    state = state or {"decided": [], "kl": 0.0, "margin": math.inf,
                      "batches": 0, "evaluations": 0, "seconds": 0.0}
    with tqdm(total=len(edges), initial=len(state["decided"]), unit=" edges",
              desc=f"{title} tau {tau:g}", mininterval=1) as bar:
        while len(state["decided"]) < len(edges):
            state = sweep_stage(circuit, edges, tau, state, bar)
            save(state)
    return state


# --------------------------------------------------------------------------------------- the result


def accuracy(logits, tokens):
    """logits (B, V) -> the share of prompts in which the answer is the likeliest token, and in
    which it beats the wrong name."""
    names = torch.stack([tokens.answers, tokens.wrong], -1).to(logits.device)  # (B, 2)
    answer, wrong = logits.gather(1, names).T  # (B) each
    exact = logits.argmax(-1) == names[:, 0]  # (B)
    right = answer > wrong  # (B)
    return exact.double().mean().item(), right.double().mean().item()


@torch.no_grad()
def ablated_logits(model, tokens):
    """The ablated stream's logits at the last position, (B, V).

    It cannot ignore padding, so it reads the prompts of one length at a time.
    """
    logits = model.lm_head.weight.new_empty(len(tokens.clean), model.config.vocab_size)  # (B, V)
    for length in tokens.lengths.unique().tolist():
        rows = tokens.lengths == length  # (B)
        idx = tokens.clean[rows, -length:].to(logits.device)  # without padding
        hidden, inputs, caches = model.clean_pass(idx)
        hidden, _ = model.ablated_pass(hidden, inputs, caches)  # (B, T, C)
        logits[rows.to(logits.device)] = model.lm_head(hidden[:, -1])
    return logits


def describe_model(model, circuits, tokens):
    """What a result says about the model itself, a dict; None where it has no ablated stream.

    circuits: {"": a Circuit of all edges on the prompts that circuits are found on, the tokens,
    "_heldout": one on other prompts, if any}. The keys end the names of what is measured there.
    """
    exact, right = accuracy(circuits[""].logits(), tokens)
    everything = sweep_order(circuits[""].graph)
    facts = {"total": len(everything), "ioi_exact": exact, "ioi_right": right,
             "ablated_exact": None, "ablated_right": None}
    if model.config.ablation != "none":
        exact, right = accuracy(ablated_logits(model, tokens), tokens)
        facts |= {"ablated_exact": exact, "ablated_right": right}
    for ending, circuit in circuits.items():
        facts[f"kl_corrupt{ending}"] = circuit.kl_without(everything)
    return facts


def describe_circuit(circuits, edges, state, tokens, seed):
    """What a result says about the circuit that a sweep of these edges found, a dict."""
    graph = circuits[""].graph
    kept, removed = {}, {}  # {edge: by how much its removal raised KL}
    for edge, (put_back, rise) in zip(edges, state["decided"]):
        (kept if put_back else removed)[edge] = rise
    connected = graph.connected(kept)
    ends = {node for edge in connected for node in (edge.source, edge.dest.node)}
    heads = sum(graph.place(node)[1] is not None for node in ends)
    facts = {"edges": len(kept), "connected": len(connected), "heads": heads}
    facts |= {name: state[name] for name in ("margin", "batches", "evaluations", "seconds")}
    removals, rng = [], random.Random(seed)  # of random circuits of the same size
    for _ in range(RANDOM):
        chosen = set(rng.sample(edges, len(kept)))
        removals.append([edge for edge in edges if edge not in chosen])
    for ending, circuit in circuits.items():
        kls = [circuit.kl_without(others) for others in removals]
        facts[f"kl_random{ending}"] = statistics.mean(kls)
        facts[f"kl_random{ending}_sd"] = statistics.stdev(kls)
        facts[f"kl{ending}"] = circuit.kl_without(removed)
    facts["circuit_exact"], facts["circuit_right"] = accuracy(circuits[""].logits(), tokens)
    facts["circuit"] = {graph.edge_name(edge): rise for edge, rise in kept.items()}
    facts["removed"] = {graph.edge_name(edge): rise for edge, rise in removed.items()}
    return facts


def find_warnings(exact, margin, dtype):
    """Reasons not to trust a circuit, one line each."""
    if exact < KNOWS:
        yield "is right in under half of the prompts: its circuit is not one for the task"
    if margin < 1e-5 and dtype == "float32":
        yield "a decision differs from tau only by rounding: measure again with --dtype float64"


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
            circuits[ending] = Circuit(PatchedModel(
                weights, config.n_head, config.windows, part.clean, part.corrupt, part.lengths,
                getattr(torch, args.dtype), device))
    facts = describe_model(model, circuits, found_on)
    state = result.state or {"circuits": [], "sweep": None}  # finished ones, the one in progress
    rows, sweep, graph = state["circuits"], state["sweep"], circuits[""].graph
    orders = ["descending", *range(args.orders)]  # a number is that of a random order
    to_find = [(tau, order) for tau in args.tau for order in orders]
    for tau, order in to_find[len(rows) :]:
        is_random = order != "descending"
        rng = random.Random(f"{args.seed} {order}") if is_random else None
        edges = sweep_order(graph, rng=rng)
        sweep = discover(circuits[""], edges, tau, sweep, title=title,
                         save=lambda sweep: result.save({"circuits": rows, "sweep": sweep}))
        row = describe_circuit(circuits, edges, sweep, found_on, args.seed)
        if is_random:  # the numbers alone: a sweep of 8 x 16 has 23,981 edges
            del row["circuit"], row["removed"]
        rows.append({"tau": tau, "order": order, **row})
        sweep = None
    warnings = find_warnings(facts["ioi_exact"], rows[0]["margin"], args.dtype)
    facts |= {"circuits": rows, "warnings": list(warnings),
              "prompts": [prompt._asdict() for prompt in prompts]}
    facts["edges_at_kl"] = edges_at_kl(facts)
    draw_circuit(result.path(".png"), result.run.path, facts, graph)
    return facts


# ------------------------------------------------------------------------------------- the frontier


def measured_points(facts):
    """(edges, KL) of a model's circuits: the one without edges, then one per tau, in the fixed
    order; on held-out prompts if there are any."""
    ending = "_heldout" if "kl_corrupt_heldout" in facts else ""
    points = [(0, facts[f"kl_corrupt{ending}"])]
    for row in facts["circuits"]:
        if row["order"] == "descending":
            points.append((row["edges"], row[f"kl{ending}"]))
    return [(edges, max(kl, LEAST_KL)) for edges, kl in points]


def frontier(points):
    """Those of the (edges, KL) that are better than all with fewer edges: KL falls along them."""
    best = []
    for edges, kl in sorted(points):
        if not best or kl < best[-1][1]:
            best.append((edges, kl))
    return best


def edges_for_kl(points, kl):
    """How many edges are needed for a KL of at most kl, a float; None outside the measured range.

    Between two neighbours on the frontier, log KL is interpolated linearly.
    """
    best = frontier(points)
    for (fewer, high), (more, low) in zip(best, best[1:]):
        if low <= kl <= high:
            return fewer + (more - fewer) * math.log(high / kl) / math.log(high / low)
    return 0.0 if kl >= best[0][1] else None


def edges_at_kl(facts):
    """{"0.1": edges_for_kl, ...} for every AT_KL. None for a single tau, and for a model that does
    not know the answers: its circuit is nearly empty, and not one for the task."""
    points = measured_points(facts)
    if len(points) < 3 or facts["ioi_exact"] < KNOWS:
        return dict.fromkeys(AT_KL)
    return {kl: edges_for_kl(points, float(kl)) for kl in AT_KL}


# ------------------------------------------------------------------------------------- the pictures

PARTS = {"Q": ("tab:red", "queries"), "K": ("tab:blue", "keys"), "V": ("tab:green", "values"),
         "": ("0.35", "an MLP or the end")}


def spot(graph, node):
    """Where a node is drawn, (x, y): blocks from bottom to top, heads left, MLPs right."""
    if node in (0, graph.end):
        return graph.n_head / 2, 2 * graph.n_layer + 1.5 if node else -0.5
    block, head = graph.place(node)
    if head is None:
        return graph.n_head + 0.5, 2 * block + 1.4
    return head, 2 * block + 0.6


def draw_circuit(path, title, facts, graph):
    """The first circuit of a result. A thicker edge costs more KL when it is removed."""
    from matplotlib.figure import Figure  # here, because it is slow to import

    row = facts["circuits"][0]
    edges = {graph.edge_name(edge): edge for edge in sweep_order(graph)}
    rises = {edges[name]: rise for name, rise in row["circuit"].items()}
    connected = set(graph.connected(rises))
    top = max(rises.values(), default=1)
    figure = Figure(figsize=(graph.n_head / 2 + 5, graph.n_layer + 3), layout="constrained")
    axes = figure.subplots()
    for edge, rise in rises.items():
        color, _ = PARTS[edge.dest.part]
        x0, y0 = spot(graph, edge.source)
        x1, y1 = spot(graph, edge.dest.node)
        x1 += {"Q": -0.15, "V": 0.15}.get(edge.dest.part, 0)  # a head's three inputs side by side
        axes.plot((x0, x1), (y0, y1), "-" if edge in connected else ":", color=color, alpha=0.65,
                  lw=0.6 + 4 * math.sqrt(max(rise, 0) / top))
    for node in {node for edge in rises for node in (edge.source, edge.dest.node)}:
        axes.text(*spot(graph, node), graph.name(node), ha="center", va="center", fontsize=8,
                  bbox={"boxstyle": "round", "fc": "white"})
    for color, label in PARTS.values():
        axes.plot([], [], color=color, label=f"into {label}")
    axes.plot([], [], ":", color="0.35", label="dangling: on no path from start to end")
    figure.legend(loc="outside right upper", fontsize=8)
    axes.axis("off")
    axes.set_title(f"{plain(title)}\n{row['edges']} of {facts['total']:,} edges have KL "
                   f"{row['kl']:.2f}, answer exact {row['circuit_exact']:.0%}")
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
    print("± is the sample standard deviation over random orders or random circuits\n"
          "edges_at_kl: interpolated between taus; -: out of range, or most answers are wrong")
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
        help="nats: an edge stays removed if that raises KL by less (0.03); a list: 0.03,0.1")
    add("--orders", type=knobs.positive, default=0, help="how many random orders to add (0)")
    add("--prompts", metavar="FILE", help="your own prompts (default: built-in templates)")
    add("--count", type=knobs.positive, default=64, help="prompts to find circuits on (64); as "
        "many more, or the rest of a file, are held out")
    add("--seed", type=int, default=0, help="of prompts, random orders and random circuits (0)")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--force", action="store_true", help="replace a result of other settings")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    results = [open_result(path, args) for path in run_paths(args.runs)]
    found = measure_all(results, partial(find_circuits, args=args, device=device), device)
    print_results(found)


if __name__ == "__main__":
    knobs.cli(main)
