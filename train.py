"""Train a self-ablating GPT-Neo.

    python train.py config/local_k2.py                              one process: GPU if there is one, else CPU
    python train.py config/local_k2.py --batch_size=12              any knob of config/__init__.py; --help lists them
    torchrun --nproc_per_node=4 train.py config/local_k2.py         one process per GPU (gloo on CPU)
    torchrun --nproc_per_node=8 train.py config/gptneo_1p3b.py      the same with everything sharded: --fsdp=True
    python train.py config/local_k2.py --resume=True                go on exactly where the run stopped

Writes into the run folder out/<config>/: last.pt, best.pt (lowest validation loss, of what is trained: the weighted
sum of both streams), metrics.jsonl (a JSON object per evaluation) and loss.png; with fsdp also optimizer-<step>/, the
shards that go with last.pt. Ctrl-C and SIGTERM save last.pt and leave.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import config as knobs
from model import GPTNeo, load_checkpoint, save_checkpoint
from prepare import UserError, load_meta, load_tokens


def place_tokens(tokens, device):
    """The tokens (n,) where batches are cut from them: on a GPU with room for them, so that only offsets cross to it
    and the loop never waits; else as they are, memory-mapped uint16."""
    if device.type == "cuda" and tokens.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return torch.from_numpy(np.array(tokens).view(np.int16)).to(device)  # torch cannot index with uint16
    return tokens


def rows_at(tokens, starts, length, device):
    """What place_tokens returned, starts (n,) -> the length tokens from each start on, (n, length) int64."""
    if isinstance(tokens, torch.Tensor):
        starts = torch.from_numpy(starts).to(device, non_blocking=True)
        return tokens[starts[:, None] + torch.arange(length, device=device)].long() & 0xFFFF  # the bits of uint16
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64)).to(device)


def batch_at(tokens, step, config, rank=0, world=1, device="cpu"):
    """This rank's rows of an update's batch: (batch_size / world, block_size + 1) int64 token ids.

    A pure function of (seed, step), drawn for all ranks together: a run resumed at any step, or spread
    over any number of ranks, sees the same tokens in the same order.
    """
    starts = np.random.default_rng((config.seed, step)).integers(0, len(tokens) - config.block_size, config.batch_size)
    rows = config.batch_size // world
    return rows_at(tokens, starts[rank * rows : (rank + 1) * rows], config.block_size + 1, device)


def learning_rate_at(step, config):
    """Linear warm-up, then cosine annealing that would reach zero at step max_iters; step counts from 0."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / (config.max_iters - config.warmup_iters)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model, tokens, config, device, autocast, rank=0, world=1):
    """Mean clean and ablated loss, nats per token, over eval_windows windows spread evenly over the
    validation split, always the same ones. Ranks share the windows; sums are reduced, then divided."""
    T = config.block_size
    windows = (len(tokens) - 1) // T
    count = min(config.eval_windows, windows)
    starts = T * (np.arange(count) * windows // count)
    sums = np.zeros(2)
    rows = max(1, config.batch_size // config.grad_accum // world)  # as many as training holds at a time
    for at in range(0, count, world * rows):
        mine = starts[at + rank * rows :][:rows]
        # sharded ranks must all call the model equally often: one that has no window left looks at another for nothing
        window = rows_at(tokens, mine if len(mine) else starts[:1], T + 1, device)
        with autocast:
            losses = model(window[:, :-1], window[:, 1:])
        sums += len(mine) * both(losses).cpu().double().numpy()
    return (sum_over_ranks(sums, device, world) / count).tolist()


def both(losses):
    """Clean and ablated loss as one tensor (2,); without ablation the clean one stands in for the other."""
    return torch.stack((losses.loss_clean, losses.loss_clean if losses.loss_ablated is None else losses.loss_ablated))


def sum_over_ranks(array, device, world):
    """A float64 array summed over all ranks, the same on each."""
    if world > 1:
        tensor = torch.from_numpy(array).to(device)
        dist.all_reduce(tensor)
        array = tensor.cpu().numpy()
    return array


def choose_machine(config, local_rank):
    """(device, whether to autocast to bfloat16, how to compile or None) from the knobs device, dtype, compile. Raises
    ValueError on CUDA graphs where they would compute something else."""
    if config.compile == "reduce-overhead" and (config.grad_accum > 1 or config.fsdp):
        # a graph's gradients live in its own memory until its next run, and p.grad is not a copy (pytorch issue 96693)
        raise UserError("--compile=reduce-overhead goes with neither --grad_accum nor --fsdp: take --compile=True")
    device = knobs.pick_device(config.device, local_rank)
    # emulated bfloat16 on GPUs before Ampere is slower than fp32
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    bfloat16 = has_bfloat16 if config.dtype == "auto" else config.dtype == "bfloat16"
    mode = ("default" if device.type == "cuda" else "False") if config.compile == "auto" else config.compile
    return device, bfloat16, None if mode == "False" else "default" if mode == "True" else mode


def shard(model, device):
    """FSDP2: from here on every process holds its part of each parameter, and the whole of one block at a time."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.transformer["h"]:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "ablated")  # the second pass gathers the block anew, like the first
    # Embeddings, head and global gates. By default a root stays whole after its forward pass, and after an evaluation,
    # which has no backward pass, training would go on with a copy that no update reaches (seen with torch 2.13).
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def make_optimizer(model, config, device):
    """AdamW over exactly the model's parameters; weight decay reaches matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps,
        fused=device.type in ("cuda", "cpu"))


def update(model, optimizer, rows, config, autocast):
    """One optimizer step on this process's rows, (n, block_size + 1) int64, in grad_accum micro-batches -> loss, clean
    and ablated loss of these rows and the norm of the whole gradient, (4,), on the device: nothing here waits for it."""
    seen = torch.zeros(3, device=rows.device)
    for micro, part in enumerate(rows.chunk(config.grad_accum), 1):
        alone = isinstance(model, DistributedDataParallel) and micro < config.grad_accum  # one all-reduce per update
        with model.no_sync() if alone else nullcontext():
            with autocast:
                losses = model(part[:, :-1], part[:, 1:])
            (losses.loss / config.grad_accum).backward()
        seen += torch.cat((losses.loss[None], both(losses))).detach() / config.grad_accum
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((seen, (norm.full_tensor() if isinstance(norm, DTensor) else norm)[None]))


def read_resumable(config, data_checksum):
    """The checkpoint to go on from. Raises UserError when there is none, or when it is of another run."""
    path = Path(config.out, "last.pt")
    if not path.is_file():
        raise UserError(f"--resume=True, but there is no {path}: leave it out to start this run")
    checkpoint = load_checkpoint(path)
    if not {"optimizer", "train_config", "data", "metrics"} <= checkpoint.keys():
        raise UserError(f"{path} has weights but no training state: train.py did not write it, so it cannot go on from it")
    if checkpoint["data"] != data_checksum:
        raise UserError(f"{config.data} is not the data that {path} was trained on (checksum {data_checksum}, "
                         f"not {checkpoint['data']}): give the run's own data with --data=")
    ours = dataclasses.asdict(config)
    changed = [f"--{name}={value}" for name, value in knobs.decisive(checkpoint["train_config"]).items()
               if ours[name] != value]
    if changed:
        raise UserError(f"{path} was trained with other knobs; to continue it add {' '.join(changed)}")
    return checkpoint


def write_metrics(path, metrics):
    """metrics.jsonl anew and atomically, from a list of dicts."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    temporary.replace(path)


def draw_losses(path, metrics, title):
    """loss.png: both streams, training (mean since the last evaluation) and validation."""
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for stream, color in (("clean", "tab:blue"), ("ablated", "tab:orange")):
        for name, label, style in ((f"loss_{stream}", "training", ":"), (f"val_{stream}", "validation", "-")):
            points = [(line["step"], line[name]) for line in metrics if line[name] is not None]
            if points:
                axes.plot(*zip(*points), style, color=color, label=f"{stream}, {label}")
    axes.set(xlabel="updates", ylabel="cross-entropy, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(f"{path}.tmp", format="png", dpi=120)
    plt.close(figure)
    os.replace(f"{path}.tmp", path)


def train(config):
    """The run that a config.Config describes. Raises UserError on what the user can mend."""
    # ---- machine and processes (torchrun sets these variables)
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device, bfloat16, compile_mode = choose_machine(config, local_rank)
    if config.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp=True shards over processes: start them with torchrun --nproc_per_node=2 train.py ...")
    if config.batch_size % (world * config.grad_accum):
        raise UserError(f"batch_size={config.batch_size} must be a multiple of processes x grad_accum "
                         f"= {world} x {config.grad_accum}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before nccl looks
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    say = lambda *words: print(*words, flush=True) if rank == 0 else None  # flushed: a log file is read while it grows

    # ---- data
    meta = load_meta(config.data)
    splits = {}
    for split in ("train", "val"):
        splits[split] = load_tokens(config.data, split)
        if len(splits[split]) <= config.block_size:
            raise UserError(f"the {split} split of {config.data} has {len(splits[split])} tokens, too few for "
                             f"block_size={config.block_size}: prepare more text or lower --block_size")
    train_tokens, val_tokens = (place_tokens(tokens, device) for tokens in splits.values())

    # ---- the run folder: a new run never overwrites an old one
    out = Path(config.out)
    if config.resume:
        checkpoint = read_resumable(config, meta["checksum"])
    elif (out / "last.pt").exists():
        raise UserError(f"{out} already holds a run: --resume=True continues it, --out=FOLDER starts another")
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb=True needs the package: pip install wandb") from None

    # ---- model
    torch.manual_seed(config.seed)  # weights are made on the CPU, so every device starts from the same ones
    config = dataclasses.replace(config, vocab_size=meta["vocab_size"])
    model = GPTNeo(config.model)
    if config.resume:
        model.load_state_dict(checkpoint["model"])

    # ---- everything else a resumed run has to know
    progress = {
        "step": 0,  # updates done
        "evaluated": -1,  # last step with a line in metrics.jsonl
        "best": math.inf,  # lowest validation loss so far
        "since": [0.0] * 5,  # sums since that line: loss, clean, ablated, gradient norm, updates
        "seconds": 0.0,  # spent training, evaluation not counted
    }
    metrics = []
    if config.resume:
        progress = {name: checkpoint[name] for name in progress}
        metrics = checkpoint["metrics"]  # not metrics.jsonl: a killed run may have written one line more
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_metrics(out / "metrics.jsonl", metrics)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {out}: {error.strerror}: choose another --out") from None

    # ---- the processes meet
    if world > 1 or config.fsdp:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if config.fsdp:
        shard(model, device)
    model.to(device)
    if compile_mode:
        model.compile(mode=compile_mode)  # in place: no _orig_mod. in the checkpoint's names
    replica = DistributedDataParallel(model) if world > 1 and not config.fsdp else model

    # ---- optimizer
    optimizer = make_optimizer(model, config, device)
    shards = checkpoint["optimizer"] if config.resume and config.fsdp else None  # the folder in out that last.pt names
    if shards:
        state = get_optimizer_state_dict(model, optimizer)  # of this world size, to be filled from shards of any other
        try:
            dcp.FileSystemReader(out / shards).read_metadata()  # here, since dcp.load would print tracebacks of its own
            dcp.load(state, checkpoint_id=out / shards)
        except (Exception, dcp.CheckpointException) as error:  # damage shows as almost any kind; the last is no Exception
            raise UserError(f"{out / shards}, which holds the optimizer of {out / 'last.pt'}, is missing or damaged "
                             f"({type(error).__name__}): bring it back, or start again with another --out") from None
        set_optimizer_state_dict(model, optimizer, state)
    elif config.resume and not config.fsdp:
        optimizer.load_state_dict(checkpoint["optimizer"])

    n_params = sum(p.numel() for p in model.parameters())
    say(json.dumps(dataclasses.asdict(config)))
    say(f"{config.ablation} ablation, {n_params:,} parameters | {meta['train']['tokens']:,} training tokens, vocabulary "
        f"{meta['vocab_size']:,} | {world} x {device}{' sharded' if config.fsdp else ''}, "
        f"{'bfloat16' if bfloat16 else 'float32'}, compile {compile_mode}")
    if config.wandb and rank == 0:
        wandb.init(project="self-ablating-transformers", name=out.name, config=dataclasses.asdict(config))

    def save(name):
        if config.fsdp:  # whole weights in one file, as ever; the optimizer's shards in a folder that last.pt names
            weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            optimizer_state = save_shards() if name == "last.pt" else None
        else:
            weights, optimizer_state = model.state_dict(), optimizer.state_dict()
        if rank == 0:
            save_checkpoint(out / name, model.config, weights, optimizer=optimizer_state, metrics=metrics, data=meta["checksum"],
                            train_config=dataclasses.asdict(config), tokenizer=meta["tokenizer"], **progress)
            for old in out.glob("optimizer-[0-9]*") if config.fsdp and name == "last.pt" else ():
                if old.name != optimizer_state:
                    shutil.rmtree(old)

    def save_shards():
        """Write the folder that the next last.pt names. Never into the one that last.pt names now: a kill would cost both."""
        nonlocal shards
        folder = f"optimizer-{progress['step']}"
        if optimizer.state and folder != shards:  # before the first update, asking for the state would make it, one step old
            dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=out / folder)
            shards = folder
        return shards

    # ---- stop on request: the handler only raises a flag, so an update is never cut in half
    stop_requested = False

    def request_stop(number, _):
        nonlocal stop_requested
        stop_requested = True
        if world == 1:  # the second time means it; of several, torchrun may pass on a signal that came here too
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)

    history = []  # per update since the last look: loss, clean, ablated, gradient norm; on the device, so no sync
    clock = time.perf_counter()

    def diverged(update):
        raise UserError(f"the loss or its gradient is no longer finite at update {update:,}; checkpoints in {out} are from "
                         f"before: start again with another --out and a lower --learning_rate or another --seed")

    def look():
        """Fetch history, refuse what is not finite, add it up; the mean of each of its four columns."""
        nonlocal history, clock
        rows = sum_over_ranks(torch.stack(history).cpu().double().numpy(), device, world) / world
        now, first = time.perf_counter(), progress["step"] - len(rows)
        bad = ~np.isfinite(rows).all(1)
        if bad.any():
            diverged(first + int(bad.argmax()) + 1)
        for row in rows.tolist():  # one by one: the sums must not depend on when a run was interrupted
            progress["since"] = [total + value for total, value in zip(progress["since"], [*row, 1.0])]
        progress["seconds"] += now - clock
        speed = len(rows) * config.batch_size * config.block_size / (now - clock)
        history, clock = [], now
        return rows.mean(0).tolist(), speed

    # ---- the loop: max_iters updates, and an evaluation before the first, after the last and in between
    while True:
        step = progress["step"]
        if (step % config.eval_interval == 0 or step == config.max_iters) and step > progress["evaluated"]:
            if history:
                look()
            val_clean, val_ablated = evaluate(model, val_tokens, config, device, autocast, rank, world)
            *sums, updates = progress["since"]
            loss, clean, ablated, norm = [total / updates if updates else None for total in sums]
            val_loss = config.clean_coeff * val_clean
            if config.ablation == "none":
                ablated = val_ablated = None
            else:
                val_loss += config.ablated_coeff * val_ablated
            if not math.isfinite(val_loss):  # the last update broke the weights: they must not reach last.pt
                diverged(step + 1)
            metrics.append({"step": step, "loss": loss, "loss_clean": clean, "loss_ablated": ablated,
                            "val_loss": val_loss, "val_clean": val_clean, "val_ablated": val_ablated, "grad_norm": norm,
                            "lr": learning_rate_at(step, config), "tokens": step * config.batch_size * config.block_size,
                            "seconds": round(progress["seconds"], 3)})
            is_best = val_loss < progress["best"]
            progress.update(evaluated=step, since=[0.0] * 5, best=min(val_loss, progress["best"]))
            say(f"step {step:,}: validation clean {val_clean:.4f}" + (f", ablated {val_ablated:.4f}" if val_ablated is not None else ""))
            if rank == 0:
                write_metrics(out / "metrics.jsonl", metrics)
                draw_losses(out / "loss.png", metrics, out.name)
                if config.wandb:
                    wandb.log(metrics[-1], step=step)
            if is_best:
                save("best.pt")
            save("last.pt")  # after best.pt: killed between the two, the run finds this best again
            clock = time.perf_counter()
        if step == config.max_iters:
            break

        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        rows = batch_at(train_tokens, step, config, rank, world, device)
        history.append(update(replica, optimizer, rows, config, autocast))
        progress["step"] = step + 1

        if (step + 1) % config.log_interval == 0:
            (loss, clean, ablated, norm), speed = look()
            left = round((config.max_iters - step - 1) * config.batch_size * config.block_size / speed)
            say(f"step {step + 1:,}: clean {clean:.4f}" + (f", ablated {ablated:.4f}" if config.ablation != "none" else "")
                + f" | grad norm {norm:.2f} | lr {learning_rate_at(step, config):.2e} | {speed:,.0f} tokens/s | "
                  f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        # ranks must agree on when to stop, and on GPUs asking costs a sync
        if world == 1 or device.type == "cpu" or (step + 1) % config.log_interval == 0:
            if sum_over_ranks(np.array([float(stop_requested)]), device, world)[0] > 0:
                if history:
                    look()
                save("last.pt")
                say(f"stopped after {step + 1:,} updates; the same command with --resume=True goes on from there")
                break

    if dist.is_initialized():
        # before its process group: dropped last, its reducer would join gloo's threads while holding the GIL that one of
        # them may wait for, and hang (seen with torch 2.13; see pytorch issue 56297)
        del replica
        dist.destroy_process_group()


def main():
    config = knobs.load(sys.argv[1:])
    try:
        train(config)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, to those whose peer is gone: nothing is left to save
        last = Path(config.out, "last.pt")
        raise UserError("this run has lost one of its processes: torchrun's report names the first failure; the same command "
                         + (f"with --resume=True goes on from {last}" if last.exists() else "starts it again")) from None


if __name__ == "__main__":
    knobs.cli(main)
