"""Train a self-ablating GPT-Neo.

    python train.py config/local_k2.py                    one process: GPU if there is one, else CPU
    python train.py config/local_k2.py --batch_size=12    any knob; --help lists them
    torchrun --nproc_per_node=4 train.py config/local_k2.py       a process per GPU (gloo on CPU)
    python train.py config/local_k2.py --resume=True      continue exactly where the run stopped

Writes into the run folder out/<config>/: last.pt, best.pt (lowest validation loss, the weighted
sum of both streams), metrics.jsonl (a JSON object per evaluation) and loss.png. Ctrl-C and SIGTERM
save last.pt and stop. A run may be resumed with another number of processes.
"""

import json
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import config as knobs
from model import GPTNeo, load_checkpoint, replace_file, save_checkpoint
from prepare import UserError, load_meta, load_tokens, locked

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------- machine


class Machine(NamedTuple):
    """This process: its rank, device, precision and compile mode."""

    rank: int
    world: int  # processes
    device: torch.device
    bfloat16: bool  # whether to autocast to it
    compile_mode: str | None

    @property
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def total(self, tensor):
        """A tensor summed over all processes, the same on each: float64, on the CPU."""
        tensor = tensor.cpu().double()
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor.cpu()


def find_machine(config):
    """The Machine that the knobs and torchrun's environment describe. Raises UserError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (world * config.grad_accum):
        raise UserError(f"batch_size={config.batch_size} must be a multiple of "
                        f"processes x grad_accum = {world} x {config.grad_accum}")
    # CUDA graphs reuse the memory of gradients, so gradients cannot be summed over micro-batches.
    # On several GPUs they have never been run.
    graphs = world == 1 and config.grad_accum == 1
    if config.compile == "reduce-overhead" and not graphs:
        raise UserError("--compile=reduce-overhead needs one process and --grad_accum=1: "
                        "take --compile=True")
    device = knobs.pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    bfloat16, modes = config.dtype == "bfloat16", {"auto": None, "False": None, "True": "default"}
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL starts
        modes["auto"] = "reduce-overhead" if graphs else "default"
        if config.dtype == "auto":  # GPUs before Ampere emulate bfloat16, slower than fp32
            bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
        if bfloat16:  # TF32 for the gates, which stay fp32: their inputs have bf16's noise anyway
            torch.set_float32_matmul_precision("high")
    return Machine(rank, world, device, bfloat16, modes.get(config.compile, config.compile))


# ------------------------------------------------------------------------------------------- data


def rows_at(tokens, starts, length, device):
    """The `length` tokens that begin at each of starts (B,): (B, length) int64, on the device."""
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))
    if device.type == "cuda":  # from pinned memory, so that the loop does not wait for the copy
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def batch_at(tokens, step, config, rank=0, world=1, device=CPU):
    """This rank's rows of an update's batch: (batch_size / world, block_size + 1) int64 token ids.

    A pure function of (seed, step), drawn for all ranks together: a run resumed at any step, or
    spread over any number of ranks, sees the same tokens in the same order.
    """
    generator = np.random.default_rng((config.seed, step))
    starts = generator.integers(0, len(tokens) - config.block_size, config.batch_size)
    rows = config.batch_size // world
    mine = starts[rank * rows : (rank + 1) * rows]
    return rows_at(tokens, mine, config.block_size + 1, device)


# ---------------------------------------------------------------------------------------- weights


def build_model(config, meta):
    """The model that a new run begins with, and where its weights come from, in words. It is on the
    CPU, so that every device starts from the same weights. Raises UserError or ModelError."""
    torch.manual_seed(config.seed)
    model, source = GPTNeo(config.model), config.init_from
    if not source:
        return model, "new weights"
    tokenizer = meta["tokenizer"]
    if source.endswith(".pt") or Path(source, "best.pt").is_file():
        checkpoint = load_checkpoint(source)
        theirs, tokenizer = GPTNeo.from_checkpoint(checkpoint), checkpoint["tokenizer"]
    else:
        theirs = GPTNeo.from_pretrained(source)
    if tokenizer != meta["tokenizer"] or theirs.config.vocab_size != config.vocab_size:
        raise UserError(f"{source} has another tokenizer than {config.data}: prepare the data with "
                        f"that tokenizer")
    wanted = {name: getattr(theirs.config, name) for name in (
        "n_layer", "n_head", "n_embd", "attention_layers", "window_size")}
    wanted["block_size"] = min(config.block_size, theirs.config.block_size)
    require_knobs(wanted, config, f"{source} has another geometry")
    weights, shapes = theirs.state_dict(), {name: w.shape for name, w in model.state_dict().items()}
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: config.block_size]
    fitting = {name: w for name, w in weights.items() if shapes.get(name) == w.shape}
    model.load_state_dict(fitting, strict=False)  # gates of another kind are left out
    new_gates = "" if shapes.keys() == fitting.keys() else ", new gates"
    return model, f"weights of {source}{new_gates}"


def require_knobs(wanted, config, reason):
    """Raises UserError with the flags to add, where a knob has another value than wanted."""
    changes = [f"--{name}={value}" for name, value in wanted.items()
               if getattr(config, name, None) != value]
    if changes:
        raise UserError(f"{reason}: add {' '.join(changes)}")


# -------------------------------------------------------------------------------------- optimizer


def make_optimizer(model, config, device):
    """AdamW; weight decay reaches matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             fused=device.type in ("cuda", "cpu"))


def update(model, optimizer, rows, config, autocast, coeff, world=1):
    """One optimizer step on this process's rows, (B, block_size + 1), in grad_accum micro-batches.

    coeff: of the ablated loss; 0 leaves the ablated pass out. world: processes.
    -> loss, clean and ablated loss of these rows and the norm of the whole gradient, (4,), on the
    device: this function does not wait for the GPU.
    """
    if coeff:  # as a tensor: every new Python number would recompile the step
        coeff = torch.full((), coeff, device=rows.device)
    sums = torch.zeros(3, device=rows.device)
    for part in rows.chunk(config.grad_accum):
        with autocast:
            losses = model(part[:, :-1], part[:, 1:], coeff)
        (losses.loss / config.grad_accum).backward()
        sums += stack_losses(losses) / config.grad_accum
    if world > 1:
        # Averaged in one all-reduce. DistributedDataParallel would sum in another order after a
        # restart, and wait for gates, which have no gradient before the ramp.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat / world, gradients)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((sums, norm[None]))  # (4,)


def stack_losses(losses):
    """Loss, clean and ablated loss, (3,); nan for an ablated pass that was left out."""
    loss, clean, ablated = losses
    ablated = torch.full_like(clean, math.nan) if ablated is None else ablated
    return torch.stack((loss.detach(), clean, ablated))


@torch.no_grad()
def validate(model, tokens, config, machine):
    """Mean clean and ablated loss, nats per token, over eval_windows windows, always the same ones,
    spread evenly over the validation split. Processes share them; sums are reduced, then divided.
    """
    T, rank, world = config.block_size, machine.rank, machine.world
    windows = (len(tokens) - 1) // T
    count = min(config.eval_windows, windows)
    starts = T * (np.arange(count) * windows // count)  # (count,)
    rows = config.batch_size // config.grad_accum // world  # as many as training holds
    sums = torch.zeros(3, dtype=torch.float64)
    for at in range(rank * rows, count, world * rows):
        window = rows_at(tokens, starts[at : at + rows], T + 1, machine.device)
        with machine.autocast:
            losses = model(window[:, :-1], window[:, 1:])
        sums += len(window) * stack_losses(losses).cpu().double()
    return (machine.total(sums) / count)[1:].tolist()


# ----------------------------------------------------------------------------------- the run folder


def require_finite(value, when):
    """value: a number or a tensor. Raises UserError."""
    if not torch.as_tensor(value).isfinite().all():
        raise UserError(f"the loss or its gradient is no longer finite at {when}: start again with "
                        f"another --out and a lower --learning_rate or another --seed")


@dataclass
class Progress:
    """The state of a run besides weights and optimizer. Saved in every checkpoint."""

    step: int = 0  # updates done
    best: float = math.inf  # lowest validation loss so far
    last_eval_step: int = -1
    # sums over the updates since then: loss, clean and ablated loss, gradient norm, updates
    sums_since_eval: list = field(default_factory=lambda: [0.0] * 5)
    seconds: float = 0.0  # spent training, evaluation not counted
    metrics: list = field(default_factory=list)  # the lines of metrics.jsonl
    wandb_id: str | None = None

    def add(self, rows, seconds):
        """Count updates: rows (n, 4) of what update() returned, and the time that they took."""
        for number, row in enumerate(rows, self.step - len(rows) + 1):
            require_finite(row[[0, 3]], f"update {number:,}")
            # one by one: these sums must not depend on when a run was interrupted
            self.sums_since_eval = [a + b for a, b in zip(self.sums_since_eval, [*row.tolist(), 1])]
        self.seconds += seconds

    def record(self, config, val_clean, val_ablated):
        """Append an evaluation's line to metrics -> whether its loss is the lowest so far."""
        *sums, updates = self.sums_since_eval
        loss, clean, ablated, norm = [total / (updates or math.nan) for total in sums]
        val_loss = config.clean_coeff * val_clean
        if config.ablation != "none":
            val_loss += config.ablated_coeff * val_ablated
        require_finite(val_loss, f"step {self.step:,} (validation)")
        rate, coeff = config.schedule(self.step)
        line = {"step": self.step, "loss": loss, "loss_clean": clean, "loss_ablated": ablated,
                "grad_norm": norm, "val_loss": val_loss, "val_clean": val_clean,
                "val_ablated": val_ablated, "lr": rate, "ablated_coeff": coeff,
                "tokens": self.step * config.batch_size * config.block_size,
                "seconds": round(self.seconds, 3)}
        # JSON has no nan: None stands for what was not computed
        self.metrics.append({k: None if math.isnan(v) else v for k, v in line.items()})
        is_best, self.best = val_loss < self.best, min(val_loss, self.best)
        self.last_eval_step, self.sums_since_eval = self.step, [0.0] * 5
        return is_best


def read_resumable(config, data_checksum):
    """The checkpoint to resume from. Raises UserError if it belongs to another run."""
    path = Path(config.out, "last.pt")
    if not path.is_file():
        path = Path(config.out, "best.pt")  # a run killed early has only that
    if not path.is_file():
        raise UserError(f"{config.out} has no checkpoint: start the run without --resume")
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} has no optimizer state to resume from: use --init_from={path} "
                        f"with another --out")
    if checkpoint["data"] != data_checksum:
        raise UserError(f"{config.data} is not the data that {path} was trained on: give the run's "
                        f"own with --data=")
    theirs = knobs.decisive(checkpoint["train_config"])
    require_knobs(theirs, config, f"{path} was trained with other knobs")
    return checkpoint


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
    axes.set(xlabel="updates", ylabel="cross-entropy, nats per token")
    axes.set_title(title, parse_math=False)  # a $ in it is not a formula
    axes.grid(alpha=0.3)
    axes.legend()
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---------------------------------------------------------------------------------------- the run


def train(config):
    """The run that a config.Config describes. Raises UserError on what the user can fix."""
    # ---- machine and data
    machine = find_machine(config)
    rank, world, device = machine.rank, machine.world, machine.device
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    meta = load_meta(config.data)
    config = replace(config, vocab_size=meta["vocab_size"])
    splits = {split: load_tokens(config.data, split) for split in ("train", "val")}  # (n,) each
    for split, tokens in splits.items():
        if len(tokens) <= config.block_size:
            raise UserError(f"the {split} split of {config.data} has {len(tokens)} tokens, too few "
                            f"for block_size={config.block_size}: lower it or prepare more text")

    # ---- model, optimizer, progress
    folder, progress = Path(config.out), Progress()
    if config.resume:
        checkpoint = read_resumable(config, meta["checksum"])
        model = GPTNeo.from_checkpoint(checkpoint)
        origin = f"goes on from {folder} at step {checkpoint['step']:,}"
    elif list(folder.glob("*.pt")):
        raise UserError(f"{folder} already holds a run: --resume=True continues it, --out=FOLDER "
                        f"starts another")
    else:
        model, origin = build_model(config, meta)
    optimizer = make_optimizer(model.to(device), config, device)
    if config.resume:
        groups = optimizer.state_dict()["param_groups"]  # this machine's, which say "fused" or not
        optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": groups})
        progress = Progress(**{part.name: checkpoint[part.name] for part in fields(Progress)})
        del checkpoint  # three times the weights
    if machine.compile_mode:  # in place: names in checkpoints stay plain
        model.compile(mode=machine.compile_mode, dynamic=False)

    def say(text):
        if rank == 0:
            print(text, flush=True)  # so that a log file shows it at once

    def save(*names):
        for p in model.parameters():  # where one is not finite, the last checkpoint stays
            require_finite(p, f"update {progress.step:,}")
        if rank == 0:
            for name in names:
                save_checkpoint(
                    folder / name, config.model, model.state_dict(),
                    optimizer=optimizer.state_dict(), train_config=asdict(config),
                    data=meta["checksum"], tokenizer=meta["tokenizer"], **vars(progress))

    def write_metrics():
        if rank == 0 and progress.metrics:
            with replace_file(folder / "metrics.jsonl") as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in progress.metrics)
            draw_losses(folder / "loss.png", progress.metrics, folder.name)

    # ---- the first lines of output
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.tmp"):  # of a run killed while it wrote
            stale.unlink()
    write_metrics()  # in case the run was killed before it wrote them
    say(json.dumps(asdict(config)))
    size = sum(p.numel() for p in model.parameters())
    say(f"{config.ablation} ablation, {size:,} parameters, {origin} | "
        f"{len(splits['train']):,} training tokens, vocabulary {config.vocab_size:,} | "
        f"{world} x {device}, "
        f"{'bfloat16' if machine.bfloat16 else 'float32'}, compile {machine.compile_mode}")
    if config.wandb and rank == 0:
        import wandb

        wandb_run = wandb.init(project="self-ablating-transformers", name=folder.name,
                               config=asdict(config), id=progress.wandb_id, resume="allow")
        progress.wandb_id = wandb_run.id

    # ---- the loop: max_iters updates; evaluations before the first, after the last, between
    stop, recent, clock = knobs.StopRequest(), [], time.perf_counter()
    while True:
        step, finished = progress.step, progress.step == config.max_iters
        eval_due = step > progress.last_eval_step and (step % config.eval_interval == 0 or finished)
        log_due = step % config.log_interval == 0
        # all processes must stop at the same step; on GPUs this check waits for the device
        can_stop = world == 1 or device.type == "cpu" or log_due or eval_due
        stopping = can_stop and machine.total(torch.tensor(float(stop.requested))).item() > 0

        if recent and (log_due or eval_due or stopping):
            rows = machine.total(torch.stack(recent)) / world  # (n, 4): here the loop waits
            progress.add(rows, time.perf_counter() - clock)
            if log_due:
                say(speed_line(rows, time.perf_counter() - clock, step, config))
            recent, clock = [], time.perf_counter()

        if eval_due:
            val_clean, val_ablated = validate(model, splits["val"], config, machine)
            is_best = progress.record(config, val_clean, val_ablated)
            say(f"step {step:,}: validation {streams_text(val_clean, val_ablated)}")
            # best.pt first: a run that is killed between the two saves repeats this evaluation
            save(*["best.pt", "last.pt"] if is_best else ["last.pt"])
            write_metrics()
            if config.wandb and rank == 0:
                wandb.log(progress.metrics[-1], step=step)
            clock = time.perf_counter()
        if finished:
            say(f"finished: {config.max_iters:,} updates, in {folder}")
            break
        if stopping:
            save("last.pt")
            say(f"stopped after {step:,} updates; the same command with --resume=True goes on from "
                f"there")
            break

        rate, ablated_coeff = config.schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_at(splits["train"], step, config, rank, world, device)
        recent.append(update(model, optimizer, batch, config, machine.autocast, ablated_coeff,
                             world))
        progress.step += 1

    if config.wandb and rank == 0:
        wandb.finish()
    if world > 1:
        dist.destroy_process_group()


def streams_text(clean, ablated):
    text = "" if math.isnan(ablated) else f", ablated {ablated:.4f}"
    return f"clean {clean:.4f}{text}"


def speed_line(rows, seconds, step, config):
    """The console's line about the last updates; rows (n, 4): what update() returned."""
    _, clean, ablated, norm = rows.mean(0).tolist()
    speed = len(rows) * config.batch_size * config.block_size / seconds
    left = timedelta(seconds=round((config.max_iters - step) * seconds / len(rows)))
    return (f"step {step:,}: {streams_text(clean, ablated)} | grad norm {norm:.2f} | "
            f"lr {config.schedule(step)[0]:.2e} | {speed:,.0f} tokens/s | {left} left")


def main():
    config = knobs.load(sys.argv[1:])
    first = os.environ.get("RANK", "0") == "0"  # the process that writes
    try:
        with locked(config.out) if first else nullcontext():
            train(config)
    except (MemoryError, RuntimeError) as error:
        out_of_memory = re.search("out of memory|allocate memory", str(error))  # torch's words
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise
        raise UserError("out of memory: raise --grad_accum, which changes no result, or lower "
                        "--batch_size, --n_embd or --n_layer") from None
    if "RANK" in os.environ:
        # Without Python's shutdown: a gloo thread that still holds a tensor would abort the process
        # ("terminate called without an active exception"; pytorch pull request 179291).
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    knobs.cli(main)
