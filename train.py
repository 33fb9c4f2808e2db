"""Train a self-ablating GPT-Neo.

    python train.py config/local_k2.py                    one process: GPU if there is one, else CPU
    python train.py config/local_k2.py --batch_size=12    any knob; --help lists them
    torchrun --nproc_per_node=4 train.py config/local_k2.py       a process per GPU (gloo on CPU)
    torchrun --nproc_per_node=8 train.py config/gptneo_1p3b.py    the same, sharded: --fsdp=True
    python train.py config/local_k2.py --resume=True      go on exactly where the run stopped

Writes into the run folder out/<config>/: last.pt, best.pt (lowest validation loss, of the weighted
sum of both streams that is trained, after the ramp if there is one), metrics.jsonl (a JSON object
per evaluation) and loss.png. Ctrl-C and SIGTERM save last.pt and leave. A run may go on with
another number of processes, sharded or not: a checkpoint always holds whole weights and the whole
optimizer.
"""

import os
import signal


def leave_at_once(number, frame):
    """Ctrl-C while torch is imported, which takes seconds. An exception might be lost in there."""
    os.write(2, b"stopped\n")
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave_at_once)

import dataclasses
import json
import math
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import config as knobs
from model import GPTNeo, GPTNeoConfig, ModelError, load_checkpoint, replace_file, save_checkpoint
from prepare import UserError, load_meta, load_tokens, lock_folder

# ---------------------------------------------------------------------------------------- machine


@dataclass
class Machine:
    """What this process computes on, and which one it is of all that train together."""

    rank: int = 0
    world: int = 1  # processes
    device: torch.device = torch.device("cpu")
    bfloat16: bool = False  # whether to autocast to it
    compile_mode: str | None = None

    @property
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def say(self, text):
        if self.rank == 0:
            try:
                print(text, flush=True)  # flushed: a log file is read while it grows
            except OSError:  # nobody reads it any more, or the disk is full: the run goes on
                knobs.drop_output()

    def total(self, array):
        """A float64 array summed over all processes, the same on each."""
        if self.world == 1:
            return array
        tensor = torch.from_numpy(array).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()


def find_machine(config):
    """The Machine that the knobs and torchrun's environment describe. Raises UserError."""
    numbers = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, alone)
        if not text.isdecimal():
            raise UserError(f"the environment variable {name}={text} is not a whole number: "
                            f"unset it, or let torchrun set it")
        numbers.append(int(text))
    rank, world, local_rank = numbers
    device, bfloat16, compile_mode = choose_machine(config, local_rank)
    if (world > 1 or config.fsdp) and "MASTER_ADDR" not in os.environ or rank >= world:
        raise UserError("--fsdp=True and several processes need torchrun, which tells them of "
                        "each other: torchrun --nproc_per_node=2 train.py ...")
    if config.batch_size % (world * config.grad_accum):
        raise UserError(f"batch_size={config.batch_size} must be a multiple of "
                        f"processes x grad_accum = {world} x {config.grad_accum}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before nccl looks
    return Machine(rank, world, device, bfloat16, compile_mode)


def choose_machine(config, local_rank):
    """(device, whether to autocast to bfloat16, how to compile or None) from three knobs.

    Raises UserError on CUDA graphs where they would compute something else, or be many.
    """
    # A graph's gradients live in its own memory until its next run, and p.grad is not a copy of
    # them (pytorch issue 96693). And a graph has one k: every other one would be recorded anew.
    graphs_fail = config.grad_accum > 1 or config.fsdp or config.anneal_end
    if config.compile == "reduce-overhead" and graphs_fail:
        raise UserError("--compile=reduce-overhead goes with none of --grad_accum, --fsdp and "
                        "--anneal_end: take --compile=True")
    device = knobs.pick_device(config.device, local_rank)
    cuda = device.type == "cuda"
    bfloat16 = config.dtype == "bfloat16"
    if config.dtype == "auto":  # emulated bfloat16 on GPUs before Ampere is slower than fp32
        bfloat16 = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    modes = {"False": None, "True": "default", "auto": "default" if cuda else None}
    return device, bfloat16, modes.get(config.compile, config.compile)


def check_memory(config, machine):
    """Refuse, before anything is made, a run that this machine cannot hold. Raises UserError."""
    few = dataclasses.replace(config.model, n_layer=1, attention_layers="global")
    try:
        with torch.device("meta"):
            model = GPTNeo(few)
    except (RuntimeError, TypeError, OverflowError):  # torch cannot even count that far
        raise UserError("no machine can hold such a model: lower --n_embd, or what else is "
                        "too large") from None
    freeze(model, config)
    # What any such run holds: its parameters (a few less than there are if gates are global), and
    # the inputs of all blocks of a micro-batch, (L, B, T, C), at least in bf16.
    needed = held(model) + (config.n_layer - 1) * held(model.transformer["h"])
    rows = config.batch_size // machine.world // config.grad_accum
    needed //= machine.world if config.fsdp else 1
    needed += 2 * config.n_layer * rows * config.block_size * config.n_embd
    memory = knobs.device_memory(machine.device)
    if needed > 2 * memory:  # twice: what swap, compression and drivers may add is not known
        raise UserError(f"this run needs more than {needed // 10**9:,} GB of memory, and "
                        f"{machine.device} has {memory // 10**9:,}: lower --n_embd, --n_layer or "
                        f"--batch_size, or raise --grad_accum")


def held(module):
    """Bytes that its parameters take in a run: 4 for each weight and, where it is trained, 12 for
    its gradient and AdamW's two moments."""
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in module.parameters())


# ------------------------------------------------------------------------------------------- data


def load_split(config, split, device):
    """The tokens of "train" or "val", placed. Raises UserError where they fill no window."""
    tokens = load_tokens(config.data, split)
    if len(tokens) <= config.block_size:
        raise UserError(f"the {split} split of {config.data} has {len(tokens)} tokens, too few for "
                        f"block_size={config.block_size}: prepare more text or lower --block_size")
    return place_tokens(tokens, device)


def place_tokens(tokens, device):
    """The tokens (n,) where batches are cut from them: on a GPU with room for them, so that only
    offsets cross to it and the loop never waits; else as they are, memory-mapped uint16."""
    if device.type == "cuda" and tokens.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        bits = np.array(tokens).view(np.int16)  # torch cannot index with uint16
        return torch.from_numpy(bits).to(device)
    return tokens


def rows_at(tokens, starts, length, device):
    """The `length` tokens from each of starts (B,) on: (B, length) int64, on the device.

    tokens: what place_tokens returned.
    """
    if isinstance(tokens, torch.Tensor):
        starts = torch.from_numpy(starts).to(device, non_blocking=True)
        at = starts[:, None] + torch.arange(length, device=device)  # (B, length)
        return tokens[at].long() & 0xFFFF  # the bits of uint16
    rows = tokens[starts[:, None] + np.arange(length)]  # (B, length)
    return torch.from_numpy(rows.astype(np.int64)).to(device)


def batch_at(tokens, step, config, rank=0, world=1, device="cpu"):
    """This rank's rows of an update's batch: (batch_size / world, block_size + 1) int64 token ids.

    A pure function of (seed, step), drawn for all ranks together: a run resumed at any step, or
    spread over any number of ranks, sees the same tokens in the same order.
    """
    generator = np.random.default_rng((config.seed, step))
    starts = generator.integers(0, len(tokens) - config.block_size, config.batch_size)
    rows = config.batch_size // world
    return rows_at(tokens, starts[rank * rows :][:rows], config.block_size + 1, device)


# -------------------------------------------------------------------------------- initial weights


def take_weights(model, config):
    """Give a new model the weights that config.init_from names: those of the clean stream, and of
    gates that fit. -> what they were, in words. Raises UserError where the knobs or the data are of
    another model."""
    source = config.init_from
    if source.endswith(".pt") or os.path.isfile(os.path.join(source, "best.pt")):
        checkpoint = load_checkpoint(source)
        theirs, weights = GPTNeo.from_checkpoint(checkpoint).config, checkpoint["model"]
        if checkpoint.get("tokenizer") != load_meta(config.data)["tokenizer"]:
            raise UserError(f"{source} has another tokenizer than {config.data}: give data that "
                            f"are made with its own")
    else:
        from interp import hf  # here: it needs a package that nothing else here needs

        folder = hf.find_folder(source)
        hf.check_vocabulary(folder, config.data)
        geometry, weights = hf.read_hf(folder)
        theirs = GPTNeoConfig(**geometry, ablation="none")
    wanted = {name: getattr(theirs, name) for name in ("n_layer", "n_head", "n_embd")}
    if theirs.attention_kinds != config.attention_kinds:
        wanted["attention_layers"] = theirs.attention_layers
    if "local" in theirs.attention_kinds:
        wanted["window_size"] = theirs.window_size
    changes = [f"--{name}={value}" for name, value in wanted.items()
               if getattr(config, name) != value]
    if config.block_size > theirs.block_size:  # it has positions for fewer tokens
        changes.append(f"--block_size={theirs.block_size}")
    if changes:
        raise UserError(f"{source} has another geometry: add {' '.join(changes)}")
    positions = "transformer.wpe.weight"
    weights[positions] = weights[positions][: config.block_size]
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    fitting = {name: weight for name, weight in weights.items()
               if shapes.get(name) == weight.shape}  # all but gates of another kind
    model.load_state_dict(fitting, strict=False)
    origin, gates = f"the weights of {source}", [name for name in shapes if "_gate." in name]
    kept = [name for name in gates if name in fitting]
    if not gates:
        return origin
    if not kept:
        return f"{origin}, new gates"
    return f"{origin}, {'its' if kept == gates else 'some of its'} gates"


# -------------------------------------------------------------------------------------- optimizer


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]


def first_model(config):
    """The model that a run begins with, and what it is in words. On the CPU: so every device starts
    from the same."""
    torch.manual_seed(config.seed)
    model, origin = GPTNeo(config.model), "new weights"
    if config.resume:
        origin = f"goes on from {config.out}"
    elif config.init_from:
        origin = take_weights(model, config)
    freeze(model, config)
    return model, origin


def freeze(model, config):
    """Take from all parameters the gradient that config.freeze wants them not to have."""
    for name, p in model.named_parameters():
        p.requires_grad_(config.freeze == "none" or "_gate." in name)


def make_optimizer(model, config, device):
    """AdamW over exactly the parameters that are trained; weight decay reaches matrices only."""
    groups = {}  # (multiplier of the learning rate, weight decay) -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            multiplier = config.gate_lr_multiplier if "_gate." in name else 1.0
            decay = config.weight_decay if p.dim() >= 2 else 0.0
            groups.setdefault((multiplier, decay), []).append(p)
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(
        [{"params": group, "multiplier": multiplier, "weight_decay": decay}
         for (multiplier, decay), group in groups.items()],
        lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps,
        fused=fused)
    # AdamW would make a parameter's state at its first gradient, which gates may get late: they
    # count their own updates. Made at once, so that every checkpoint has the state of every one.
    for group in optimizer.param_groups:
        for p in group["params"]:
            updates = torch.zeros((), dtype=torch.float32, device=device if fused else "cpu")
            optimizer.state[p] = {"step": updates, "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def update(model, optimizer, rows, config, autocast, now):
    """One optimizer step on this process's rows, (B, block_size + 1) int64, in grad_accum parts.

    now: what config.at gives for this update; an ablated_coeff of 0 leaves the ablated pass out.
    -> loss, clean and ablated loss of these rows and the norm of the whole gradient, (4,), on the
    device: nothing here waits for it.
    """
    ablated_coeff = now.ablated_coeff
    if ablated_coeff:  # as a tensor, lest a compiled step be made anew for every value
        ablated_coeff = torch.full((), ablated_coeff, device=rows.device)
    seen = torch.zeros(3, device=rows.device)
    for part_number, part in enumerate(rows.chunk(config.grad_accum), 1):
        # of several processes, the gradients are averaged once, with the last part
        waits = isinstance(model, DistributedDataParallel) and part_number < config.grad_accum
        with model.no_sync() if waits else nullcontext():
            with autocast:
                losses = model(part[:, :-1], part[:, 1:], ablated_coeff, now.k)
            (losses.loss / config.grad_accum).backward()
        seen += torch.cat((losses.loss[None], both(losses))).detach() / config.grad_accum
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((seen, norm[None]))  # (4,)


def both(losses):
    """Clean and ablated loss, (2,); without an ablated pass the clean one stands in for it."""
    clean, ablated = losses.loss_clean, losses.loss_ablated
    return torch.stack((clean, clean if ablated is None else ablated))


@torch.no_grad()
def validation_losses(model, tokens, config, machine):
    """Mean clean and ablated loss, nats per token, over eval_windows windows.

    They are spread evenly over the validation split, always the same ones. Processes share them;
    sums are reduced, then divided.
    """
    T, rank, world = config.block_size, machine.rank, machine.world
    windows = (len(tokens) - 1) // T
    count = min(config.eval_windows, windows)
    starts = T * (np.arange(count) * windows // count)  # (count,)
    rows = max(1, config.batch_size // config.grad_accum // world)  # as many as training holds
    sums = np.zeros(2)
    for at in range(0, count, world * rows):
        mine = starts[at + rank * rows :][:rows]
        # Sharded processes must all call the model equally often: one that has no window left
        # looks at another, for nothing.
        window = rows_at(tokens, mine if len(mine) else starts[:1], T + 1, machine.device)
        with machine.autocast:
            losses = model(window[:, :-1], window[:, 1:])
        sums += len(mine) * both(losses).cpu().double().numpy()
    return (machine.total(sums) / count).tolist()


# --------------------------------------------------------------------------------------- progress


@dataclass
class Progress:
    """What a run knows of itself, beside weights and optimizer: a part of every checkpoint."""

    step: int = 0  # updates done
    evaluated: int = -1  # step of the last line of metrics
    best: float = math.inf  # lowest validation loss so far
    # sums over the updates since that line: loss, clean, ablated, gradient norm, updates
    since: list = field(default_factory=lambda: [0.0] * 5)
    seconds: float = 0.0  # spent training, evaluation not counted
    metrics: list = field(default_factory=list)  # the lines of metrics.jsonl, which may be gone

    def add(self, rows, seconds):
        """Updates that are done: rows (n, 4) of what update() returned, and the time they took."""
        for row in rows.tolist():  # one by one: sums must not depend on when a run was interrupted
            self.since = [total + value for total, value in zip(self.since, [*row, 1.0])]
        self.seconds += seconds

    def metrics_line(self, config, val_clean, val_ablated):
        """An evaluation's line: its losses, and means over the updates since the one before."""
        *sums, updates = self.since
        loss, clean, ablated, norm = [total / updates if updates else None for total in sums]
        now = config.at(self.step)
        val_loss = config.clean_coeff * val_clean
        if config.at(self.step - updates).ablated_coeff == 0:  # some of them did not compute it
            ablated = None
        if config.ablation == "none":
            val_ablated = None
        else:
            val_loss += config.ablated_coeff * val_ablated
        return {"step": self.step, "loss": loss, "loss_clean": clean, "loss_ablated": ablated,
                "val_loss": val_loss, "val_clean": val_clean, "val_ablated": val_ablated,
                "grad_norm": norm, "lr": now.learning_rate, "ablated_coeff": now.ablated_coeff,
                "k_attn": now.k[0], "k_mlp": now.k[1],
                "tokens": self.step * config.batch_size * config.block_size,
                "seconds": round(self.seconds, 3)}

    def record(self, line):
        """Enter the line of an evaluation at this step. -> whether it is the best so far"""
        is_best = line["val_loss"] < self.best
        self.best = min(line["val_loss"], self.best)
        self.evaluated, self.since = self.step, [0.0] * 5
        self.metrics.append(line)
        return is_best

    def is_sound(self, config):
        """Whether a run of this Config can have come to this: a file may hold anything."""
        if not (0 <= self.step <= config.max_iters and -1 <= self.evaluated <= self.step):
            return False
        numbers, keys = [*self.since], Progress().metrics_line(config, 0.0, 0.0).keys()
        for line in self.metrics:
            if not isinstance(line, dict) or line.keys() != keys:
                return False
            numbers += [0.0 if value is None else value for value in line.values()]
        return len(self.since) == 5 and all(type(value) in (int, float) for value in numbers)


class Meter:
    """Collects what updates return, on the device, so that the loop rarely waits; times them."""

    def __init__(self, config, machine):
        self.config, self.machine = config, machine
        self.restart()

    def restart(self):
        """Nothing collected, and the clock at zero: it ran on while something else was done."""
        self.collected, self.started = [], time.perf_counter()

    def add(self, numbers):
        self.collected.append(numbers)

    def settle(self, progress):
        """Enter what was collected into progress -> its means, (4,), tokens per second, updates;
        None where nothing was. Raises UserError at the first update that is not finite."""
        if not self.collected:
            return None
        rows = torch.stack(self.collected).cpu().double().numpy()  # (n, 4)
        rows = self.machine.total(rows) / self.machine.world
        seconds = time.perf_counter() - self.started
        self.restart()
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            first = progress.step - len(rows) + 1
            raise diverged(self.config, first + int(finite.argmin()))
        progress.add(rows, seconds)
        tokens = len(rows) * self.config.batch_size * self.config.block_size
        return rows.mean(0).tolist(), tokens / seconds, len(rows)


def diverged(config, number):
    return UserError(f"the loss or its gradient is no longer finite at update {number:,}; "
                     f"checkpoints in {config.out} are from before: start again with another "
                     f"--out and a lower --learning_rate or another --seed")


def streams_text(clean, ablated):
    """Both losses for the console; ablated is None where it was not computed."""
    return f"clean {clean:.4f}" + ("" if ablated is None else f", ablated {ablated:.4f}")


def speed_line(progress, config, means, speed, updates):
    """The console's line about the last updates; means, ...: what Meter.settle returned."""
    _, clean, ablated, norm = means
    known = config.at(progress.step - updates).ablated_coeff > 0  # from the first of them on
    text = streams_text(clean, ablated if known else None)
    tokens = (config.max_iters - progress.step) * config.batch_size * config.block_size
    minutes, seconds = divmod(round(tokens / speed), 60)
    if config.anneal_end:  # validation has the k that it falls to
        text += " | k {}, {}".format(*config.at(progress.step).k)
    return (f"step {progress.step:,}: {text} | grad norm {norm:.2f} | "
            f"lr {config.at(progress.step).learning_rate:.2e} | {speed:,.0f} tokens/s | "
            f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")


# ------------------------------------------------------------------------------------- run folder


class RunFolder:
    """The folder that a run writes to: one run at a time, and only its first process writes."""

    def __init__(self, config, meta, machine):
        self.config, self.meta, self.machine = config, meta, machine
        self.path = Path(config.out)
        self.saved = None  # the step of its last.pt
        last, best = self.path / "last.pt", self.path / "best.pt"
        if config.resume and not os.path.isfile(last):  # False, not an error, for too long a name
            raise UserError(f"--resume=True, but there is no {last}: "
                            f"leave it out to start this run")
        if os.path.exists(last) and not config.resume:  # a new run never overwrites an old one
            raise UserError(f"{config.out} already holds a run: --resume=True continues it, "
                            f"--out=FOLDER starts another")
        # a run that was killed early may have left a best.pt: no matter
        alone = os.path.isfile(best) and not os.path.exists(last)
        if alone and "optimizer" not in load_checkpoint(best):
            raise UserError(f"{best} is a model from elsewhere, which would be overwritten: begin "
                            f"with it by --init_from={config.out}, and give another --out")

    def __enter__(self):
        self.lock = None
        if self.machine.rank == 0:
            self.lock = lock_folder(self.path, f"another train.py is at work in {self.path}: "
                                               f"wait for it or choose another --out")
        return self

    def __exit__(self, *_):
        if self.lock is not None:
            os.close(self.lock)

    @contextmanager
    def writing(self):
        """Tell a full disk in one line, and what it leaves intact."""
        try:
            yield
        except ModelError as error:
            kept = "mend that or choose another --out"
            if self.saved is not None and (self.path / "last.pt").is_file():
                kept = (f"last.pt, of step {self.saved:,}, is intact: mend that, and the same "
                        f"command with --resume=True goes on from there")
            raise UserError(f"{error}; {kept}") from None

    def write_metrics(self, progress):
        """metrics.jsonl and loss.png anew."""
        if self.machine.rank == 0:
            with self.writing():
                lines = [json.dumps(line) + "\n" for line in progress.metrics]
                with replace_file(self.path / "metrics.jsonl") as file:
                    file.write("".join(lines).encode())
                if progress.metrics:
                    draw_losses(self.path / "loss.png", progress.metrics, self.path.name)

    def save(self, names, model, optimizer, progress):
        """Write a checkpoint under these names. Every process must call it: the first one gathers
        whole weights and the whole optimizer, by parameter name, off the GPU."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)
        state = get_optimizer_state_dict(model, optimizer, options=whole)
        if self.machine.rank == 0:
            with self.writing():
                for name in names:
                    save_checkpoint(
                        self.path / name, self.config.model, weights, optimizer=state,
                        data=self.meta["checksum"], tokenizer=self.meta["tokenizer"],
                        train_config=dataclasses.asdict(self.config), **vars(progress))
        self.saved = progress.step


def read_resumable(config, data_checksum):
    """The checkpoint to go on from, out/last.pt. Raises UserError where it is of another run."""
    path = Path(config.out, "last.pt")
    checkpoint = load_checkpoint(path)
    ours, theirs = knobs.decisive(dataclasses.asdict(config)), checkpoint.get("train_config")
    if isinstance(theirs, dict):
        theirs = knobs.decisive(theirs)
        others = ", ".join(sorted(map(str, theirs.keys() ^ ours.keys())))
        if others:
            raise UserError(f"{path} is of another version of train.py, with other knobs "
                            f"({others}): it can be evaluated, but not continued")
    kinds = {"train_config": dict, "model": dict, "optimizer": dict, "data": str}
    kinds |= {field.name: field.type for field in dataclasses.fields(Progress)}
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        raise UserError(f"{path} has no training state to go on from ({', '.join(wrong)} missing "
                        f"or of a wrong type): train.py did not write it")
    if checkpoint["data"] != data_checksum:
        raise UserError(f"{config.data} is not the data that {path} was trained on (checksum "
                        f"{data_checksum}, not {checkpoint['data']}): give the run's own data "
                        f"with --data=")
    changed = [f"--{name}={theirs[name]}" for name in ours if theirs[name] != ours[name]]
    if changed:
        raise UserError(f"{path} was trained with other knobs; to continue it add "
                        f"{' '.join(changed)}")
    if not (progress_of(checkpoint).is_sound(config) and fits(checkpoint, config)):
        raise UserError(f"{path} is damaged, or of an earlier version of train.py: its progress, "
                        f"weights or optimizer are not those of this run, so it cannot go on")
    return checkpoint


def progress_of(checkpoint):
    """The Progress that a checkpoint holds, field by field."""
    names = [field.name for field in dataclasses.fields(Progress)]
    return Progress(**{name: checkpoint[name] for name in names})


def fits(checkpoint, config):
    """Whether it holds the weights of such a model and AdamW's state of each that is trained."""
    with torch.device("meta"):
        model = GPTNeo(config.model)
    freeze(model, config)
    state, found = {}, checkpoint["optimizer"].get("state", {})
    count = torch.tensor(0, dtype=torch.float32)  # AdamW counts its updates so
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[name] = {"step": count, "exp_avg": p, "exp_avg_sq": p}
    pairs = ((checkpoint["model"], model.state_dict()), (found, state))
    if any(layouts(theirs) != layouts(ours) for theirs, ours in pairs):
        return False
    updates = checkpoint["step"]
    of_gates = sum(config.at(step).ablated_coeff > 0 for step in range(updates))
    counts = {name: of_gates if "_gate." in name else updates for name in found}
    return all(moments["step"] == counts[name] for name, moments in found.items())


def layouts(tree):
    """Nested dicts of tensors as nested dicts of their shapes, dtypes and layouts."""
    if isinstance(tree, dict):
        return {name: layouts(value) for name, value in tree.items()}
    return [getattr(tree, name, None) for name in ("shape", "dtype", "layout")]


def restore(model, optimizer, checkpoint, config):
    """Give a run's weights and optimizer, which the first process has read, to all of them."""
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    if checkpoint["step"]:  # that of the last update
        set_learning_rate(optimizer, config.at(checkpoint["step"] - 1).learning_rate)
    state = checkpoint["optimizer"]
    if state:  # with groups of this machine: those of another may say "fused"
        state["param_groups"] = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, state, options=whole)
    set_model_state_dict(model, checkpoint["model"], options=whole)


def draw_losses(path, metrics, title):
    """loss.png: both streams, training (mean since the last evaluation) and validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for stream, color in (("clean", "tab:blue"), ("ablated", "tab:orange")):
        for name, label, style in (("loss", "training", ":"), ("val", "validation", "-")):
            column = f"{name}_{stream}"
            points = [(line["step"], line[column]) for line in metrics if line[column] is not None]
            if points:
                axes.plot(*zip(*points), style, color=color, label=f"{stream}, {label}")
    axes.set(xlabel="updates", ylabel="cross-entropy, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---------------------------------------------------------------------------------------- the run


def shard(model, device):
    """FSDP2: from here on every process holds its part of each parameter, and the whole of one
    block at a time."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.transformer["h"]:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "ablated")  # the second pass gathers the block anew
    # The rest: embeddings, head and global gates. By default the root stays whole after its forward
    # pass. An evaluation has no backward pass that would shard it again, so training would go on
    # with a copy that no update reaches (seen with torch 2.13).
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def replicate(model, config, world, coeff):
    """The model with its gradients averaged over processes; itself where it is alone or sharded.

    While the ablated loss has the coefficient 0 the gates get none, and are not to be waited for.
    """
    if world == 1 or config.fsdp:
        return model
    idle_gates = config.ablation != "none" and coeff == 0
    return DistributedDataParallel(model, find_unused_parameters=idle_gates)


def train(config):
    """The run that a config.Config describes. Raises UserError on what the user can mend."""
    # ---- machine
    machine = find_machine(config)
    rank, world, device = machine.rank, machine.world, machine.device

    # ---- data
    meta = load_meta(config.data)
    config = dataclasses.replace(config, vocab_size=meta["vocab_size"])
    check_memory(config, machine)
    train_tokens = load_split(config, "train", device)
    val_tokens = load_split(config, "val", device)
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb=True needs the package: pip install wandb") from None

    # ---- model
    folder = RunFolder(config, meta, machine)
    model, origin = first_model(config)
    parameters = sum(p.numel() for p in model.parameters())

    with folder:
        checkpoint = read_resumable(config, meta["checksum"]) if config.resume else None
        if checkpoint and rank:
            checkpoint |= {"model": {}, "optimizer": {}}  # they come from the first process
        if world > 1 or config.fsdp:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if config.fsdp:
            shard(model, device)
        model.to(device)

        # ---- optimizer
        optimizer = make_optimizer(model, config, device)
        progress = Progress()
        if checkpoint:
            restore(model, optimizer, checkpoint, config)
            progress = progress_of(checkpoint)
            folder.saved = progress.step
            del checkpoint  # three times the weights
        if machine.compile_mode:
            model.compile(mode=machine.compile_mode)  # in place: names in checkpoints stay plain
        coeff = config.at(progress.step).ablated_coeff
        replica = replicate(model, config, world, coeff)

        # ---- the first lines
        folder.write_metrics(progress)  # a killed run may have written one line more
        machine.say(json.dumps(dataclasses.asdict(config)))
        machine.say(f"{config.ablation} ablation, {parameters:,} parameters, {origin} | "
                    f"{meta['train']['tokens']:,} training tokens, vocabulary "
                    f"{meta['vocab_size']:,} | {world} x {device}"
                    f"{' sharded' if config.fsdp else ''}, "
                    f"{'bfloat16' if machine.bfloat16 else 'float32'}, "
                    f"compile {machine.compile_mode}")
        if config.wandb and rank == 0:
            wandb.init(project="self-ablating-transformers", name=folder.path.name,
                       config=dataclasses.asdict(config))

        # ---- the loop: max_iters updates; evaluations before the first, after the last, between
        stop = knobs.StopRequest(patient=world > 1)
        meter = Meter(config, machine)
        if progress.evaluated == config.max_iters:
            machine.say(f"this run was finished at step {progress.step:,}: a longer one begins "
                        f"anew, or with its weights: --init_from={config.out} and another --out")
        while True:
            due = progress.step % config.eval_interval == 0 or progress.step == config.max_iters
            if due and progress.step > progress.evaluated:
                meter.settle(progress)
                losses = validation_losses(model, val_tokens, config, machine)
                line = progress.metrics_line(config, *losses)
                if not math.isfinite(line["val_loss"]):  # the last update broke the weights
                    raise diverged(config, progress.step + 1)
                is_best = progress.record(line)
                text = streams_text(line["val_clean"], line["val_ablated"])
                machine.say(f"step {progress.step:,}: validation {text}")
                folder.write_metrics(progress)
                if config.wandb and rank == 0:
                    wandb.log(line, step=progress.step)
                # last.pt comes last: killed between the two, the run finds this best again
                names = ["best.pt", "last.pt"] if is_best else ["last.pt"]
                folder.save(names, model, optimizer, progress)
                meter.restart()
            if progress.step == config.max_iters:
                break

            now = config.at(progress.step)
            set_learning_rate(optimizer, now.learning_rate)
            rows = batch_at(train_tokens, progress.step, config, rank, world, device)
            before, coeff = coeff, now.ablated_coeff
            if coeff and not before:  # the ramp begins: from here on every gate has a gradient
                replica = replicate(model, config, world, coeff)
            meter.add(update(replica, optimizer, rows, config, machine.autocast, now))
            progress.step += 1

            log = progress.step % config.log_interval == 0
            if log:
                machine.say(speed_line(progress, config, *meter.settle(progress)))
            # processes must agree on when to stop, and on GPUs asking costs a sync
            if world == 1 or device.type == "cpu" or log:
                if machine.total(np.array([float(stop.requested)]))[0]:
                    meter.settle(progress)
                    folder.save(["last.pt"], model, optimizer, progress)
                    machine.say(f"stopped after {progress.step:,} updates; the same command "
                                f"with --resume=True goes on from there")
                    break

        if dist.is_initialized():
            # The replica goes before its process group: dropped last, its reducer would join
            # gloo's threads while holding the GIL that one of them may wait for, and hang (seen
            # with torch 2.13; see pytorch issue 56297).
            del replica
            dist.destroy_process_group()
        if config.wandb and rank == 0:
            wandb.finish()


def main():
    config = knobs.load(sys.argv[1:])
    last = Path(config.out, "last.pt")
    try:
        train(config)
    except (MemoryError, RuntimeError) as error:
        shortages = (MemoryError, torch.OutOfMemoryError)  # Python's and numpy's, a GPU's
        if isinstance(error, shortages) or "can't allocate memory" in str(error):  # torch's on CPUs
            raise UserError("out of memory: raise --grad_accum, which changes no result, or lower "
                            "--batch_size, --n_embd or --n_layer") from None
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        # SIGTERM is torchrun's, to those whose peer is gone: nothing is left to save
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        advice = f"with --resume=True goes on from {last}" if last.exists() else "starts it again"
        raise UserError(f"this run has lost one of its processes: torchrun's report names the "
                        f"first failure; the same command {advice}") from None
    if "RANK" in os.environ:
        # One of several processes ends without Python's farewell: a thread of gloo that lets go of
        # its last tensor meanwhile needs the interpreter, which kills it, and C++ then the process
        # ("terminate called without an active exception", seen with torch 2.13; see pytorch pull
        # request 179291).
        print(end="", flush=True)
        os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on cli tells
    knobs.cli(main)
