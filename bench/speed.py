"""Time a training step as train.py takes it: batch, forward, backward, clipping, optimizer.

    python -m bench.speed                           the paper's model and batch, GPT-2's vocabulary
    python -m bench.speed --batch_size=4            1,024 tokens per step
    python -m bench.speed --dtype=float32,bfloat16 --compile=False,True,reduce-overhead
    python -m bench.speed config/demo.py --vocab_size=580         any knob of train.py

Commas make lists of --dtype, --compile, --batch_size and --vocab_size. Every combination is timed
for the plain GPT-Neo (baseline) and the local and the global variant. All take turns, round after
round, so that a busy machine slows all of them. Tokens are random: no data are needed.

ms/step      the median of the rounds, and the fastest and the slowest of them
x baseline   the median over that of the baseline with the same knobs
of floor     the step's matrix products at the rate of one large product: share of the time taken
peak MB      the most memory that a step needs, weights and optimizer included; on a CPU it is the
             resident memory of a separate process, on Linux and without --compile only
h / 400,000  hours for the paper's 400,000 updates
"""

import itertools
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import config as knobs
from model import GPTNeo
from prepare import UserError
from train import batch_at, make_optimizer, pick_precision, update

VARIANTS = {"baseline": "none", "local": "local", "global": "global"}  # name: --ablation
LISTS = {"dtype": "auto", "compile": "auto", "batch_size": "24", "vocab_size": "50257"}  # defaults


def clock(function, device, times=1):
    """Seconds per call, the work that it leaves to a GPU included."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
    if wait:
        wait()
    begun = time.perf_counter()
    for _ in range(times):
        function()
    if wait:
        wait()
    return (time.perf_counter() - begun) / times


class Row:
    """One line of the table: a variant with its knobs."""

    def __init__(self, variant, words, vocab_size):
        self.variant = variant
        config = knobs.load([*words, f"--ablation={VARIANTS[variant]}"])
        self.config = replace(config, vocab_size=vocab_size)
        self.device = knobs.pick_device(config.device)
        self.bfloat16, self.compile_mode = pick_precision(config, self.device, world=1)
        self.steps, self.seconds = 0, []  # steps taken; seconds per step, one entry per round
        self.memory = None  # bytes
        dtype = "bfloat16" if self.bfloat16 else "float32"
        self.setting = {  # what rows share that are compared: the first columns of the table
            "dtype": dtype, "compile": self.compile_mode or "False",
            "V": str(vocab_size), "batch": f"{config.batch_size} x {config.block_size}"}

    def build(self, steps):
        """Make the model and take the first steps."""
        config = self.config
        torch.manual_seed(config.seed)
        self.model = GPTNeo(config.model).to(self.device)
        if self.compile_mode:
            self.model.compile(mode=self.compile_mode, dynamic=False)
        self.optimizer = make_optimizer(self.model, config)
        self.coeff = config.schedule(config.max_iters)[1]  # after the ramp
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, 1_000_000)
        self.tokens = tokens.astype(np.uint16)
        self.time(steps)

    def step(self):
        config = self.config
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
        batch = batch_at(self.tokens, self.steps, config, rank=0, world=1, device=self.device)
        update(self.model, self.optimizer, batch, config, autocast, self.coeff)
        self.steps += 1

    def time(self, steps):
        """Seconds per step."""
        # pick_precision set this for all rows, and only bfloat16 ones use TF32
        if self.device.type == "cuda":
            precision = "high" if self.bfloat16 else "highest"
            torch.set_float32_matmul_precision(precision)
        self.step()  # in a run, the step before is of the same model
        return clock(self.step, self.device, steps)

    def flops(self):
        """Floating-point operations of one step's matrix products, forward and backward."""
        config = self.config
        C, L, T = config.n_embd, config.n_layer, config.block_size
        # blocks: q, k, v and out projections 4 C C, MLP 8 C C; attention: T / 2 keys on average
        per_token = L * 12 * C * C + L * T * C + C * config.vocab_size
        if config.ablation != "none":  # two streams, and the gates
            per_token = 2 * per_token + L * C * (config.attn_units + 4 * C)
        return 6 * config.batch_size * T * per_token


# ------------------------------------------------------------------------------------------- memory


def resident(which):
    """This process's resident memory in bytes, "VmRSS" now or "VmHWM" at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{which}:")[1].split()[0])


def cpu_memory(row):
    """Peak memory in bytes of the first steps of a row that is not built yet."""
    before = resident("VmRSS")
    row.build(1)
    return resident("VmHWM") - before


def build(row):
    """Make a row ready to be timed, and measure its peak memory."""
    begun, cuda = time.perf_counter(), row.device.type == "cuda"
    if row.device.type == "cpu" and not row.compile_mode and Path("/proc/self").exists():
        context = multiprocessing.get_context("spawn")  # else memory freed before is used again
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            row.memory = pool.submit(cpu_memory, row).result()
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    row.build(3)
    if cuda:
        row.memory = torch.cuda.max_memory_allocated() - before
    words = " ".join([row.variant, *row.setting.values()])
    print(f"  {words}: warm after {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------- table


def product_rate(device, dtype):
    """FLOP/s of a large matrix product, the best of six."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(clock(lambda: a @ a, device) for _ in range(6))


def numbers(row, rows, rates):
    """A row's line of the table: {heading: text}."""
    median = statistics.median(row.seconds)
    ratio, memory = "-", "-"
    for other in rows:
        if other.variant == "baseline" and other.setting == row.setting:
            ratio = f"{median / statistics.median(other.seconds):.2f}"
    if row.memory:
        memory = f"{row.memory / 1e6:,.0f}"
    floor = row.flops() / rates[row.setting["dtype"]]
    tokens = row.config.batch_size * row.config.block_size
    return {"variant": row.variant, **row.setting, "ms/step": f"{1e3 * median:.2f}",
            "min": f"{1e3 * min(row.seconds):.2f}", "max": f"{1e3 * max(row.seconds):.2f}",
            "tokens/s": f"{tokens / median:,.0f}", "x baseline": ratio,
            "of floor": f"{floor / median:.0%}", "peak MB": memory,
            "h / 400,000": f"{400_000 * median / 3600:.1f}"}


def print_table(lines):
    cells = [list(lines[0])]
    cells += [list(line.values()) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def parse(argv):
    """The command line -> its own flags, and all rows. Raises UserError."""
    parser = knobs.Parser(description=__doc__)
    add = parser.add_argument
    for name, default in LISTS.items():
        add(f"--{name}", default=default, help=f"one or more, with commas (default {default})")
    add("--variants", default=",".join(VARIANTS), help="which, with commas (default %(default)s)")
    add("--rounds", type=int, default=7, help="of timing everything once (default 7)")
    add("--steps", type=int, default=0, help="per row and round (default 1; on a GPU 10)")
    args, words = parser.parse_known_args(argv)
    variants, sizes = args.variants.split(","), args.vocab_size.split(",")
    if set(variants) - VARIANTS.keys():
        raise UserError(f"--variants={args.variants} must be some of {','.join(VARIANTS)}")
    if not all(size.isdecimal() and 2 <= int(size) <= 2**16 for size in sizes):
        raise UserError(f"--vocab_size={args.vocab_size} must be from 2 to 65,536")
    if args.rounds < 1:
        raise UserError(f"--rounds={args.rounds} must be at least 1")
    lists = [getattr(args, name).split(",") for name in LISTS]
    rows = []
    for *values, vocab_size in itertools.product(*lists):
        own = [f"--{name}={value}" for name, value in zip(LISTS, values)]
        rows += [Row(variant, [*words, *own], int(vocab_size)) for variant in variants]
    return args, rows


def main():
    args, rows = parse(sys.argv[1:])
    device = rows[0].device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # clock and memory are of the current GPU
    steps = args.steps or (10 if device.type == "cuda" else 1)
    torch._dynamo.config.recompile_limit = 2 + 6 * len(rows)  # else late rows would not be compiled
    for row in rows:
        build(row)
    for _ in range(args.rounds):
        for row in rows:
            row.seconds.append(row.time(steps))
    dtypes = {row.setting["dtype"] for row in rows}
    torch.set_float32_matmul_precision("highest")  # bfloat16 rows have allowed TF32
    rates = {name: product_rate(device, getattr(torch, name)) for name in dtypes}
    where = f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}; {args.rounds} rounds of {steps} steps")
    for dtype, rate in rates.items():
        print(f"{dtype}: {rate / 1e12:.2f} TFLOP/s in a large matrix product")
    print_table([numbers(row, rows, rates) for row in rows])


if __name__ == "__main__":
    knobs.cli(main)
