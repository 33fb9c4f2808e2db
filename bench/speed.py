"""Time a training step as train.py takes it: batch, forward, backward, clipping, optimizer.

    python bench/speed.py                           the paper's model and batch, GPT-2's vocabulary
    python bench/speed.py --batch_size=4 --parts    1,024 tokens a step, and where their time goes
    python bench/speed.py --dtype=float32,bfloat16 --compile=False,True,reduce-overhead
    python bench/speed.py config/demo.py --vocab_size=580         any knob of train.py
    python bench/speed.py --batch_size=4 --against=b125f23        beside the step of another commit

Commas make lists of --dtype, --compile, --batch_size and --vocab_size. Every combination is timed
for the plain GPT-Neo (baseline) and the local and the global variant, all in turn, round after
round, so that a busy machine slows all of them. Two references are eager and hold whole logits:
`plain`, the baseline as a first draft would write it, and `whole`, the same of the local variant.

ms/step      the median of the rounds, and the fastest and the slowest of them
x baseline   the median over that of the baseline with the same knobs, in the same call
GFLOP/s      the arithmetic of a step over its time: 6 operations per token and weight of each
             matrix, 2 in the forward and 4 in the backward pass; causal attention counts half
of floor     the shortest possible time, the floor, over the time taken. The floor is the arithmetic
             at the rate of a large matrix product on this device; on CUDA at least seven passes
             over logits of 2 bytes each, at the rate of a large copy
peak MB      the most memory that a step holds beyond what was there before the model, weights and
             optimizer included; on a CPU resident memory, of a process of its own
h / 400,000  hours for the paper's 400,000 updates

--against=COMMIT compares whole trees instead: one process has the files of this tree, another those
of the commit, and they take their own steps by turns (bench/against.py). `ratio` is this tree's
median over the commit's, so it is below 1 where this tree is faster. For `by round` the two times
of each round are divided first, and the median is taken of these ratios: a machine that slows down
for a few rounds cannot move it. `lowest` and `highest` are the extremes of the same ratios.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
from against import times_of_both
from eval import column, print_table
from interp.results import environment
from model import GPTNeo
from parts import time_parts
from prepare import UserError
from timing import clock, in_turn
from train import (
    Machine, batch_at, check_memory, choose_machine, make_optimizer, place_tokens, update)

ABLATION = {  # variant: the knob
    "plain": "none", "baseline": "none", "whole": "local", "local": "local", "global": "global"}
REFERENCES = ("plain", "whole")
LISTS = {"dtype": "auto", "compile": "auto", "vocab_size": "50257", "batch_size": "24"}  # defaults


def whole_head_losses(streams, weight, targets, coeffs):
    """head_losses as a first draft would write it: every logit of every stream at once."""
    losses = []
    for x in streams:
        logits = F.linear(x, weight).float()  # (B, T, V)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    means = torch.stack(losses)  # (streams,)
    return means @ means.new_tensor(coeffs), means.detach()


class Row:
    """One line of the table: a variant with its knobs, which can step once it is built.

    stepper.py calls Row(variant, words, vocab_size), build, time and seconds at other commits, too.
    """

    def __init__(self, variant, words, vocab_size):
        self.variant, self.words, self.vocab_size = variant, words, vocab_size
        self.config = knobs.load([*words, f"--ablation={ABLATION[variant]}"])
        batch_size, grad_accum = self.config.batch_size, self.config.grad_accum
        if self.config.fsdp or batch_size % grad_accum:
            raise UserError(f"batch_size={batch_size} must be a multiple of "
                            f"grad_accum={grad_accum}, and this is one process: --fsdp=False")
        if self.config.freeze != "none":
            raise UserError("what is counted here is a step that trains all: --freeze=none")
        self.device, bfloat16, self.compile_mode = choose_machine(self.config, 0)
        self.dtype = "bfloat16" if bfloat16 else "float32"
        check_memory(self.sized(), Machine(device=self.device))
        self.streams = 1 if self.config.ablation == "none" else 2
        self.memory = None  # peak of a step in bytes, where it is known

    def sized(self):
        """The config with the vocabulary, which is no knob."""
        return dataclasses.replace(self.config, vocab_size=self.vocab_size)

    def label(self):
        """What tells it from the other rows: the knobs as they were given."""
        config = self.config
        return (f"{self.variant} {config.dtype} compile={config.compile} "
                f"V={self.vocab_size} B={config.batch_size}")

    def setting(self):
        """What the variants share, as it was understood: columns of the table."""
        return {
            "dtype": self.dtype, "compile": self.compile_mode or "False",
            "vocab_size": self.vocab_size,
            "batch": f"{self.config.batch_size} x {self.config.block_size}"}

    def build(self):
        config = self.sized()
        bfloat16 = self.dtype == "bfloat16"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)
        torch.manual_seed(config.seed)
        self.model = GPTNeo(config.model).to(self.device)
        if self.compile_mode:
            self.model.compile(mode=self.compile_mode)
        self.optimizer = make_optimizer(self.model, config, self.device)
        self.now = config.at(config.max_iters)  # when all that changes along a run has changed
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, 1_000_000)
        self.tokens = place_tokens(tokens.astype(np.uint16), self.device)
        self.steps, self.seconds = 0, []  # steps taken; seconds of a step, one a round
        return self

    def step(self):
        head_losses = model_file.head_losses
        if self.variant in REFERENCES:
            head_losses = whole_head_losses
        with mock.patch.object(model_file, "head_losses", head_losses):
            rows = batch_at(self.tokens, self.steps, self.config, device=self.device)
            update(self.model, self.optimizer, rows, self.config, self.autocast, self.now)
        self.steps += 1

    def time(self, steps):
        # in a real run the step before is its own; another row's would leave another heap and cache
        self.step()
        self.seconds.append(clock(self.step, self.device, steps))

    def flops(self):
        """Operations of one step, forward and backward, nothing counted twice."""
        config = self.config
        C, L, T = config.n_embd, config.n_layer, config.block_size
        blocks = L * 12 * C * C  # q, k, v and out projections 4 C C, MLP 8 C C
        head = C * self.vocab_size
        attention = L * T * C  # scores and sums of values, over T / 2 keys on average
        per_token = self.streams * (blocks + head + attention)
        if config.ablation != "none":
            per_token += L * C * (config.attn_units + 4 * C)  # the gates, on the clean stream only
        return 6 * config.batch_size * T * per_token

    def floor(self, product, copy):
        """Seconds that a step takes at least, at these FLOP/s and bytes/s."""
        seconds = self.flops() / product
        if self.device.type == "cuda":
            tokens = self.config.batch_size * self.config.block_size
            logits = 2 * self.streams * tokens * self.vocab_size  # bytes
            seconds = max(seconds, 7 * logits / copy)
        return seconds


# --------------------------------------------------------------------------------- memory and rates


def resident(which):
    """This process's resident memory in bytes, "VmRSS" now or "VmHWM" at its peak.

    None where Linux's /proc is missing.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split(f"{which}:")[1].split()[0])


def cpu_memory(row):
    """The peak memory in bytes of two steps of a row that is not built yet, or None."""
    before = resident("VmRSS")
    row.build()
    for _ in range(2):
        row.step()
    return None if before is None else resident("VmHWM") - before


def memory_in_new_process(row):
    """cpu_memory with a heap of its own: what others have freed would hide what a step takes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(cpu_memory, row).result()


def build_and_warm(row, steps):
    """Make a row ready to be timed, and on the way find its peak memory."""
    on_gpu = row.device.type == "cuda"
    if row.device.type == "cpu" and not row.compile_mode:  # to compile it twice would take minutes
        row.memory = memory_in_new_process(row)
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    row.build()
    for _ in range(steps):
        row.step()
    if on_gpu:
        torch.cuda.synchronize()
        row.memory = torch.cuda.max_memory_allocated() - before
    seconds = time.perf_counter() - begun
    print(f"  {row.label()}: warm after {seconds:.0f} s", file=sys.stderr, flush=True)


def ceilings(device, dtype):
    """FLOP/s of a large matrix product, bytes/s (read and written) of a large copy; best of six."""
    n, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.ones_like(source)
    work = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    seconds = in_turn(work, 6, device)
    return 2 * n**3 / min(seconds["product"]), 2 * size / min(seconds["copy"])


# ---------------------------------------------------------------------------------------- the table


def numbers_of(row, rows, ceiling):
    """The numbers of one row, by the names of COLUMNS; None where there is no number."""
    median = statistics.median(row.seconds)
    ratio = None
    for other in rows:
        if other.variant == "baseline" and other.setting() == row.setting():
            ratio = median / statistics.median(other.seconds)
    return {
        "variant": row.variant, **row.setting(),
        "ms": 1e3 * median, "ms_min": 1e3 * min(row.seconds), "ms_max": 1e3 * max(row.seconds),
        "tokens_per_s": row.config.batch_size * row.config.block_size / median,
        "ratio": ratio, "gflops": row.flops() / median / 1e9,
        "floor_share": row.floor(*ceiling) / median,
        "memory_mb": None if row.memory is None else row.memory / 1e6,
        "hours_400k": 400_000 * median / 3600}


SETTING = [
    ("variant", column("variant")),
    ("dtype", column("dtype")),
    ("compile", column("compile")),
    ("vocabulary", column("vocab_size", ",")),
    ("batch", column("batch")),
]
COLUMNS = [
    *SETTING,
    ("ms/step", column("ms", ".1f")),
    ("min", column("ms_min", ".1f")),
    ("max", column("ms_max", ".1f")),
    ("tokens/s", column("tokens_per_s", ",.0f")),
    ("x baseline", column("ratio", ".2f")),
    ("GFLOP/s", column("gflops", ",.0f")),
    ("of floor", column("floor_share", ".0%")),
    ("peak MB", column("memory_mb", ",.0f")),
    ("h / 400,000", column("hours_400k", ".1f")),
]
AGAINST_COLUMNS = [
    *SETTING,
    ("ms/step", column("ms", ".1f")),
    ("there", column("ms_there", ".1f")),
    ("ratio", column("ratio", ".3f")),
    ("by round", column("ratio_by_round", ".3f")),
    ("lowest", column("ratio_min", ".3f")),
    ("highest", column("ratio_max", ".3f")),
]


def known(row):
    """A row without its None, so that the table shows - there."""
    return {name: value for name, value in row.items() if value is not None}


def measure_rows(rows, args, steps):
    """Time all rows in turn -> the result that --json prints."""
    for row in rows:
        build_and_warm(row, 3)
    for _ in range(args.rounds):
        for row in rows:
            row.time(steps)
    device = rows[0].device
    rates = {}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        rates[dtype] = ceilings(device, getattr(torch, dtype))
    result = {
        "environment": environment(device), "rounds": args.rounds, "steps": steps,
        "ceilings": {dtype: {"gflops": product / 1e9, "copy_gb_per_s": copy / 1e9}
                     for dtype, (product, copy) in rates.items()},
        "rows": [numbers_of(row, rows, rates[row.dtype]) for row in rows]}
    if args.parts:
        result["parts_ms"] = parts_of_last(rows, args.rounds)
    return result


def parts_of_last(rows, rounds):
    """{variant: {the name of a part: ms}} for the last combination of knobs."""
    own = [row for row in rows if row.variant not in REFERENCES]
    milliseconds = {}
    for row in own:
        if row.setting() == own[-1].setting():
            seconds = time_parts(row, rounds)
            milliseconds[row.variant] = {part: 1e3 * value for part, value in seconds.items()}
    return milliseconds


def compare_rows(rows, args, steps):
    """Time all rows in turn, at this and at another commit -> the result that --json prints."""
    compared = []
    times = times_of_both(rows, args.against, args.rounds, steps)
    for row, here, there in zip(rows, *times):
        median, median_there = statistics.median(here), statistics.median(there)
        ratios = [ours / theirs for ours, theirs in zip(here, there)]
        compared.append({
            "variant": row.variant, **row.setting(),
            "ms": 1e3 * median, "ms_there": 1e3 * median_there,
            "ratio": median / median_there, "ratio_by_round": statistics.median(ratios),
            "ratio_min": min(ratios), "ratio_max": max(ratios)})
    return {"environment": environment(rows[0].device), "against": args.against,
            "rounds": args.rounds, "steps": steps, "rows": compared}


def show(result):
    """The result as text."""
    print("{device}, torch {torch}, commit {commit}".format(**result["environment"])
          + f"; median of {result['rounds']} rounds of {result['steps']} steps, all rows in turn")
    for dtype, rates in result.get("ceilings", {}).items():
        print(f"{dtype}: a large product {rates['gflops']:,.0f} GFLOP/s, "
              f"a large copy {rates['copy_gb_per_s']:,.0f} GB/s")
    if "against" in result:
        print(f"there: commit {result['against']}; ratio: this tree's time over its time")
        print_table(result["rows"], AGAINST_COLUMNS)
    else:
        print_table([known(row) for row in result["rows"]], COLUMNS)
    for variant, times in result.get("parts_ms", {}).items():
        listed = ", ".join(f"{part} {ms:.1f}" for part, ms in times.items())
        print(f"{variant}, ms on their own: {listed}")


# --------------------------------------------------------------------------------- the command line


def parse_arguments():
    """The command line -> its own words, and those for train.py's knobs. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    add = parser.add_argument
    for name, default in LISTS.items():
        add(f"--{name}", default=default, help=f"one or more, with commas (default {default})")
    add("--variants", help=f"some of {','.join(ABLATION)}, with commas (default all; "
                           f"with --against all but the references plain and whole)")
    add("--rounds", type=int, default=7, help="of timing everything once (default 7)")
    add("--steps", type=int, help="between two looks at the clock (default 1; on a GPU 10)")
    add("--parts", action="store_true",
        help="also time the parts of a step, for the last combination of knobs")
    add("--against", metavar="COMMIT", help="compare with the step of another commit")
    add("--json", action="store_true", help="print JSON and nothing else")
    args, words = parser.parse_known_args()
    if args.variants is None:
        args.variants = ",".join(ABLATION)
        if args.against is not None:
            args.variants = "baseline,local,global"
    args.variants = args.variants.split(",")
    if set(args.variants) - ABLATION.keys():
        named = ",".join(args.variants)
        raise UserError(f"--variants={named} must be some of {', '.join(ABLATION)}")
    if args.rounds < 1 or args.steps is not None and args.steps < 1:
        raise UserError(f"--rounds={args.rounds} and --steps={args.steps} must be at least 1")
    for text in args.vocab_size.split(","):
        few_digits = text.isdecimal() and len(text) <= 5
        if not few_digits or not 2 <= int(text) <= 2**16:  # tokens are uint16
            raise UserError(f"--vocab_size={args.vocab_size} must be whole numbers "
                            f"from 2 to 65,536, with commas")
    if args.against is not None and args.parts:
        raise UserError("--against compares whole steps: leave out --parts")
    return args, words


def make_rows(args, words):
    """Every variant with every combination of the lists."""
    rows = {}
    lists = [getattr(args, name).split(",") for name in LISTS]
    for dtype, mode, vocab_size, batch_size in itertools.product(*lists):
        for variant in args.variants:
            chosen = "False" if variant in REFERENCES else mode
            row = Row(variant, [*words, f"--dtype={dtype}", f"--compile={chosen}",
                                f"--batch_size={batch_size}"], int(vocab_size))
            rows.setdefault(row.label(), row)  # a reference is not compiled: once is enough
    return list(rows.values())


def main():
    args, words = parse_arguments()
    rows = make_rows(args, words)
    steps = args.steps or (10 if rows[0].device.type == "cuda" else 1)
    measure = measure_rows if args.against is None else compare_rows
    result = measure(rows, args, steps)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    knobs.cli(main)
