"""Every knob of train.py, its default (the paper's, where the paper says one) and its meaning.

    python train.py config/local_k2.py --batch_size=12     defaults < config file < command line

A config file is Python that assigns to some of these names: a diff from the defaults. Names that
begin with an underscore, and imported modules, are its own business.

The knobs of the model itself (n_layer, k_attn, gate, ...) are the fields of GPTNeoConfig in
model.py. Below the loader is what every script of the project shares: how it ends, which device
it takes and how much memory that has.
"""

import argparse
import codecs
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from model import GPTNeoConfig, ModelError
from prepare import UserError

Compile = Literal["auto", "False", "True", "reduce-overhead"]


class Now(NamedTuple):
    """What changes along a run, as it is at one update: the learning rate, which gates multiply by
    their own factor; the coefficient of the ablated loss; (k_attn, k_mlp). Without an ablated
    stream the coefficient is 0 and k is (0, 0)."""

    learning_rate: float
    ablated_coeff: float
    k: tuple


@dataclasses.dataclass
class Config(GPTNeoConfig):
    """All knobs of a run. Raises UserError or ModelError on values that cannot work."""

    # where from and where to
    data: str = "data/tinystories"  # folder that prepare.py wrote
    out: str = "out/custom"  # run folder; with a config file, out/<name of the file>
    init_from: str = ""  # begin with these weights: a run of ours, or a GPT-Neo of Hugging Face's
    resume: bool = False  # continue out/last.pt exactly
    # optimization: AdamW, cosine annealing to zero
    batch_size: int = 24  # sequences per update, over all processes and micro-batches together
    grad_accum: int = 1  # micro-batches per update on each process: less memory, the same update
    max_iters: int = 400_000  # updates
    # ablated_coeff is 0 up to ramp_start, then rises in a line, and is whole from ramp_end on
    ramp_start: float = 0.0  # share of the run; while the coefficient is 0 no gate is computed
    ramp_end: float = 0.0  # share of the run; 0: whole from the first update on, the paper
    # k_attn and k_mlp fall from all units but one, at ramp_start, to their values at anneal_end
    anneal_end: float = 0.0  # share of the run; 0: k does not change, the paper
    freeze: Literal["none", "base"] = "none"  # base: train the gates alone
    learning_rate: float = 1.4e-3  # at the top of the cosine
    gate_lr_multiplier: float = 1.0  # the learning rate of the gates is so many times that
    warmup_iters: int = 0  # updates of linear warm-up before the cosine
    weight_decay: float = 0.0  # on matrices only
    beta1: float = 0.9  # the paper names no betas and no epsilon: PyTorch's defaults
    beta2: float = 0.999
    adam_eps: float = 1e-8
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 leaves it alone
    seed: int = 1337  # of the weights and of the batches
    # evaluation and logging
    eval_interval: int = 1000  # updates between validation, checkpoint, metrics.jsonl and loss.png
    eval_windows: int = 200  # validation windows of block_size tokens, the same ones every time
    log_interval: int = 100  # updates between console lines
    wandb: bool = False  # also log to Weights & Biases, if it is installed
    # machine
    device: str = "auto"  # auto takes cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on GPUs
    compile: Compile = "auto"  # auto is True on cuda; reduce-overhead adds CUDA graphs
    fsdp: bool = False  # shard weights, gradients and optimizer over the processes: big models

    def __post_init__(self):
        super().__post_init__()
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) <= 1e38:  # float32 holds no more
                raise UserError(f"{name}={getattr(self, name)} must be a number from 0 to 1e38")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in ("data", "out"):
            if not getattr(self, name):
                raise UserError(f"{name}= must name a folder")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must be a whole number from 0 to 2**63 - 1")
        if not 0 <= self.warmup_iters < self.max_iters:
            raise UserError(f"warmup_iters={self.warmup_iters} must be between 0 and "
                            f"max_iters - 1 = {self.max_iters - 1}")
        if not 0 <= self.ramp_start <= self.ramp_end <= 1:
            raise UserError(f"ramp_start={self.ramp_start} and ramp_end={self.ramp_end} must be "
                            f"shares of the run, and the end not before the start: "
                            f"0 <= ramp_start <= ramp_end <= 1")
        if self.anneal_end and not self.ramp_start <= self.anneal_end <= 1:
            raise UserError(f"anneal_end={self.anneal_end} must be a share of the run, not before "
                            f"ramp_start={self.ramp_start}, when k begins to fall, and at most 1")
        trains_clean = self.clean_coeff > 0 and self.freeze == "none"
        if not trains_clean and self.at(0).ablated_coeff == 0:
            without = "freeze=base" if self.freeze == "base" else "clean_coeff=0"
            ramps = self.ablation != "none" and self.ramp_end > 0
            advice = ": add --ramp_start=0 --ramp_end=0" if ramps else ""
            raise UserError(f"{without} and no ablated loss in the first update: such a run would "
                            f"train nothing, or nothing at first{advice}")

    def at(self, step):
        """What changes along the run, at an update, counted from 0: -> Now.

        The learning rate: linear warm-up, then cosine annealing that would reach zero at step
        max_iters. The coefficient of the ablated loss: a line. k: geometric.
        """
        if step < self.warmup_iters:
            rate = self.learning_rate * (step + 1) / self.warmup_iters
        else:
            progress = (step - self.warmup_iters) / (self.max_iters - self.warmup_iters)
            rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        if self.ablation == "none":
            return Now(rate, 0.0, (0, 0))
        done = step / self.max_iters
        coeff = self.ablated_coeff * way(done, self.ramp_start, self.ramp_end)
        left = 1 - way(done, self.ramp_start, self.anneal_end)  # of the fall of k
        k = (fallen(self.attn_units, self.k_attn, left), fallen(4 * self.n_embd, self.k_mlp, left))
        return Now(rate, coeff, k)

    @property
    def model(self):
        """The GPTNeoConfig in it: what the model needs to know, without the rest of the run."""
        names = [field.name for field in dataclasses.fields(GPTNeoConfig)]
        return GPTNeoConfig(**{name: getattr(self, name) for name in names})


def way(done, start, end):
    """How far a share of the run lies between two: 0 up to the start, 1 from the end on."""
    if done >= end:
        return 1.0
    if done <= start:
        return 0.0
    return (done - start) / (end - start)


def fallen(units, k, left):
    """How many of the units win when such a share is left of the fall from all but one to k."""
    return round(k * ((units - 1) / k) ** left)


AT_LEAST_1 = ("batch_size", "grad_accum", "max_iters", "eval_interval", "eval_windows",
              "log_interval")
NOT_NEGATIVE = ("learning_rate", "gate_lr_multiplier", "weight_decay", "adam_eps", "grad_clip",
                "clean_coeff", "ablated_coeff")

# what a user may set: all but the vocabulary, which comes with the data
FIELDS = {field.name: field for field in dataclasses.fields(Config) if field.name != "vocab_size"}

# where a run computes and what it prints, never what it computes: these may differ on resuming;
# and the vocabulary, which is the data's: they have a checksum of their own
MACHINE = ("resume", "data", "out", "device", "dtype", "compile", "fsdp", "grad_accum",
           "log_interval", "wandb", "vocab_size")


def decisive(values):
    """{knob: value} without the MACHINE ones: with the data, they decide what a run computes."""
    return {name: value for name, value in values.items() if name not in MACHINE}


# --------------------------------------------------------------------------------- the loader


def unknown(name):
    """The end of an error message about a knob that is not there."""
    near = difflib.get_close_matches(name, FIELDS, n=1)
    advice = f": did you mean '{near[0]}'?" if near else "; --help lists them"
    return f"there is no knob '{name}'{advice}"


def parse_value(field, value):
    """A command-line string or a config-file value as the field's type. Raises UserError."""
    choices, text = get_args(field.type), str(value)
    if choices and text in choices:
        return text
    if field.type is bool and text.capitalize() in ("True", "False"):
        return text.capitalize() == "True"
    if field.type is str and isinstance(value, str):
        return value
    if field.type in (int, float) and not isinstance(value, bool):
        try:
            return field.type(text)
        except ValueError:
            pass
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    wants = "one of " + ", ".join(choices) if choices else kinds[field.type]
    shown = text if len(text) < 100 else f"{text[:100]} ..."
    raise UserError(f"{field.name}={shown} is not {wants}")


def load(argv):
    """Command-line words -> Config. Raises UserError on unknown knobs and wrong types."""
    parser = argparse.ArgumentParser(usage="python train.py [config/NAME.py] [--knob=value ...]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    parser.add_argument("config", nargs="?", help="a config file, such as config/local_k2.py")
    # every knob's comment, read off the sources, so that --help can never disagree with them
    source = inspect.getsource(GPTNeoConfig) + inspect.getsource(Config)
    notes = dict(re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", source, re.MULTILINE))
    for name, field in FIELDS.items():
        note = f"{notes.get(name, '')} (default {field.default})".strip().replace("%", "%%")
        shown = "|".join(get_args(field.type)) or field.type.__name__
        bare = {"nargs": "?", "const": "True"} if field.type is bool else {}  # --resume is True
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=note, metavar=shown,
                            **bare)
    known, extra = parser.parse_known_args(argv)
    for word in extra:
        if word.startswith("--"):
            raise UserError(unknown(word[2:].split("=")[0]))
        raise UserError(f"'{word}' is neither a knob (--name=value) nor the one config file")
    given = vars(known)
    path, values = given.pop("config"), {}
    if path is not None:  # an empty word is a mistake, such as an unset shell variable
        values = {"out": f"out/{Path(path).stem}", **read_file(path)}
    values.update(given)
    return Config(**{name: parse_value(FIELDS[name], value) for name, value in values.items()})


def usage_error(message):
    """argparse's complaint as one short line, like every other."""
    raise UserError(message if len(message) < 300 else f"{message[:300]} ...")


def read_file(path):
    """The knobs that a config file assigns. Raises UserError if it does not run or names others."""
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # whatever is wrong with the user's Python
        reason = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        raise UserError(f"config file {path} does not run: {kind}: {reason}") from None
    values = {}
    for name, value in names.items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if name not in FIELDS:
            raise UserError(f"{path}: {unknown(name)}")
        values[name] = value
    return values


# ------------------------------------------------------------------- what every script shares


def pick_device(name, index=0):
    """A torch.device that works: "auto" takes cuda, else mps, else cpu; "cuda" is GPU number index.

    Raises UserError.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(f"cuda:{index}" if name == "cuda" else name)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU, number 0")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # its first sentence
        raise UserError(f"--device={name} cannot be used here, "
                        f"try --device=cpu: {reason}") from None
    return device


def device_memory(device):
    """Bytes of the GPU or, for every other device, of the machine; infinite where unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
    return pages * size if min(pages, size) > 0 else math.inf


class StopRequest:
    """Ctrl-C and SIGTERM raise a flag, so that nothing is cut in half: `if stop.requested: ...`.

    A second signal kills at once, which the first one says, unless patient: of several processes,
    torchrun may pass on a signal that has come to each of them already.
    """

    def __init__(self, patient=False):
        self.requested, self.patient = False, patient
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        if not self.patient:
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):  # print may be at work already
                os.write(2, b"\nstopping where it can go on; once more: at once\n")


def plainly(error):
    """For codecs: how to print what the terminal's encoding lacks. ± becomes +-, others ?."""
    text = error.object[error.start : error.end]
    return "".join("+-" if letter == "±" else "?" for letter in text), error.end


codecs.register_error("plainly", plainly)


def cli(main):
    """Run a script's main(). What the user can mend is one line on stderr and exit code 1; every
    other exception is a bug and keeps its traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as scripts have it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook has put its own
            stream.reconfigure(errors="plainly")
    try:
        main()
        print(end="", flush=True)  # here, where a full disk can still be told in one line
    except (UserError, ModelError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO) or error.filename:
            raise
        drop_output()
        raise SystemExit(f"error: cannot write the output: {error.strerror}") from None


def drop_output():
    """Send what stdout can no longer take nowhere: Python would complain of it again as it ends."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
