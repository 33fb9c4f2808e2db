"""Circuits: the edges of a model that ACDC keeps for the indirect-object task (paper: Table 1).

    python interp/acdc.py out/local_k2                             tau 0.03, 64 prompts of our own
    python interp/acdc.py out/* --tau 0.01,0.03,0.1,0.3 --plot frontier.png
                                                                   several runs and thresholds
    python interp/acdc.py out/local_k2 --orders 8                  8 random orders of the sweep too
    python interp/acdc.py out/local_k2 --prompts mine.json         [{"clean": ..., "corrupt": ...,
                                                          "answer": " Tom", "wrong": " Sue"}, ...]

Task: "Then, Tom and Sue went to the park. Sue gave a ball to" -> " Tom". A corrupt prompt has other
names in the three places. A circuit is a set of edges: an edge in it carries what its source gives
in the circuit, every other edge what its source gives on the corrupt prompt.

The method is ACDC (Conmy et al. 2023) as the paper ran it. What is kept depends on the order of the
sweep; within a stage (all heads of a block, or one MLP) that hangs on a hash seed in the paper's
library. Here it is fixed, and --orders shows how much it matters. One tau gives two models circuits
of different quality, so compare models at equal KL, by the frontiers of several taus. Below, each
under its heading: the task, the graph, the metric, the model, the circuit, the order, the rule, the
result, the frontier.

Writes acdc.json and acdc.png beside the checkpoint. After Ctrl-C the same command goes on.

Shape letters: B prompts, T positions, C channels, H heads, D = C / H, V vocabulary, S sources,
K circuits tried at a time.
"""

import hashlib
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts interp/ there
import config as knobs
from eval import open_run, run_paths
from interp.common import (
    averages, check_picture, check_range, column, number, parse_list, print_table, run_parser,
    save_figure)
from interp.results import MAYBE, NUMBER, Job, fits, gate_fingerprint, results_of
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
KNOWS = 0.5  # in under this share of prompts right, a model has no circuit for the task
ALL, LAST = slice(None), slice(-1, None)  # the positions of a node's input that count


# ----------------------------------------------------------------------------------------- the task


KEYS = ("clean", "corrupt", "answer", "wrong")  # of a prompt, a dict of texts


class Tokens(NamedTuple):
    """Pairs of prompts as int64 tokens, padded on the left to the longest."""

    clean: torch.Tensor  # (B, T)
    corrupt: torch.Tensor  # (B, T)
    lengths: torch.Tensor  # (B), how many tokens of a row are no padding
    answers: torch.Tensor  # (B), the right name
    wrong: torch.Tensor  # (B), the other name

    def rows(self, start, stop):
        return Tokens(*(tensor[start:stop] for tensor in self))


def single_tokens(words, tokenizer):
    """Those of the words that are one token with a space before them."""
    return [word for word in words if len(tokenizer.encode_ordinary(f" {word}")) == 1]


def make_prompts(tokenizer, count, seed):
    """Distinct prompts, dicts of texts by KEYS; the giver is named first in half of them.

    In the corrupt prompt each of the three names is another one, drawn independently of the other
    two. Raises UserError on a vocabulary that lacks too many of our words.
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
        prompts[clean] = {"clean": clean, "corrupt": corrupt,
                          "answer": f" {receiver}", "wrong": f" {giver}"}
        if len(prompts) == count:
            return list(prompts.values())
    raise UserError(f"our templates and this tokenizer's names make fewer than {count} different "
                    f"prompts: lower --count")


def read_prompts(path):
    """A --prompts file -> its list of dicts. Raises UserError."""
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        texts = [prompt[key] for prompt in prompts for key in KEYS]
    except OSError as error:
        raise UserError(f"cannot read prompts from {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, a number or brackets without end
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read prompts from {path}: {reason}") from None
    except (TypeError, KeyError):
        texts = []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{path} must be a list of {{"clean": TEXT, "corrupt": TEXT, '
                        f'"answer": TEXT, "wrong": TEXT}}')
    return prompts


def check_prompt(prompt, tokens, block_size):
    """Raises UserError on what cannot be compared position by position. tokens: {key: list}."""
    length = len(tokens["clean"])
    shown = repr(prompt["clean"])
    if len(shown) > 200:
        shown = shown[:200] + "...'"
    if length != len(tokens["corrupt"]):
        raise UserError(f"{shown} has {length} tokens and its corrupt prompt "
                        f"{len(tokens['corrupt'])}: both must be equally long")
    if tokens["clean"] == tokens["corrupt"] or prompt["answer"] == prompt["wrong"]:
        raise UserError(f"{shown}: the corrupt prompt must differ from the clean one, "
                        f"and the wrong answer from the right one")
    if length > block_size:
        raise UserError(f"{shown} has {length} tokens, the model takes {block_size}")
    for key in ("answer", "wrong"):
        if len(tokens[key]) != 1:
            raise UserError(f"{prompt[key][:80]!r} is {len(tokens[key])} tokens of this tokenizer, "
                            f"not one: names must be single tokens, as a rule with a leading space")


def pad(rows):
    """Lists of tokens -> (B, T), with 0 on the left of the shorter ones."""
    T = max(map(len, rows))
    return torch.tensor([[0] * (T - len(row)) + row for row in rows])


def tokenize(prompts, tokenizer, block_size):
    """Texts -> Tokens. Raises UserError on prompts that do not fit each other or the model."""
    rows = []
    for prompt in prompts:
        tokens = {key: tokenizer.encode_ordinary(prompt[key]) for key in KEYS}
        check_prompt(prompt, tokens, block_size)
        rows.append(tokens.values())
    clean, corrupt, answers, wrong = zip(*rows)
    lengths = torch.tensor([len(row) for row in clean])
    answers, wrong = torch.tensor(answers), torch.tensor(wrong)  # (B, 1) each
    return Tokens(pad(clean), pad(corrupt), lengths, answers[:, 0], wrong[:, 0])


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

    A node is numbered as it is computed: 0 is Resid Start (token + position embedding), then each
    block's heads and its MLP, last Resid End (what ln_f reads). A head gives its output without
    out_proj's bias, which is always there. Every node has an edge to each input of every node of a
    later stage; so a block's heads feed its own MLP. LayerNorm acts on the sum at each input.
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

    def role(self, node):
        """Resid Start, head, MLP or Resid End."""
        if node in (0, self.end):
            return "Resid End" if node else "Resid Start"
        return "MLP" if self.place(node)[1] is None else "head"

    def dests(self, node):
        """The inputs of a node."""
        parts = "QKV" if self.role(node) == "head" else [""]
        return [Dest(node, part) for part in parts]

    def sources(self, node):
        """The nodes that feed this one: all of earlier stages."""
        return range(self.stages[self.stage[node]][0])

    def name(self, node, part=""):
        """Such as Resid Start, A0.3, A0.3.Q, MLP 0."""
        role, (block, head) = self.role(node), self.place(node)
        if role == "head":
            return f"A{block}.{head}.{part}" if part else f"A{block}.{head}"
        return f"MLP {block}" if role == "MLP" else role

    def edge_name(self, edge):
        return f"{self.name(edge.source)}->{self.name(*edge.dest)}"

    def kind(self, edge):
        """A0.1->A2.3.Q is a head->Q, MLP 1->Resid End an MLP->Resid End, ..."""
        return f"{self.role(edge.source)}->{edge.dest.part or self.role(edge.dest.node)}"

    def connected(self, kept):
        """Those of the kept edges that lie on a path from Resid Start to Resid End."""
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
    """A GPT-Neo on pairs of prompts, one node at a time, and what it gives on both.

    weights: a GPTNeo's clean_state_dict(). windows: how many tokens each block sees.
    clean, corrupt, lengths: as in Tokens. Raises UserError where the activations are not finite.
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
        for residual in (self.clean_residual, self.corrupt_residual):
            if not residual[-1].isfinite().all():
                raise UserError("the model's activations are not finite on these prompts: "
                                "its training has diverged")
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
        """What a node first makes of one of its inputs (..., C).

        A head makes its queries, keys or values of it, (..., D), an MLP the LayerNorm of it.
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
            if self.graph.role(stage[0]) == "head":
                block, _ = self.graph.place(stage[0])
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
        """Remove exactly these edges: all that follows from it is computed anew."""
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

        Either what it reads on the corrupt prompts, with every kept edge set right; or, while its
        sources are clean, what it reads on the clean ones, with every removed edge spoilt.
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
                    spoilt = self.model.corrupt[edge.source] - self.model.clean[edge.source]
                    x = x + spoilt[:, self.positions(dest)]  # (B, T or 1, C)
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


# ---------------------------------------------------------------------------------------- the order


def sweep_order(graph, order="descending", rng=None):
    """Every edge, in the order in which the sweep asks for it: stage by stage, from the end.

    Within a stage: heads ascending, Q, K, V, and the sources of each descending (as ACDC has it) or
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


# ----------------------------------------------------------------------------------------- the rule
#
# All of ACDC, one edge at a time:
#
#     kl = 0
#     for edge in order:
#         rise = KL(clean model || circuit without edge) - kl
#         if rise < tau:         the edge stays removed, and kl += rise, also where rise is negative
#         else:                  the edge is put back, kl stays
#
# The sweep below decides the same, but asks for several edges in one batch, and for fewer.


def stays_removed(rise, tau):
    """ACDC's rule: an edge stays removed if its removal raises KL by less than tau nats."""
    return rise < tau


def decide(circuit, edges, kl, tau):
    """The rule for the next edges, up to the first that is put back.

    -> a verdict for each, [whether it is kept, by how much its removal raised KL], and the new KL.

    All of them are tried in one batch, each with those before it removed too. That is what the rule
    asks for as long as none is put back; what was tried behind such a one counts for nothing.
    """
    attempt = circuit.attempt(edges)
    verdicts, removed = [], 0
    for kl_without in attempt.kl:
        rise = kl_without - kl
        stays = stays_removed(rise, tau)
        verdicts.append([not stays, rise])
        if not stays:
            break
        kl, removed = kl_without, removed + 1
    circuit.commit(attempt, removed)
    return verdicts, kl


def sweep_stage(circuit, edges, tau, state, bar):
    """Decide the edges of the next stage. -> the state of the sweep after it, see discover."""
    began, done, state = time.time(), state["decided"], dict(state)
    # from scratch for every stage, so that going on after a stop is equal to the last bit
    circuit.set_removed([edge for edge, (kept, _) in zip(edges, done) if not kept])
    stage_of, left = circuit.graph.stage, edges[len(done) :]
    stage_edges = [edge for edge in left if stage_of[edge.dest.node] == stage_of[left[0].dest.node]]
    # All edges out of these nodes are decided. A node that keeps none has no effect at all, so that
    # removing an edge into it raises KL by exactly 0: no need to look.
    dead = [edge for edge in stage_edges if edge.dest.node not in circuit.live]
    verdicts = {edge: [not stays_removed(0.0, tau), 0.0] for edge in dead}
    todo = [edge for edge in stage_edges if edge.dest.node in circuit.live]
    bar.update(len(dead))

    # On a CPU many edges cost more than one: begin with one after each that is put back.
    smallest, largest = GPU_WINDOW, GPU_WINDOW
    if circuit.current.device.type == "cpu":
        smallest, largest = 1, WINDOW
    size = smallest
    while todo:
        tried = todo[:size]
        decided, state["kl"] = decide(circuit, tried, state["kl"], tau)
        state["batches"] += 1
        state["evaluations"] += len(tried)
        state["margin"] = min(state["margin"], *(abs(rise - tau) for _, rise in decided))
        verdicts.update(zip(tried, decided))
        put_back, _ = decided[-1]
        size = smallest if put_back else min(2 * size, largest)
        todo = todo[len(decided) :]
        bar.update(len(decided))
    state["decided"] = done + [verdicts[edge] for edge in stage_edges]
    state["seconds"] += time.time() - began
    return state


def discover(circuit, edges, tau, state=None, save=lambda state: None):
    """ACDC's sweep over these edges, in this order -> the state it ends in, a dict of plain values:

    decided: a verdict for every edge so far, see decide. kl: of what is left of the model, in nats.
    margin: how close a rise of KL came to tau. evaluations, batches, seconds: what it took.

    save is called with the state after every stage. The sweep goes on from one that is given.
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
    """logits (B, V) -> in which share of prompts the answer is the likeliest token, and in which
    it beats the wrong name."""
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


def kl_of_several(circuit, removals):
    """Mean and standard deviation of the KL of circuits, given by the edges removed in each."""
    kls = []
    for removed in removals:
        circuit.set_removed(removed)
        kls.append(circuit.kl())
    return statistics.mean(kls), statistics.stdev(kls)


def random_removals(edges, kept, rng):
    """The edges that are missing in each of RANDOM circuits of so many kept edges."""
    removals = []
    for _ in range(RANDOM):
        chosen = set(rng.sample(range(len(edges)), kept))
        removals.append([edge for at, edge in enumerate(edges) if at not in chosen])
    return removals


def describe_model(gptneo, circuit, heldout, tokens):
    """What a result says of the model itself, as a dict; circuit: one of its, with all edges.

    heldout: the same on other prompts, or None. Without gates ablated_exact and _right are None.
    """
    exact, right = accuracy(circuit.logits(), tokens)
    everything = sweep_order(circuit.graph)
    facts = {"total": len(everything), "ioi_exact": exact, "ioi_right": right,
             "ablated_exact": None, "ablated_right": None}
    if gptneo.config.ablation != "none":
        exact, right = accuracy(ablated_logits(gptneo, tokens), tokens)
        facts |= {"ablated_exact": exact, "ablated_right": right}
    circuit.set_removed(everything)
    facts["kl_corrupt"] = circuit.kl()
    if heldout is not None:
        heldout.set_removed(everything)
        facts["kl_corrupt_heldout"] = heldout.kl()
    return facts


def describe(circuit, heldout, edges, state, tokens, seed):
    """Everything that a result has to say of one circuit, as a dict.

    heldout: a Circuit of the same model on other prompts, or None.
    """
    graph = circuit.graph
    kept, removed = {}, {}  # {edge: by how much its removal raised KL}
    for edge, (put_back, rise) in zip(edges, state["decided"]):
        (kept if put_back else removed)[edge] = rise
    connected = graph.connected(kept)
    ends = {node for edge in connected for node in (edge.source, edge.dest.node)}
    heads = [node for node in ends if graph.role(node) == "head"]
    circuit.set_removed(removed)
    exact, right = accuracy(circuit.logits(), tokens)
    facts = {"edges": len(kept), "connected": len(connected), "heads": len(heads),
             "kl": circuit.kl(), "circuit_exact": exact, "circuit_right": right}
    facts |= {name: state[name] for name in ("margin", "evaluations", "batches", "seconds")}
    facts["kinds"] = dict(Counter(graph.kind(edge) for edge in kept))

    removals = random_removals(edges, len(kept), random.Random(seed))
    facts["kl_random"], facts["kl_random_sd"] = kl_of_several(circuit, removals)
    if heldout is not None:
        heldout.set_removed(removed)
        facts["kl_heldout"] = heldout.kl()
        mean, spread = kl_of_several(heldout, removals)
        facts |= {"kl_random_heldout": mean, "kl_random_heldout_sd": spread}
    facts["circuit"] = {graph.edge_name(edge): rise for edge, rise in kept.items()}
    facts["removed"] = {graph.edge_name(edge): rise for edge, rise in removed.items()}
    return facts


def find_circuits(job, title, args, device):
    """Find the circuits of one run, or go on with it -> the facts of its result."""
    prompts, tokens = job.inputs
    gptneo, count = job.run.model.to(device), args.count
    config, weights = gptneo.config, gptneo.clean_state_dict()

    def circuit_on(tokens):
        model = PatchedModel(weights, config.n_head, config.windows, tokens.clean, tokens.corrupt,
                             tokens.lengths, getattr(torch, args.dtype), device)
        return Circuit(model)

    found_on = tokens.rows(0, count)
    circuit = circuit_on(found_on)
    heldout = circuit_on(tokens.rows(count, None)) if len(prompts) > count else None
    facts = describe_model(gptneo, circuit, heldout, found_on) | {"prompts": prompts}
    print(f"{title}: {facts['total']:,} edges; the model's likeliest token is the answer in "
          f"{facts['ioi_exact']:.0%}, the answer beats the wrong one in {facts['ioi_right']:.0%}; "
          f"KL(clean || corrupt) {facts['kl_corrupt']:.3f}", flush=True)

    state = {"circuits": [], "sweep": None}  # finished ones, and the one in progress
    if job.state:
        print(f"going on from {job.path('.resume.pt')}", file=sys.stderr)
        state = job.state
    circuits = state["circuits"]

    def save(sweep):
        job.save({"circuits": circuits, "sweep": sweep})

    orders = [args.order, *range(args.orders)]  # a number is that of a random order
    to_find = [(tau, order) for tau in args.tau for order in orders]
    for tau, order in to_find[len(circuits) :]:
        if order == args.order:
            edges = sweep_order(circuit.graph, order)
        else:
            edges = sweep_order(circuit.graph, rng=random.Random(f"{args.seed} {order}"))
        sweep = discover(circuit, edges, tau, state["sweep"], save)
        row = describe(circuit, heldout, edges, sweep, found_on, args.seed)
        if order != args.order:  # the numbers alone: a sweep of 8 x 16 has 23,981 edges
            del row["circuit"], row["removed"]
        circuits.append({"tau": tau, "order": order, **row})
        state["sweep"] = None
        save(None)
    facts |= {"circuits": circuits, "warnings": doubts(facts["ioi_exact"], circuits[0], args.dtype)}
    draw_circuit(job.path(".png"), run_name(job.run.path), facts, circuit.graph)
    return facts


def doubts(exact, first, dtype):
    """Why not to believe the first circuit, a line each."""
    warnings = []
    if exact < KNOWS:
        warnings.append("gives the right answer in under half of the prompts: "
                        "its circuit is not one for that task")
    if first["margin"] < 1e-5 and dtype == "float32":
        warnings.append("a decision came as close to tau as rounding: --dtype float64 settles it")
    return warnings


# ------------------------------------------------------------------------------------- the frontier


# names of numbers, and the KL in nats that a circuit of so many edges reaches
EDGES_FOR = {"edges_kl_0.1": 0.1, "edges_kl_0.3": 0.3, "edges_kl_1": 1.0}
LEAST_KL = 1e-6  # float32 does not tell less from 0, which has no logarithm


def measured_points(result):
    """(edges, KL) of a model's circuits: the one without edges, then one a tau, in the fixed order.

    On held-out prompts, or on those it was found on where none are held out.
    """
    prompts = "_heldout" if result["settings"]["heldout"] else ""
    points = [(0, result[f"kl_corrupt{prompts}"])]
    for row in result["circuits"]:
        if isinstance(row["order"], str):  # a random order has a number
            points.append((row["edges"], row[f"kl{prompts}"]))
    return [(edges, max(kl, LEAST_KL)) for edges, kl in points]


def measured_on(settings):
    """Which prompts measured_points are of."""
    return "held-out prompts" if settings["heldout"] else "the prompts they were found on"


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
    that no edge is needed for takes 0; what lies otherwise outside the frontier is not guessed.
    """
    best = frontier(points)
    for (fewer, high), (more, low) in zip(best, best[1:]):
        if low <= kl <= high:
            return fewer + (more - fewer) * math.log(high / kl) / math.log(high / low)
    fewest, highest = best[0]
    return 0.0 if fewest == 0 and kl >= highest else None


def edges_at_equal_kl(result):
    """{name in EDGES_FOR: edges} as far as a result says.

    Of a single tau it says nothing, nor of a model that does not know the answers: it needs next to
    no edges, for next to nothing.
    """
    points, found = measured_points(result), {}
    if len(points) < 3 or result["ioi_exact"] < KNOWS:
        return {}
    for name, kl in EDGES_FOR.items():
        edges = edges_for_kl(points, kl)
        if edges is not None:
            found[name] = edges
    return found


# ------------------------------------------------------------------------------------- the pictures


def run_name(path):
    """The name of a run's folder, also for a .pt file in it."""
    path = Path(os.path.abspath(path))  # "." has no name
    return path.name if path.is_dir() else path.parent.name


COLORS = {"Q": "tab:red", "K": "tab:blue", "V": "tab:green", "": "0.35"}


def spot(graph, node):
    """Where a node is drawn, (x, y): blocks from bottom to top, heads left, MLPs right."""
    role, (block, head) = graph.role(node), graph.place(node)
    if role == "head":
        return head, 2 * block + 0.6
    if role == "MLP":
        return graph.n_head + 0.5, 2 * block + 1.4
    return graph.n_head / 2, 2 * graph.n_layer + 1.5 if node else -0.5


def draw_edges(axes, graph, rises):
    """rises: {kept Edge: how much KL its removal costs}; the more, the thicker."""
    connected, top = set(graph.connected(rises)), max(rises.values(), default=1)
    for edge, rise in sorted(rises.items(), key=lambda item: item[1]):
        (x0, y0), (x1, y1) = spot(graph, edge.source), spot(graph, edge.dest.node)
        x1 += {"Q": -0.15, "V": 0.15}.get(edge.dest.part, 0)  # a head's three inputs side by side
        axes.plot((x0, x1), (y0, y1), color=COLORS[edge.dest.part], alpha=0.65, zorder=1,
                  lw=0.6 + 4 * math.sqrt(max(rise, 0) / top), solid_capstyle="round",
                  ls="-" if edge in connected else ":")
    for part, kind in (("Q", "queries"), ("K", "keys"), ("V", "values"), ("", "an MLP or the end")):
        axes.plot([], [], color=COLORS[part], lw=2, label=f"into {kind}")
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


def draw_circuit(path, run, facts, graph):
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
    blocks = range(graph.n_layer)
    axes.set_yticks([2 * block + 1 for block in blocks], [f"block {block}" for block in blocks])
    axes.set_xticks([])
    axes.set_title(f"{run}\n{row['edges']} of {facts['total']:,} edges at tau {row['tau']:g}, "
                   f"KL {row['kl']:.2f}\nanswer exact: model {facts['ioi_exact']:.0%}, "
                   f"circuit {row['circuit_exact']:.0%}", loc="left", fontsize="medium")
    axes.spines[:].set_visible(False)
    save_figure(path, figure)


def draw_frontiers(path, results):
    """Edges against KL, a line for every run, and a point for every tau, also off the line."""
    from cycler import cycler
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(ls=["-", "--", ":", "-."]) * rcParams["axes.prop_cycle"])
    for result in results:
        points = measured_points(result)
        edges, kls = zip(*frontier(points))
        (line,) = axes.plot(kls, edges, label=result["run"])
        edges, kls = zip(*points[1:])
        axes.scatter(kls, edges, s=20, color=line.get_color())
    settings = results[0]["settings"]
    taus = ", ".join(f"{tau:g}" for tau in settings["tau"])
    label = f"KL(model || circuit) in nats, on {measured_on(settings)}"
    axes.set(xscale="log", xlabel=label, ylabel="edges")
    axes.set_title(f"circuits at tau {taus}\n"
                   f"a smaller tau keeps more edges; a line ends at the circuit without edges",
                   loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    save_figure(path, figure)


# --------------------------------------------------------------------------------- the command line


def answers_by(whose):
    """A column: how often the answer is the likeliest token, and how often it beats the other."""
    def show(row):
        return f"{row[f'{whose}_exact']:.0%}, {row[f'{whose}_right']:.0%}"
    return show


COLUMNS = [  # heading, how to print it; a column that no row has is left out
    ("run", column("run")),
    ("tau", column("tau", "g")),
    ("edges", column("edges", ",")),
    ("random orders", number("orders", ".1f")),
    ("connected", column("connected", ",")),
    ("heads", column("heads")),
    ("KL", column("kl", ".3f")),
    ("held out", column("kl_heldout", ".3f")),
    ("random circuits", number("kl_random", ".3f")),
    ("corrupt", column("kl_corrupt", ".3f")),
    ("answer exact", column("ioi_exact", ".0%")),
    ("right > wrong", column("ioi_right", ".0%")),
    ("by the ablated stream", answers_by("ablated")),
    ("by the circuit", answers_by("circuit")),
    ("evaluations", column("evaluations", ",")),
    ("seconds", column("seconds", ".0f")),
]
EQUAL_KL_COLUMNS = [("run", column("run"))] + [
    (f"edges for KL <= {kl:g}", column(name, ".1f")) for name, kl in EDGES_FOR.items()]


def table_rows(result):
    """A row per tau: the circuit of the fixed order, and how many edges the random orders keep."""
    for tau in result["settings"]["tau"]:
        first, *others = [row for row in result["circuits"] if row["tau"] == tau]
        counts = averages([{"orders": other["edges"]} for other in others], ["orders"])
        row = result | first | counts
        yield {name: value for name, value in row.items() if value is not None}


CIRCUIT = {  # of a result, what is printed of each of its circuits
    "tau": NUMBER, "order": (int, str), "edges": int, "connected": int, "heads": int, "kl": NUMBER,
    "kl_random": NUMBER, "kl_random_sd": NUMBER, "circuit_exact": NUMBER, "circuit_right": NUMBER,
    "evaluations": int, "seconds": NUMBER, "margin": NUMBER, "kinds": dict}
RESULT = {"total": int, "ioi_exact": NUMBER, "ioi_right": NUMBER, "ablated_exact": MAYBE,
          "ablated_right": MAYBE, "kl_corrupt": NUMBER, "circuits": [CIRCUIT], "warnings": [str]}
HELD_OUT = {"kl_corrupt_heldout": NUMBER, "circuits": [{"kl_heldout": NUMBER}]}  # where any are
SWEEP = {"decided": list, "kl": NUMBER, "margin": NUMBER, "evaluations": int, "batches": int,
         "seconds": NUMBER}  # of a state, see discover


def is_result(result):
    """Whether a result has the circuits that its settings ask for, and what is printed of them."""
    settings = result["settings"]
    if not fits(result, RESULT) or (settings["heldout"] and not fits(result, HELD_OUT)):
        return False
    return {circuit["tau"] for circuit in result["circuits"]} == set(settings["tau"])


def is_state(state):
    """Whether find_circuits can go on from it."""
    if not fits(state, {"circuits": [CIRCUIT], "sweep": object}):
        return False
    return state["sweep"] is None or fits(state["sweep"], SWEEP)


def print_results(results):
    """Print the tables and what cannot stand in them."""
    print()
    print_table([row for result in results for row in table_rows(result)], COLUMNS)
    settings = results[0]["settings"]
    how = "found on {count} prompts, {heldout} held out, seed {seed}; sources {order}"
    print(how.format(**settings))
    print("± is the sample standard deviation over random orders, or over random circuits")
    if len(settings["tau"]) > 1:
        print(f"\ninterpolated between the circuits of these taus, edges against log KL, on "
              f"{measured_on(settings)}\n"
              f"- is out of their range, or of a model that does not know the answers")
        rows = [{"run": result["run"]} | edges_at_equal_kl(result) for result in results]
        if any(len(row) > 1 for row in rows):
            print_table(rows, EQUAL_KL_COLUMNS)
        else:
            print("no model here has such a number")
    for result in results:
        first = result["circuits"][0]
        kinds = [f"{count} {kind}" for kind, count in Counter(first["kinds"]).most_common()]
        print(f"\n{result['run']}, tau {first['tau']:g}: {', '.join(kinds)}")
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")


def parse_arguments():
    """The command line. Raises UserError."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--tau", default="0.03",
        help="an edge stays removed if that raises KL by fewer nats (0.03); a list: 0.03,0.1")
    add("--order", choices=("descending", "ascending"), default="descending",
        help="of the sources of an input: later or earlier ones first (descending)")
    add("--orders", type=int, default=0, help="how many random orders to add (0)")
    add("--prompts", metavar="FILE",
        help="JSON list of clean, corrupt, answer, wrong (our templates)")
    add("--count", type=int, default=64, help="prompts to find circuits on (64); as many more, or "
        "what is left of a file, are held out")
    add("--seed", type=int, default=0,
        help="of the prompts, the random orders and the random circuits (0)")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--plot", metavar="FILE", help="one picture of all these runs: edges against KL, a point a "
        "tau (.png, .pdf or .svg)")
    add("--force", action="store_true", help="replace a result of other settings")
    args = parser.parse_args()
    args.tau = parse_list("--tau", args.tau, float)
    check_range(args, "count", 1, 10_000)
    check_range(args, "orders", 0, 1000)
    check_range(args, "seed", 0, 2**63 - 1)
    check_picture(args.plot)
    return args


def choose_device(name):
    """A torch.device for sums in float64, which mps has not. Raises UserError."""
    if name == "auto" and not torch.cuda.is_available():
        name = "cpu"
    device = knobs.pick_device(name)
    if device.type == "mps":
        raise UserError("KL is summed in float64, which mps has not: add --device=cpu")
    return device


def open_job(path, args):
    """A run as a Job, its inputs the prompts: texts, Tokens. Raises UserError or ModelError."""
    run = open_run(path)
    tokenizer = load_tokenizer(run.tokenizer)
    if args.prompts:
        prompts = read_prompts(args.prompts)
    else:
        prompts = make_prompts(tokenizer, 2 * args.count, args.seed)
    tokens = tokenize(prompts, tokenizer, run.model.config.block_size)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tokens)).hexdigest()
    settings = {
        "tau": args.tau, "order": args.order, "orders": args.orders, "seed": args.seed,
        "prompts": f"{args.prompts or 'templates'}, tokens {digest[:16]}",
        "count": min(args.count, len(prompts)), "heldout": max(0, len(prompts) - args.count),
        "dtype": args.dtype}
    job = Job(run, "acdc", settings, pictures=[".png"], force=args.force,
              is_result=is_result, is_state=is_state, gates=gate_fingerprint(run.model))
    job.inputs = prompts, tokens
    return job


def main():
    args = parse_arguments()
    device = choose_device(args.device)
    jobs = [open_job(path, args) for path in run_paths(args.runs)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        results = results_of(jobs, partial(find_circuits, args=args, device=device), device)
    except KeyboardInterrupt:
        advice = "the same command goes on from the last stage that was done"
        raise SystemExit(f"stopped: {advice}") from None
    print_results(results)
    if args.plot is not None:
        draw_frontiers(args.plot, results)


if __name__ == "__main__":
    knobs.cli(main)
