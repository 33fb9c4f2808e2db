"""Every knob of train.py, its default (the paper's, where the paper says one) and its meaning.

    python train.py config/local_k2.py --batch_size=12     defaults < config file < command line

A config file is Python that assigns to some of these names: a diff from the defaults. Names that begin with an
underscore, and imported modules, are its own business.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import runpy
import traceback
from pathlib import Path
from typing import Literal, get_args


@dataclasses.dataclass
class Config:
    # where from and where to
    data: str = "data/tinystories"  # folder that prepare.py wrote
    out: str = "out/custom"  # run folder; with a config file, out/<name of the file>
    resume: bool = False  # continue out/last.pt exactly
    # the gate
    ablation: Literal["none", "local", "global"] = "local"  # none is the plain GPT-Neo, the baseline
    gate: Literal["softmax", "sigmoid"] = "softmax"  # soft form behind the hard mask: the paper's or the published code's
    attn_unit: Literal["dim", "head"] = "dim"  # attention units are head-output channels or whole heads
    k_attn: int = 2  # attention units kept per token and layer
    k_mlp: int = 2  # MLP neurons kept per token and layer
    clean_coeff: float = 1.0  # loss = clean_coeff * clean + ablated_coeff * ablated cross-entropy
    ablated_coeff: float = 1.0
    # geometry; the vocabulary comes with the data
    n_layer: int = 8
    n_head: int = 16
    n_embd: int = 128
    block_size: int = 256  # context, tokens
    attention_layers: str = "global"  # or "local", or a pattern to repeat, such as "global,local"
    window_size: int = 256  # tokens that a local layer sees
    # optimization: AdamW, cosine annealing to zero
    batch_size: int = 24  # sequences per update, over all processes and micro-batches together
    grad_accum: int = 1  # micro-batches per update on each process: less memory, the same update
    max_iters: int = 400_000  # updates
    learning_rate: float = 1.4e-3  # at the top of the cosine
    warmup_iters: int = 0  # updates of linear warm-up before the cosine
    weight_decay: float = 0.0  # on matrices only
    beta1: float = 0.9  # the paper names no betas and no epsilon: PyTorch's defaults
    beta2: float = 0.999
    adam_eps: float = 1e-8
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 leaves it alone
    seed: int = 1337  # of the weights and of the batches
    # evaluation and logging
    eval_interval: int = 1000  # updates between validation, checkpoint, metrics.jsonl line and loss.png
    eval_windows: int = 200  # validation windows of block_size tokens, the same ones every time
    log_interval: int = 100  # updates between console lines
    wandb: bool = False  # also log to Weights & Biases, if it is installed
    # machine
    device: str = "auto"  # auto takes cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto is bfloat16 on GPUs that have it
    compile: Literal["auto", "False", "True", "reduce-overhead"] = "auto"  # auto is True on cuda; the last adds CUDA graphs, without grad_accum
    fsdp: bool = False  # shard weights, gradients and optimizer over the processes, for models past one GPU's memory

    def __post_init__(self):
        for name in ("batch_size", "grad_accum", "max_iters", "eval_interval", "eval_windows", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.warmup_iters < self.max_iters:
            raise ValueError(f"warmup_iters={self.warmup_iters} must be between 0 and max_iters - 1 = {self.max_iters - 1}")
        for name in ("learning_rate", "weight_decay", "adam_eps", "grad_clip", "clean_coeff", "ablated_coeff", "seed"):
            if not 0 <= getattr(self, name) < (2**63 if name == "seed" else float("inf")):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number that is not negative")
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name}= must name a folder")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")


FIELDS = {field.name: field for field in dataclasses.fields(Config)}

# where a run computes and what it prints, never what it computes: these may differ when it is resumed. (fsdp may not,
# although it computes the same: it keeps the optimizer's state in files of its own.)
MACHINE = ("resume", "data", "out", "device", "dtype", "compile", "grad_accum", "log_interval", "wandb")


def decisive(values):
    """{knob: value} without the MACHINE ones: what decides, with the checksum of the data, what a run computes."""
    return {name: value for name, value in values.items() if name not in MACHINE}


def comments():
    """{knob: its comment}, read off the source above, so that --help can never disagree with it."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))


def unknown(name):
    """The end of an error message about a knob that is not there."""
    near = difflib.get_close_matches(name, FIELDS, n=1)
    return f"there is no knob '{name}'" + (f": did you mean '{near[0]}'?" if near else "; --help lists them")


def parse(field, value):
    """A command-line string or a config-file value as the field's type. Raises ValueError."""
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
    raise ValueError(f"{field.name}={text} is not {wants}")


def load(argv):
    """Command-line words -> Config. Raises ValueError on an unknown knob or a wrong type; --help exits."""
    notes = comments()
    parser = argparse.ArgumentParser(usage="python train.py [config/NAME.py] [--knob=value ...]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a config file, such as config/local_k2.py")
    for name, field in FIELDS.items():
        note = f"{notes.get(name, '')} (default {field.default})".strip().replace("%", "%%")
        switch = {"nargs": "?", "const": "True"} if field.type is bool else {}  # --resume is --resume=True
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=note, **switch,
                            metavar="|".join(get_args(field.type)) or field.type.__name__)
    parser.error = usage_error
    known, extra = parser.parse_known_args(argv)
    for word in extra:
        if word.startswith("--"):
            raise ValueError(unknown(word[2:].split("=")[0]))
        raise ValueError(f"'{word}' is neither a knob (--name=value) nor the one config file")
    given = vars(known)
    path, values = given.pop("config"), {}
    if path is not None:  # an empty word is a mistake, such as an unset shell variable
        values = {"out": f"out/{Path(path).stem}", **read_file(path)}
    return Config(**{name: parse(FIELDS[name], value) for name, value in {**values, **given}.items()})


def usage_error(message):
    """argparse's complaint as one line, like every other."""
    raise ValueError(message)


def read_file(path):
    """The knobs that a config file assigns. Raises ValueError when it cannot be run or names an unknown one."""
    if not Path(path).is_file():
        raise ValueError(f"there is no config file {path}")
    try:
        values = runpy.run_path(path)
    except Exception as error:  # whatever is wrong with the user's Python
        raise ValueError(f"config file {path} does not run: {type(error).__name__}: {error}") from None
    values = {name: value for name, value in values.items() if not (name.startswith("_") or inspect.ismodule(value))}
    for name in values:
        if name not in FIELDS:
            raise ValueError(f"{path}: {unknown(name)}")
    return values


def pick_device(name, index=0):
    """A torch.device that works: "auto" takes cuda, else mps, else cpu; "cuda" is GPU number index. Raises ValueError."""
    import torch  # here, so that --help need not wait for it

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{index}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # its first sentence: the others fill a screen
        raise ValueError(f"--device={name} cannot be used here, try --device=cpu: {reason}") from None
    return device


def cli(main):
    """Run a script's main(): a ValueError that this project's own code raises is a message for the user, printed
    as one line with exit code 1; every other exception is a bug and keeps its traceback."""
    try:
        main()
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if "site-packages" in where.filename or not where.line.startswith("raise ValueError"):
            raise
        raise SystemExit(f"error: {error}") from None
