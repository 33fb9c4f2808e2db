"""Where the time of a training step goes, for speed.py --parts: each part on its own."""

import statistics

import torch

from model import gate, head_losses
from timing import in_turn
from train import batch_at


def fresh(x):
    """The same values, where a backward pass ends: what comes before is another part's."""
    return x.detach().requires_grad_()


class Parts:
    """The parts of the step of a speed.Row, with inputs like those that they have in the step.

    A part with a backward pass is a function without arguments that returns a scalar.
    """

    def __init__(self, row):
        self.row, self.model, self.config = row, row.model, row.model.config
        rows = self.data()  # (B, T + 1)
        self.idx, self.targets = rows[:, :-1], rows[:, 1:]  # (B, T)
        with row.autocast:
            hidden, inputs, caches = self.model.clean_pass(self.idx)
        self.hidden = fresh(hidden)  # (B, T, C)
        self.inputs = [fresh(x) for x in inputs]  # one a layer, each (B, T, C)
        self.caches = [(fresh(k), fresh(v)) for k, v in caches]

    def data(self):
        return batch_at(self.row.tokens, 0, self.row.config, device=self.row.device)

    def clean_pass(self):
        return self.model.clean_pass(self.idx)[0].square().sum()

    def scores(self):
        """Of every layer's attention units, each (B, T, C or H), and neurons, each (B, T, M)."""
        if self.config.ablation == "global":
            L = self.config.n_layer
            attn, mlp = self.model.attn_gate(self.hidden), self.model.mlp_gate(self.hidden)
            return attn.chunk(L, -1), mlp.chunk(L, -1)
        blocks = self.model.transformer["h"]
        attn = [block.attn_gate(x) for x, block in zip(self.inputs, blocks)]
        return attn, [block.mlp_gate(x) for x, block in zip(self.inputs, blocks)]

    def gates(self):
        total, config = 0, self.config
        for scores_of_kind, k in zip(self.scores(), (config.k_attn, config.k_mlp)):
            for scores in scores_of_kind:
                total = total + gate(scores, k, config.gate).square().sum()
        return total

    def ablated_pass(self):
        return self.model.ablated_pass(self.hidden, self.inputs, self.caches)[0].square().sum()

    def heads(self):
        """Both streams' losses; the clean hidden states stand in for the ablated ones."""
        streams = [self.hidden]
        if self.config.ablation != "none":
            streams.append(self.hidden * 1.0)
        weight = self.model.lm_head.weight
        return head_losses(streams, weight, self.targets, [1.0] * len(streams))[0]

    def optimize(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.row.optimizer.step()

    def with_backward(self, part):
        """A part as the step runs it: compiled where the row is, under autocast, then backward."""
        if self.row.compile_mode:
            part = torch.compile(part)

        def run():
            with self.row.autocast:
                loss = part()
            loss.backward()
        return run

    def work(self):
        """{the name of a part: the function to time}, in the order of the step."""
        work = {"data": self.data, "clean pass": self.with_backward(self.clean_pass)}
        if self.config.ablation != "none":
            work["gates"] = self.with_backward(self.gates)
            work["ablated pass and gates"] = self.with_backward(self.ablated_pass)
        work["heads and losses"] = self.with_backward(self.heads)
        work["clipping and optimizer"] = self.optimize
        return work


def time_parts(row, rounds):
    """{the name of a part: its median seconds} of a built speed.Row."""
    work = Parts(row).work()
    for run in work.values():
        run()  # compiles, allocates; the optimizer, last, has every gradient
    seconds = in_turn(work, rounds, row.device)
    row.optimizer.zero_grad(set_to_none=True)
    return {name: statistics.median(values) for name, values in seconds.items()}
