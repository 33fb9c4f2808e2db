"""What does the gate's temperature T do to training? One run, again with every T.

    python bench/temperature.py config/demo.py                       six forms, 300 updates each
    python bench/temperature.py config/local_k2.py --forms=eq3,1,0.5 --updates=100
    python bench/temperature.py config/demo.py --precision=float64        any knob of train.py

Every form of the gate has the same hard mask, and the gradient of softmax(scores / T):

eq3        the paper's, gate="softmax": T is the gap of each token, s_(k) - s_(k+1), which the
           gradient flows through
gap        the same T, which no gradient flows through
mean       a running mean of the gaps, one for attention units and one for neurons: over the tokens
           of all layers, a hundredth of it renewed by every layer
a number   the same T for ever; 1 is gate="constant"

Each is trained on the CPU from the same weights and on the same batches, those of train.py with
these knobs, whose schedule is kept: --updates only stops the run early. --gate and the ramp have no
say: the ablated loss is whole from the first update on. Printed:

gates      norm of the gradient of all gates, before clipping: the median and the largest
all        the same of all parameters
parts      a twin gets every batch with its rows in reverse: the same sums in another order. The
           first update at which the losses of the two differ by more than 1e-9, 1e-6 and 1e-3 of
           their value, and the largest difference. A twin is given up once it is 1e-3 away.
attn, mlp  of the sets of k winners, one a token and layer of a fixed batch of the validation split,
           the share that one update changes: after a tenth, half and all of the updates
loss       of both streams on the validation split, at the end
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import json
import statistics
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts bench/ there
import config as knobs
import model as model_file
from eval import column, print_table
from interp.results import environment
from model import MIN_GAP, StraightThrough, gate
from prepare import UserError, load_meta
from train import (
    Machine, batch_at, check_memory, first_model, load_split, make_optimizer, set_learning_rate,
    update, validation_losses)

NAMED = ("eq3", "gap", "mean")  # the forms that are not a number
BOUNDS = ("1e-9", "1e-6", "1e-3")  # of the relative difference of two losses
SHARES = {"10": 0.1, "50": 0.5, "100": 1.0}  # of the updates, after which winners are compared
CPU = Machine()

# ---- gates in place of model.gate: scores (..., N), k and what --gate says -> mask (..., N)


def eq3(scores, k, _):
    return gate(scores, k, "softmax")


def tempered(scores, k, _, find_T):
    """The hard mask with the gradient of softmax(scores / T), for a T without a gradient."""
    fixed = scores.detach()
    z = (scores - fixed.amax(-1, keepdim=True)) / find_T(fixed, k)  # no large numbers for small T
    return StraightThrough.apply(z.softmax(-1), fixed.topk(k, dim=-1).indices)


def gap(scores, k):
    """Each row's T of Eq. 2: (..., N) -> (..., 1)."""
    top = scores.topk(k + 1, dim=-1).values  # (..., k + 1), largest first
    return (top[..., k - 1 : k] - top[..., k:]).clamp_min(MIN_GAP)


class RunningGap:
    """The mean gap of the tokens seen, the last ones most, of gates with as many units N."""

    def __init__(self):
        self.means = {}  # N: mean

    def __call__(self, scores, k):
        N, now = scores.size(-1), gap(scores, k).mean()
        self.means[N] = torch.lerp(self.means.get(N, now), now, 0.01)
        return self.means[N]


def constant(scores, k, T):
    return T


def make_gate(form):
    """The gate of this form, for one model: a running mean is its own."""
    if form == "eq3":
        return eq3
    if form == "gap":
        return partial(tempered, find_T=gap)
    if form == "mean":
        return partial(tempered, find_T=RunningGap())
    return partial(tempered, find_T=partial(constant, T=float(form)))


# ---- one model in training


@contextmanager
def default_dtype(dtype):
    """What torch makes in here is of this dtype: train.update sums losses in a new tensor."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Run:
    """A model with its optimizer, its form of the gate and the gradients that its gates get."""

    def __init__(self, form, config, precision):
        self.config, self.gate = config, make_gate(form)
        self.dtype = getattr(torch, precision)
        self.model = first_model(config)[0].to(self.dtype)
        self.optimizer = make_optimizer(self.model, config, CPU.device)
        self.squares = {}  # name of a gate's parameter: squared norm of its gradient
        for name, parameter in self.model.named_parameters():
            if "_gate." in name:
                parameter.register_post_accumulate_grad_hook(partial(self.see, name))

    def see(self, name, parameter):
        """Called when a gradient is complete, before anything is clipped."""
        self.squares[name] = parameter.grad.double().square().sum().item()

    def update(self, rows, step):
        """Take the step with these rows -> loss, norm of the gradient, the same of the gates."""
        self.squares.clear()
        now = self.config.at(step)
        set_learning_rate(self.optimizer, now.learning_rate)
        with default_dtype(self.dtype), mock.patch.object(model_file, "gate", self.gate):
            seen = update(self.model, self.optimizer, rows, self.config, CPU.autocast, now)
        return seen[0].item(), seen[3].item(), sum(self.squares.values()) ** 0.5

    @torch.no_grad()
    def winners(self, idx):
        """The masks of idx (B, T), one a kind of unit: (B, T, L, N)."""
        streams = self.model.ablated(idx)
        return {"attn": streams.attn_mask, "mlp": streams.mlp_mask}


def changed(before, after):
    """The share of the sets of winners, of masks (B, T, L, N), that are not the same."""
    return (before != after).any(-1).double().mean().item()


def first_beyond(differences, bound):
    """The first update, counted from 1, after which they differ by more; None if they never do."""
    for number, difference in enumerate(differences, 1):
        if difference > bound:
            return number
    return None


def measure(form, config, train_tokens, val_tokens, args):
    """Train a model with this form of the gate, and its twin -> a row of the table."""
    begun, row = time.perf_counter(), {"form": form}
    run, twin = Run(form, config, args.precision), Run(form, config, args.precision)
    watched = batch_at(val_tokens, 0, config)[:, :-1]  # (B, T)
    points = {max(1, round(share * args.updates)): name for name, share in SHARES.items()}
    norms, gate_norms, differences = [], [], []
    for step in range(args.updates):
        rows, point = batch_at(train_tokens, step, config), points.get(step + 1)
        before = run.winners(watched) if point else None
        loss, norm, gate_norm = run.update(rows, step)
        norms.append(norm)
        gate_norms.append(gate_norm)
        if twin:
            differences.append(abs(twin.update(rows.flip(0), step)[0] / loss - 1))
            if differences[-1] > float(BOUNDS[-1]):
                twin = None
        if point:
            after = run.winners(watched)
            for kind in after:
                row[f"{kind}_changed_{point}"] = changed(before[kind], after[kind])
            print(f"  {form}: {step + 1} updates after {time.perf_counter() - begun:.0f} s, "
                  f"loss {loss:.4f}, the twin's at most {max(differences):.0e} away",
                  file=sys.stderr, flush=True)
    clean, ablated = validation_losses(run.model, val_tokens, config, CPU)
    return row | {
        "gate_norm_median": statistics.median(gate_norms), "gate_norm_max": max(gate_norms),
        "norm_median": statistics.median(norms), "norm_max": max(norms),
        **{f"parts_{bound}": first_beyond(differences, float(bound)) for bound in BOUNDS},
        "largest_difference": max(differences), "val_clean": clean, "val_ablated": ablated}


# ---- the table and the command line


def parts(bound):
    """A column of the update at which two orders of summation part by more than this."""
    def show(row):
        update_number = row.get(f"parts_{bound}")  # a table's rows have no None
        return "never" if update_number is None else f"{update_number:,}"
    return show


GRADIENTS = [
    ("T", column("form")),
    ("gates, median", column("gate_norm_median", ".3g")),
    ("largest", column("gate_norm_max", ".3g")),
    ("all, median", column("norm_median", ".3g")),
    ("largest", column("norm_max", ".3g")),
    *[(f"parts by {bound}", parts(bound)) for bound in BOUNDS],
    ("at most", column("largest_difference", ".0e")),
]
WINNERS = [
    ("T", column("form")),
    *[(f"attn, {name} %", column(f"attn_changed_{name}", ".1%")) for name in SHARES],
    *[(f"mlp, {name} %", column(f"mlp_changed_{name}", ".1%")) for name in SHARES],
    ("loss clean", column("val_clean", ".4f")),
    ("ablated", column("val_ablated", ".4f")),
]


def check_form(form):
    """Raise UserError unless this is a form."""
    try:
        is_form = form in NAMED or MIN_GAP <= float(form) <= 1 / MIN_GAP
    except ValueError:
        is_form = False
    if not is_form:
        raise UserError(f"--forms={form} must be some of {', '.join(NAMED)} and numbers from "
                        f"{MIN_GAP:g} to {1 / MIN_GAP:g}, with commas")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    add = parser.add_argument
    add("--forms", default="eq3,gap,mean,0.25,1,4", help="(default %(default)s)")
    add("--updates", type=int, default=300, help="of each model (default 300)")
    add("--precision", default="float32", choices=("float32", "float64"))
    add("--json", action="store_true", help="print JSON and nothing else")
    args, words = parser.parse_known_args()
    config, forms = knobs.load(words), args.forms.split(",")
    config = dataclasses.replace(config, ramp_start=0.0, ramp_end=0.0)
    for form in forms:
        check_form(form)
    if not 1 <= args.updates <= config.max_iters:
        raise UserError(f"--updates={args.updates} must be from 1 to max_iters={config.max_iters}")
    if config.ablation == "none":
        raise UserError("ablation=none has no gates to compare: take local or global")
    if config.batch_size < 2 or config.batch_size % config.grad_accum:
        raise UserError(f"batch_size={config.batch_size} must be at least 2, for there to be two "
                        f"orders of its rows, and a multiple of grad_accum={config.grad_accum}")
    vocab_size = load_meta(config.data)["vocab_size"]
    config = dataclasses.replace(config, vocab_size=vocab_size)
    check_memory(config, CPU)
    tokens = [load_split(config, split, CPU.device) for split in ("train", "val")]
    result = {"environment": environment(CPU.device), "updates": args.updates,
              "precision": args.precision,
              "rows": [measure(form, config, *tokens, args) for form in forms]}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print("{device}, torch {torch}, commit {commit}".format(**result["environment"])
          + f"; {args.updates} updates of {config.max_iters:,}, {args.precision}")
    print_table(result["rows"], GRADIENTS)
    print_table(result["rows"], WINNERS)


if __name__ == "__main__":
    knobs.cli(main)
