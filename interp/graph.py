"""A model as a graph of nodes and edges, and circuits in it (used by interp/circuits.py).

An edge carries the output of a node to an input of a later node. In a circuit, removed edges carry
the output that their source has on a corrupt prompt.

Shape letters: B prompts, T positions, C channels, H heads, D = C / H, V vocabulary, S sources,
K circuits tried at a time.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F

ALL, LAST = slice(None), slice(-1, None)  # the positions of a node's input that matter


class Dest(NamedTuple):
    """Where an edge ends: one of the inputs of a node."""
    node: int
    part: str  # Q, K or V of a head; "" of an MLP and of Resid End, which have one input


class Edge(NamedTuple):
    source: int
    dest: Dest


class Graph:
    """Nodes are numbered in the order of computation: 0 is Resid Start (token + position
    embedding), then each block's heads and its MLP, last Resid End (what ln_f reads). A head's
    output lacks the bias of out_proj, which is always there. Every node has an edge to each input
    of every node of a later stage. LayerNorm acts on the sum at each input."""

    def __init__(self, n_layer, n_head):
        self.n_layer, self.n_head = n_layer, n_head
        self.end = 1 + n_layer * (n_head + 1)
        self.stages = []  # in forward order; the nodes of one cannot feed each other
        for first in range(1, self.end, n_head + 1):
            mlp = first + n_head
            self.stages += [range(first, mlp), [mlp]]
        self.stages.append([self.end])
        # the number of a node's stage, which is also that of its input in the residual stream
        self.stage = {node: at for at, nodes in enumerate(self.stages) for node in nodes}

    def block_and_head(self, node):
        """Block and head of a head; block and None of another node."""
        block, number = divmod(node - 1, self.n_head + 1)
        is_head = node < self.end and number < self.n_head
        return block, number if is_head else None

    def dests(self, node):
        """The inputs of a node."""
        parts = [""] if self.block_and_head(node)[1] is None else "QKV"
        return [Dest(node, part) for part in parts]

    def sources(self, node):
        """The nodes that feed this one: all of earlier stages."""
        return range(self.stages[self.stage[node]][0])

    def name(self, node, part=""):
        """Such as Resid Start, A0.3, A0.3.Q, MLP 0."""
        if node == 0:
            return "Resid Start"
        if node == self.end:
            return "Resid End"
        block, head = self.block_and_head(node)
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


def unchanged(site, value):
    return value


def attention_mask(position, window):
    """position (B, T), negative on padding -> (B, T, T): 0 where a query looks, -inf elsewhere."""
    distance = position[:, :, None] - position[:, None]  # (B, T, T), from a query back to a key
    seen = (distance >= 0) & (distance < window) & (position[:, None] >= 0)
    seen |= distance == 0  # padding sees itself: a row of -inf would give nan
    return torch.where(seen, 0.0, -torch.inf)


class PatchedModel:
    """A GPT-Neo on pairs of prompts, computed node by node.

    weights: a GPTNeo's clean_state_dict(). windows: how many tokens each block sees. clean,
    corrupt, lengths: as in Tokens, on the device of the weights.
    """

    def __init__(self, weights, n_head, windows, clean, corrupt, lengths, dtype=torch.float32):
        self.graph = Graph(len(windows), n_head)
        self.weights = {}
        for name, value in weights.items():
            self.weights[name.removeprefix("transformer.")] = value.to(dtype)
        at = torch.arange(-clean.size(1), 0, device=lengths.device)  # (T)
        position = at + lengths[:, None]  # (B, T), negative on padding
        self.masks = [attention_mask(position, window) for window in windows]
        self.heads = [self.split_heads(block) for block in range(len(windows))]
        self.unembed = self.weights["lm_head.weight"].T  # (C, V)
        wte = self.weights["wte.weight"]
        positions = self.weights["wpe.weight"][position.clamp_min(0)]  # (B, T, C)
        # the output of every source, (S, B, T, C), and the input of every stage, [(B, T, C), ...]
        self.clean, self.clean_residual = self.run(wte[clean] + positions)
        self.corrupt, self.corrupt_residual = self.run(wte[corrupt] + positions)
        self.change = self.corrupt - self.clean  # (S, B, T, C)
        self.clean_out = self.read_out(self.clean_residual[-1])  # (B, C)
        p = (self.clean_out @ self.unembed).double().softmax(-1)  # (B, V)
        self.log_p = p.log().to(dtype)  # (B, V)
        self.p_unembed = p @ self.unembed.double().T  # (B, C), for E_p[d] without logits

    def split_heads(self, block):
        """A block's matrices head by head: Q, K and V (H, C, D), O (H, D, C)."""
        name = f"h.{block}.attn.attention"
        split = (self.graph.n_head, -1)
        out = self.weights[f"{name}.out_proj.weight"]  # (C, C), H * D columns
        heads = {"O": out.T.unflatten(0, split).contiguous()}
        for part in "QKV":
            matrix = self.weights[f"{name}.{part.lower()}_proj.weight"]  # (C, C), H * D rows
            heads[part] = matrix.unflatten(0, split).mT.contiguous()
        return heads

    def weight_and_bias(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], *self.weight_and_bias(name), 1e-5)

    def read_out(self, residual):
        """What Resid End reads, (..., B, T or 1, C) -> the output of ln_f at the last position."""
        return self.norm("ln_f", residual[..., -1, :])  # (..., B, C)

    def linear(self, name, x):
        return F.linear(x, *self.weight_and_bias(name))

    def output(self, node, inputs, edit=unchanged):
        """The output of a node, (..., B, T or 1, C), from its inputs, a list of such tensors.

        edit: node, its units -> its units: a head's channels, (..., D), an MLP's neurons, (..., 4C)
        """
        block, head = self.graph.block_and_head(node)
        if head is None:
            x = self.norm(f"h.{block}.ln_2", inputs[0])
            hidden = self.linear(f"h.{block}.mlp.c_fc", x)  # (..., B, T or 1, 4C)
            neurons = edit(node, F.gelu(hidden, approximate="tanh"))
            return self.linear(f"h.{block}.mlp.c_proj", neurons)
        projected = []
        for part, x in zip("QKV", inputs):
            x = self.norm(f"h.{block}.ln_1", x)
            projected.append(x @ self.heads[block][part][head])
        q, k, v = projected  # q (..., B, T or 1, D), k and v (..., B, T, D)
        mask = self.masks[block][:, -q.size(-2) :]  # (B, T or 1, T)
        scores = q @ k.transpose(-1, -2) + mask  # (..., B, T or 1, T); no 1/sqrt(D), as in GPT-Neo
        channels = edit(node, scores.softmax(-1) @ v)  # (..., B, T or 1, D)
        return channels @ self.heads[block]["O"][head]

    def run(self, x, read=unchanged, edit=unchanged):
        """Embeddings x (B, T, C) -> all sources' outputs (S, B, T, C), all stages' inputs.

        read: Dest, the residual stream (B, T, C) -> what this input reads. edit: see output
        """
        outputs, residual = [x], []
        for stage in self.graph.stages[:-1]:
            residual.append(x)
            given = []
            for node in stage:
                inputs = [read(dest, x) for dest in self.graph.dests(node)]
                given.append(self.output(node, inputs, edit))
            outputs += given
            x = x + sum(given)
            block, head = self.graph.block_and_head(stage[0])
            if head is not None:
                x = x + self.weights[f"h.{block}.attn.attention.out_proj.bias"]
        residual.append(read(Dest(self.graph.end, ""), x))
        return torch.stack(outputs), residual

    def divergence(self, residuals):
        """KL(clean model || circuit) in nats at the last position, mean over prompts, of K
        circuits: what Resid End reads in each, (K, B, T or 1, C) -> (K) float64.

        With p the clean model's distribution, E_p the expectation over next tokens under p, and d
        the change of the logits, the circuit's log q is log p + d - log E_p[exp d], and so
            KL = E_p[log p - log q] = log E_p[exp d] - E_p[d]
        Nothing large cancels here, so fp32 keeps the digits of a small KL; only sums need float64.
        """
        outs = self.read_out(residuals)  # (K, B, C)
        change = outs - self.clean_out
        mean = (change.double() * self.p_unembed).sum(-1)  # (K, B), E_p[d]
        buffer = torch.empty_like(self.log_p)  # one circuit at a time: K x B x V is too large
        log_mean_exp = []
        for row in change:
            logits = torch.addmm(self.log_p, row, self.unembed, out=buffer)  # (B, V), log p + d
            top = logits.amax(-1, keepdim=True)  # (B, 1)
            total = logits.sub_(top).exp_().sum(-1).double()  # (B)
            log_mean_exp.append(total.log() + top[:, 0].double())
        return (torch.stack(log_mean_exp) - mean).mean(-1)


class Circuit:
    """Which edges of a patched model are removed, and the inputs and outputs of every node then.

    Only what matters is computed. A node is live if it reaches Resid End over kept edges; the
    others change nothing. KL is measured at the last position, so most inputs matter only there:
    a node matters at all positions only if it reaches Resid End through a key or a value.
    """

    def __init__(self, model):
        self.model, self.graph = model, model.graph
        self.end_input = Dest(self.graph.end, "")
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
        self.inputs = {}  # {Dest: its value, (B, T or 1, C)}, computed when first needed
        for node in sorted(self.live - {0, graph.end}):
            if any(self.removed[dest] or self.changed.intersection(self.kept[dest])
                   for dest in graph.dests(node)):
                self.set_output(node, self.output_of(node, {}))

    def positions(self, dest):
        """The positions of an input that matter."""
        matters = dest.part in ("K", "V") or dest.node in self.everywhere
        return ALL if matters else LAST

    def set_output(self, node, output):
        """Set the output of this node to output (B, T or 1, C)."""
        self.current[node][:, -output.size(-2) :] = output
        self.changed.add(node)

    def input_of(self, dest):
        """The value of an input, (B, T or 1, C): on the corrupt prompts, with every kept edge
        corrected; or, if that sum is shorter and its sources are clean, on the clean prompts, with
        every removed edge corrupted."""
        if dest not in self.inputs:
            model, stage = self.model, self.graph.stage[dest.node]
            removed, kept = self.removed[dest], self.kept[dest]
            if len(removed) < len(kept) and self.changed.isdisjoint(kept):
                x = model.clean_residual[stage]  # (B, T, C)
                change = model.change[removed]  # (removed, B, T, C)
            else:
                x = model.corrupt_residual[stage]
                change = self.current[kept] - model.corrupt[kept]  # (kept, B, T, C)
            x = x + change.sum(0)
            self.inputs[dest] = x[:, self.positions(dest)]
        return self.inputs[dest]

    def output_of(self, node, new):
        """The output of a node when some of its inputs have new values, {Dest: value}."""
        inputs = []
        for dest in self.graph.dests(node):
            inputs.append(new[dest] if dest in new else self.input_of(dest))
        return self.model.output(node, inputs)

    def attempt(self, edges):
        """Try to remove the first, the first two, ... of these K edges of one stage, in one batch
        -> KL of these circuits, a list, and what changes: inputs {Dest: value}, outputs {node:
        value}, (K, B, T or 1, C) each."""
        inputs, outputs = {}, {}
        for dest in {edge.dest: None for edge in edges}:
            x = self.input_of(dest)
            tries = []
            for edge in edges:
                if edge.dest == dest:  # the sweep comes from the end, so its source is still clean
                    x = x + self.model.change[edge.source][:, self.positions(dest)]
                tries.append(x)  # (B, T or 1, C)
            inputs[dest] = torch.stack(tries)
        first = min(dest.node for dest in inputs)
        for node in sorted(node for node in self.live if node >= first):
            dests = self.graph.dests(node)
            for dest in dests:
                rows, changes = self.positions(dest), []
                for source in self.kept[dest]:
                    if source in outputs:
                        old = self.current[source][:, rows]
                        changes.append(outputs[source][:, :, rows] - old)
                if changes:
                    inputs[dest] = self.input_of(dest) + sum(changes)
            if node != self.graph.end and inputs.keys() & dests:
                outputs[node] = self.output_of(node, inputs)
        kls = self.model.divergence(inputs[self.end_input]).tolist()
        return kls, inputs, outputs

    def commit(self, edges, inputs, outputs):
        """Remove these edges, the first ones of the last attempt, which gave inputs and outputs."""
        number = len(edges) - 1
        swept = self.graph.stage[edges[0].dest.node]
        for node, output in outputs.items():
            self.set_output(node, output[number])
        for dest, x in inputs.items():
            if self.graph.stage[dest.node] == swept:
                self.inputs[dest] = x[number]
            else:
                del self.inputs[dest]  # to be summed again: rounding errors would add up
        for edge in edges:
            self.removed[edge.dest].append(edge.source)

    def kl_without(self, removed):
        """KL(clean model || circuit) once exactly these edges are removed, a float."""
        self.set_removed(removed)
        return self.model.divergence(self.input_of(self.end_input)[None]).item()
