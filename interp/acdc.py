"""Circuits: the edges of a model that ACDC keeps for the indirect-object task (Table 1 of the paper).

    python interp/acdc.py out/local_k2                          tau 0.03, 64 prompts of our own templates
    python interp/acdc.py out/local_k2 out/baseline --tau 0.03,0.1    several runs, several thresholds, one table
    python interp/acdc.py out/local_k2 --orders 8               and mean and spread over 8 random orders of the sweep
    python interp/acdc.py out/local_k2 --prompts mine.json      [{"clean": ..., "corrupt": ..., "answer": " Tom", "wrong": " Sue"}]

Task: "Then, Tom and Sue went to the park. Sue gave a ball to" -> " Tom". A corrupt prompt has other names in the three
places. The circuit is the set of edges whose inputs stay clean while all others carry what they carry on the corrupt prompts.

Graph, all positions of an edge together. Sources: `Resid Start` (token + position embedding), the output of every head
`A<block>.<head>` (without out_proj's bias, which is always there) and of every `MLP <block>`. Destinations: the Q, K and V
input of every head, the input of every MLP, `Resid End` (what ln_f reads). Every earlier source has an edge to every
destination; a block's heads feed its own MLP. LayerNorm acts on each destination's own sum.

Sweep (ACDC, Conmy et al. 2023, as the paper ran it): prev = 0; for each edge, from the end to the start: remove it; if
KL(clean model || circuit) at the last position, mean over prompts, rose by less than tau over prev, it stays removed and prev
is the new KL; else it is put back. What is kept depends on the order within a stage (all heads of a block are one stage, an MLP another), which
in the paper's library hangs on a hash seed: here heads ascend, Q, K, V, and sources descend (or --order ascending).

Exact and fast: one edge's removal changes only its destination and what that still reaches, so only this is recomputed; a node
without kept edges reaches nothing, so its own inputs go unseen; and the next edges are tried as one batch of growing removals,
of which everything up to the first refusal counts. Writes acdc.json and acdc.png beside the checkpoint; Ctrl-C and go on.
"""

import argparse
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts interp/ there
import config as knobs
from eval import earlier_result, number, open_checkpoint, print_table, refuse_mixed, result_head, result_path, run_paths, write_json
from model import GPTNeo
from prepare import load_tokenizer

TEMPLATES = [  # a name order each: the giver is the first or the second of the two
    text.replace("{G}", giver) for giver in ("{B}", "{A}") for text in (
        "Then, {A} and {B} went to the {place}. {G} gave a {object} to",
        "Then, {A} and {B} had a lot of fun at the {place}. {G} gave a {object} to",
        "When {A} and {B} got to the {place}, {G} gave a {object} to",
        "After {A} and {B} went to the {place}, {G} handed a {object} to",
        "While {A} and {B} were playing at the {place}, {G} showed a {object} to",
        "One day, {A} and {B} were at the {place}, and {G} brought a {object} to",
        "Soon, {A} and {B} found a {object} at the {place}. {G} gave the {object} to")]
NAMES = """Lily Anna Sara Emma Lucy Ella Amy Jane Kate Sue Mary Rose Mia Sarah Molly Bella Jill Luna Jenny Ann Lisa Tina Betty Penny
Grace Julie Sophie Sandy Annie Emily Alice Zoe Maria Ellie Lena Lydia Ruby Joy Kim Liz Clara Gina Becky Cindy Hannah Chloe Linda Meg
Tom Ben Tim Max Sam Jack Leo Dan Bob Nick Joe Paul John Billy Tommy Mark Jimmy Jake Pete Jim Bobby Fred Andy Peter Toby Charlie Dave
Bill Henry Mike Gary Danny Ted Alex Will James Tony Luke Pat Lee Harry Joey George Jamie Oliver David Rob Carl Finn Frank Chris""".split()
PLACES = "park beach farm zoo school lake river store market library hospital station".split()
OBJECTS = "ball book kite doll drum hat boat truck bell shell ring bone puzzle robot basket necklace".split()
WINDOW = 16  # edges tried in one batch; more is faster on a GPU, and more is thrown away at a refusal
RANDOM = 10  # random circuits of the same size that a circuit's KL is compared with


# ------------------------------------------------------------------------------------------- the task


def make_prompts(tokenizer, count, seed):
    """count distinct prompts as dicts of texts: clean, corrupt, answer, wrong. Corrupt: each of the three names replaced
    by one drawn from those that the clean prompt has not. Raises UserError on a vocabulary without names."""
    rng = random.Random(seed)
    known = lambda words: [word for word in words if len(tokenizer.encode_ordinary(" " + word)) == 1]
    names, places, objects = known(NAMES), known(PLACES), known(OBJECTS)
    if len(names) < 5 or not places or not objects:
        raise UserError(f"only {len(names)} of our names, {len(places)} places and {len(objects)} objects are single tokens "
                         f"of this tokenizer: give prompts of its own with --prompts FILE")
    prompts, seen = [], set()
    for turn in range(100 * count):
        if len(prompts) == count:
            return prompts
        template = TEMPLATES[turn % len(TEMPLATES)]
        A, B = rng.sample(names, 2)
        words = {"place": rng.choice(places), "object": rng.choice(objects)}
        clean = template.format(A=A, B=B, **words)
        if clean in seen:
            continue
        seen.add(clean)
        # the third name has a slot of its own, so that it need not be one of the first two
        giver = "B" if template in TEMPLATES[: len(TEMPLATES) // 2] else "A"
        first, _, second = template.rpartition("{" + giver + "}")
        others = [rng.choice([name for name in names if name not in (A, B)]) for _ in range(3)]
        corrupt = first.format(A=others[0], B=others[1], **words) + others[2] + second.format(**words)
        answer, wrong = (A, B) if giver == "B" else (B, A)
        prompts.append({"clean": clean, "corrupt": corrupt, "answer": f" {answer}", "wrong": f" {wrong}"})
    raise UserError(f"our templates and this tokenizer's names make fewer than {count} different prompts: lower --count")


def read_prompts(path):
    """A --prompts file -> its list of dicts. Raises UserError."""
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read prompts from {path}: {' '.join(str(error).split())}") from None
    keys = ("clean", "corrupt", "answer", "wrong")
    if not isinstance(prompts, list) or not prompts or not all(
            isinstance(prompt, dict) and all(isinstance(prompt.get(key), str) for key in keys) for prompt in prompts):
        raise UserError(f'{path} must be a list of {{"clean": TEXT, "corrupt": TEXT, "answer": TEXT, "wrong": TEXT}}')
    return prompts


def tokenize(prompts, tokenizer, block_size):
    """Texts -> tokens clean and corrupt (B, T), left-padded to the longest, lengths (B), answers and wrong ones (B), each
    int64. Raises UserError on a pair of unequal length or of equals, a prompt that is too long, an answer of several tokens."""
    rows = {key: [tokenizer.encode_ordinary(prompt[key]) for prompt in prompts] for key in ("clean", "corrupt", "answer", "wrong")}
    for prompt, clean, corrupt, *names in zip(prompts, *rows.values()):
        shown = repr(prompt["clean"] if len(prompt["clean"]) < 200 else prompt["clean"][:200] + "...")
        if len(clean) != len(corrupt):
            raise UserError(f"{shown} has {len(clean)} tokens and its corrupt prompt {len(corrupt)}: both must be equally long")
        if clean == corrupt or prompt["answer"] == prompt["wrong"]:
            raise UserError(f"{shown}: the corrupt prompt must differ from the clean one, and the wrong answer from the right one")
        if len(clean) > block_size:
            raise UserError(f"{shown} has {len(clean)} tokens, the model takes {block_size}")
        for key, name in zip(("answer", "wrong"), names):
            if len(name) != 1:
                raise UserError(f"{prompt[key]!r} is {len(name)} tokens of this tokenizer, not one: names must be single "
                                 f"tokens, as a rule with their leading space")
    T = max(map(len, rows["clean"]))
    pad = lambda rows: torch.tensor([[0] * (T - len(row)) + row for row in rows])
    return (pad(rows["clean"]), pad(rows["corrupt"]), torch.tensor([len(row) for row in rows["clean"]]),
            torch.tensor(rows["answer"])[:, 0], torch.tensor(rows["wrong"])[:, 0])


# ------------------------------------------------------------------------------------------- the graph


class Graph:
    """Names and order of nodes and edges. Nodes are numbered as they are computed: 0 is Resid Start, then each block's heads
    and its MLP, last Resid End. A destination is (node, input), input one of Q, K, V or, where there is only one, "".
    An edge is (source node, destination)."""

    def __init__(self, n_layer, n_head):
        self.n_layer, self.n_head, self.end = n_layer, n_head, 1 + n_layer * (n_head + 1)
        # stages in forward order: the nodes of one cannot feed each other
        self.stages = []
        for first in range(1, self.end, n_head + 1):
            self.stages += [range(first, first + n_head), range(first + n_head, first + n_head + 1)]
        self.stages.append(range(self.end, self.end + 1))

    def place(self, node):
        """Block and head of a head; block and None of an MLP."""
        block, head = divmod(node - 1, self.n_head + 1)
        return block, head if head < self.n_head else None

    def stage(self, node):
        """The number of a node's stage, which is also that of its input in the residual stream; not for Resid Start."""
        block, head = self.place(node)
        return 2 * block + (head is None) if node < self.end else len(self.stages) - 1

    def is_head(self, node):
        return 0 < node < self.end and self.place(node)[1] is not None

    def inputs(self, node):
        """The destinations of a node."""
        return [(node, part) for part in ("QKV" if self.is_head(node) else [""])]

    def sources(self, node):
        """The nodes that feed this one: all of earlier stages."""
        return range(node - self.place(node)[1] if self.is_head(node) else node)

    def name(self, node, part=""):
        if node in (0, self.end):
            return "Resid End" if node else "Resid Start"
        block, head = self.place(node)
        return f"MLP {block}" if head is None else f"A{block}.{head}" + (f".{part}" if part else "")

    def edge_name(self, edge):
        return f"{self.name(edge[0])}->{self.name(*edge[1])}"

    def kind(self, edge):
        """A0.1->A2.3.Q is a head->Q, MLP 1->Resid End an MLP->Resid End, ..."""
        source, (node, part) = edge
        return (f"{'head' if self.is_head(source) else self.name(source).split()[0].replace('Resid', 'Resid Start')}->"
                f"{part or self.name(node).split()[0].replace('Resid', 'Resid End')}")

    def sweep(self, order="descending", rng=None):
        """All edges, stage by stage from the end. order: of the sources of a destination; with rng, a random.Random, the
        edges of a stage are shuffled instead."""
        edges = []
        for stage in reversed(self.stages):
            turn = reversed if order == "descending" else list
            of_stage = [(source, dest) for node in stage for dest in self.inputs(node) for source in turn(self.sources(node))]
            if rng is not None:
                rng.shuffle(of_stage)
            edges += of_stage
        return edges

    def connected(self, kept):
        """Those of the kept edges that lie on a path from Resid Start to Resid End."""
        forward, backward = {0}, {self.end}
        for source, (node, _) in sorted(kept, key=lambda edge: edge[1][0]):
            if source in forward:
                forward.add(node)
        for source, (node, _) in sorted(kept, key=lambda edge: -edge[1][0]):
            if node in backward:
                backward.add(source)
        return [(source, dest) for source, dest in kept if source in forward and dest[0] in backward]


class Circuit:
    """A model on pairs of prompts, some of its edges removed: their destinations get what the source gives on the corrupt
    prompt. Shapes: B prompts, T positions, C channels, D = C / H, S sources, K circuits tried at a time.

    weights: a GPTNeo's clean_state_dict(); windows: how many tokens each block sees. clean, corrupt (B, T): tokens,
    left-padded; lengths (B): how many of them count.
    """

    def __init__(self, weights, n_head, windows, clean, corrupt, lengths, dtype=torch.float32, device="cpu"):
        self.graph = Graph(len(windows), n_head)
        self.w = {name.removeprefix("transformer."): value.to(device, dtype) for name, value in weights.items()}
        T = clean.size(1)
        position = torch.arange(T) - (T - lengths[:, None])  # (B, T); negative on padding
        query, key = torch.arange(T)[:, None], torch.arange(T)
        self.mask = []  # a block each, (B, T, T): 0 where a query may look, -inf elsewhere
        for window in windows:
            seen = (key <= query) & (key > query - window) & (position[:, None, :] >= 0)
            seen |= torch.eye(T, dtype=torch.bool)  # padding sees itself: a row of -inf would give nan
            self.mask.append(torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(device, dtype))
        self.heads = []  # a block each: W_Q, W_K, W_V (H, C, D) and W_O (H, D, C)
        for block in range(len(windows)):
            matrix = lambda name: self.w[f"h.{block}.attn.attention.{name}.weight"].T
            self.heads.append({part: matrix(f"{part.lower()}_proj").unflatten(1, (n_head, -1)).transpose(0, 1).contiguous()
                               for part in "QKV"} | {"O": matrix("out_proj").unflatten(0, (n_head, -1)).contiguous()})
        self.unembed = self.w["lm_head.weight"].T  # (C, V)
        position = position.clamp_min(0).to(device)
        self.clean, self.clean_residual = self.run(clean.to(device), position)
        self.corrupt, self.corrupt_residual = self.run(corrupt.to(device), position)
        if not (self.clean_residual[-1].isfinite().all() and self.corrupt_residual[-1].isfinite().all()):
            raise UserError("the model's activations are not finite on these prompts: its training has diverged")

        # The metric's constants. With d the change of the logits, KL = log E_p[exp d] - E_p[d], E_p over the clean model's
        # vocabulary: nothing large cancels, so fp32 keeps its digits.
        self.y_clean = self.norm("ln_f", self.clean_residual[-1][:, -1])  # (B, C)
        p = (self.y_clean @ self.unembed).double().softmax(-1)  # (B, V)
        self.log_p, self.p_unembed = p.log().to(dtype), p @ self.unembed.double().T  # (B, V), (B, C)
        self.evaluations = self.batches = 0
        self.restore([])

    # ---- the model, a node at a time

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def mlp(self, block, x):
        """(..., C) -> (..., C)"""
        linear = lambda name, x: F.linear(x, self.w[f"h.{block}.mlp.{name}.weight"], self.w[f"h.{block}.mlp.{name}.bias"])
        return linear("c_proj", F.gelu(linear("c_fc", self.norm(f"h.{block}.ln_2", x)), approximate="tanh"))

    def project(self, block, head, part, x):
        """The queries, keys or values of a head: (..., C) -> (..., D)."""
        return self.norm(f"h.{block}.ln_1", x) @ self.heads[block][part][head]

    def attend(self, block, head, q, k, v):
        """q (..., T or 1, D), k and v (..., T, D) -> the head's output (..., T or 1, C); no 1/sqrt(D), as in GPT-Neo."""
        scores = q @ k.transpose(-1, -2) + self.mask[block][:, -q.size(-2):]  # (..., B, T or 1, T)
        return scores.softmax(-1) @ v @ self.heads[block]["O"][head]

    def run(self, idx, position):
        """The whole model: tokens and positions (B, T) -> every source's output (S, B, T, C), every stage's input (B, T, C)."""
        outputs, residual = [self.w["wte.weight"][idx] + self.w["wpe.weight"][position]], []
        x = outputs[0]  # (B, T, C)
        for block in range(len(self.heads)):
            residual.append(x)
            heads = [self.attend(block, head, *(self.project(block, head, part, x) for part in "QKV"))
                     for head in range(self.graph.n_head)]
            x = x + sum(heads) + self.w[f"h.{block}.attn.attention.out_proj.bias"]
            residual.append(x)
            outputs += [*heads, self.mlp(block, x)]
            x = x + outputs[-1]
        return torch.stack(outputs), [*residual, x]

    def kl(self, x):
        """KL(clean model || circuit) in nats, mean over prompts: what ln_f reads last (K, B, C) -> (K) float64."""
        change = self.norm("ln_f", x) - self.y_clean  # (K, B, C)
        mean = (change.double() * self.p_unembed).sum(-1)  # (K, B), E_p[d]
        buffer = torch.empty_like(self.log_p)  # a circuit at a time: K x B x V logits would not fit a cache
        kl = []
        for row in change:
            logits = torch.addmm(self.log_p, row, self.unembed, out=buffer)  # (B, V), log p + d
            top = logits.amax(-1, keepdim=True)
            kl.append(logits.sub_(top).exp_().sum(-1).double().log() + top[:, 0].double())
        self.evaluations += len(x)
        self.batches += 1
        return (torch.stack(kl) - mean).mean(-1)

    # ---- the state: which edges are removed, and what every node reads and gives

    def restore(self, removed):
        """Remove exactly these edges, and compute anew every node that this changes and that still reaches Resid End."""
        graph = self.graph
        self.removed = defaultdict(list)  # destination -> sources
        for source, dest in removed:
            self.removed[dest].append(source)
        # live: nodes that reach Resid End over kept edges; everywhere: those that do so through a key or value, so that all
        # their positions count and not the last alone
        self.kept, self.live, self.everywhere = {}, {graph.end}, set()
        for node in range(graph.end, 0, -1):
            for dest in graph.inputs(node) if node in self.live else ():
                gone = set(self.removed[dest])
                self.kept[dest] = [source for source in graph.sources(node) if source not in gone]
                self.live.update(self.kept[dest])
                if self.positions(dest) == slice(None):
                    self.everywhere.update(self.kept[dest])
        self.current, self.changed = self.clean.clone(), set()  # (S, B, T, C); the nodes that no longer give what clean says
        self.inputs, self.projections = {}, {}  # by destination, made when first needed: (B, T or 1, C), (B, T or 1, D)
        for node in sorted(self.live - {0, graph.end}):
            if any(self.removed[dest] or not self.changed.isdisjoint(self.kept[dest]) for dest in graph.inputs(node)):
                self.give(node, self.output(node, {}))

    def positions(self, dest):
        """The positions of a destination's input that count: all of them, or the last."""
        return slice(None) if dest[1] in ("K", "V") or dest[0] in self.everywhere else slice(-1, None)

    def give(self, node, output):
        """output (B, T or 1, C) is what this node gives from now on."""
        self.current[node][:, -output.size(-2):] = output
        self.changed.add(node)

    def input(self, dest):
        """What a destination reads, (B, T or 1, C): the corrupt run's input with its kept edges set right, or, while its
        sources are all clean, the clean run's with its removed ones spoilt, whichever are fewer."""
        if dest not in self.inputs:
            stage, rows = self.graph.stage(dest[0]), self.positions(dest)
            removed, kept = self.removed[dest], self.kept[dest]
            if len(removed) < len(kept) and self.changed.isdisjoint(kept):
                x, change = self.clean_residual[stage], self.corrupt[removed] - self.clean[removed]
            else:
                x, change = self.corrupt_residual[stage], self.current[kept] - self.corrupt[kept]
            self.inputs[dest] = (x + change.sum(0))[:, rows]
        return self.inputs[dest]

    def output(self, node, new):
        """What a node gives, (..., B, T or 1, C), when some of its destinations read something new, {destination: input}."""
        block, head = self.graph.place(node)
        if head is None:
            return self.mlp(block, new[node, ""] if new else self.input((node, "")))
        qkv = []
        for dest in self.graph.inputs(node):
            if dest in new:
                qkv.append(self.project(block, head, dest[1], new[dest]))
            else:
                if dest not in self.projections:
                    self.projections[dest] = self.project(block, head, dest[1], self.input(dest))
                qkv.append(self.projections[dest])
        return self.attend(block, head, *qkv)

    def attempt(self, edges):
        """KL after removing the first, the first two, ... all of these edges of one stage: (K,) floats. Its sources are
        clean, since the sweep goes from the end to the start."""
        graph, end = self.graph, (self.graph.end, "")
        self.edges, self.new_inputs, self.new_outputs = edges, {}, {}
        for dest in dict.fromkeys(dest for _, dest in edges):
            x, rows, tries = self.input(dest), self.positions(dest), []
            for source, at in edges:
                if at == dest:
                    x = x + (self.corrupt[source] - self.clean[source])[:, rows]
                tries.append(x)
            self.new_inputs[dest] = torch.stack(tries)  # (K, B, T or 1, C)
        first = min(node for node, _ in self.new_inputs)
        for node in sorted(node for node in self.live if node >= first):
            for dest in graph.inputs(node):
                changed = [source for source in self.kept[dest] if source in self.new_outputs]
                if changed:
                    rows = self.positions(dest)
                    self.new_inputs[dest] = self.input(dest) + sum(
                        self.new_outputs[source][:, :, rows] - self.current[source][:, rows] for source in changed)
            new = {dest: self.new_inputs[dest] for dest in graph.inputs(node) if dest in self.new_inputs}
            if new and node != graph.end:
                self.new_outputs[node] = self.output(node, new)
        return self.kl(self.new_inputs[end][:, :, -1]).tolist()

    def commit(self, count):
        """Remove the first count of the edges of the last attempt."""
        if count:
            for node, outputs in self.new_outputs.items():
                self.give(node, outputs[count - 1])
            swept = {dest for _, dest in self.edges}
            for dest, inputs in self.new_inputs.items():
                self.projections.pop(dest, None)
                if dest in swept:
                    self.inputs[dest] = inputs[count - 1]
                else:
                    del self.inputs[dest]  # to be summed anew: adding up changes would drift
            for source, dest in self.edges[:count]:
                self.removed[dest].append(source)
        self.edges, self.new_inputs, self.new_outputs = [], {}, {}

    def result(self):
        """KL(clean model || circuit), a float, and the circuit's logits at the last position, (B, V)."""
        x = self.input((self.graph.end, ""))[:, -1]
        return self.kl(x[None]).item(), self.norm("ln_f", x) @ self.unembed


def discover(circuit, edges, tau, state=None, save=lambda state: None):
    """ACDC's sweep over these edges, in this order -> its state, a dict with "decided", an entry per edge: [kept, by how much
    its removal raised KL]; "kl" of what is left; "margin", how close a decision came to tau; and what it took.

    state: what save was given between two stages of an earlier sweep, to go on from there, to the last bit. Nodes without
    kept edges reach nothing: their in-edges would raise KL by exactly 0, so they are decided unseen.
    """
    first, most = (1, WINDOW) if circuit.clean.device.type == "cpu" else (2 * WINDOW, 2 * WINDOW)
    state = state or {"decided": [], "kl": 0.0, "margin": None, "evaluations": 0, "batches": 0, "seconds": 0.0}
    with tqdm(total=len(edges), initial=len(state["decided"]), unit=" edges", desc=f"tau {tau:g}", mininterval=1) as bar:
        while len(state["decided"]) < len(edges):
            began, done, kl, margin = time.time(), len(state["decided"]), state["kl"], state["margin"]
            circuit.restore([edge for edge, (kept, _) in zip(edges, state["decided"]) if not kept])
            circuit.evaluations = circuit.batches = 0
            stage = circuit.graph.stage(edges[done][1][0])
            of_stage = [edge for edge in edges[done:] if circuit.graph.stage(edge[1][0]) == stage]
            entries = {edge: [tau <= 0, 0.0] for edge in of_stage if edge[1][0] not in circuit.live}
            todo, size = [edge for edge in of_stage if edge not in entries], first
            bar.update(len(entries))
            while todo:
                removed = 0
                for edge, kl_without in zip(todo, circuit.attempt(todo[:size])):
                    rise = kl_without - kl
                    margin = min(abs(rise - tau), math.inf if margin is None else margin)
                    entries[edge] = [not rise < tau, rise]
                    if entries[edge][0]:
                        break
                    kl, removed = kl_without, removed + 1
                circuit.commit(removed)
                seen = min(removed + 1, size, len(todo))  # a refused edge is decided too
                size = min(2 * size, most) if removed == seen else first
                todo = todo[seen:]
                bar.update(seen)
            state = {"decided": state["decided"] + [entries[edge] for edge in of_stage], "kl": kl, "margin": margin,
                     "evaluations": state["evaluations"] + circuit.evaluations, "batches": state["batches"] + circuit.batches,
                     "seconds": state["seconds"] + time.time() - began}
            save(state)
    return state


# ------------------------------------------------------------------------------------------- a run's result


def accuracy(logits, answers, wrong):
    """logits (B, V), tokens (B) -> share of prompts whose likeliest token is the answer, and where it beats the wrong name."""
    rows = torch.arange(len(logits), device=logits.device)
    return ((logits.argmax(-1) == answers).double().mean().item(),
            (logits[rows, answers] > logits[rows, wrong]).double().mean().item())


def describe(circuit, edges, state, tau, order, answers, heldout, rng):
    """Everything that a result has to say of one circuit, as a dict."""
    graph = circuit.graph
    kept = [edge for edge, (keep, _) in zip(edges, state["decided"]) if keep]
    removed = [edge for edge, (keep, _) in zip(edges, state["decided"]) if not keep]
    circuit.restore(removed)
    kl, logits = circuit.result()
    exact, right = accuracy(logits, *answers)
    connected = graph.connected(kept)
    heads = {node for source, dest in connected for node in (source, dest[0]) if graph.is_head(node)}
    result = {"tau": tau, "order": order, "edges": len(kept), "connected": len(connected), "heads": len(heads), "kl": kl,
              "circuit_exact": exact, "circuit_right": right, "margin": state["margin"], "evaluations": state["evaluations"],
              "batches": state["batches"], "seconds": state["seconds"],
              "kinds": Counter(graph.kind(edge) for edge in kept)}
    random_circuits = []
    for _ in range(RANDOM):
        chosen = set(rng.sample(range(len(edges)), len(kept)))
        random_circuits.append([edge for at, edge in enumerate(edges) if at not in chosen])
    for name, where in (("", circuit), ("_heldout", heldout)):
        if where is None:
            continue
        if name:
            where.restore(removed)
            result[f"kl{name}"] = where.result()[0]
        kls = []
        for missing in random_circuits:
            where.restore(missing)
            kls.append(where.result()[0])
        result |= {f"kl_random{name}": statistics.mean(kls), f"kl_random{name}_sd": statistics.stdev(kls)}
    return result | {"circuit": {graph.edge_name(edge): rise for edge, (keep, rise) in zip(edges, state["decided"]) if keep},
                     "removed": {graph.edge_name(edge): rise for edge, (keep, rise) in zip(edges, state["decided"]) if not keep}}


def measure(run, checkpoint, args, head, prompts, tokens, device):
    """Finds the circuits of one run, or goes on with it -> its result, which is written."""
    path, resume = result_path(run, "acdc.json"), result_path(run, "acdc.resume.json")
    progress = {"checkpoint": head["checkpoint"], "settings": head["settings"], "circuits": [], "state": None}
    found = earlier_result(resume, head, True)  # one of other settings has been refused by main, or is to be replaced
    if found:
        print(f"going on from {resume}", file=sys.stderr)
        progress = found

    model = GPTNeo.from_checkpoint(checkpoint)
    build = lambda rows: Circuit(model.clean_state_dict(), model.config.n_head, model.config.windows,
                                 *(t[rows] for t in tokens[:3]), getattr(torch, args.dtype), device)
    circuit = build(slice(args.count))
    heldout = build(slice(args.count, None)) if len(tokens[0]) > args.count else None
    answers = [names[: args.count].to(device) for names in tokens[3:]]

    exact, right = accuracy(circuit.result()[1], *answers)
    everything = circuit.graph.sweep()
    circuit.restore(everything)
    result = head | {"total": len(everything), "ioi_exact": exact, "ioi_right": right, "kl_corrupt": circuit.result()[0]}
    print(f"{run}: {len(everything):,} edges; the model's likeliest token is the answer in {exact:.0%}, the answer beats the "
          f"wrong one in {right:.0%}; KL(clean || corrupt) {result['kl_corrupt']:.3f}", flush=True)

    for done, (tau, order) in enumerate((tau, order) for tau in args.tau for order in (args.order, *range(args.orders))):
        if done < len(progress["circuits"]):
            continue
        edges = circuit.graph.sweep(args.order) if order == args.order else circuit.graph.sweep(
            rng=random.Random(f"{args.seed} {order}"))
        save = lambda state: write_json(resume, progress | {"state": state})
        state = discover(circuit, edges, tau, progress["state"], save)
        row = describe(circuit, edges, state, tau, order, answers, heldout, random.Random(args.seed))
        if order != args.order:  # of random orders the numbers alone: a sweep of 8 x 16 has 23,981 edges
            del row["circuit"], row["removed"]
        progress["circuits"].append(row)
        progress["state"] = None
        write_json(resume, progress)
    result |= {"prompts": prompts, "circuits": progress["circuits"]}
    first = progress["circuits"][0]
    result |= {name: first[name] for name in ("edges", "connected")} | {"warnings": []}  # for eval.py --table1
    if exact < 0.5:
        result["warnings"].append("gives the right answer in under half of the prompts: its circuit is not one for that task")
    if first["margin"] is not None and first["margin"] < 1e-5 and args.dtype == "float32":
        result["warnings"].append("a decision came as close to tau as rounding: --dtype float64 settles it")
    draw(result_path(run, "acdc.png"), result, circuit.graph)
    write_json(path, result)  # last: where it is, the picture is too
    resume.unlink(missing_ok=True)
    return result


def rows_of(result):
    """A row per tau: its circuit of the fixed order, and mean and spread of the edges of the random ones."""
    for tau in result["settings"]["tau"]:
        first, *others = [row for row in result["circuits"] if row["tau"] == tau]
        counts = [row["edges"] for row in others]
        spread = {"orders": statistics.mean(counts), "orders_sd": statistics.stdev(counts) if counts[1:] else None} if counts else {}
        yield result | first | spread


COLUMNS = [  # heading, how to print it; a column that no row has is left out
    ("run", lambda r: r["run"]),
    ("tau", lambda r: f"{r['tau']:g}"),
    ("edges", lambda r: f"{r['edges']:,}"),
    ("random orders", number("orders", ".1f")),
    ("connected", lambda r: f"{r['connected']:,}"),
    ("heads", lambda r: str(r["heads"])),
    ("KL", lambda r: f"{r['kl']:.3f}"),
    ("held out", lambda r: f"{r['kl_heldout']:.3f}"),
    ("random circuits", number("kl_random", ".3f")),
    ("corrupt", lambda r: f"{r['kl_corrupt']:.3f}"),
    ("answer exact", lambda r: f"{r['ioi_exact']:.0%}"),
    ("right > wrong", lambda r: f"{r['ioi_right']:.0%}"),
    ("by the circuit", lambda r: f"{r['circuit_exact']:.0%}, {r['circuit_right']:.0%}"),
    ("evaluations", lambda r: f"{r['evaluations']:,}"),
    ("seconds", lambda r: f"{r['seconds']:.0f}"),
]


def draw(path, result, graph):
    """The first circuit: blocks from bottom to top, heads left, MLPs right; the thicker an edge, the more KL it costs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def spot(node):
        if node in (0, graph.end):
            return graph.n_head / 2, 2 * graph.n_layer + 1.5 if node else -0.5
        block, head = graph.place(node)
        return (graph.n_head + 0.5, 2 * block + 1.4) if head is None else (head, 2 * block + 0.6)

    row = result["circuits"][0]
    edges = {graph.edge_name(edge): edge for edge in graph.sweep()}
    kept = {edges[name]: rise for name, rise in row["circuit"].items()}
    connected, top = set(graph.connected(kept)), max(kept.values(), default=1)
    colors = {"Q": "tab:red", "K": "tab:blue", "V": "tab:green", "": "0.35"}
    figure, axes = plt.subplots(figsize=(max(6, 0.6 * graph.n_head + 3), max(4, 1.1 * graph.n_layer + 1.5)), layout="constrained")
    for (source, dest), rise in sorted(kept.items(), key=lambda item: item[1]):
        (x0, y0), (x1, y1) = spot(source), spot(dest[0])
        x1 += {"Q": -0.15, "V": 0.15}.get(dest[1], 0)  # the three inputs of a head side by side
        dangling = (source, dest) not in connected
        axes.plot((x0, x1), (y0, y1), color=colors[dest[1]], lw=0.6 + 4 * math.sqrt(max(rise, 0) / top), ls=":" if dangling else "-",
                  alpha=0.65, solid_capstyle="round", zorder=1)
    used = {node for source, dest in kept for node in (source, dest[0])}
    for node in range(graph.end + 1):
        x, y = spot(node)
        if node in used:
            axes.text(x, y, graph.name(node), ha="center", va="center", fontsize=8, zorder=3,
                      bbox={"boxstyle": "round", "fc": "white", "ec": "black", "lw": 0.8})
        else:
            axes.plot(x, y, "o", color="0.85", ms=4, zorder=2)
    for part, label in (("Q", "into queries"), ("K", "into keys"), ("V", "into values"), ("", "into an MLP or the end")):
        axes.plot([], [], color=colors[part], lw=2, label=label)
    axes.plot([], [], color="0.35", ls=":", label="dangling: on no path from start to end")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axes.set_yticks([2 * block + 1 for block in range(graph.n_layer)], [f"block {block}" for block in range(graph.n_layer)])
    axes.set_xticks([])
    axes.set_title(f"{result['run']}\n{row['edges']} of {result['total']:,} edges at tau {row['tau']:g}, KL {row['kl']:.2f}\n"
                   f"answer exact: model {result['ioi_exact']:.0%}, circuit {row['circuit_exact']:.0%}", loc="left", fontsize="medium")
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(f"{path}.tmp", format="png", dpi=130)
    plt.close(figure)
    Path(f"{path}.tmp").replace(path)


def numbers(text):
    """--tau: one or more thresholds."""
    values = [float(word) for word in text.split(",")]
    if not all(0 <= value < math.inf for value in values) or len(set(values)) < len(values):
        raise ValueError
    return values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    parser.add_argument("--tau", default="0.03", help="an edge stays out when its removal raises KL by less (0.03); a list: 0.03,0.1")
    parser.add_argument("--order", choices=("descending", "ascending"), default="descending",
                        help="of the sources of a destination: later or earlier ones first (descending)")
    parser.add_argument("--orders", type=int, default=0, help="so many random orders beside that one (0)")
    parser.add_argument("--prompts", metavar="FILE", help="JSON list of clean, corrupt, answer, wrong (our templates)")
    parser.add_argument("--count", type=int, default=64,
                        help="prompts to find it on (64); as many more, or what is left of a file, are held out")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts, the random orders and the random circuits (0)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="auto", help="auto takes cuda, else cpu")
    parser.add_argument("--force", action="store_true", help="replace a result of other settings")
    args = parser.parse_args()
    try:
        args.tau = numbers(args.tau)
    except ValueError:
        raise UserError(f"--tau={args.tau} is not a threshold in nats, or several different ones: --tau=0.03,0.1") from None
    if not 1 <= args.count <= 10_000 or not 0 <= args.orders <= 1000:
        raise UserError(f"--count={args.count} must be from 1 to 10,000, --orders={args.orders} from 0 to 1,000")
    device = knobs.pick_device("cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device)
    if device.type == "mps":
        raise UserError("KL is summed in float64, which mps has not: add --device=cpu")

    jobs = []
    for run in run_paths(args.runs):  # all of them, before the first takes its minutes
        checkpoint = open_checkpoint(run)
        tokenizer = load_tokenizer(checkpoint["tokenizer"])
        prompts = read_prompts(args.prompts) if args.prompts else make_prompts(tokenizer, 2 * args.count, args.seed)
        tokens = tokenize(prompts, tokenizer, checkpoint["config"]["block_size"])
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tokens)).hexdigest()[:16]
        settings = {"tau": args.tau, "order": args.order, "orders": args.orders, "seed": args.seed,
                    "prompts": f"{args.prompts or 'templates'}, tokens {digest}", "count": min(args.count, len(prompts)), "heldout": max(0, len(prompts) - args.count), "dtype": args.dtype}
        head = result_head(run, checkpoint, settings, device)
        earlier_result(result_path(run, "acdc.resume.json"), head, args.force)
        jobs.append((run, checkpoint, head, prompts, tokens, earlier_result(result_path(run, "acdc.json"), head, args.force)))
    refuse_mixed([head for _, _, head, *_ in jobs])
    results = []
    for run, checkpoint, head, prompts, tokens, result in jobs:
        if result:
            print(f"{result_path(run, 'acdc.json')} has it already, of {result['date']}", file=sys.stderr)
        else:
            result = measure(run, checkpoint, args, head, prompts, tokens, device)
        results.append(result)
    print()
    print_table([row for result in results for row in rows_of(result)], COLUMNS)
    print("found on {count} prompts, {heldout} held out, seed {seed}; sources {order}".format(**results[0]["settings"])
          + ("; ± is the sample standard deviation over random orders" if args.orders > 1 else ""))
    for result in results:
        kinds = sorted(result["circuits"][0]["kinds"].items(), key=lambda item: -item[1])
        print(f"\n{result['run']}, tau {result['circuits'][0]['tau']:g}: " + ", ".join(f"{count} {kind}" for kind, count in kinds))
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")


if __name__ == "__main__":
    try:
        knobs.cli(main)
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from the last stage that was done") from None
