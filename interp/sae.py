"""Sparse autoencoders on places of the clean stream: L0 and CE score (Table 1), and the features.

    python interp/sae.py out/local_k2                         the paper's recipe (Table 5): a GPU
    python interp/sae.py out/local_k2 --small                 minutes on a CPU
    python interp/sae.py out/* --small --seeds 1,2,3          a table: mean ± deviation over seeds
    python interp/sae.py out/local_k2 --small --l1 2,5,10     the frontier of L0 against CE score
    python interp/sae.py out/local_k2 --small --features 20   what features fire on, also a page
    python interp/sae.py out/local_k2 --small --places        which places matter, nothing trained
    python interp/sae.py out/local_k2 --small --l1 2,5,10 --layer 0,1 --site mlp_out,resid

The paper trains on 409.6M activations, --small on 4.1M of 1M tokens. All l1 of a sweep train on one
stream of activations. Places (every --layer with every --site) are trained one after the other,
each as if it were alone: they multiply the time, but the memory is that of the largest one.
mlp_act is four times as wide as the others: 16 times their work, four times their buffer.

The CE score divides by what the model loses, in nats per token, when the place is zeroed. Where
that is little (--places marks less than 0.05), the score says little: choose other places.

Writes into the run folder sae.json (every number, its settings and its history), sae.pt (the
autoencoders), sae.png and, with --features, sae_features.html. What is there already with the same
settings is not made again. Ctrl-C and SIGTERM save and leave; the same command again goes on
exactly from there.

A fixed l1 does not give two models the same L0, so compare models by their frontiers (--plot draws
them over each other) or by the CE score interpolated on them at L0 = 3, which is printed, not by
one point. x~ = s x is what an autoencoder is trained on, s such that a mean row has norm sqrt(d):
    f = ReLU(x~ W_enc + b_enc)     x^ = f W_dec + b_dec     loss = |x^ - x~|^2 + l1 sum_i f_i c_i
with c_i = 1 and decoder rows of norm 1 (recipe saelens5, the paper's library) or c_i = |W_dec,i|
(saelens6). topk (Gao et al. 2024) and batchtopk (Bussmann et al. 2024) keep the k largest f_i, of a
token or on average, in place of l1.

Shape letters: n activations, d their size, F features; B windows of T tokens, V vocabulary.
"""

import html
import math
import os
import sys
import time
from collections import defaultdict
from functools import cache, partial
from itertools import cycle, product
from operator import itemgetter
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts interp/ there
import config as knobs
from eval import find_data, open_run, run_paths
from interp.common import (
    averages, check_picture, check_range, check_writable, column, number, parse_list, print_table,
    run_parser, save_figure)
from interp.activations import (
    SITES, Site, Stopped, Strongest, Text, check_stop, held_out_windows, read_windows, windows_at)
from interp.results import MAYBE, NUMBER, Job, fits, results_of, write_text, write_torch
from model import load_torch
from prepare import UserError, load_tokenizer, load_tokens

SIZES = {  # by default, as in Table 5; with --small; what it is
    "steps": (100_000, 4_000, "updates"),
    "batch_size": (4096, 1024, "activations per update"),
    "lr": (1e-5, 3e-4, "learning rate"),
    "tokens": (None, 1_000_000, "training tokens that activations are taken from, at most"),
    "buffer": (262_144, 1_000_000, "activations in memory; where all fit, each is computed once"),
    "eval_windows": (400, 100, "held-out windows of block_size tokens, at most"),
}
FEATURE_WINDOWS = 1024  # held-out windows that --features looks through, at most
DEAD_AFTER = 1000  # steps that a feature may be silent in training before it counts as dead
SAVE_EVERY = 300  # seconds: what a crash can cost
LITTLE = 0.05  # nats per token: a place that costs less when zeroed does not matter to the model
AT_L0 = 3  # where the frontiers of several models are compared


# -------------------------------------------------------------------------------- the autoencoder


class SAE(nn.Module):
    """d inputs, F features. W_enc (d, F), b_enc (F), W_dec (F, d), b_dec (d), as in SAELens."""

    def __init__(self, d, F, activation="relu", k=None):
        super().__init__()
        self.activation, self.k = activation, k
        self.W_enc = nn.Parameter(torch.zeros(d, F))
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.W_dec = nn.Parameter(torch.zeros(F, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        if activation == "batchtopk":
            # running mean of the smallest f kept, the bar in evaluation; -1: none seen yet
            self.register_buffer("threshold", torch.tensor(-1.0))

    @torch.no_grad()
    def initialise(self, recipe, seed):
        """Biases 0, the encoder the decoder's transpose.

        saelens5 then makes the decoder's rows, about sqrt(2) long, 1 long.
        """
        nn.init.kaiming_uniform_(self.W_dec, generator=torch.Generator().manual_seed(seed))
        if recipe == "saelens6":
            self.W_dec.mul_(0.1 / self.W_dec.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        if recipe == "saelens5":
            self.unit_rows()
        return self

    @torch.no_grad()
    def unit_rows(self):
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    def encode(self, x):
        """x (n, d) -> features f (n, F), none negative."""
        f = torch.addmm(self.b_enc, x, self.W_enc).relu()  # (n, F)
        if self.activation == "topk":
            values, which = f.topk(self.k, dim=-1)  # (n, k)
            f = torch.zeros_like(f).scatter(-1, which, values)  # (n, F)
        elif self.activation == "batchtopk":
            f = f * (f >= self.bar(f))
        return f

    def bar(self, f):
        """batchtopk: how large a feature of f (n, F) must be to be kept. Training moves it."""
        if not self.training or not len(f):
            return self.threshold
        kept = f.detach().flatten().topk(self.k * len(f), sorted=False).values  # (k n)
        bar = kept.min()
        average = torch.lerp(self.threshold, bar, 0.01)
        self.threshold = torch.where(self.threshold < 0, bar, average)
        return bar

    def decode(self, f):
        """f (n, F) -> x^ (n, d)."""
        return torch.addmm(self.b_dec, f, self.W_dec)

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fold(self, scale):
        """From one that reads and writes s x to one that reads and writes x.

        The decoder's rows are then 1 / s long. SAELens 5.1 makes them 1 again when it saves, which
        spoils them.
        """
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        return self


def sae_from(row, settings):
    """The SAE that a row, with its "weights", of sae.pt describes.

    It knows its place: Site(model, sae.layer, sae.site, sae.center) reads what it is to be given.
    """
    sae = SAE(*row["weights"]["W_enc"].shape, settings["activation"], row.get("k"))
    sae.load_state_dict(row["weights"])
    sae.layer, sae.site, sae.center = row["layer"], row["site"], settings["center"]
    return sae.eval()


def read_saes(path):
    """A sae.pt as Job wants it: its "saes" are SAEs. Raises UserError if it is none."""
    try:
        found = load_torch(path)
        saes = [sae_from(row, found["settings"]) for row in found["saes"]]
        return {"checkpoint": found["checkpoint"], "settings": found["settings"], "saes": saes}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # absent, damaged, of another program, or with weights that do not fit together
        raise UserError(f"{path} does not hold autoencoders of this version of interp/sae.py "
                        f"({type(error).__name__}): delete it, and make it again") from None


def load_saes(path):
    """The SAEs of a sae.pt, in the order of "saes" in sae.json. Raises UserError if it is none."""
    return read_saes(path)["saes"]


def lr_at(step, steps, lr):
    """Constant, then straight towards 0 over the last fifth (20,000 of the paper's steps)."""
    return lr * min(1, (steps - step) / max(1, steps // 5))  # step counts from 0


def l1_at(step, steps, l1):
    """Straight up from 0 over the first twentieth (5,000 of the paper's steps), then constant."""
    return l1 * min(1, step / max(1, steps // 20))


def make_adam(sae, recipe):
    beta1 = 0.0 if recipe == "saelens5" else 0.9
    return torch.optim.Adam(sae.parameters(), betas=(beta1, 0.999), fused=True)


def train_step(sae, optimizer, x, lr, l1, recipe):
    """One update on x (n, d), already scaled, by the gradient of error + penalty, means over n:

    |x^ - x|^2 + l1 sum_i f_i c_i    with c_i = 1 in saelens5 and |W_dec,i| in saelens6

    -> error, penalty; features (n, F).
    """
    optimizer.param_groups[0]["lr"] = lr
    if recipe == "saelens5":
        sae.unit_rows()
    f = sae.encode(x)  # (n, F)
    error = (sae.decode(f) - x).square().sum() / max(1, len(x))
    weighted = f if recipe == "saelens5" else f * sae.W_dec.norm(dim=1)
    penalty = l1 * weighted.sum() / max(1, len(x))
    optimizer.zero_grad()
    (error + penalty).backward()
    nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    return error.detach(), penalty.detach(), f.detach()


# ------------------------------------------------------------------------------ its training data


class Plan(NamedTuple):
    """How much of a text is read for training, and how it is held in memory."""

    windows: int  # of the text that are used
    size: int  # activations in the buffer
    cached: bool  # the buffer holds all of them
    served: int  # batches between two refills, or, of a cached text, between two shuffles


def plan_of(settings, tokens, T):
    """The Plan for so many tokens, in windows of T. Raises UserError if they are too few."""
    windows = min(tokens, settings["tokens"] or tokens) // T
    rows = windows * T
    cached = rows <= settings["buffer"]
    size = rows if cached else settings["buffer"]
    served = (size if cached else size // 2) // settings["batch_size"]
    if not served:
        raise UserError(
            f"{rows:,} training tokens, in whole windows of {T}, and a buffer of "
            f"{settings['buffer']:,} are too few for batches of {settings['batch_size']:,}: "
            f"give a smaller --batch_size or more of the others")
    return Plan(windows, size, cached, served)


class Batches:
    """Shuffled, scaled activations of the training stream: at(step) -> (batch_size, d).

    A buffer holds some activations. Half of it, drawn at random, is served and then replaced by new
    ones, and so on: memory stays flat for any corpus. A corpus that fits into the buffer is run
    through the model once and reshuffled every time it has been served. Windows come in a random
    order, another one every epoch. All orders are pure functions of the seed, so the buffer is all
    that has to be saved. Raises UserError when the text is too short, and Stopped.
    """

    def __init__(self, site, tokens, settings, seed, saved=None, stop=None):
        self.site, self.tokens, self.seed, self.stop = site, tokens, seed, stop
        self.T, self.batch = site.model.config.block_size, settings["batch_size"]
        self.device = next(site.model.parameters()).device
        self.windows, self.size, self.cached, self.served = plan_of(settings, len(tokens), self.T)
        self.fresh = -(-self.served * self.batch // self.T)  # windows in a refill
        self.epoch, self.rows, self.refill = None, None, 0
        if saved:
            self.refill, self.scale = saved["refill"], saved["scale"]
            self.buffer = saved["buffer"].to(self.device)  # (size, d)
        else:
            self.fill()

    def state(self):
        """What a resumed run needs. A cached corpus is rather run through the model once more."""
        if self.cached:
            return None
        return {"refill": self.refill, "scale": self.scale, "buffer": self.buffer}

    def fill(self):
        """Fills the buffer. The scale is that of 1,000 batches, or of all of a cached corpus."""
        if not self.cached:
            count = min(-(-1000 * self.batch // self.T), self.windows)
            norms = [x.norm(dim=1).sum().item() for x in self.read(0, count, "norms")]
            norm = sum(norms) / (count * self.T)
        self.buffer = torch.empty(self.size, self.site.d, device=self.device)  # (size, d)
        filled = 0
        for x in self.read(0, -(-self.size // self.T), "activations"):
            self.buffer[filled : filled + len(x)] = x[: self.size - filled]
            filled += len(x)
        if self.cached:
            norm = self.buffer.norm(dim=1).mean().item()
        # a place that is always 0 can stay there
        self.scale = math.sqrt(self.site.d) / norm if norm else 1.0
        self.buffer *= self.scale

    def starts(self, first, count):
        """Where windows number first, first + 1, ... begin. Every epoch has an order of its own."""
        parts = []
        while count:
            epoch, at = divmod(first, self.windows)
            if epoch != self.epoch:
                generator = np.random.default_rng((self.seed, 0, epoch))
                self.epoch, self.window_order = epoch, generator.permutation(self.windows)
            parts.append(self.window_order[at : at + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) * self.T

    def read(self, first, count, title=None):
        """Activations of windows number first, first + 1, ...: some (n, d) at a time."""
        starts = self.starts(first, count)
        for _, x in read_windows(self.site.read, self.tokens, starts, self.T, self.device,
                                 self.stop, title):
            yield x.flatten(0, 1)  # (n, d)

    def order(self, refill):
        """Rows of the buffer in the order in which this refill serves them, (served x batch)."""
        generator = np.random.default_rng((self.seed, 1, refill))
        order = generator.permutation(self.size)[: self.served * self.batch]
        return torch.from_numpy(order).to(self.device)

    def at(self, step):
        """The batch of this step; steps must come in order. Stopped leaves the buffer as it was."""
        refill, i = divmod(step, self.served)
        if refill != self.refill and not self.cached:
            first = -(-self.size // self.T) + (refill - 1) * self.fresh
            new = torch.cat(list(self.read(first, self.fresh)))  # (fresh x T, d)
            self.buffer[self.order(refill - 1)] = new[: self.served * self.batch] * self.scale
        if refill != self.refill or self.rows is None:
            self.refill, self.rows = refill, self.order(refill)
        return self.buffer[self.rows[i * self.batch : (i + 1) * self.batch]]  # (batch, d)


# -------------------------------------------------------------------------- training, with resume


class Training:
    """The SAEs of one place and seed, one for every l1 (or k), all on the same batches.

    saved: what state() gave before an interruption, or None. Raises Stopped, nothing half done.
    """

    def __init__(self, site, tokens, settings, seed, saved=None, stop=None):
        self.site, self.settings, self.seed, self.stop = site, settings, seed, stop
        self.swept = "l1" if settings["l1"] else "k"
        self.features = settings["expansion"] * site.d
        device = next(site.model.parameters()).device
        self.saes, self.optimizers, self.history = [], [], []
        for value in settings[self.swept]:
            k = value if self.swept == "k" else None
            sae = SAE(site.d, self.features, settings["activation"], k)
            self.saes.append(sae.initialise(settings["recipe"], seed).to(device))
            self.optimizers.append(make_adam(sae, settings["recipe"]))
            self.history.append({"step": [], "error": [], "penalty": [], "l0": [], "dead": []})
        # steps since each feature fired
        self.silent = torch.zeros(len(self.saes), self.features, dtype=torch.int64, device=device)
        self.step, self.seconds, self.clock = 0, 0.0, time.time()
        if saved:
            self.go_on_from(saved)
        self.batches = Batches(site, tokens, settings, seed, saved and saved["batches"], stop)

    def go_on_from(self, saved):
        """saved: what state() gave."""
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.history, self.silent = saved["history"], saved["silent"].to(self.silent.device)
        for sae, weights in zip(self.saes, saved["weights"]):
            sae.load_state_dict(weights)
        for optimizer, moments in zip(self.optimizers, saved["moments"]):
            optimizer.load_state_dict(moments)

    def state(self):
        """All it takes to go on from here, with the same bits."""
        return {"step": self.step, "seconds": self.worked(), "history": self.history,
                "silent": self.silent, "weights": [sae.state_dict() for sae in self.saes],
                "moments": [optimizer.state_dict() for optimizer in self.optimizers],
                "batches": self.batches.state()}

    def worked(self):
        """Seconds, those before an interruption included."""
        return self.seconds + time.time() - self.clock

    def advance(self):
        """One step of every SAE -> whether it is a point of the history."""
        check_stop(self.stop)
        settings, step = self.settings, self.step
        steps, recipe = settings["steps"], settings["recipe"]
        x = self.batches.at(step)  # (n, d)
        lr = lr_at(step, steps, settings["lr"])
        logged = step % max(1, steps // 100) == 0 or step == steps - 1
        for i, (sae, optimizer) in enumerate(zip(self.saes, self.optimizers)):
            l1 = l1_at(step, steps, settings["l1"][i]) if self.swept == "l1" else 0.0
            error, penalty, f = train_step(sae, optimizer, x, lr, l1, recipe)
            fired = f.amax(0) > 0  # (F)
            self.silent[i] = (self.silent[i] + 1) * ~fired
            if logged:
                self.log(i, error.item(), penalty.item(), f.count_nonzero().item() / len(x))
        self.step += 1
        return logged

    def log(self, i, error, penalty, l0):
        """A point in the history of SAE number i. Raises UserError when the loss is not finite."""
        if not math.isfinite(error + penalty):
            raise UserError(f"the loss at step {self.step} is {error + penalty}: "
                            f"give a smaller --lr")
        dead = (self.silent[i] >= DEAD_AFTER).sum().item()
        point = {"step": self.step, "error": error, "penalty": penalty, "l0": l0, "dead": dead}
        for name, value in point.items():
            self.history[i][name].append(round(value, 5))

    def rows(self):
        """What is to be said and kept of every SAE, a dict each, with its folded weights."""
        rows = []
        for sae, value, past in zip(self.saes, self.settings[self.swept], self.history):
            # fewer steps than it takes to count as dead say nothing
            dead = past["dead"][-1] / self.features if self.settings["steps"] > DEAD_AFTER else None
            weights = sae.fold(self.batches.scale).cpu().state_dict()
            rows.append({
                "layer": self.site.layer, "site": self.site.site,
                "seed": self.seed, "features": self.features, "scale": self.batches.scale,
                "seconds": round(self.worked(), 1), self.swept: value, "dead": dead,
                "history": past, "weights": weights})
        return rows


def train_seed(training, save, title):
    """Steps a Training to its end -> its rows. Now and then, and before Stopped, save(state)."""
    steps, saved = training.settings["steps"], time.time()
    with tqdm(initial=training.step, total=steps, desc=title, unit=" steps", mininterval=1) as bar:
        while training.step < steps:
            if time.time() - saved > SAVE_EVERY:
                save(training.state())
                saved = time.time()
            try:
                logged = training.advance()
            except Stopped:
                save(training.state())
                raise
            if logged:
                last = [(past["l0"][-1], past["dead"][-1]) for past in training.history]
                words = [f"L0 {l0:.1f} dead {dead}" for l0, dead in last]
                bar.set_postfix_str(", ".join(words), refresh=False)
            bar.update()
    return training.rows()


# ------------------------------------------------------------------------------------- evaluation


def token_nats(log_q, idx):
    """Sum of the cross-entropy of tokens 2 to T of idx (B, T), from log-probabilities (B, T, V)."""
    nats = -log_q[:, :-1].gather(-1, idx[:, 1:, None])  # (B, T - 1, 1)
    return nats.cpu().double().sum().item()


def divergence(log_p, log_q):
    """Sum over all positions of KL(p || q), from log-probabilities (B, T, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).cpu().double().sum().item()


def ratio(part, whole):
    return part / whole if whole else None


class Score:
    """Sums over held-out text of what one SAE does. In float64 on the CPU: some GPUs have none."""

    def __init__(self, sae):
        self.sae = sae
        self.nats = self.kl = self.error = 0.0
        self.fired = torch.zeros(sae.b_enc.numel(), dtype=torch.int64)  # (F), tokens

    def add(self, site, idx, x, log_p):
        """idx (B, T), its activations x (B T, d), the model's log-probabilities log_p (B, T, V)."""
        f = self.sae.encode(x)  # (B T, F)
        x_hat = self.sae.decode(f)  # (B T, d)
        log_q = site.run(idx, lambda old: x_hat.view_as(old)).log_softmax(-1)  # (B, T, V)
        self.nats += token_nats(log_q, idx)
        self.kl += divergence(log_p, log_q)
        self.error += (x - x_hat).cpu().double().square().sum().item()
        self.fired += (f > 0).sum(0).cpu()

    def firing(self, n):
        """What the n tokens say about how often features fire."""
        shares = self.fired[self.fired > 0].numpy() / n
        features, edges = np.histogram(np.log10(shares), bins=np.linspace(-7, 0, 29))
        density = {"log10_edges": edges.round(4).tolist(), "features": features.tolist()}
        return {"l0": self.fired.sum().item() / n, "tokens": n, "density": density,
                "never": (self.fired == 0).double().mean().item()}


def parts_of(idx, config):
    """Windows idx (B, T), so many at a time that a (B, T, V) takes 16 MB or is of one window."""
    return idx.split(max(1, 2**22 // (idx.size(1) * config.vocab_size)))


@torch.no_grad()
def score_zeroing(sites, idx, title=None):
    """What each of several places of a model matters to it on the windows idx (B, T): a dict each.

    ce_clean, ce_zero: as in score_saes.
    """
    model, predicted = sites[0].model, idx.numel() - len(idx)  # tokens
    nats_clean, nats_zero = 0.0, [0.0] * len(sites)
    parts = parts_of(idx, model.config)
    for part in tqdm(parts, desc=title, unit=" batches", leave=False, disable=title is None):
        nats_clean += token_nats(model(part).log_softmax(-1), part)
        for i, site in enumerate(sites):
            log_q = site.run(part, torch.zeros_like).log_softmax(-1)  # (B, T, V)
            nats_zero[i] += token_nats(log_q, part)
    return [{"layer": site.layer, "site": site.site,
             "ce_clean": nats_clean / predicted, "ce_zero": nats / predicted}
            for site, nats in zip(sites, nats_zero)]


@torch.no_grad()
def score_saes(site, saes, idx, stop=None, title=None):
    """What each of several folded SAEs does to the model on the windows idx (B, T) -> a dict each.

    ce_*: nats per token over the predictions of tokens 2 to T of every window; _clean as it is,
    _zero with the place replaced by 0, _sae by x^. ce_score = (zero - sae) / (zero - clean);
    kl_score the same with KL(clean || .) over all positions. l0: features f_i > 0 per token.
    explained_variance = 1 - sum |x - x^|^2 / sum |x - mean x|^2. never: share of features that stay
    silent here; density: a histogram over the others of the share of tokens they fire in. A ratio
    to 0 is None.
    """
    n, predicted = idx.numel(), idx.numel() - len(idx)  # tokens
    scores = [Score(sae) for sae in saes]
    nats_clean = nats_zero = kl_zero = squares = 0.0
    total = torch.zeros(site.d, dtype=torch.float64)
    parts = parts_of(idx, site.model.config)
    for part in tqdm(parts, desc=title, unit=" batches", leave=False, disable=title is None):
        check_stop(stop)
        x = site.read(part).flatten(0, 1)  # (B T, d)
        x64 = x.cpu().double()
        total += x64.sum(0)
        squares += x64.square().sum().item()
        log_p = site.model(part).log_softmax(-1)  # (B, T, V)
        log_q = site.run(part, torch.zeros_like).log_softmax(-1)
        nats_clean += token_nats(log_p, part)
        nats_zero += token_nats(log_q, part)
        kl_zero += divergence(log_p, log_q)
        for score in scores:
            score.add(site, part, x, log_p)

    variance = squares - total.square().sum().item() / n
    if variance <= 1e-9 * squares:  # it is rounding: all activations are the same
        variance = 0.0
    rows = []
    for score in scores:
        row = {"ce_clean": nats_clean / predicted, "ce_zero": nats_zero / predicted,
               "ce_sae": score.nats / predicted, "kl_zero": kl_zero / n, "kl_sae": score.kl / n}
        row["ce_score"] = ratio(row["ce_zero"] - row["ce_sae"], row["ce_zero"] - row["ce_clean"])
        row["kl_score"] = ratio(row["kl_zero"] - row["kl_sae"], row["kl_zero"])
        row["explained_variance"] = ratio(variance - score.error, variance)
        rows.append(row | score.firing(n))
    return rows


def zeroing_costs(row):
    """Nats per token that the model loses when the place of this row is zeroed."""
    return row["ce_zero"] - row["ce_clean"]


def warnings(row):
    """What a reader of this row of "saes" has to know, a sentence each."""
    if "l1" in row and row["l0"] > row["features"] / 20:
        yield (f"{place(row)}, {coefficient(row)}, seed {row['seed']}: L0 {row['l0']:.0f} is more "
               f"than a twentieth of {row['features']} features: not converged (take more --steps "
               f"or a larger --lr) or a small --l1")
    if zeroing_costs(row) < LITTLE:
        yield (f"{place(row)}: without this place the model loses only {zeroing_costs(row):.4f} "
               f"nats: the CE score divides by that and means little")


def score_at_l0(rows, l0):
    """The CE score at this L0, interpolated between the SAEs whose L0 lie on both sides of it.

    rows: of one place and one seed, dicts with l0 and ce_score. Linear in log L0. None outside the
    range of their L0, and where one of the two has no score.
    """
    points = sorted((row for row in rows if row["l0"] > 0), key=itemgetter("l0"))
    if not points:
        return None
    logs = [math.log(row["l0"]) for row in points]
    scores = np.array([row["ce_score"] for row in points], dtype=float)  # None becomes nan
    score = np.interp(math.log(l0), logs, scores, left=math.nan, right=math.nan)
    return None if math.isnan(score) else float(score)


# ---------------------------------------------------------------------------- features to look at


@torch.no_grad()
def top_snippets(site, sae, text, count, snippets=8, context=12, stop=None):
    """The most characteristic features, and where they fire most in a Text.

    -> [{feature, density, max, snippets}], snippets one a story. Characteristic: of the features
    that fire in at most 2 % of the tokens, those that write most, by sum f_i^2 |W_dec,i|^2.
    """
    F = sae.b_enc.numel()
    energy, fired = torch.zeros(2, F, device=text.device)  # each (F)
    tokens, best = 0, Strongest(snippets)

    def features_of(idx):
        x = site.read(idx).flatten(0, 1)  # (B T, d)
        return sae.encode(x).unflatten(0, idx.shape)  # (B, T, F)

    for f, positions, stories in text.read(features_of, stop, "features"):  # f (n, F)
        energy += f.square().sum(0)
        fired += (f > 0).sum(0)
        tokens += len(f)
        best.add(f, positions, stories)
    energy *= sae.W_dec.square().sum(1) * (fired <= 0.02 * tokens)
    chosen = energy.topk(min(count, int((energy > 0).sum()))).indices  # (N)

    def chosen_of(idx):
        return features_of(idx)[..., chosen]  # (B, T, N)

    values, positions = (kept[chosen.cpu()] for kept in best.found())  # each (N, K)
    shown = text.snippets(chosen_of, positions, context, context, stop)
    features = []
    for feature, peaks, around in zip(chosen.tolist(), values.tolist(), shown):
        firing = [snippet for snippet, peak in zip(around, peaks) if peak > 0]
        features.append({"feature": feature, "density": fired[feature].item() / tokens,
                         "max": peaks[0], "snippets": firing})
    return features


PAGE = Template("""\
<!doctype html>
<meta charset=utf-8>
<title>$title</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 22px }
h2 { font-size: 17px; margin: 1.6em 0 .3em }
p { margin: .1em 0 }
small, b { font-weight: normal; color: #888 }
b { display: inline-block; width: 4em; font-size: 13px }
span { border-radius: 3px }
</style>
<h1>$title</h1>
<p>Each feature's largest activations in held-out text, one a story: the stronger the colour, the
stronger the activation (a token under the mouse tells its own).
$features
""")


def show_features(features, tokenizer, path, title):
    """Prints them, [brackets] around tokens with half of the largest activation; writes a page."""
    page = []
    for one in features:
        head = f"feature {one['feature']}"
        note = f"fires in {one['density']:.3%} of the tokens, up to {one['max']:.2f}"
        print(f"\n{head}, {note}")
        page.append(f"<h2>{head} <small>{note}</small></h2>")
        for snippet in one["snippets"]:
            peak = snippet.values[snippet.peak]
            words, spans = [], []
            for token, value in zip(snippet.tokens, snippet.values):
                word = tokenizer.decode_single_token_bytes(token).decode(errors="replace")
                word = word.replace("\n", "↵")
                words.append(f"[{word}]" if value >= one["max"] / 2 else word)
                spans.append(shaded(word, value, one["max"]))
            print(f"{peak:8.2f}  {''.join(words)}")
            page.append(f"<p><b>{peak:.2f}</b>{''.join(spans)}")
    write_text(path, PAGE.substitute(title=html.escape(title), features="\n".join(page)))
    print(f"\nthe same as a page: {path}")


def shaded(word, value, largest):
    """A token as HTML, the stronger its activation the stronger its colour."""
    if value <= 0:
        return html.escape(word)
    return (f"<span style='background:rgba(255,140,0,{value / largest:.2f})' "
            f"title='{value:.2f}'>{html.escape(word)}</span>")


# ---------------------------------------------------------------------------------------- results


def place(row):
    return f"{row['site']} of block {row['layer']}"


def coefficient(row):
    return f"l1 {row['l1']:g}" if "l1" in row else f"k {row['k']}"


def grouped(rows, *keys):
    """{(key(row), ...): the rows that have these in common}, in the order of the first ones."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(key(row) for key in keys)].append(row)
    return groups


MEASURED = ("l0", "ce_score", "kl_score", "explained_variance", "dead", "ce_clean", "ce_sae",
            "ce_zero")


KEPT = ("layer", "site", "seed", "l1", "k", "weights")  # in sae.pt, of a row while it is trained

HISTORY = {"step": list, "error": list, "l0": list, "dead": list}
TRAINED = {"layer": int, "site": str, "seed": int, "features": int, "scale": NUMBER,
           "dead": MAYBE, "history": HISTORY}
SCORED = {**TRAINED, **{name: MAYBE for name in MEASURED}, "l0": NUMBER,
          "density": {"features": list, "log10_edges": list}}
TRAINING = {"step": int, "seconds": NUMBER, "history": [HISTORY], "silent": torch.Tensor,
            "weights": [dict], "moments": [dict], "batches": object}  # see Training.state


def is_result(result):
    """Whether a result has the SAEs that its settings ask for, and what is printed and drawn."""
    settings = result["settings"]
    swept = "l1" if settings["l1"] else "k"
    if not fits(result, {"saes": [{**SCORED, swept: NUMBER}], "warnings": [str]}):
        return False
    counts = [len(settings[name]) for name in ("layer", "site", "seeds", swept)]
    return len(result["saes"]) == math.prod(counts)


def is_state(state):
    """Whether train_saes can go on from it."""
    if not fits(state, {"rows": [{**TRAINED, "weights": dict}], "current": object}):
        return False
    return state["current"] is None or fits(state["current"], TRAINING)


def table_rows(result):
    """A row for every place and l1 (or k) of a run: averages over the seeds."""
    rows = []
    for group in grouped(result["saes"], place, coefficient).values():
        first = group[0]
        head = {"run": result["run"], "layer": first["layer"], "site": first["site"],
                "coefficient": coefficient(first), "n": len(group)}
        rows.append(head | averages(group, MEASURED))
    return rows


def rows_at_l0(result):
    """A row for every place of a run: its CE score at AT_L0 over the seeds, if the sweep has it."""
    rows = []
    for group in grouped(result["saes"], place).values():
        seeds = grouped(group, itemgetter("seed")).values()
        scores = [{"score": score_at_l0(saes, AT_L0)} for saes in seeds]
        swept = [row["l0"] for row in group]
        head = {"run": result["run"], "layer": group[0]["layer"], "site": group[0]["site"],
                "n": len(seeds), "lowest": min(swept), "highest": max(swept)}
        rows.append(head | averages(scores, ["score"]))
    return rows


def cost_in_nats(row):
    return f"{zeroing_costs(row):.4f}"


def score_in_words(row):
    return number("score", ".3f")(row) + " (interpolated)" if "score" in row else "not in the sweep"


COLUMNS = [
    ("run", column("run")),
    ("place", place),
    ("sparsity", column("coefficient")),
    ("seeds", column("n")),
    ("L0", number("l0", ".2f")),
    ("CE score", number("ce_score", ".3f")),
    ("KL score", number("kl_score", ".3f")),
    ("expl. var.", number("explained_variance", ".3f")),
    ("dead", number("dead", ".1%")),
    ("CE clean", column("ce_clean", ".4f")),  # no seed changes it
    ("CE SAE", number("ce_sae", ".4f")),
    ("CE zero", column("ce_zero", ".4f")),  # no seed changes it
    ("zeroing costs", cost_in_nats),
]
COLUMNS_AT_L0 = [
    ("run", column("run")),
    ("place", place),
    ("seeds", column("n")),
    ("L0 from", column("lowest", ".2f")),
    ("to", column("highest", ".2f")),
    (f"CE score at L0 = {AT_L0}", score_in_words),
]
COLUMNS_OF_PLACES = [
    ("run", column("run")),
    ("place", place),
    ("CE clean", column("ce_clean", ".4f")),
    ("CE zero", column("ce_zero", ".4f")),
    ("zeroing costs", cost_in_nats),
    ("", lambda row: "says little" if zeroing_costs(row) < LITTLE else "-"),
]


LINES = ("-", "--", ":", "-.")  # for the blocks, in their order
MARKERS = dict(zip(SITES, "os^Dv"))


def names_of(results):
    """What to call each run in a picture: its path, without the folder that all of them share."""
    runs = [Path(result["run"]).absolute() for result in results]
    shared = os.path.commonpath([run.parent for run in runs])
    return [str(run.relative_to(shared)) for run in runs]


def line_of(row, settings):
    """How the place of this row is drawn: a style of line for its block, a marker for its site."""
    block = settings["layer"].index(row["layer"])
    return {"linestyle": LINES[block % len(LINES)], "marker": MARKERS[row["site"]]}


def draw_saes(path, results):
    """Training curves and firing densities of every SAE; the frontiers, a line a run and place.

    A colour is a run, or, among the curves of a single run, an SAE of each place.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    (error, l0, dead), (density, score, variance) = figure.subplots(2, 3)
    settings, places = results[0]["settings"], list(grouped(results[0]["saes"], place).values())
    several, few = len(results) > 1, len(results) * len(places) <= 6  # more words would be a blot
    colors = cycle(colormaps["tab10" if len(results) <= 10 else "tab20"].colors)
    legend = []  # of the whole picture: first the runs, then the places
    for name, color, result in zip(names_of(results), colors if several else ["0.3"], results):
        legend += score.plot([], [], color=color, label=name)
        for j, row in enumerate(result["saes"]):
            style = {"linestyle": line_of(row, settings)["linestyle"],
                     "color": color if several else f"C{j % len(places[0])}"}
            for axes, measured in ((error, "error"), (l0, "l0"), (dead, "dead")):
                axes.plot(row["history"]["step"], row["history"][measured], linewidth=1, **style)
            density.stairs(row["density"]["features"], row["density"]["log10_edges"], **style)
        for axes, measured in ((score, "ce_score"), (variance, "explained_variance")):
            draw_frontiers(axes, result, measured, color, few)
    for first, *_ in places:
        legend += score.plot([], [], color="0.3", label=place(first), **line_of(first, settings))
    figure.legend(handles=legend, loc="outside right upper", fontsize="small", handlelength=4)
    if not several and len(places[0]) <= 6:
        words = [f"{coefficient(row)}, seed {row['seed']}" for row in places[0]]
        error.legend(error.lines[: len(words)], words, fontsize="small")
    error.set(title="squared error per activation, scaled", xlabel="step", yscale="log")
    l0.set(title="L0 in training", xlabel="step", yscale="log")
    dead.set(title=f"features silent for {DEAD_AFTER:,} steps", xlabel="step",
             ylim=(0, max(1, 1.05 * dead.get_ylim()[1])))
    density.set(title="features by firing density, held-out text",
                xlabel="log10 of the share of tokens it fires in")
    score.set(title="CE score against L0, held-out text", xlabel="L0", xscale="log")
    variance.set(title="explained variance against L0, held-out text", xlabel="L0", xscale="log")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    title = "{activation}, recipe {recipe}, {steps:,} steps of {batch_size:,}"
    figure.suptitle(title.format(**settings), fontsize="medium")
    save_figure(path, figure)


def draw_frontiers(axes, result, name, color, annotated):
    """A measured number of a run's SAEs against their L0, a line a place.

    annotated: with its l1 or k beside each point.
    """
    measured = [row for row in table_rows(result) if name in row]
    for rows in grouped(measured, place).values():
        rows.sort(key=itemgetter("l0"))
        xs, ys = [row["l0"] for row in rows], [row[name] for row in rows]
        axes.plot(xs, ys, color=color, **line_of(rows[0], result["settings"]))
        for x, y, row in zip(xs, ys, rows) if annotated else ():
            axes.annotate(row["coefficient"], (x, y), textcoords="offset points",
                          xytext=(5, -10), fontsize="small")
    axes.margins(0.12)  # room for those words


# ---------------------------------------------------------------------------------------- one run


class Inputs(NamedTuple):
    """What the job of a run reads."""

    sites: list  # the Sites; their model is on the CPU until its turn comes
    eot: int
    train: np.ndarray  # tokens
    val: np.ndarray


def places_of(model, layers, args):
    """The Sites of every one of these layers with every --site."""
    return [Site(model, *place, not args.raw) for place in product(layers, args.site)]


def open_job(path, args, load):
    """A run as a Job with its Inputs, looked over. Raises UserError or ModelError.

    load: load_tokens or the like.
    """
    run = open_run(path)
    folder, meta = find_data(run, args.data)
    config = run.model.config
    layers = args.layer or [max(0, config.n_layer - 2)]
    sites = places_of(run.model, layers, args)
    settings = {"data": meta["checksum"], "layer": layers, "site": args.site,
                "center": any(site.center for site in sites), "recipe": args.recipe,
                "activation": args.activation, "l1": args.l1, "k": args.k, "seeds": args.seeds,
                "expansion": args.expansion}
    settings |= {name: getattr(args, name) for name in SIZES}
    F = args.expansion * min(site.d for site in sites)
    if args.k and not 1 <= min(args.k) <= max(args.k) <= F:
        raise UserError(f"--k: keep from 1 to all {F} features of {path}")
    job = Job(run, "sae", settings, {".pt": read_saes}, [".png"], args.force, is_result, is_state)
    if args.features:  # it may be the only thing left to write
        check_writable(job.path("_features.html"))
    elif job.result:
        return job  # it reads nothing more
    train, val = load(folder, "train"), load(folder, "val")
    held_out_windows(val, config.block_size, 1)  # or it is too short
    job.inputs = Inputs(sites, meta["eot"], train, val)
    return job


def train_saes(job, title, device, stop):
    """Trains and scores the SAEs of one run, or goes on with it -> its facts. Raises Stopped."""
    settings, (sites, _, train, val) = job.settings, job.inputs
    T = job.run.model.to(device).config.block_size
    state = job.state or {"rows": [], "current": None}
    rows = state["rows"]  # of the places and seeds that are done; current: of what is not

    def save(current):
        job.save({"rows": rows, "current": current})

    done = len(rows) // len(settings["l1"] or settings["k"])
    for site, seed in list(product(sites, settings["seeds"]))[done:]:
        name = f"{title}, {site.site} of block {site.layer}, seed {seed}"
        # a Training without a name: its buffer is gone before the next one fills its own
        rows += train_seed(
            Training(site, train, settings, seed, state["current"], stop), save, name)
        state["current"] = None
        save(None)

    starts = held_out_windows(val, T, settings["eval_windows"])
    idx = windows_at(val, starts, T, device)  # (B, T)
    scores = []
    for site, group in zip(sites, grouped(rows, place).values()):
        saes = [sae_from(row, settings).to(device) for row in group]
        scores += score_saes(site, saes, idx, stop, "evaluation")
    facts, kept, found = {"saes": []}, [], []
    for row, score in zip(rows, scores):
        kept.append({name: row[name] for name in KEPT if name in row})
        row = {name: value for name, value in row.items() if name != "weights"} | score
        facts["saes"].append(row)
        found += warnings(row)
    facts["warnings"] = list(dict.fromkeys(found))  # each once: some are of a place, not of an SAE
    content = {"settings": settings, "checkpoint": job.checkpoint, "saes": kept}
    write_torch(job.path(".pt"), content)
    draw_saes(job.path(".png"), [{"run": str(job.run.path), "settings": settings, **facts}])
    return facts


def print_features(job, count, device, stop):
    """The features of a run's first SAE, here and as a page."""
    (site, *_), eot, _, val = job.inputs
    T = site.model.to(device).config.block_size
    sae = load_saes(job.path(".pt"))[0].to(device)
    text = Text(val, eot, T, device, starts=held_out_windows(val, T, FEATURE_WINDOWS))
    features = top_snippets(site, sae, text, count, stop=stop)
    first = job.result["saes"][0]
    title = f"{job.run.path}: {place(first)}, {coefficient(first)}"
    print(f"\n--- {title}")
    tokenizer = load_tokenizer(job.run.tokenizer)
    show_features(features, tokenizer, job.path("_features.html"), title)


def print_places(args, device):
    """What zeroing costs, a table of every place of these runs. Nothing is trained or written."""
    rows, load = [], cache(load_tokens)
    for path in run_paths(args.runs):
        run = open_run(path)
        folder, _ = find_data(run, args.data)
        config = run.model.to(device).config
        sites = places_of(run.model, args.layer or range(config.n_layer), args)
        val = load(folder, "val")
        starts = held_out_windows(val, config.block_size, args.eval_windows)
        idx = windows_at(val, starts, config.block_size, device)  # (B, T)
        rows += [{"run": str(path)} | row for row in score_zeroing(sites, idx, str(path))]
    print_table(rows, COLUMNS_OF_PLACES)


# ------------------------------------------------------------------------------- the command line


def make_parser():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--data", help="prepared data to use (default: the run's own)")
    add("--layer", help="blocks, from 0, with commas between them (default: the last but one)")
    add("--site", help="mlp_out, attn_out, resid, mlp_act, attn_act: output of the MLP, of the "
                       "attention, of the whole block; neurons, channels of the heads; with "
                       "commas (default mlp_out)")
    add("--places", action="store_true",
        help="train nothing: print what zeroing costs, of all places or of --layer, --site")
    add("--raw", action="store_true", help="do not centre the activations over channels")
    add("--recipe", choices=["saelens5", "saelens6"], default="saelens5",
        help="(default saelens5, the paper's)")
    add("--activation", choices=["relu", "topk", "batchtopk"], default="relu",
        help="(default relu, the paper's)")
    add("--l1", help="relu: sparsity coefficients with commas between them (default 5)")
    add("--k", help="topk, batchtopk: features kept per token, with commas (default 8)")
    add("--seeds", default="1337", help="of weights and batches, with commas (default 1337)")
    add("--small", action="store_true", help="defaults for a CPU")
    for name, (paper, small, note) in SIZES.items():
        add(f"--{name}", type=type(small),
            help=f"{note} (default {paper or 'all'}, with --small {small})")
    add("--expansion", type=int, default=16, help="features per channel of the site (default 16)")
    add("--features", type=int, metavar="N",
        help="show the N most characteristic features of the first SAE")
    add("--plot", metavar="FILE", help="one picture of all these runs (.png, .pdf or .svg)")
    add("--force", action="store_true",
        help="replace results made with other settings or of other weights")
    return parser


def parse_arguments(argv):
    """Command-line words -> arguments, the settings of Table 5 or --small. Raises UserError."""
    args = make_parser().parse_args(argv)
    for name, (paper, small, _) in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.small else paper)
    for name in (*SIZES, "expansion", "features"):
        low, high = (1e-30, 1e30) if name == "lr" else (1, 2**63 - 1)
        check_range(args, name, low, high)
    useless = "k" if args.activation == "relu" else "l1"
    if getattr(args, useless) is not None:
        raise UserError(f"--{useless} has no effect with --activation {args.activation}: drop it")
    if args.activation == "relu":
        args.l1 = parse_list("--l1", "5" if args.l1 is None else args.l1, float)
    else:
        args.k = parse_list("--k", "8" if args.k is None else args.k, int)
    args.seeds = parse_list("--seeds", args.seeds, int)
    if args.layer is not None:
        args.layer = parse_list("--layer", args.layer, int)
    args.site = parse_sites(args)
    for name in ("features", "plot", "force") if args.places else ():
        if getattr(args, name):
            raise UserError(f"--{name} has no effect with --places: drop it")
    check_picture(args.plot)
    return args


def parse_sites(args):
    """The names in --site; by default, with --places, all of them. Raises UserError."""
    if args.site is None:
        return list(SITES) if args.places else ["mlp_out"]
    sites = args.site.split(",")
    if len(set(sites)) < len(sites) or not set(sites) <= set(SITES):
        raise UserError(f"--site={args.site} must be of {', '.join(SITES)}, each once, with commas "
                        f"between them")
    return sites


def main():
    args = parse_arguments(sys.argv[1:])
    device = knobs.pick_device(args.device)
    if args.places:
        return print_places(args, device)
    load = cache(load_tokens)  # each split once: every byte of it is verified
    jobs = [open_job(path, args, load) for path in run_paths(args.runs)]
    stop = knobs.StopRequest()
    try:
        results = results_of(jobs, partial(train_saes, device=device, stop=stop), device)
        for job in jobs if args.features else ():
            print_features(job, args.features, device, stop)
    except Stopped:
        raise SystemExit("stopped: the same command again goes on from here") from None
    print_table([row for result in results for row in table_rows(result)], COLUMNS)
    settings = results[0]["settings"]  # of all of them: they have the same
    if len(settings["l1"] or settings["k"]) > 1:
        print()
        print_table([row for result in results for row in rows_at_l0(result)], COLUMNS_AT_L0)
    if len(settings["seeds"]) > 1:
        print("± is the sample standard deviation over seeds")
    for result in results:
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")
    if args.plot:
        draw_saes(args.plot, results)


if __name__ == "__main__":
    knobs.cli(main)
