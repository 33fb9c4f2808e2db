"""Sparse autoencoders on one place of the clean stream: the L0 and CE score of the paper's Table 1, and the features.

    python interp/sae.py out/local_k2                          the paper's recipe (Table 5): 409.6M activations, for a GPU
    python interp/sae.py out/local_k2 --small                  4.1M activations of 1M tokens: minutes on a CPU
    python interp/sae.py out/* --small --seeds 1,2,3           many checkpoints in one table, mean ± deviation over seeds
    python interp/sae.py out/local_k2 --small --l1 2,5,10      a sweep: all train on one stream of activations, and the
                                                               picture has the frontier of L0 against CE score
    python interp/sae.py out/local_k2 --small --features 20    what the features fire on, here and as a web page

Writes into the run folder sae.json (every number, its settings and its history), sae.pt (the autoencoders), sae.png and,
with --features, sae_features.html. What is there already with the same settings is not made again. Ctrl-C and SIGTERM
save and leave; the same command again goes on exactly from there.

A fixed l1 does not give two models the same L0, so compare models by their frontiers (--plot draws them over each
other), not by one point. x~ = s x is what an autoencoder is trained on, with s such that a mean row has norm sqrt(d):
    f = ReLU(x~ W_enc + b_enc)        x^ = f W_dec + b_dec        loss = |x^ - x~|^2 + l1 sum_i f_i c_i
with c_i = 1 and decoder rows of norm 1 (recipe saelens5, the paper's library) or c_i = |W_dec,i| (saelens6). topk
(Gao et al. 2024) and batchtopk (Bussmann et al. 2024) keep the k largest f_i, of a token or on average, in place of l1.

Shape letters: n activations, d their size, F features; B windows of T tokens, V vocabulary.
"""

import argparse
import html
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts interp/ there
import config as knobs
from eval import (earlier_result, fingerprint, mismatch, number, open_run, print_table, refuse_mixed, result_head, result_path,
                  run_paths, write_json)
from model import GPTNeo
from prepare import load_meta, load_tokenizer, load_tokens

SITES = {"mlp_out": "mlp", "attn_out": "attn.attention", "resid": "", "mlp_act": "mlp.c_proj"}  # modules of a block
PAPER = dict(steps=100_000, batch_size=4096, lr=1e-5, tokens=None, buffer=262_144, eval_windows=400)  # Table 5
SMALL = dict(steps=4_000, batch_size=1024, lr=3e-4, tokens=1_000_000, buffer=1_000_000, eval_windows=100)  # all cached
DEAD_AFTER = 1000  # steps that a feature may be silent in training before it counts as dead
WINDOWS = 32  # windows in a forward pass that reads activations; a constant, so that a resumed run rounds alike


# ------------------------------------------------------------------------------------------- the autoencoder


class SAE(nn.Module):
    """d inputs, F features. Weights W_enc (d, F), b_enc (F), W_dec (F, d), b_dec (d), as SAELens names them."""

    def __init__(self, d, F, activation="relu", k=None):
        super().__init__()
        self.activation, self.k = activation, k
        self.W_enc = nn.Parameter(torch.zeros(d, F))
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.W_dec = nn.Parameter(torch.zeros(F, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        if activation == "batchtopk":  # running mean of the smallest f kept, the bar in evaluation; -1: none seen yet
            self.register_buffer("threshold", torch.tensor(-1.0))

    @torch.no_grad()
    def initialise(self, recipe, seed):
        """Biases 0, the encoder the decoder's transpose; saelens5 then makes the decoder's rows, about sqrt(2), 1 long."""
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
            f = torch.zeros_like(f).scatter(-1, which, values)
        elif self.activation == "batchtopk":
            bar = self.threshold
            if self.training and len(x):
                bar = f.detach().flatten().topk(self.k * len(x), sorted=False).values.min()
                self.threshold = torch.where(self.threshold < 0, bar, torch.lerp(self.threshold, bar, 0.01))
            f = f * (f >= bar)
        return f

    def decode(self, f):
        """f (n, F) -> x^ (n, d)."""
        return torch.addmm(self.b_dec, f, self.W_dec)

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fold(self, scale):
        """From one that reads and writes s x to one that reads and writes x: features and output stay what they were.
        The decoder's rows are then 1 / s long (SAELens 5.1 makes them 1 again when it saves, which spoils them)."""
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        return self


def restore(row, settings):
    """The SAE that a row, with its "weights", of sae.pt describes."""
    sae = SAE(*row["weights"]["W_enc"].shape, settings["activation"], row.get("k"))
    sae.load_state_dict(row["weights"])
    return sae.eval()


def load_saes(path):
    """The SAEs of a sae.pt, in the order of "saes" in sae.json. Raises UserError when it is no such file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return [restore(row, content["settings"]) for row in content["saes"]]
    except Exception as error:  # absent, cut off, of another program: torch.load raises almost any kind
        raise UserError(f"{path} does not hold autoencoders of interp/sae.py ({type(error).__name__}): delete it, and "
                         f"make it again") from None


def lr_at(step, steps, lr):
    """Constant, then straight towards 0 over the last fifth (20,000 of the paper's 100,000 steps); step counts from 0."""
    return lr * min(1, (steps - step) / max(1, steps // 5))


def l1_at(step, steps, l1):
    """Straight up from 0 over the first twentieth (5,000 of the paper's 100,000 steps), then constant."""
    return l1 * min(1, step / max(1, steps // 20))


def make_optimizer(sae, recipe):
    return torch.optim.Adam(sae.parameters(), betas=(0.0 if recipe == "saelens5" else 0.9, 0.999), fused=True)


def train_step(sae, optimizer, x, lr, l1, recipe):
    """One update on x (n, d), already scaled -> squared error and penalty, means over n; features (n, F)."""
    optimizer.param_groups[0]["lr"] = lr
    if recipe == "saelens5":
        sae.unit_rows()
    f = sae.encode(x)
    error = (sae.decode(f) - x).square().sum() / max(1, len(x))
    penalty = l1 * (f if recipe == "saelens5" else f * sae.W_dec.norm(dim=1)).sum() / max(1, len(x))
    optimizer.zero_grad()
    (error + penalty).backward()
    nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    return error.detach(), penalty.detach(), f.detach()


# ------------------------------------------------------------------------------------------- activations


class Stopped(Exception):
    """Ctrl-C or SIGTERM came. Raised only where nothing is half done."""


class Reached(Exception):
    """Carries the activations out of a forward pass whose rest nobody needs."""


asked_to_stop = []


def check_stop():
    if asked_to_stop:
        raise Stopped


class Site:
    """A place in the clean stream of a model: block `layer`, and one of SITES.

    center: see x minus its mean over channels. LayerNorm hides that shift from the model; the paper's library, which
    centres the weights that write to the residual stream, had it so. mlp_act is not in the stream and never centred.
    Raises UserError when there is no such block.
    """

    def __init__(self, model, layer, site, center=True):
        if not 0 <= layer < model.config.n_layer:
            raise UserError(f"--layer={layer}: the blocks of this model are 0 to {model.config.n_layer - 1}")
        self.model, self.site, self.center = model, site, center and site != "mlp_act"
        self.d = model.config.n_embd * (4 if site == "mlp_act" else 1)
        self.module = model.transformer["h"][layer].get_submodule(SITES[site])

    @torch.no_grad()
    def run(self, idx, edit):
        """idx (B, T) -> clean logits (B, T, V) with this place's x (B, T, d) replaced by edit(x)."""
        def change(x):
            return edit(x - x.mean(-1, keepdim=True) if self.center else x)

        def on_output(module, args, out):  # blocks and attention return (x, keys and values)
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        hook = (self.module.register_forward_hook(on_output) if self.site != "mlp_act" else
                self.module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:])))
        try:
            return self.model(idx)
        finally:
            hook.remove()

    def read(self, idx):
        """idx (B, T) -> x (B T, d)."""
        def stop(x):
            raise Reached(x)
        try:
            self.run(idx, stop)
        except Reached as reached:
            return reached.args[0].flatten(0, 1)


def windows_at(tokens, numbers, T, device):
    """Windows of T tokens that do not overlap, by number: -> (len(numbers), T) int64."""
    return torch.from_numpy(tokens[np.asarray(numbers)[:, None] * T + np.arange(T)].astype(np.int64)).to(device)


class Batches:
    """Shuffled, scaled activations of the training stream: at(step) -> (batch_size, d).

    A buffer holds some activations. Half of it, drawn at random, is served and then replaced by new ones, and so on:
    memory stays flat for any corpus. A corpus that fits into the buffer is run through the model once and reshuffled every
    time it has been served. Windows come in a random order, another one every epoch. All orders are pure functions of
    the seed, so the buffer is all that has to be saved. Raises UserError when the text is too short.
    """

    def __init__(self, site, tokens, settings, seed, saved=None):
        self.site, self.tokens, self.seed = site, tokens, seed
        self.T, self.batch = site.model.config.block_size, settings["batch_size"]
        self.device = next(site.model.parameters()).device
        self.windows = min(len(tokens), settings["tokens"] or len(tokens)) // self.T
        rows = self.windows * self.T
        self.cached = rows <= settings["buffer"]
        self.size = rows if self.cached else settings["buffer"]
        self.served = (self.size if self.cached else self.size // 2) // self.batch  # batches between two refills
        if not self.served:
            raise UserError(f"{rows:,} training tokens, in whole windows of {self.T}, and a buffer of {settings['buffer']:,} "
                             f"are too few for batches of {self.batch:,}: give a smaller --batch_size or more of the others")
        self.fresh = -(-self.served * self.batch // self.T)  # windows in a refill
        self.epoch, self.rows, self.refill = None, None, 0
        if saved and not self.cached:
            self.refill, self.scale, self.buffer = saved["refill"], saved["scale"], saved["buffer"].to(self.device)
        else:
            self.start()

    def state(self):
        """What a resumed run needs. A cached corpus is rather run through the model once more."""
        return {} if self.cached else {"refill": self.refill, "scale": self.scale, "buffer": self.buffer}

    def start(self):
        """Fills the buffer; the scale is that of 1,000 batches or, of a cached corpus, of all of it."""
        if not self.cached:
            count = min(-(-1000 * self.batch // self.T), self.windows)
            norm = sum(x.norm(dim=1).sum().item() for x in self.read(0, count, "norms")) / (count * self.T)
        self.buffer, at = torch.empty(self.size, self.site.d, device=self.device), 0  # (size, d)
        for x in self.read(0, -(-self.size // self.T), "activations"):
            self.buffer[at : at + len(x)] = x[: self.size - at]
            at += len(x)
        if self.cached:
            norm = self.buffer.norm(dim=1).mean().item()
        self.scale = math.sqrt(self.site.d) / norm if norm else 1.0  # a place that is always 0 can stay there
        self.buffer *= self.scale

    def read(self, first, count, title=None):
        """Activations of windows number first, first + 1, ...: (at most WINDOWS x T, d) at a time."""
        with tqdm(total=count * self.T, desc=title, unit=" tokens", unit_scale=True, leave=False, disable=not title) as bar:
            while count:
                check_stop()
                epoch, at = divmod(first, self.windows)
                if epoch != self.epoch:
                    self.epoch = epoch
                    self.window_order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.windows)
                numbers = self.window_order[at : at + min(count, WINDOWS)]
                yield self.site.read(windows_at(self.tokens, numbers, self.T, self.device))
                bar.update(len(numbers) * self.T)
                first, count = first + len(numbers), count - len(numbers)

    def order(self, refill):
        """Rows of the buffer in the order they are served in after this refill, (served x batch)."""
        order = np.random.default_rng((self.seed, 1, refill)).permutation(self.size)[: self.served * self.batch]
        return torch.from_numpy(order).to(self.device)

    def at(self, step):
        """The batch of this step; steps must come one after the other. Stopped leaves the buffer as it was."""
        refill, i = divmod(step, self.served)
        if refill != self.refill and not self.cached:
            first = -(-self.size // self.T) + (refill - 1) * self.fresh
            new = torch.cat(list(self.read(first, self.fresh)))
            self.buffer[self.order(refill - 1)] = new[: self.served * self.batch] * self.scale
        if refill != self.refill or self.rows is None:
            self.refill, self.rows = refill, self.order(refill)
        return self.buffer[self.rows[i * self.batch : (i + 1) * self.batch]]  # (batch, d)


# ------------------------------------------------------------------------------------------- training, with resume


def train(site, tokens, settings, seed, saved, save, title):
    """One seed: an SAE for every l1 (or k), all on the same batches -> a row each, with folded weights and the history.

    saved: what an interrupted run gave to save(state), or None. Raises Stopped, after a save, on request.
    """
    steps, recipe, swept = settings["steps"], settings["recipe"], "l1" if settings["l1"] else "k"
    device, F = next(site.model.parameters()).device, settings["expansion"] * site.d
    saes = [SAE(site.d, F, settings["activation"], value if swept == "k" else None).initialise(recipe, seed).to(device)
            for value in settings[swept]]
    optimizers = [make_optimizer(sae, recipe) for sae in saes]
    silent = torch.zeros(len(saes), F, dtype=torch.int64, device=device)  # steps since each feature fired
    history = [{"step": [], "error": [], "penalty": [], "l0": [], "dead": []} for _ in saes]
    begin, seconds, clock = 0, 0.0, time.time()
    if saved:
        begin, seconds, history, silent = saved["step"], saved["seconds"], saved["history"], saved["silent"].to(device)
        for sae, optimizer, weights, moments in zip(saes, optimizers, saved["weights"], saved["moments"]):
            sae.load_state_dict(weights)
            optimizer.load_state_dict(moments)
    batches = Batches(site, tokens, settings, seed, saved and saved["batches"])

    def save_all(step):
        save({"step": step, "seconds": seconds + time.time() - clock, "history": history, "silent": silent,
              "weights": [sae.state_dict() for sae in saes], "moments": [optimizer.state_dict() for optimizer in optimizers],
              "batches": batches.state()})
        return time.time()

    log_every, last_save = max(1, steps // 100), time.time()
    for step in (bar := tqdm(range(begin, steps), initial=begin, total=steps, desc=title, unit=" steps", mininterval=1)):
        try:
            check_stop()
            x = batches.at(step)  # (batch, d)
        except Stopped:
            save_all(step)
            raise
        if time.time() - last_save > 300:  # a crash costs five minutes at most
            last_save = save_all(step)
        logged = step % log_every == 0 or step == steps - 1
        for i, (sae, optimizer, past) in enumerate(zip(saes, optimizers, history)):
            l1 = l1_at(step, steps, settings["l1"][i]) if swept == "l1" else 0.0
            error, penalty, f = train_step(sae, optimizer, x, lr_at(step, steps, settings["lr"]), l1, recipe)
            silent[i] = (silent[i] + 1) * (f.amax(0) <= 0)
            if logged:
                point = {"step": step, "error": error.item(), "penalty": penalty.item(),
                         "l0": f.count_nonzero().item() / len(x), "dead": (silent[i] >= DEAD_AFTER).sum().item()}
                if not math.isfinite(point["error"] + point["penalty"]):
                    raise UserError(f"the loss at step {step} is {point['error'] + point['penalty']}: give a smaller --lr")
                for name, value in point.items():
                    past[name].append(round(value, 5))
        if logged:
            bar.set_postfix_str(", ".join(f"L0 {past['l0'][-1]:.1f} dead {past['dead'][-1]}" for past in history), False)
    common = {"seed": seed, "features": F, "scale": batches.scale, "seconds": round(seconds + time.time() - clock, 1)}
    return [{**common, swept: value, "dead": past["dead"][-1] / F if steps > DEAD_AFTER else None, "history": past,
             "weights": sae.fold(batches.scale).cpu().state_dict()}
            for sae, value, past in zip(saes, settings[swept], history)]


# ------------------------------------------------------------------------------------------- evaluation


def held_out(model, data, count, device):
    """At most count windows, spread evenly over the validation split -> (windows, T). ValueError when it holds none."""
    tokens, T = load_tokens(data, "val"), model.config.block_size
    if len(tokens) < T:
        raise UserError(f"{data} has {len(tokens)} validation tokens, fewer than a window of {T}: choose other --data")
    windows = len(tokens) // T
    return windows_at(tokens, np.linspace(0, windows, min(count, windows), endpoint=False).astype(int), T, device)


@torch.no_grad()
def evaluate(site, saes, idx, progress=False):
    """What each of several folded SAEs does to the model on the windows idx (B, T) -> a dict of numbers each.

    ce_*: nats per token over the predictions of tokens 2 to T of every window; _clean as it is, _zero with the place
    replaced by 0, _sae by x^. ce_score = (zero - sae) / (zero - clean); kl_score the same with KL(clean || .) over all
    positions. l0: features f_i > 0 per token. explained_variance = 1 - sum |x - x^|^2 / sum |x - mean x|^2. never: share
    of features that stay silent here; density: a histogram over the others of the share of tokens they fire in. What
    nothing is there to divide by for is None. Sums are in float64, on the CPU, as some GPUs have none.
    """
    names, V = ("ce_clean", "ce_zero", "ce_sae", "kl_zero", "kl_sae"), site.model.config.vocab_size
    sums = [dict.fromkeys((*names, "error"), 0.0) for _ in saes]
    fired = [torch.zeros(sae.b_enc.numel(), dtype=torch.int64) for sae in saes]  # each (F)
    total, squares, n = torch.zeros(site.d, dtype=torch.float64), 0.0, idx.numel()

    def compare(logits, targets, log_p=None):
        """-> log-probabilities (B, T, V), sums of cross-entropy and of KL(p || these)"""
        log_q = logits.log_softmax(-1)
        nats = -log_q[:, :-1].gather(-1, targets[:, 1:, None]).cpu().double().sum().item()
        return log_q, nats, 0.0 if log_p is None else (log_p.exp() * (log_p - log_q)).sum(-1).cpu().double().sum().item()

    parts = idx.split(max(1, 2**22 // (idx.size(1) * V)))  # so that the largest tensors, (B, T, V), take 16 MB or a window
    for part in tqdm(parts, desc="evaluation", unit=" batches", leave=False, disable=not progress):
        check_stop()
        x = site.read(part)  # (B T, d)
        x64 = x.cpu().double()
        total, squares = total + x64.sum(0), squares + x64.square().sum().item()
        log_p, ce_clean, _ = compare(site.model(part), part)
        _, ce_zero, kl_zero = compare(site.run(part, torch.zeros_like), part, log_p)
        for i, sae in enumerate(saes):
            f = sae.encode(x)  # (B T, F)
            x_hat = sae.decode(f)  # (B T, d)
            _, ce_sae, kl_sae = compare(site.run(part, lambda old: x_hat.view_as(old)), part, log_p)
            for name, value in zip(names, (ce_clean, ce_zero, ce_sae, kl_zero, kl_sae)):
                sums[i][name] += value / (n if name[:2] == "kl" else n - len(idx))
            sums[i]["error"] += (x - x_hat).cpu().double().square().sum().item()
            fired[i] += (f > 0).sum(0).cpu()

    def ratio(part, whole):
        return part / whole if whole else None

    rows, variance = [], squares - total.square().sum().item() / n
    variance *= variance > 1e-9 * squares  # else it is rounding: all activations are the same
    for row, count in zip(sums, fired):
        error = row.pop("error")
        row["ce_score"] = ratio(row["ce_zero"] - row["ce_sae"], row["ce_zero"] - row["ce_clean"])
        row["kl_score"] = ratio(row["kl_zero"] - row["kl_sae"], row["kl_zero"])
        row["l0"], row["explained_variance"] = count.sum().item() / n, ratio(variance - error, variance)
        row["never"], row["tokens"] = (count == 0).double().mean().item(), n
        features, edges = np.histogram(np.log10(count[count > 0].numpy() / n), bins=np.linspace(-7, 0, 29))
        rows.append(row | {"density": {"log10_edges": edges.round(4).tolist(), "features": features.tolist()}})
    return rows


def warnings(row):
    if "l1" in row and row["l0"] > row["features"] / 20:
        yield (f"L0 {row['l0']:.0f} is more than a twentieth of {row['features']} features: "
               "not converged (take more --steps or a larger --lr) or a small --l1")
    if row["ce_zero"] - row["ce_clean"] < 0.05:
        yield (f"without this place the model loses only {row['ce_zero'] - row['ce_clean']:.4f} nats: "
               "the CE score divides by that and means little")


# ------------------------------------------------------------------------------------------- features to look at


@torch.no_grad()
def top_snippets(site, sae, tokens, eot, count, snippets=8, context=12):
    """The most characteristic features, and where they fire most -> [{feature, density, max, snippets}].

    Characteristic: of those that fire in at most 2 % of the tokens, the ones that write most, by sum f_i^2 |W_dec,i|^2.
    A snippet is (tokens, activations, index of the peak), within one story, one a story. tokens: (windows, T) int64
    """
    n, F = tokens.numel(), sae.b_enc.numel()
    energy, fired = torch.zeros(F, device=tokens.device), torch.zeros(F, device=tokens.device)
    for part in tqdm(tokens.split(WINDOWS), desc="features", unit=" batches", leave=False):
        check_stop()
        f = sae.encode(site.read(part))  # (B T, F)
        energy += f.square().sum(0)
        fired += (f > 0).sum(0)
    energy *= sae.W_dec.square().sum(1) * (fired <= 0.02 * n)
    chosen = energy.topk(min(count, int((energy > 0).sum()))).indices  # (N)
    f = torch.cat([sae.encode(site.read(part))[:, chosen].cpu() for part in tokens.split(WINDOWS)])  # (n, N)
    flat = tokens.flatten().cpu()  # (n)
    # a story ends after its end-of-text; windows do not follow on each other, so their ends are ends too
    bounds = np.union1d(np.arange(0, n + 1, tokens.size(1)), (flat == eot).nonzero()[:, 0].numpy() + 1)
    features = []
    for i, feature in enumerate(chosen.tolist()):
        shown, rate = {}, fired[feature].item() / n
        for peak in f[:, i].argsort(descending=True)[: int(fired[feature])].tolist():
            story = np.searchsorted(bounds, peak, side="right")
            if story not in shown and len(shown) < snippets:
                low, high = max(bounds[story - 1], peak - context), min(bounds[story], peak + context + 1)
                shown[story] = flat[low:high].tolist(), f[low:high, i].tolist(), int(peak - low)
        features.append({"feature": feature, "density": rate, "max": f[:, i].max().item(), "snippets": list(shown.values())})
    return features


def show_features(features, tokenizer, path, title):
    """Prints them, [brackets] around tokens with at least half of the feature's largest activation, and writes a page."""
    def text(token):
        return tokenizer.decode_single_token_bytes(token).decode(errors="replace").replace("\n", "↵")

    page = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>:root{{color-scheme:light dark}}"
            "body{font:15px/1.6 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}p{margin:.1em 0}"
            "small,b{font-weight:normal;color:#888}b{display:inline-block;width:4em;font-size:13px}span{border-radius:3px}"
            f"h1{{font-size:22px}}h2{{font-size:17px;margin:1.6em 0 .3em}}</style><h1>{html.escape(title)}</h1>"
            "<p>Each feature's largest activations in held-out text, one a story: the stronger the colour, the stronger the "
            "activation (a token under the mouse tells its own)."]
    for one in features:
        head = f"feature {one['feature']}"
        note = f"fires in {one['density']:.3%} of the tokens, up to {one['max']:.2f}"
        print(f"\n{head}, {note}")
        page.append(f"<h2>{head} <small>{note}</small></h2>")
        for tokens, values, peak in one["snippets"]:
            marked = "".join(f"[{text(t)}]" if v >= one["max"] / 2 else text(t) for t, v in zip(tokens, values))
            print(f"{values[peak]:8.2f}  {marked}")
            spans = (html.escape(text(t)) if v <= 0 else f"<span style='background:rgba(255,140,0,{v / one['max']:.2f})' "
                     f"title='{v:.2f}'>{html.escape(text(t))}</span>" for t, v in zip(tokens, values))
            page.append(f"<p><b>{values[peak]:.2f}</b>{''.join(spans)}")
    Path(f"{path}.tmp").write_text("\n".join(page), encoding="utf-8")
    os.replace(f"{path}.tmp", path)
    print(f"\nthe same as a page: {path}")


# ------------------------------------------------------------------------------------------- results


def coefficient(row):
    return f"l1 {row['l1']:g}" if "l1" in row else f"k {row['k']}"


def table_rows(result):
    """A row for every l1 (or k) of a checkpoint: means over seeds, and, of several, sample deviations as NAME_sd."""
    for name in dict.fromkeys(map(coefficient, result["saes"])):
        group = [row for row in result["saes"] if coefficient(row) == name]
        merged = {"run": result["run"], "coefficient": name, "n": len(group)}
        for measured in ("l0", "ce_score", "kl_score", "explained_variance", "dead", "ce_clean", "ce_sae", "ce_zero"):
            values = [row[measured] for row in group]
            if None not in values:
                merged[measured] = np.mean(values)
                merged[f"{measured}_sd"] = np.std(values, ddof=1) if len(group) > 1 else None
        yield merged


COLUMNS = [("run", lambda r: r["run"]), ("sparsity", lambda r: r["coefficient"]), ("seeds", lambda r: str(r["n"])),
           ("L0", number("l0", ".2f")), ("CE score", number("ce_score", ".3f")), ("KL score", number("kl_score", ".3f")),
           ("expl. var.", number("explained_variance", ".3f")), ("dead", number("dead", ".1%")),
           ("CE clean", lambda r: f"{r['ce_clean']:.4f}"), ("CE SAE", number("ce_sae", ".4f")),
           ("CE zero", lambda r: f"{r['ce_zero']:.4f}")]  # two that no seed changes


def draw(path, results):
    """Training curves and firing densities of every SAE; the frontiers, a line for every checkpoint."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((error, l0, dead), (density, score, variance)) = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for i, result in enumerate(results):
        for j, row in enumerate(result["saes"]):
            label = f"{coefficient(row)}, seed {row['seed']}"
            style = dict(color=f"C{i}", label=f"{result['run']}, {label}") if results[1:] else dict(color=f"C{j}", label=label)
            for axes, name in ((error, "error"), (l0, "l0"), (dead, "dead")):
                axes.plot(row["history"]["step"], row["history"][name], linewidth=1, **style)
            density.stairs(row["density"]["features"], row["density"]["log10_edges"], **style)
        for axes, name in ((score, "ce_score"), (variance, "explained_variance")):
            points = sorted((row["l0"], row[name], row["coefficient"]) for row in table_rows(result) if name in row)
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=f"C{i}", label=result["run"])
            for *at, text in points:
                axes.annotate(text, at, textcoords="offset points", xytext=(5, -10), fontsize="small")
            axes.margins(0.12)  # room for those words
    error.set(title="squared error per activation, scaled", xlabel="step", yscale="log")
    l0.set(title="L0 in training", xlabel="step", yscale="log")
    dead.set(title=f"features silent for {DEAD_AFTER:,} steps", xlabel="step", ylim=(0, max(1, 1.05 * dead.get_ylim()[1])))
    density.set(title="features by firing density, held-out text", xlabel="log10 of the share of tokens it fires in")
    score.set(title="CE score against L0, held-out text", xlabel="L0")
    variance.set(title="explained variance against L0, held-out text", xlabel="L0")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    for axes in (error, score):
        if len(axes.lines) <= 6:  # more would cover them
            axes.legend(fontsize="small")
    figure.suptitle("{site} of block {layer}, {activation}, recipe {recipe}, {steps:,} steps of {batch_size:,}"
                    .format(**results[0]["settings"]), fontsize="medium")
    figure.savefig(f"{path}.tmp", format=Path(path).suffix[1:], dpi=110)
    os.replace(f"{path}.tmp", path)
    plt.close(figure)


def save_torch(path, content):
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def finished(run, head, force):
    """The result that is there already, or None. Raises UserError where another one, or half of one, is in the way."""
    unfinished = result_path(run, "sae.resume.pt")
    if unfinished.exists():
        try:
            other = mismatch(head, torch.load(unfinished, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # somebody else's file
            raise UserError(f"{unfinished} is damaged ({type(error).__name__}): delete it") from None
        if other and not force:
            raise UserError(f"{unfinished} was made with {other}: --force replaces it")
    result = earlier_result(result_path(run, "sae.json"), head, force)
    return result if result_path(run, "sae.pt").exists() else None


def measure(run, checkpoint, model, data, settings, device, title):
    """Trains and evaluates the SAEs of one run, or goes on with it -> its result, which is written. Raises Stopped."""
    result = result_head(run, checkpoint, settings, device)
    head = {"settings": settings, "checkpoint": result["checkpoint"]}
    work = {**head, "rows": [], "current": None}  # rows of the seeds that are done, and the state of the one that is not
    unfinished = result_path(run, "sae.resume.pt")
    if unfinished.exists():
        found = torch.load(unfinished, map_location="cpu", weights_only=True)
        work = work if mismatch(head, found) else found  # another one: main() was told to replace it
    site = Site(model.to(device), settings["layer"], settings["site"], settings["center"])
    idx = held_out(model, data, settings["eval_windows"], device)

    def save(current):
        save_torch(unfinished, {**work, "current": current})

    done = len(work["rows"]) // len(settings["l1"] or settings["k"])
    for seed in settings["seeds"][done:]:
        work["rows"] += train(site, load_tokens(data, "train"), settings, seed, work["current"], save, f"{title} seed {seed}")
        work["current"] = None
        save(None)
    rows, saes = work["rows"], [restore(row, settings).to(device) for row in work["rows"]]
    result["saes"] = [{**row, **measured} for row, measured in zip(rows, evaluate(site, saes, idx, progress=True))]
    for row in result["saes"]:
        del row["weights"]
    first = next(table_rows(result))
    result |= {"l0": first["l0"], "ce_score": first.get("ce_score"),  # for eval.py --table1
               "warnings": [f"{coefficient(row)}, seed {row['seed']}: {warning}"
                            for row in result["saes"] for warning in warnings(row)]}
    rows = [{name: row[name] for name in ("seed", "l1", "k", "weights") if name in row} for row in rows]
    save_torch(result_path(run, "sae.pt"), {**head, "saes": rows})
    draw(result_path(run, "sae.png"), [result])
    write_json(result_path(run, "sae.json"), result)  # last: where it is, the rest is too
    unfinished.unlink()
    return result


def numbers(flag, text, kind):
    """"2,5,10" -> [2, 5, 10]. Raises UserError."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or len(set(values)) < len(values) or not all(0 <= value < 2**63 for value in values):
        raise UserError(f"{flag}={text} must be {'numbers' if kind is float else 'whole numbers'} from 0 on, each once, with "
                         f"commas between them, such as 2,5,10")
    return values


def parse(argv):
    """Command-line words -> arguments, with the settings of Table 5 or --small filled in. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    parser.add_argument("--data", help="prepared data to use (default: the run's own)")
    parser.add_argument("--layer", type=int, help="block, from 0 (default: the last but one)")
    parser.add_argument("--site", choices=list(SITES), default="mlp_out",
                        help="output of the MLP, of the attention, of the whole block, or the MLP's neurons (default mlp_out)")
    parser.add_argument("--raw", action="store_true", help="do not centre the activations over channels")
    parser.add_argument("--recipe", choices=["saelens5", "saelens6"], default="saelens5", help="(default saelens5, the paper's)")
    parser.add_argument("--activation", choices=["relu", "topk", "batchtopk"], default="relu", help="(default relu, the paper's)")
    parser.add_argument("--l1", help="relu: sparsity coefficients with commas between them (default 5)")
    parser.add_argument("--k", help="topk, batchtopk: features kept per token, with commas (default 8)")
    parser.add_argument("--seeds", default="1337", help="of weights and batches, with commas (default 1337)")
    parser.add_argument("--small", action="store_true", help="defaults for a CPU")
    notes = {"steps": "updates", "batch_size": "activations per update", "lr": "learning rate",
             "tokens": "training tokens that activations are taken from, at most",
             "buffer": "activations held in memory; where it holds all of them, each is computed once",
             "eval_windows": "held-out windows of block_size tokens, at most"}
    for name, note in notes.items():
        parser.add_argument(f"--{name}", type=float if name == "lr" else int,
                            help=f"{note} (default {PAPER[name] or 'all'}, with --small {SMALL[name]})".replace("%", "%%"))
    parser.add_argument("--expansion", type=int, default=16, help="features per channel of the site (default 16)")
    parser.add_argument("--features", type=int, metavar="N", help="show the N most characteristic features of the first SAE")
    parser.add_argument("--plot", metavar="FILE", help="one picture of all these runs (.png, .pdf or .svg)")
    parser.add_argument("--force", action="store_true", help="replace results made with other settings or of other weights")
    parser.add_argument("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    args = parser.parse_args(argv)

    for name, value in (SMALL if args.small else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in (*PAPER, "expansion", "features"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf or name != "lr" and value == 0:
            raise UserError(f"--{name}={value} must be more than 0")
    useless = "k" if args.activation == "relu" else "l1"
    if getattr(args, useless) is not None:
        raise UserError(f"--{useless} has no effect with --activation {args.activation}: drop it")
    args.l1 = numbers("--l1", "5" if args.l1 is None else args.l1, float) if args.activation == "relu" else None
    args.k = None if args.activation == "relu" else numbers("--k", "8" if args.k is None else args.k, int)
    args.seeds = numbers("--seeds", args.seeds, int)
    if args.plot and (Path(args.plot).suffix not in (".png", ".pdf", ".svg")
                      or not os.access(Path(args.plot).absolute().parent, os.W_OK)):
        raise UserError(f"--plot={args.plot} must end in .png, .pdf or .svg and lie in a folder that can be written")
    return args


def main():
    args = parse(sys.argv[1:])
    device = knobs.pick_device(args.device)
    jobs = []
    for path in run_paths(args.runs):  # all of them are looked at before the first takes its minutes
        run, checkpoint, data = open_run(path, args.data)
        model = GPTNeo.from_checkpoint(checkpoint)
        layer = max(0, model.config.n_layer - 2) if args.layer is None else args.layer
        site = Site(model, layer, args.site, not args.raw)
        if args.k and not 1 <= min(args.k) <= max(args.k) <= args.expansion * site.d:
            raise UserError(f"--k: keep from 1 to all {args.expansion * site.d} features of {path}")
        settings = {"data": load_meta(data)["checksum"], "layer": layer, "site": args.site, "center": site.center,
                    **{name: getattr(args, name) for name in ("recipe", "activation", "l1", "k", "seeds", "expansion", *PAPER)}}
        head = {"run": str(run), "settings": settings, "checkpoint": fingerprint(checkpoint)}
        jobs.append((run, checkpoint, model, data, settings, finished(run, head, args.force)))
    refuse_mixed([{"run": run, "settings": settings} for run, _, _, _, settings, _ in jobs])

    def request_stop(number, _):
        asked_to_stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second time means it

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, request_stop)
    results = []
    try:
        for i, (run, checkpoint, model, data, settings, result) in enumerate(jobs, 1):
            if result:
                print(f"{run}: {result_path(run, 'sae.json')} of {result['date']} has it already", file=sys.stderr)
            else:
                result = measure(run, checkpoint, model, data, settings, device, f"[{i}/{len(jobs)}] {run}")
            results.append(result)
        for result, (run, checkpoint, model, data, settings, _) in zip(results, jobs if args.features else []):
            site = Site(model.to(device), settings["layer"], settings["site"], settings["center"])
            sae = load_saes(result_path(run, "sae.pt"))[0].to(device)
            idx = held_out(model, data, 1024, device)
            features = top_snippets(site, sae, idx, load_meta(data)["eot"], args.features)
            title = f"{run}: {args.site} of block {settings['layer']}, {coefficient(result['saes'][0])}"
            print(f"\n--- {title}")
            show_features(features, load_tokenizer(checkpoint["tokenizer"]), result_path(run, "sae_features.html"), title)
    except Stopped:
        raise SystemExit("stopped: the same command again goes on from here") from None
    print_table([row for result in results for row in table_rows(result)], COLUMNS)
    if any(row["n"] > 1 for result in results for row in table_rows(result)):
        print("± is the sample standard deviation over seeds")
    for result in results:
        for warning in result["warnings"]:
            print(f"warning: {result['run']}: {warning}")
    if args.plot:
        draw(args.plot, results)


if __name__ == "__main__":
    knobs.cli(main)
