"""Every knob of train.py, its default (the paper's, where the paper says one) and its meaning.

    python train.py config/local_k2.py --batch_size=12     defaults < config file < command line

A config file is Python that assigns to some of these names: a diff from the defaults. It may import
modules and use names that begin with an underscore. The knobs of the model itself (n_layer, k_attn,
gate, ...) are the fields of GPTNeoConfig in model.py.
"""

import argparse
import difflib
import inspect
import math
import os
import re
import runpy
import signal
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

import prepare
from model import GPTNeoConfig, ModelError
from prepare import Parser, UserError

Compile = Literal["auto", "False", "True", "reduce-overhead"]


@dataclass
class Config(GPTNeoConfig):
    """All knobs of a run. Raises UserError on values that cannot work."""

    # where from and where to
    data: str = "data/tinystories"  # folder that prepare.py wrote
    out: str = "out/custom"  # run folder; with a config file, out/<name of the file>
    init_from: str = ""  # initial weights: a run folder, a .pt, or a GPT-Neo from the hub
    resume: bool = False  # continue the run in the folder --out exactly where it stopped
    # optimization: AdamW, cosine annealing to zero
    batch_size: int = 24  # sequences per update, over all processes and micro-batches together
    grad_accum: int = 1  # micro-batches per update on each process: less memory, the same update
    max_iters: int = 400_000  # updates
    # the ramp: ablated_coeff is 0 before ramp_start, then rises linearly until ramp_end
    ramp_start: float = 0.0  # share of the run; while the coefficient is 0 no gate is computed
    ramp_end: float = 0.0  # share of the run where the ramp ends; 0, the paper: no ramp
    learning_rate: float = 1.4e-3  # peak
    warmup_iters: int = 0  # updates of linear warm-up before the cosine
    weight_decay: float = 0.0  # on matrices only
    beta1: float = 0.9  # the paper names no betas: PyTorch's defaults
    beta2: float = 0.999  # see beta1
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    seed: int = 1337  # of the weights and of the batches
    # evaluation and logging
    eval_interval: int = 1000  # updates between evaluations, which save checkpoint, metrics, plot
    eval_windows: int = 200  # validation windows of block_size tokens, always the same ones
    log_interval: int = 100  # updates between console lines
    wandb: bool = False  # also log to Weights & Biases, if it is installed
    # machine
    device: str = "auto"  # auto takes cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast on new GPUs
    # reduce-overhead: CUDA graphs, for one process and grad_accum=1
    compile: Compile = "auto"  # auto: False on a CPU; on a GPU reduce-overhead, or else True

    def __post_init__(self):
        def require(good, message):
            if not good:
                raise UserError(message)

        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int:
                least = 0 if name in ("seed", "warmup_iters", "k_attn", "k_mlp") else 1
                require(value >= least, f"{name}={value} must be at least {least}")
            if field.type is float:
                require(0 <= value < math.inf, f"{name}={value} must be finite and at least 0")
        require(self.n_embd % self.n_head == 0,
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        kinds = self.attention_layers.split(",")
        require(set(kinds) <= {"global", "local"} and self.n_layer % len(kinds) == 0,
                f"attention_layers={self.attention_layers} must be a pattern of global,local whose "
                f"length divides n_layer={self.n_layer}")
        for name, units in (("k_attn", self.attn_units), ("k_mlp", 4 * self.n_embd)):
            require(self.ablation == "none" or 1 <= getattr(self, name) < units,
                    f"{name}={getattr(self, name)} must be from 1 to {units - 1}: a layer has "
                    f"{units} units and at least one must lose")
        require(self.warmup_iters < self.max_iters,
                f"warmup_iters={self.warmup_iters} must be below max_iters={self.max_iters}")
        require(self.ramp_start <= self.ramp_end <= 1,
                f"ramp_start={self.ramp_start} and ramp_end={self.ramp_end} must be shares of the "
                f"run: 0 <= ramp_start <= ramp_end <= 1")

    def schedule(self, step):
        """(learning rate, ablated_coeff) of an update, counted from 0. Learning rate: linear
        warm-up, then cosine annealing that would reach zero at step max_iters."""
        if step < self.warmup_iters:
            rate = self.learning_rate * (step + 1) / self.warmup_iters
        else:
            progress = (step - self.warmup_iters) / (self.max_iters - self.warmup_iters)
            rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        done = step / self.max_iters  # share of the run
        coeff = self.ablated_coeff
        if self.ablation == "none" or done < self.ramp_start:
            coeff = 0.0
        elif done < self.ramp_end:
            coeff *= (done - self.ramp_start) / (self.ramp_end - self.ramp_start)
        return rate, coeff

    @property
    def model(self):
        """The knobs of the model alone."""
        return GPTNeoConfig(**{field.name: getattr(self, field.name)
                               for field in fields(GPTNeoConfig)})


# what a user may set: all but the vocabulary, which comes with the data
FIELDS = {field.name: field for field in fields(Config) if field.name != "vocab_size"}

# knobs that may change on resuming: where a run computes, how it rounds and what it prints. The
# data and their vocabulary are compared by a checksum instead.
MACHINE = ("resume", "data", "out", "device", "dtype", "compile", "grad_accum", "log_interval",
           "wandb", "vocab_size")


def decisive(values):
    """{knob: value} without the MACHINE ones: with the data, they decide what a run computes."""
    return {name: value for name, value in values.items() if name not in MACHINE}


# --------------------------------------------------------------------------------- the loader


def boolean(text):
    if text.capitalize() not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text} is neither True nor False")
    return text.capitalize() == "True"


def positive(text):
    """For argparse: a whole number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def picture(path):
    """For argparse: a file that a plot can be saved to."""
    if Path(path).suffix not in (".png", ".pdf", ".svg") or not Path(path).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is no .png, .pdf or .svg of an existing folder")
    return path


def parse(words):
    """Words such as --n_layer=2 -> {knob: value}, and maybe "config": a path. Raises UserError. The
    help texts are the comments beside the knobs."""
    source = inspect.getsource(GPTNeoConfig) + inspect.getsource(Config)
    notes = dict(re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", source, re.MULTILINE))
    parser = Parser(usage="python train.py [config/NAME.py] [--knob=value ...]",
                    description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", help="a config file, such as config/local_k2.py")
    for name, field in FIELDS.items():
        if choices := get_args(field.type):
            options = {"choices": choices}
        elif field.type is bool:  # --resume is --resume=True
            options = {"type": boolean, "nargs": "?", "const": True, "metavar": "bool"}
        else:
            options = {"type": field.type, "metavar": field.type.__name__}
        note = f"{notes.get(name, '')} (default {field.default})".replace("%", "%%")
        parser.add_argument(f"--{name}", help=note, **options)
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name not in {*FIELDS, "help"}:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            advice = f"did you mean --{near[0]}?" if near else "--help lists them"
            raise UserError(f"there is no knob {name}: {advice}")
    return vars(parser.parse_args(words))


def load(argv):
    """Command-line words -> Config. Raises UserError."""
    given, from_file = parse(argv), {}
    if path := given.pop("config", None):
        if not Path(path).is_file():
            raise UserError(f"there is no config file {path}")
        try:  # its values are checked as the command line's are
            values = {"out": f"out/{Path(path).stem}", **runpy.run_path(path)}
            from_file = parse([f"--{name}={value}" for name, value in values.items()
                               if not name.startswith("_") and not inspect.ismodule(value)])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # whatever is wrong with the user's Python
            raise UserError(f"{path} does not run: {type(error).__name__}: {error}") from None
    return Config(**{**from_file, **given})


# ----------------------------------------------------------------------- what all scripts share


def pick_device(name="auto", index=0):
    """A torch.device that works: "auto" takes cuda, else mps, else cpu; "cuda" is GPU number index.
    Raises UserError."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(f"cuda:{index}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={name} does not work here, try --device=cpu: {reason}") from None
    return device


class StopRequest:
    """Ctrl-C and SIGTERM set a flag, so that an update is never interrupted. A second signal kills
    at once, but not under torchrun, which passes on to each process what it has received already.
    """

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        if "RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)


cli = partial(prepare.cli, errors=(UserError, ModelError))  # how every other script ends
