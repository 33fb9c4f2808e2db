"""Time a training step, exactly as train.py takes it: batch, forward, backward, clipping, optimizer.

    python bench/speed.py                                          the paper's model and batch, GPT-2's vocabulary
    python bench/speed.py --batch_size=4 --parts                   1,024 tokens a step, and where their time goes
    python bench/speed.py --dtype=float32,bfloat16 --compile=False,True,reduce-overhead    every combination
    python bench/speed.py config/demo.py --vocab_size=580          any knob of train.py

Commas make lists of --dtype, --compile, --batch_size and --vocab_size. Every combination is timed for the plain GPT-Neo
(baseline) and the local and the global variant, all in turn, round after round, so that a busy machine slows all of them;
a figure is the median of the rounds, and ratios are those of medians within one run. Two references, eager and with whole
logits: `plain`, the baseline as a first draft would write it, and `whole`, the local variant with both logit tensors.

FLOP/s: 6 FLOP per token and weight of each matrix, with causal attention counted half, over the time. Floor: these over the rate of a large matrix product here; on CUDA at least the bytes of seven passes over
the 2-byte logits, over the rate of a large copy. Memory: peak of a step above what was there before the
model, weights and optimizer included; on a CPU resident memory, of a process of its own.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts bench/ there
import config as knobs
import model as model_file
from eval import environment
from model import GPTNeo, gate
from prepare import UserError
from train import batch_at, choose_machine, make_optimizer, place_tokens, update

ABLATION = {"plain": "none", "baseline": "none", "whole": "local", "local": "local", "global": "global"}


def whole_head_losses(streams, weight, targets, coeffs):
    """head_losses as a first draft would write it: every logit of every stream at once."""
    means = torch.stack([F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), targets.flatten()) for x in streams])
    return means @ means.new_tensor(coeffs), means.detach()


class Row:
    """One line of the table: a variant under one choice of knobs, ready to step."""

    def __init__(self, variant, words, vocab_size):
        self.variant, self.words, self.vocab_size = variant, words, vocab_size
        self.config = knobs.load([*words, f"--ablation={ABLATION[variant]}"])
        self.model_config = dataclasses.replace(self.config, vocab_size=vocab_size).model
        if self.config.fsdp or self.config.batch_size % self.config.grad_accum:
            raise UserError(f"batch_size={self.config.batch_size} must be a multiple of grad_accum={self.config.grad_accum}, "
                             f"and this is one process: --fsdp=False")

    def build(self):
        config = self.config
        self.device, bfloat16, self.compile_mode = choose_machine(config, 0)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)
        self.dtype = "bfloat16" if bfloat16 else "float32"
        torch.manual_seed(config.seed)
        self.model = GPTNeo(self.model_config).to(self.device)
        if self.compile_mode:
            self.model.compile(mode=self.compile_mode)
        self.optimizer = make_optimizer(self.model, config, self.device)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, 1_000_000).astype(np.uint16)
        self.tokens, self.steps, self.seconds = place_tokens(tokens, self.device), 0, []
        return self

    def step(self):
        head_losses = whole_head_losses if self.variant in ("plain", "whole") else model_file.head_losses
        with mock.patch.object(model_file, "head_losses", head_losses):
            rows = batch_at(self.tokens, self.steps, self.config, device=self.device)
            update(self.model, self.optimizer, rows, self.config, self.autocast)
        self.steps += 1

    def time(self, steps):
        self.step()  # as in a real run, the step before was one of its own: another row's leaves another heap and cache
        self.seconds.append(clock(self.step, self.device, steps))

    def flops(self):
        """Of one step, both passes, without counting anything twice."""
        c, C = self.config, self.config.n_embd
        gates = 0 if c.ablation == "none" else c.n_layer * C * (C if c.attn_unit == "dim" else c.n_head) + c.n_layer * 4 * C * C
        stream = c.n_layer * 12 * C * C + C * self.vocab_size + c.n_layer * c.block_size * C  # the last: causal attention
        return 6 * c.batch_size * c.block_size * (stream * (1 if c.ablation == "none" else 2) + gates)


def clock(function, device, times=1):
    """Seconds that one call takes, the work it leaves to a GPU included."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    begun = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - begun) / times


def resident(peak):
    """This process's resident memory in bytes, now or at its peak; None where Linux's /proc is missing."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def cpu_memory(row):
    before = resident(peak=False)
    row.build()
    for _ in range(2):
        row.step()
    return before and resident(peak=True) - before


def build_and_warm(row, steps):
    """Make it ready to be timed, and on the way find its peak memory in bytes, or None."""
    if row.config.device == "cpu" or knobs.pick_device(row.config.device).type == "cpu":
        row.memory = None
        if row.config.compile in ("auto", "False"):  # to compile it twice would take minutes
            fresh = multiprocessing.get_context("spawn")  # a heap of its own: what others have freed would hide what it takes
            with ProcessPoolExecutor(1, mp_context=fresh) as pool:
                row.memory = pool.submit(cpu_memory, row).result()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    row.build()
    for _ in range(steps):
        row.step()
    if row.device.type == "cuda":
        torch.cuda.synchronize()
        row.memory = torch.cuda.max_memory_allocated() - before
    print(f"  {label(row)}: warm after {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def ceilings(device, dtype):
    """FLOP/s of a large matrix product and bytes/s, read and written, of a large copy on this device; best of five."""
    n, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.ones_like(source)
    best = lambda function: min(clock(function, device) for _ in range(6))
    return 2 * n**3 / best(lambda: torch.mm(a, b)), 2 * size / best(lambda: target.copy_(source))


def parts(row, rounds):
    """{part: median seconds}, each forward and backward on its own with inputs like those in the step."""
    model, config, device = row.model, row.model.config, row.device
    batch = batch_at(row.tokens, 0, row.config, device=device)
    idx, targets = batch[:, :-1], batch[:, 1:]
    fresh = lambda x: x.detach().requires_grad_()
    with row.autocast:
        hidden, inputs, caches = model.clean_pass(idx)
    hidden, inputs, caches = fresh(hidden), [fresh(x) for x in inputs], [tuple(map(fresh, kv)) for kv in caches]
    compiled = torch.compile if row.compile_mode else lambda function: function

    def scores():
        if config.ablation == "global":
            return [s for both in (model.attn_gate, model.mlp_gate) for s in both(hidden).chunk(config.n_layer, -1)]
        return [g(x) for x, block in zip(inputs, model.transformer["h"]) for g in (block.attn_gate, block.mlp_gate)]

    def masks():
        return sum(gate(s, config.k_mlp if s.size(-1) == 4 * config.n_embd else config.k_attn, config.gate).square().sum()
                   for s in scores())

    def both_heads():
        streams = [hidden] if config.ablation == "none" else [hidden, hidden * 1.0]
        return model_file.head_losses(streams, model.lm_head.weight, targets, [1.0] * len(streams))[0]

    def backward(function):
        function = compiled(function)

        def run():
            with row.autocast:
                loss = function()
            loss.backward()
        return run

    def optimize():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        row.optimizer.step()

    work = {"data": lambda: batch_at(row.tokens, 0, row.config, device=device),
            "clean pass": backward(lambda: model.clean_pass(idx)[0].square().sum())}
    if config.ablation != "none":
        work["gates"] = backward(masks)
        work["ablated pass and gates"] = backward(lambda: model.ablated_pass(hidden, inputs, caches)[0].square().sum())
    work |= {"heads and losses": backward(both_heads), "clipping and optimizer": optimize}
    seconds = {name: [] for name in work}
    for name, run in work.items():
        run()  # compiles, allocates; the optimizer, last, has every gradient
    for _ in range(rounds):
        for name, run in work.items():
            seconds[name].append(clock(run, device))
    row.optimizer.zero_grad(set_to_none=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def label(row):
    return f"{row.variant} {row.config.dtype} compile={row.config.compile} V={row.vocab_size} B={row.config.batch_size}"


def report(row, rows, ceiling):
    """The numbers of one row, by the names of the columns."""
    median, tokens = statistics.median(row.seconds), row.config.batch_size * row.config.block_size
    knobs_of = lambda other: (other.config.dtype, other.config.compile, other.vocab_size, other.config.batch_size)
    baseline = next((other for other in rows if other.variant == "baseline" and knobs_of(other) == knobs_of(row)), None)
    product, copy = ceiling[row.dtype]
    streams = 1 if row.config.ablation == "none" else 2
    floor = max(row.flops() / product, 7 * 2 * streams * tokens * row.vocab_size / copy if row.device.type == "cuda" else 0)
    return {"variant": row.variant, "dtype": row.dtype, "compile": row.compile_mode or "False", "vocab_size": row.vocab_size,
            "batch": f"{row.config.batch_size} x {row.config.block_size}", "ms": 1e3 * median,
            "ms_min": 1e3 * min(row.seconds), "ms_max": 1e3 * max(row.seconds), "tokens_per_s": tokens / median,
            "ratio": median / statistics.median(baseline.seconds) if baseline else None,
            "gflops": row.flops() / median / 1e9, "floor_share": floor / median, "memory_mb": row.memory and row.memory / 1e6,
            "hours_400k": 400_000 * median / 3600}


COLUMNS = [("variant", "", "variant"), ("dtype", "", "dtype"), ("compile", "", "compile"), ("vocab_size", ",", "vocabulary"),
           ("batch", "", "batch"), ("ms", ".1f", "ms/step"), ("ms_min", ".1f", "min"), ("ms_max", ".1f", "max"),
           ("tokens_per_s", ",.0f", "tokens/s"), ("ratio", ".2f", "x baseline"), ("gflops", ",.0f", "GFLOP/s"),
           ("floor_share", ".0%", "of floor"), ("memory_mb", ",.0f", "peak MB"), ("hours_400k", ".1f", "h / 400,000")]


def print_table(rows):
    """Dicts as aligned text."""
    cells = [[heading, *("-" if row[name] is None else format(row[name], form) for row in rows)] for name, form, heading in COLUMNS]
    widths = [max(map(len, column)) for column in cells]
    for line in zip(*cells):
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = knobs.usage_error
    for name, default in (("dtype", "auto"), ("compile", "auto"), ("batch_size", "24"), ("vocab_size", "50257")):
        parser.add_argument(f"--{name}", default=default, help=f"one or more, with commas (default {default})")
    parser.add_argument("--variants", default="plain,baseline,whole,local,global", help="which of these, with commas")
    parser.add_argument("--rounds", type=int, default=7, help="of timing everything once (default 7)")
    parser.add_argument("--steps", type=int, help="steps between two looks at the clock (default 1 on a CPU, 10 on a GPU)")
    parser.add_argument("--parts", action="store_true", help="also time the parts of a step, for the last combination of knobs")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args, words = parser.parse_known_args()
    variants = args.variants.split(",")
    if set(variants) - ABLATION.keys():
        raise UserError(f"--variants={args.variants} must be some of {', '.join(ABLATION)}")
    if args.rounds < 1 or args.steps is not None and args.steps < 1:
        raise UserError(f"--rounds={args.rounds} and --steps={args.steps} must be at least 1")
    if not all(text.isdecimal() and 1 < int(text) < 65536 for text in args.vocab_size.split(",")):
        raise UserError(f"--vocab_size={args.vocab_size} must be whole numbers from 2 to 65,535, with commas")
    rows = []
    for dtype, mode, vocab_size, batch in itertools.product(*(value.split(",") for value in
                                                              (args.dtype, args.compile, args.vocab_size, args.batch_size))):
        for variant in variants:
            reference = variant in ("plain", "whole")
            row = Row(variant, [*words, f"--dtype={dtype}", f"--compile={'False' if reference else mode}",
                                f"--batch_size={batch}"], int(vocab_size))
            if not reference or label(row) not in map(label, rows):  # a reference is not compiled: once is enough
                rows.append(row)

    for row in rows:
        build_and_warm(row, 3)
    device = rows[0].device
    steps = args.steps or (10 if device.type == "cuda" else 1)
    for _ in range(args.rounds):
        for row in rows:
            row.time(steps)
    ceiling = {dtype: ceilings(device, getattr(torch, dtype)) for dtype in dict.fromkeys(row.dtype for row in rows)}
    result = {"environment": environment(device), "rounds": args.rounds, "steps": steps,
              "ceilings": {dtype: {"gflops": rate / 1e9, "copy_gb_per_s": copy / 1e9} for dtype, (rate, copy) in ceiling.items()},
              "rows": [report(row, rows, ceiling) for row in rows]}
    if args.parts:
        result["parts_ms"] = {row.variant: {name: 1e3 * seconds for name, seconds in parts(row, args.rounds).items()}
                              for row in rows[-len(variants):] if row.variant in ("baseline", "local", "global")}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print("{device}, torch {torch}, commit {commit}".format(**result["environment"])
          + f"; median of {args.rounds} rounds of {steps} steps, all rows in turn")
    for dtype, rates in result["ceilings"].items():
        print(f"{dtype}: a large product {rates['gflops']:,.0f} GFLOP/s, a large copy {rates['copy_gb_per_s']:,.0f} GB/s")
    print_table(result["rows"])
    for variant, times in result.get("parts_ms", {}).items():
        print(f"{variant}, ms on their own: " + ", ".join(f"{name} {ms:.1f}" for name, ms in times.items()))


if __name__ == "__main__":
    knobs.cli(main)
