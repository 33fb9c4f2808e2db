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
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import config as knobs
from model import GPTNeo, ModelError, load_checkpoint, replace_file, save_checkpoint
from prepare import UserError, load_meta, load_tokens, locked, require_tokenizer

# ------------------------------------------------------------------------------------------- data


def rows_at(tokens, starts, length, device):
    """The `length` tokens that begin at each of starts (B,): (B, length) int64, on the device."""
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))
    if device.type == "cuda":  # from pinned memory, so that the loop does not wait for the copy
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def batch_at(tokens, step, config, rank, world, device):
    """This rank's rows of an update's batch: (batch_size / world, block_size + 1) int64 token ids.

    A pure function of (seed, step), drawn for all ranks together: a run resumed at any step, or
    spread over any number of ranks, sees the same tokens in the same order.
    """
    generator = np.random.default_rng((config.seed, step))
    starts = generator.integers(0, len(tokens) - config.block_size, config.batch_size)
    rows = config.batch_size // world
    mine = starts[rank * rows : (rank + 1) * rows]
    return rows_at(tokens, mine, config.block_size + 1, device)


# ---------------------------------------------------------------------------- model and optimizer


def build_model(config, meta):
    """The model that a new run begins with. It is on the CPU, so that every device starts from the
    same weights. Raises UserError or ModelError."""
    torch.manual_seed(config.seed)
    model, source = GPTNeo(config.model), config.init_from
    if not source:
        return model
    path = Path(source)
    is_run = path.suffix == ".pt" or (path / "best.pt").is_file()
    if not is_run and not (path / "config.json").is_file():  # a mistyped run, or a name on the hub?
        is_run = path.is_dir() or any(path.parent.glob("*/best.pt"))
    if is_run:
        checkpoint = load_checkpoint(source)
        initial = GPTNeo.from_checkpoint(checkpoint)
        if checkpoint["tokenizer"] != meta["tokenizer"]:
            raise UserError(f"{source} has another tokenizer than {config.data}: give data of its "
                            f"tokenizer with --data")
    else:
        initial = GPTNeo.from_pretrained(source)
        require_tokenizer(source, initial.config.vocab_size, config.data)
    wanted = {name: getattr(initial.config, name) for name in (
        "n_layer", "n_head", "n_embd", "attention_layers", "window_size")}
    wanted["block_size"] = min(config.block_size, initial.config.block_size)
    require_knobs(wanted, config, f"{source} has another geometry")
    weights = initial.state_dict()
    shapes = {name: w.shape for name, w in model.state_dict().items()}
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: config.block_size]
    fitting = {name: w for name, w in weights.items() if shapes.get(name) == w.shape}
    model.load_state_dict(fitting, strict=False)  # gates of another kind are left out
    return model


def require_knobs(wanted, config, reason):
    """Raises UserError with the flags to add, where a knob has another value than wanted."""
    changes = [f"--{name}={value}" for name, value in wanted.items()
               if getattr(config, name, None) != value]
    if changes:
        raise UserError(f"{reason}: add {' '.join(changes)}")


def make_optimizer(model, config):
    """AdamW; weight decay reaches matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             fused=True)


def update(model, optimizer, rows, config, autocast, coeff, world=1):
    """One optimizer step on this process's rows, (B, block_size + 1), in grad_accum micro-batches.

    coeff: of the ablated loss; 0 leaves the ablated pass out. world: processes.
    -> loss, clean and ablated loss of the whole batch and the norm of the gradient, (4,), on the
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
        # Losses and gradients are averaged in one all-reduce. DistributedDataParallel would sum in
        # another order after a restart, and wait for gates, which have no gradient before the ramp.
        tensors = [*(p.grad for p in model.parameters() if p.grad is not None), sums]
        flat = torch.nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat / world, tensors)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((sums, norm[None]))  # (4,)


def stack_losses(losses):
    """Loss, clean and ablated loss, (3,); nan for an ablated pass that was left out."""
    loss, clean, ablated = losses
    ablated = torch.full_like(clean, math.nan) if ablated is None else ablated
    return torch.stack((loss.detach(), clean, ablated))


def total(tensor, device):
    """A tensor summed over all processes, the same on each: float64, on the CPU."""
    tensor = tensor.cpu().double()
    if dist.is_initialized():
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor.cpu()


@torch.no_grad()
def validate(model, tokens, config, autocast, rank, world, device):
    """Mean clean and ablated loss, nats per token, over eval_windows windows, always the same ones,
    spread evenly over the validation split. Processes share them; sums are reduced, then divided.
    """
    T, windows = config.block_size, (len(tokens) - 1) // config.block_size
    count = min(config.eval_windows, windows)
    starts = T * (np.arange(count) * windows // count)  # (count,)
    size = config.batch_size // config.grad_accum // world  # as many rows as training holds
    sums = torch.zeros(3, dtype=torch.float64)
    for at in range(rank * size, count, world * size):
        rows = rows_at(tokens, starts[at : at + size], T + 1, device)
        with autocast:
            losses = model(rows[:, :-1], rows[:, 1:])
        sums += len(rows) * stack_losses(losses).cpu().double()
    return (total(sums, device) / count)[1:].tolist()


# ----------------------------------------------------------------------------------- the run folder


@dataclass
class Progress:
    """The state of a run besides weights and optimizer. Saved in every checkpoint."""

    step: int = 0  # updates done
    best: float = math.inf  # lowest validation loss so far
    last_eval_step: int = -1
    rows_since_eval: list = field(default_factory=list)  # what update() returned since then
    seconds: float = 0.0  # spent training, evaluation not counted
    metrics: list = field(default_factory=list)  # the lines of metrics.jsonl
    wandb_id: str | None = None


def read_resumable(config, data_checksum):
    """The checkpoint to resume from. Raises UserError if it belongs to another run."""
    if not list(Path(config.out).glob("*.pt")):
        raise UserError(f"{config.out} has no checkpoint: start the run without --resume")
    path = Path(config.out, "last.pt")  # a run killed early has only best.pt
    try:
        checkpoint = load_checkpoint(path if path.is_file() else config.out)
    except ModelError as error:
        advice = f": delete {path} to continue from best.pt" if path.is_file() else ""
        raise UserError(f"{error}{advice}") from None
    if "optimizer" not in checkpoint:  # written by interp.hf or interp.unlearn
        raise UserError(f"{config.out} has weights only: start from them with "
                        f"--init_from={config.out} and another --out")
    if checkpoint["data"] != data_checksum:
        raise UserError(f"{config.data} is not the data that {config.out} was trained on: give the "
                        f"run's own with --data=")
    trained_with = knobs.decisive(checkpoint["train_config"])
    require_knobs(trained_with, config, f"{config.out} was trained with other knobs")
    return checkpoint


def require_finite(values, step):
    """Raises UserError unless all values are finite."""
    if not torch.as_tensor(values).isfinite().all():
        raise UserError(f"the loss or its gradient is no longer finite by update {step:,}: start "
                        f"again with another --out and a lower --learning_rate or another --seed")


def metrics_line(config, progress, val_clean, val_ablated):
    """The line of metrics.jsonl about an evaluation, with training losses as means since the one
    before. Raises UserError if the validation loss is not finite."""
    rows = progress.rows_since_eval or [[math.nan] * 4]  # there are none at step 0
    loss, clean, ablated, norm = np.mean(rows, axis=0).tolist()
    val_loss = config.clean_coeff * val_clean
    if config.ablation != "none":
        val_loss += config.ablated_coeff * val_ablated
    require_finite(val_loss, progress.step)
    rate, coeff = config.schedule(progress.step)
    line = {"step": progress.step, "loss": loss, "loss_clean": clean, "loss_ablated": ablated,
            "grad_norm": norm, "val_loss": val_loss, "val_clean": val_clean,
            "val_ablated": val_ablated, "lr": rate, "ablated_coeff": coeff,
            "tokens": progress.step * config.batch_size * config.block_size,
            "seconds": round(progress.seconds, 3)}
    # JSON has no nan: None stands for what was not computed
    return {name: None if math.isnan(value) else value for name, value in line.items()}


def draw_losses(path, metrics, title):
    """loss.png: the columns of metrics.jsonl that are cross-entropies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"loss_clean": "C0:", "val_clean": "C0-", "loss_ablated": "C1:", "val_ablated": "C1-"}
    for column, style in styles.items():
        points = [(line["step"], line[column]) for line in metrics if line[column] is not None]
        if points:
            axes.plot(*zip(*points), style, label=column)
    axes.set(xlabel="updates", ylabel="cross-entropy, nats per token")
    axes.set_title(title, parse_math=False)  # a $ in it is not a formula
    axes.grid(alpha=0.3)
    axes.legend()
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---------------------------------------------------------------------------------------- the run


def pick_precision(config, device, world):
    """-> whether to autocast to bfloat16, and torch.compile's mode or None. Allows TF32 for the
    gates. Raises UserError."""
    # CUDA graphs reuse the memory of gradients, so gradients cannot be summed over micro-batches.
    # On several GPUs they have never been run.
    graphs = world == 1 and config.grad_accum == 1
    if config.compile == "reduce-overhead" and not graphs:
        raise UserError("--compile=reduce-overhead needs one process and --grad_accum=1: "
                        "take --compile=True")
    bfloat16 = config.dtype == "bfloat16"
    modes = {"auto": None, "False": None, "True": "default", "reduce-overhead": "reduce-overhead"}
    if device.type == "cuda":
        modes["auto"] = "reduce-overhead" if graphs else "default"
        if config.dtype == "auto":  # GPUs before Ampere emulate bfloat16, slower than fp32
            bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if bfloat16:  # TF32 for the gates, which stay fp32: their inputs have bf16's noise anyway
            torch.set_float32_matmul_precision("high")
    return bfloat16, modes[config.compile]


def train(config):
    """The run that a config.Config describes. Raises UserError on what the user can fix."""
    # ---- machine: torchrun starts `world` processes, and this one is number `rank`
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (world * config.grad_accum):
        raise UserError(f"batch_size={config.batch_size} must be a multiple of "
                        f"processes x grad_accum = {world} x {config.grad_accum}")
    device = knobs.pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    bfloat16, compile_mode = pick_precision(config, device, world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL starts
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # ---- data
    meta = load_meta(config.data)
    config = replace(config, vocab_size=meta["vocab_size"])
    train_tokens, val_tokens = load_tokens(config.data, "train"), load_tokens(config.data, "val")
    if min(len(train_tokens), len(val_tokens)) <= config.block_size:
        raise UserError(f"a split of {config.data} has too few tokens for "
                        f"block_size={config.block_size}: lower it or prepare more text")

    # ---- model, optimizer, progress
    folder, progress = Path(config.out), Progress()
    if config.resume:
        checkpoint = read_resumable(config, meta["checksum"])
        model = GPTNeo.from_checkpoint(checkpoint)
        progress = Progress(**{name: checkpoint.get(name, default)  # a run of older code lacks some
                               for name, default in vars(progress).items()})
    elif list(folder.glob("*.pt")):
        raise UserError(f"{folder} already holds a run: --resume=True continues it, --out=FOLDER "
                        f"starts another")
    else:
        model = build_model(config, meta)
    optimizer = make_optimizer(model.to(device), config)
    if config.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        del checkpoint  # three times the weights
    if compile_mode:  # in place: names in checkpoints stay plain
        model.compile(mode=compile_mode, dynamic=False)

    def say(text):
        if rank == 0:
            print(text, flush=True)  # so that a log file shows it at once

    def save(name):
        if rank == 0:
            save_checkpoint(
                folder / name, config.model, model.state_dict(), optimizer=optimizer.state_dict(),
                train_config=asdict(config), data=meta["checksum"], tokenizer=meta["tokenizer"],
                **vars(progress))

    # ---- the first lines of output
    say(json.dumps(asdict(config)))
    size = sum(p.numel() for p in model.parameters())
    say(f"{config.ablation} ablation, {size:,} parameters, {progress.step:,} updates done | "
        f"{len(train_tokens):,} training tokens, vocabulary {config.vocab_size:,} | "
        f"{world} x {device}, {'bfloat16' if bfloat16 else 'float32'}, compile {compile_mode}")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.tmp"):  # of a run killed while it wrote
            stale.unlink()
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
        rate, ablated_coeff = config.schedule(step)
        # all processes stop at the same step; on several GPUs this check waits for the device
        can_stop = world == 1 or device.type == "cpu" or log_due or eval_due
        stopping = can_stop and total(torch.tensor(float(stop.requested)), device).item() > 0

        if recent and (log_due or eval_due or stopping):
            rows = torch.stack(recent).cpu().double()  # (n, 4): here the loop waits for the GPU
            seconds = time.perf_counter() - clock
            require_finite(rows[:, [0, 3]], step)
            progress.rows_since_eval += rows.tolist()
            progress.seconds += seconds
            if log_due:
                _, clean, ablated, norm = rows.mean(0).tolist()
                speed = len(rows) * config.batch_size * config.block_size / seconds
                left = timedelta(seconds=round((config.max_iters - step) * seconds / len(rows)))
                say(f"step {step:,}: {streams_text(clean, ablated)} | grad norm {norm:.2f} | "
                    f"lr {rate:.2e} | {speed:,.0f} tokens/s | {left} left")
            recent, clock = [], time.perf_counter()

        if eval_due:
            val_clean, val_ablated = validate(
                model, val_tokens, config, autocast, rank, world, device)
            line = metrics_line(config, progress, val_clean, val_ablated)
            progress.metrics.append(line)
            progress.last_eval_step, progress.rows_since_eval = step, []
            say(f"step {step:,}: validation {streams_text(val_clean, val_ablated)}")
            if rank == 0:
                with replace_file(folder / "metrics.jsonl") as file:
                    file.writelines(json.dumps(line).encode() + b"\n" for line in progress.metrics)
                draw_losses(folder / "loss.png", progress.metrics, folder.name)
                if config.wandb:
                    wandb.log(line, step=step)
            if line["val_loss"] < progress.best:
                progress.best = line["val_loss"]
                save("best.pt")
        if eval_due or stopping:
            save("last.pt")  # after all else: a run that is killed before repeats the evaluation
            clock = time.perf_counter()
        if finished:
            say(f"finished: {config.max_iters:,} updates, in {folder}")
            break
        if stopping:
            say(f"stopped after {step:,} updates; the same command with --resume=True goes on from "
                f"there")
            break

        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_at(train_tokens, step, config, rank, world, device)
        recent.append(update(model, optimizer, batch, config, autocast, ablated_coeff, world))
        progress.step += 1

    if config.wandb and rank == 0:
        wandb.finish()
    if world > 1:
        dist.destroy_process_group()


def streams_text(clean, ablated):
    text = "" if math.isnan(ablated) else f", ablated {ablated:.4f}"
    return f"clean {clean:.4f}{text}"


def main():
    config = knobs.load(sys.argv[1:])
    first = os.environ.get("RANK", "0") == "0"  # the process that writes
    try:
        with locked(config.out) if first else nullcontext():
            train(config)
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory", str(error)):  # torch's words
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
