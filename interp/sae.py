"""Sparse autoencoders (SAEs) on places of the clean stream: nats lost, L0 and CE score (Table 1).

    python -m interp.sae out/local_k2                         the paper's recipe (Table 5): a GPU
    python -m interp.sae out/local_k2 --small                 minutes on a CPU
    python -m interp.sae out/* --small --seeds 1,2,3          a table: mean ± deviation over seeds
    python -m interp.sae out/local_k2 --small --l1 2,5,10     how the loss depends on sparsity
    python -m interp.sae out/local_k2 --small --layer 0,1 --site mlp_out,resid

nats_lost is the increase of the loss, in nats per token, when the SAE's output x^ replaces the
activations x of a place. Lower is better. nats_zero is the same with zeros in place of x^. The CE
score, 1 - nats_lost / nats_zero, says little if nats_zero is below 0.05. The same l1 gives two
models different L0. So compare models at equal L0: give several --l1, to interpolate at L0 = 3.

Each --layer is combined with each --site: such a pair is called a place. The paper trains on 409.6M
activations; --small on 4.1M, from 1M tokens. With d channels and F = 16 d features (SAELens 5.1.0):
    x~ = s x, with s such that the mean norm of x~ is sqrt(d)
    f = ReLU(x~ W_enc + b_enc)     x^ = f W_dec + b_dec     loss = |x^ - x~|^2 + l1 sum_i f_i

Writes sae.json (every number), sae.png and sae.pt into the run folder. The same command continues
an interrupted one. load_saes("out/local_k2/sae.pt") gives the SAEs as modules. That file holds
    {"settings": as in sae.json, "checkpoint": digest of the clean stream, "gates": of the gates,
     "saes": [{"layer": int, "site": str, "seed": int, "l1": float, "weights":
               {"W_enc": (d, F), "b_enc": (F), "W_dec": (F, d), "b_dec": (d), all float32}}]}
in the order of "saes" in sae.json. The weights read x itself: s is part of them. If
settings["center"] and the site is mlp_out, attn_out or resid, x is without its mean over channels.

Shape letters: n activations, d their size, F features; B windows of T tokens, V vocabulary.
"""

import argparse
import math
import time
from functools import lru_cache, partial
from itertools import groupby, product
from operator import itemgetter

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import config as knobs
from eval import open_runs, plain, print_table, run_parser, save_figure, spread
from interp.activations import SITES, Site, held_out_windows, read_windows, windows_at
from interp.results import Result, list_of, measure_all
from model import load_torch, replace_file
from prepare import UserError, load_tokens

SIZES = {  # name: (default, as in Table 5; with --small; help text)
    "steps": (100_000, 4_000, "updates"),
    "batch_size": (4096, 1024, "activations per update"),
    "lr": (1e-5, 3e-4, "learning rate"),
    "tokens": (None, 1_000_000, "training tokens that activations are taken from, at most"),
    "buffer": (262_144, 1_000_000, "activations in memory; if all fit, each is computed once"),
    "eval_windows": (400, 100, "held-out windows of block_size tokens, at most"),
}
SHARED = ["run", "layer", "site", "l1", "nats_zero", "ce_clean", "ce_zero"]  # equal for all seeds
MEASURED = ["nats_lost", "l0", "ce_score", "kl_score", "explained_variance", "dead", "ce_sae"]
COLUMNS = {  # of the printed table: entry of a row, its format
    "run": "", "layer": "", "site": "", "l1": "g", "n": "", "nats_lost": ".4f", "l0": ".2f",
    "ce_score": ".3f", "kl_score": ".3f", "explained_variance": ".3f", "dead": ".1%",
    "nats_zero": ".4f", "ce_clean": ".4f", "ce_sae": ".4f", "ce_zero": ".4f"}
DEAD_AFTER = 1000  # steps that a feature may be silent in training before it counts as dead
SAVE_EVERY = 30  # seconds: the most work that a kill can lose
LITTLE = 0.05  # nats per token: a place that costs less when zeroed does not matter to the model
AT_L0 = 3  # where models are compared
place_of = itemgetter("layer", "site")

# -------------------------------------------------------------------------------- the autoencoder


class SAE(nn.Module):
    """d inputs, F features. W_enc (d, F), b_enc (F), W_dec (F, d), b_dec (d), as in SAELens."""

    def __init__(self, d, F):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d, F))
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.W_dec = nn.Parameter(torch.zeros(F, d))
        self.b_dec = nn.Parameter(torch.zeros(d))

    @torch.no_grad()
    def initialise(self, seed):
        """Biases 0, the encoder the decoder's transpose; after that, decoder rows get norm 1."""
        nn.init.kaiming_uniform_(self.W_dec, generator=torch.Generator().manual_seed(seed))
        self.W_enc.copy_(self.W_dec.T)
        self.unit_rows()
        return self

    @torch.no_grad()
    def unit_rows(self):
        norms = self.W_dec.norm(dim=1, keepdim=True)  # (F, 1)
        self.W_dec.div_(norms.clamp_min(1e-12))

    def encode(self, x):
        """x (n, d) -> features f (n, F), none negative."""
        return torch.addmm(self.b_enc, x, self.W_enc).relu()

    def decode(self, f):
        """f (n, F) -> x^ (n, d)."""
        return torch.addmm(self.b_dec, f, self.W_dec)

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fold(self, scale):
        """Change an SAE that reads and writes s x into one that reads and writes x.

        Its decoder rows then have norm 1 / s. SAELens 5.1 normalises them again when it saves,
        which corrupts its files.
        """
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        return self


def sae_from(row, center):
    """The SAE of a row of sae.pt. Site(model, sae.layer, sae.site, sae.center) reads its inputs."""
    weights = row["weights"]
    sae = SAE(*weights["W_enc"].shape)
    sae.load_state_dict(weights)
    sae.layer, sae.site, sae.center = row["layer"], row["site"], center
    return sae


def load_saes(path):
    """The SAEs of a sae.pt, in the order of "saes" in sae.json. Raises ModelError if damaged."""
    found = load_torch(path)
    return [sae_from(row, found["settings"]["center"]) for row in found["saes"]]


def schedule(step, steps, lr, l1):
    """(lr, l1) of a step, counted from 0: l1 rises during the first 1/20 of the steps, lr falls
    during the last 1/5 (5,000 and 20,000 of the paper's steps)."""
    falling = min(1, (steps - step) / max(1, steps // 5))
    rising = min(1, step / max(1, steps // 20))
    return lr * falling, l1 * rising


def train_step(sae, optimizer, x, lr, l1):
    """One update on scaled x (n, d) -> error and penalty, whose sum is the loss; features (n, F).

    Both are means over n: of |x^ - x|^2, and of l1 sum_i f_i.
    """
    optimizer.param_groups[0]["lr"] = lr
    sae.unit_rows()
    f = sae.encode(x)  # (n, F)
    error = (sae.decode(f) - x).square().sum() / len(x)
    penalty = l1 * f.sum() / len(x)
    optimizer.zero_grad()
    (error + penalty).backward()
    nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    return error.detach(), penalty.detach(), f.detach()


# --------------------------------------------------------------------------------------- training


@lru_cache(maxsize=4)
def shuffled(count, *key):
    """0 to count - 1 in an order that is a pure function of the key."""
    return np.random.default_rng(key).permutation(count)


class Batches:
    """Shuffled, scaled activations of the training stream: at(step) -> (batch_size, d).

    Half of a buffer, drawn at random, is served and then replaced by new activations, so memory
    does not grow with the corpus. A corpus that fits into the buffer ("cached") is run through the
    model once, and shuffled each time it has been served. Raises UserError for too short a text.
    """

    def __init__(self, site, tokens, settings, seed, saved=None):
        self.site, self.tokens, self.seed = site, tokens, seed
        self.device = next(site.model.parameters()).device
        T, batch = site.model.config.block_size, settings["batch_size"]
        windows = min(len(tokens), settings["tokens"] or len(tokens)) // T
        self.cached = windows * T <= settings["buffer"]
        size = windows * T if self.cached else settings["buffer"]  # activations in the buffer
        served = (size if self.cached else size // 2) // batch  # batches until the next refill
        if not served:
            raise UserError(f"{windows * T:,} training tokens, in whole windows of {T}, and a "
                            f"buffer of {settings['buffer']:,} are too few for batches of "
                            f"{batch:,}: give a smaller --batch_size or more of the others")
        self.T, self.batch, self.windows, self.size, self.served = T, batch, windows, size, served
        self.refill = 0  # after a resume too: repeating the current refill changes nothing
        if saved:
            self.scale = saved["scale"]
            self.buffer = saved["buffer"].to(self.device)  # (size, d)
        else:
            self.fill()

    def state(self):
        """What a resumed call needs. A cached corpus is not saved: the model reads it again."""
        if self.cached:
            return None
        return {"scale": self.scale, "buffer": self.buffer}

    def fill(self):
        """Fill the buffer. The scale is that of 1,000 batches, or of all of a cached corpus."""
        d, size = self.site.d, self.size
        if not self.cached:
            count = min(math.ceil(1000 * self.batch / self.T), self.windows)
            norms = [x.norm(dim=1).sum().item() for x in self.read(0, count, "norms")]
            norm = sum(norms) / (count * self.T)
        self.buffer = torch.empty(size, d, device=self.device)  # (size, d)
        filled = 0
        for x in self.read(0, math.ceil(size / self.T), "activations"):
            self.buffer[filled : filled + len(x)] = x[: size - filled]
            filled += len(x)
        if self.cached:
            norm = self.buffer.norm(dim=1).mean().item()
        self.scale = math.sqrt(d) / norm if norm else 1.0  # a place that is always 0 stays 0
        self.buffer *= self.scale

    def read(self, first, count, title=None):
        """Activations of windows number first, first + 1, ...: some (n, d) at a time."""
        starts = []
        for number in range(first, first + count):
            epoch, at = divmod(number, self.windows)
            starts.append(shuffled(self.windows, self.seed, 0, epoch)[at] * self.T)
        batches = read_windows(self.site.read, self.tokens, starts, self.T, self.device, title)
        for _, x in batches:
            yield x.flatten(0, 1)  # (n, d)

    def rows(self, refill):
        """Rows of the buffer in the order in which this refill serves them, (served x batch)."""
        order = shuffled(self.size, self.seed, 1, refill)
        return torch.from_numpy(order[: self.served * self.batch])

    def at(self, step):
        """The batch of this step. Steps must come in order."""
        refill, number = divmod(step, self.served)
        if refill != self.refill and not self.cached:
            old = self.rows(refill - 1)
            count = math.ceil(len(old) / self.T)  # windows
            first = math.ceil(self.size / self.T) + (refill - 1) * count
            new = torch.cat([*self.read(first, count)])  # (count x T, d)
            self.buffer[old] = new[: len(old)] * self.scale
        self.refill = refill
        rows = self.rows(refill)[number * self.batch :]
        return self.buffer[rows[: self.batch]]  # (batch, d)


class Learner:
    """An SAE in training, its optimizer and its history."""

    def __init__(self, sae, l1):
        self.sae, self.l1 = sae, l1
        self.optimizer = torch.optim.Adam(sae.parameters(), betas=(0.0, 0.999), fused=True)
        self.silent = torch.zeros_like(sae.b_enc, dtype=torch.int64)  # (F), steps without firing
        self.history = {"step": [], "error": [], "penalty": [], "l0": [], "dead": []}

    def state(self):
        return {"sae": self.sae.state_dict(), "optimizer": self.optimizer.state_dict(),
                "silent": self.silent, "history": self.history}

    def load(self, state):
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.silent.copy_(state["silent"])
        self.history = state["history"]

    def update(self, x, step, steps, lr):
        """One step on x (n, d). About 100 of all steps are kept in history. Raises UserError."""
        lr, l1 = schedule(step, steps, lr, self.l1)
        error, penalty, f = train_step(self.sae, self.optimizer, x, lr, l1)
        self.silent = (self.silent + 1) * (f.amax(0) == 0)
        if step % max(1, steps // 100) and step < steps - 1:
            return
        loss = (error + penalty).item()
        if not math.isfinite(loss):
            raise UserError(f"the loss at step {step} is {loss}: give a smaller --lr")
        point = {"step": step, "error": error.item(), "penalty": penalty.item(),
                 "l0": f.count_nonzero().item() / len(x),
                 "dead": (self.silent >= DEAD_AFTER).sum().item()}
        for name, value in point.items():
            self.history[name].append(round(value, 5))


def train_saes(result, state, site, seed, tokens, title):
    """Train the SAEs of one place and seed, one for each l1, on the same batches: a dict each.

    state: of result; its "current" is the saved state of this training, or None.
    """
    settings, device = result.key["settings"], next(site.model.parameters()).device
    steps = settings["steps"]
    F = settings["expansion"] * site.d
    learners = [Learner(SAE(site.d, F).initialise(seed).to(device), l1) for l1 in settings["l1"]]
    current = state["current"] or {"step": 0, "learners": [], "batches": None}
    for learner, saved in zip(learners, current["learners"]):
        learner.load(saved)
    batches = Batches(site, tokens, settings, seed, current["batches"])
    bar = tqdm(range(current["step"], steps), initial=current["step"], total=steps, desc=title,
               unit=" steps", mininterval=1)
    saved_at = time.time()
    for step in bar:
        if time.time() - saved_at > SAVE_EVERY:
            current = {"step": step, "batches": batches.state(),
                       "learners": [learner.state() for learner in learners]}
            result.save(state | {"current": current})
            saved_at = time.time()
        x = batches.at(step)  # (n, d)
        for learner in learners:
            learner.update(x, step, steps, settings["lr"])
        bar.set_postfix(L0=[learner.history["l0"][-1] for learner in learners], refresh=False)
    rows = []
    for learner in learners:
        # unknown if there were fewer steps than a feature must be silent to count as dead
        dead = learner.history["dead"][-1] / F if steps > DEAD_AFTER else None
        weights = learner.sae.fold(batches.scale).cpu().state_dict()
        rows.append({"layer": site.layer, "site": site.site, "seed": seed, "l1": learner.l1,
                     "features": F, "scale": batches.scale, "dead": dead,
                     "history": learner.history, "weights": weights})
    return rows


# ------------------------------------------------------------------------------------- evaluation


def token_nats(log_q, idx):
    """Sum of the cross-entropy of tokens 2 to T of idx (B, T), from log-probabilities (B, T, V)."""
    nats = -log_q[:, :-1].gather(-1, idx[:, 1:, None])  # (B, T - 1, 1)
    return nats.cpu().double().sum().item()


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
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # (B, T): KL(p || q)
        self.nats += token_nats(log_q, idx)
        self.kl += divergence.cpu().double().sum().item()
        self.error += (x - x_hat).cpu().double().square().sum().item()
        self.fired += (f > 0).sum(0).cpu()


@torch.no_grad()
def score_saes(site, saes, idx, title=None):
    """What each of several folded SAEs does to the model on the windows idx (B, T): a dict each.

    ce_*: nats per token over the predictions of tokens 2 to T of every window; _clean: unchanged,
    _zero: with the place replaced by 0, _sae: by x^. ce_score = (zero - sae) / (zero - clean);
    kl_score the same with KL(clean || .) over all positions. l0: features f_i > 0 per token.
    explained_variance = 1 - sum |x - x^|^2 / sum |x - mean x|^2. never: share of features that are
    silent here; density: how many others fire in which share of tokens. A ratio to 0 is None.
    """
    n, predicted = idx.numel(), idx.numel() - len(idx)  # tokens
    zero = Score(SAE(site.d, 1).to(saes[0].W_dec))  # its x^ is 0
    scores = [Score(sae) for sae in saes]
    nats_clean, total = 0.0, torch.zeros(site.d, dtype=torch.float64)
    # as many windows at a time as give a (B, T, V) of at most 16 MB, and at least one
    parts = idx.split(max(1, 2**22 // (idx.size(1) * site.model.config.vocab_size)))
    for part in tqdm(parts, desc=title, unit=" batches", leave=False, disable=title is None):
        x = site.read(part).flatten(0, 1)  # (B T, d)
        total += x.cpu().double().sum(0)
        log_p = site.model(part).log_softmax(-1)  # (B, T, V)
        nats_clean += token_nats(log_p, part)
        for score in (zero, *scores):
            score.add(site, part, x, log_p)

    variance = zero.error - total.square().sum().item() / n
    if variance <= 1e-9 * zero.error:  # it is rounding: all activations are the same
        variance = 0.0
    clean, zeroed = nats_clean / predicted, zero.nats / predicted
    rows = []
    for score in scores:
        ce, fired = score.nats / predicted, score.fired
        shares = fired[fired > 0].numpy() / n
        features, edges = np.histogram(np.log10(shares), bins=np.linspace(-7, 0, 29))
        density = {"log10_edges": edges.round(4).tolist(), "features": features.tolist()}
        rows.append({
            "ce_clean": clean, "ce_zero": zeroed, "ce_sae": ce, "nats_lost": ce - clean,
            "nats_zero": zeroed - clean,
            "kl_zero": zero.kl / n, "kl_sae": score.kl / n,
            "ce_score": ratio(zeroed - ce, zeroed - clean),
            "kl_score": ratio(zero.kl / n - score.kl / n, zero.kl / n),
            "explained_variance": ratio(variance - score.error, variance),
            "l0": fired.sum().item() / n, "never": (fired == 0).double().mean().item(),
            "tokens": n, "density": density})
    return rows


def value_at(sweep, name, l0):
    """A number at this L0, interpolated in log L0 between the two nearest SAEs of one place and
    seed. None outside the range of their L0, and if one of the two has no such number."""
    points = sorted((row for row in sweep if row["l0"] > 0), key=itemgetter("l0"))
    if not points:
        return None
    logs = [math.log(row["l0"]) for row in points]
    values = np.array([row[name] for row in points], dtype=float)  # None becomes nan
    value = np.interp(math.log(l0), logs, values, left=math.nan, right=math.nan)
    return None if math.isnan(value) else value


def at_equal_l0(saes):
    """The numbers at AT_L0 of each place: means over seeds, None where one does not reach it."""
    places = []
    for (layer, site), rows in groupby(saes, place_of):
        sweeps = [[*sweep] for _, sweep in groupby(rows, itemgetter("seed"))]
        place = {"layer": layer, "site": site, "seeds": len(sweeps)}
        for name in ("nats_lost", "ce_score"):
            values = [value_at(sweep, name, AT_L0) for sweep in sweeps]
            place[name] = None if None in values else sum(values) / len(values)
            if len(values) > 1 and None not in values:
                place[f"{name}_sd"] = np.std(values, ddof=1)
        places.append(place)
    return {"l0": AT_L0, "places": places}


def warnings(row):
    """What a reader of this row of "saes" must know, one sentence each."""
    place = f"{row['site']} of block {row['layer']}"
    cost = row["nats_zero"]
    if row["l0"] > row["features"] / 20:
        yield (f"{place}, l1 {row['l1']:g}, seed {row['seed']}: L0 {row['l0']:.0f} is more than a "
               f"twentieth of {row['features']} features: not converged (use more --steps or a "
               f"larger --lr), or --l1 is too small")
    if cost < LITTLE:
        yield (f"{place}: zeroing this place costs only {cost:.4f} nats: the CE score divides by "
               f"that, and means little")


# ------------------------------------------------------------------------------ tables and picture


def rows_of(facts):
    return [{"run": result["run"], **row} for result in facts for row in result["saes"]]


def over_seeds(rows):
    """A DataFrame with a row for each run, place and l1: means and deviations over the seeds."""
    frame = pd.DataFrame(rows, columns=SHARED + MEASURED)
    groups = frame.astype(dict.fromkeys(MEASURED, float)).groupby(SHARED, sort=False)
    return spread(groups, MEASURED).assign(n=groups.size()).reset_index()


def print_results(facts):
    """The table, the numbers at equal L0 where several l1 were trained, and the warnings."""
    settings = facts[0]["settings"]  # of all of them: they are the same
    print_table(over_seeds(rows_of(facts)), COLUMNS)
    if len(settings["l1"]) > 1:
        print(f"\nat L0 = {AT_L0}, interpolated; - if the SAEs of a seed do not reach this L0")
        places = [{"run": result["run"], "n": place["seeds"], **place}
                  for result in facts for place in result["at_l0"]["places"]]
        print_table(pd.DataFrame(places), COLUMNS)
    if len(settings["seeds"]) > 1:
        print("± is the sample standard deviation over seeds")
    for result in facts:
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")


def draw_saes(path, facts):
    """Training and firing of every SAE; loss against L0. A colour is a run and place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    (error, l0, dead), (density, nats, score) = figure.subplots(2, 3)
    error.set(title="squared error per activation, scaled", xlabel="step", yscale="log")
    l0.set(title="L0 in training", xlabel="step", yscale="log")
    dead.set(title=f"features silent for {DEAD_AFTER:,} steps", xlabel="step")
    density.set(title="features by firing density, held-out text",
                xlabel="log10 of the share of tokens it fires in")
    nats.set(title="nats lost (lower is better), held-out text", xlabel="L0", xscale="log")
    score.set(title="CE score, held-out text", xlabel="L0", xscale="log")
    for number, (key, rows) in enumerate(groupby(rows_of(facts), itemgetter(*SHARED[:3]))):
        color, rows = f"C{number}", [*rows]
        for row in rows:
            history, firing = row["history"], row["density"]
            for axes, name in ((error, "error"), (l0, "l0"), (dead, "dead")):
                axes.plot(history["step"], history[name], linewidth=1, color=color)
            density.stairs(firing["features"], firing["log10_edges"], color=color)
        points = over_seeds(rows).sort_values("l0")
        name = plain("{}, block {}, {}".format(*key))
        nats.plot(points["l0"], points["nats_lost"], "o-", color=color, label=name)
        score.plot(points["l0"], points["ce_score"], "o-", color=color)
    nats.legend(handles=nats.lines[:6], fontsize="small")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    save_figure(path, figure)


# ------------------------------------------------------------------------ one run, command line


def sites_of(model, settings):
    """The Sites of every layer with every site of these settings. Raises UserError."""
    places = product(settings["layer"], settings["site"])
    return [Site(model, layer, site, settings["center"]) for layer, site in places]


def open_result(run, args):
    """The Result of a run. Raises UserError where it has no such block."""
    settings = {"data": run.meta["checksum"], "site": args.site,
                "layer": args.layer or [max(0, run.model.config.n_layer - 2)],
                "center": not args.raw, "l1": args.l1, "seeds": args.seeds,
                "expansion": args.expansion, **{name: getattr(args, name) for name in SIZES}}
    settings["center"] = any(site.center for site in sites_of(run.model, settings))
    return Result(run, "sae", settings, args.force, [".pt", ".png"])


def measure(result, title, device):
    """Train and score the SAEs of one run, or continue with them -> its facts."""
    run, settings = result.run, result.key["settings"]
    sites = sites_of(run.model.to(device), settings)
    T = run.model.config.block_size
    train, val = load_tokens(run.folder, "train"), load_tokens(run.folder, "val")
    idx = windows_at(val, held_out_windows(val, T, settings["eval_windows"]), T, device)  # (B, T)
    state = result.state or {"rows": [], "current": None}
    rows = state["rows"]  # of the places and seeds that are trained
    done = len(rows) // len(settings["l1"])
    for site, seed in [*product(sites, settings["seeds"])][done:]:
        name = f"{title}, block {site.layer}, {site.site}, seed {seed}"
        rows += train_saes(result, state, site, seed, train, name)
        state["current"] = None
        result.save(state)
    for site, (_, group) in zip(sites, groupby(rows, place_of)):
        group = [row for row in group if "l0" not in row]  # not yet scored
        if group:
            saes = [sae_from(row, site.center).to(device) for row in group]
            for row, score in zip(group, score_saes(site, saes, idx, "evaluation")):
                row.update(score)
            result.save(state)

    saes = []
    for row in rows:
        kept = {name: row[name] for name in ("layer", "site", "seed", "l1")}
        saes.append({**kept, "weights": row.pop("weights")})
    with replace_file(result.path(".pt")) as file:
        torch.save({**result.key, "saes": saes}, file)
    found = [warning for row in rows for warning in warnings(row)]
    facts = {"saes": rows, "at_l0": at_equal_l0(rows), "warnings": [*dict.fromkeys(found)]}
    draw_saes(result.path(".png"), [{"run": run.path, **facts}])
    return facts


def sites(text):
    """For argparse: names of SITES with commas between them."""
    names = text.split(",")
    if len(set(names)) < len(names) or not SITES.keys() >= set(names):
        raise argparse.ArgumentTypeError(f"{text} must be of {', '.join(SITES)}, each once")
    return names


def parse_arguments():
    """The command line, with the settings of Table 5 or --small. Raises UserError."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--layer", type=list_of(int),
        help="blocks, from 0, with commas between them (default: the last but one)")
    add("--site", type=sites, default=["mlp_out"],
        help="mlp_out, attn_out, resid, mlp_act, attn_act: output of the MLP, of the attention, of "
             "the whole block; neurons, channels of the heads; with commas (default mlp_out)")
    add("--raw", action="store_true", help="do not centre the activations over channels")
    add("--l1", type=list_of(float), default=[5.0],
        help="sparsity coefficients, with commas (default 5)")
    add("--seeds", type=list_of(int), default=[1337],
        help="of weights and batches, with commas (default 1337)")
    add("--small", action="store_true", help="smaller defaults, for a CPU")
    for name, (paper, small, note) in SIZES.items():
        add(f"--{name}", type=float if name == "lr" else knobs.positive,
            help=f"{note} (default {paper or 'all'}, with --small {small})")
    add("--expansion", type=knobs.positive, default=16,
        help="features per channel of the site (default 16)")
    add("--plot", type=knobs.picture, metavar="FILE", help="one picture of all these runs")
    add("--force", action="store_true",
        help="replace results made with other settings or of other weights")
    args = parser.parse_args()
    for name, (paper, small, _) in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.small else paper)
    return args


def main():
    args = parse_arguments()
    device, runs = knobs.pick_device(args.device), open_runs(args.runs, args.data)
    results = [open_result(run, args) for run in runs]
    facts = measure_all(results, partial(measure, device=device), device)
    print_results(facts)
    if args.plot:
        draw_saes(args.plot, facts)


if __name__ == "__main__":
    knobs.cli(main)
