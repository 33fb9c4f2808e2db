"""Train every config with every seed: one process a run, as many at a time on each GPU of this machine as fit.

    python bench/sweep.py config/baseline.py config/local_k2.py --seeds=1,2,3 --per_gpu=2
    python bench/sweep.py config/demo.py --seeds=1,2 --per_gpu=2 --device=cpu    on the CPU they share its cores

Other --name=value words are knobs of train.py, for every run. CONFIG with seed S is trained into out/sweep/CONFIG_seedS
(another parent folder: --out=FOLDER) and prints into out/sweep/CONFIG_seedS.log. The same command again skips what is
finished and continues the rest: after Ctrl-C or SIGTERM, which stop all runs, or after a failure, which stops no other.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts bench/ there
import config as knobs
from model import load_checkpoint
from prepare import UserError, load_meta


def plan(argv):
    """Command-line words -> [(words for train.py, the Config they mean)], how many at a time on a GPU. Raises UserError."""
    parser = argparse.ArgumentParser(usage="python bench/sweep.py config/NAME.py ... [--seeds=S,S] [--knob=value ...]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("--seeds", default="1337", help="with commas between them (default 1337)")
    parser.add_argument("--per_gpu", type=int, default=1, help="runs at a time on each GPU, or on the CPU (default 1)")
    parser.add_argument("--out", default="out/sweep", help="parent of the run folders (default out/sweep)")
    args, words = parser.parse_known_args(argv)
    paths, passed = [word for word in words if word[:1] != "-"], [word for word in words if word[:1] == "-"]
    if not paths:
        raise UserError("which runs? Name at least one config file, such as config/local_k2.py")
    if args.per_gpu < 1:
        raise UserError(f"--per_gpu={args.per_gpu} must be at least 1")
    if not args.out:
        raise UserError("--out= must name a folder")
    if {word.split("=")[0] for word in passed} & {"--seed", "--resume"}:
        raise UserError("leave out --seed and --resume: --seeds=1,2 names the seeds, and what was begun is continued")
    runs = {}
    for seed in args.seeds.split(","):  # one seed of every config before the next: the first whole table comes early
        for path in paths:
            out = str(Path(args.out, f"{Path(path).stem}_seed{seed}"))
            if out in runs:
                raise UserError(f"two of these runs would be {out}: give every config and every seed once")
            words = [path, *passed, f"--seed={seed}", f"--out={out}"]
            runs[out] = words, knobs.load(words)
            if runs[out][1].fsdp:
                raise UserError(f"{path}: a run here is one process, which cannot shard: add --fsdp=False or use torchrun")
    return list(runs.values()), args.per_gpu


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES has to say for each one of the GPUs that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    numbers = range(torch.cuda.device_count())  # of those listed, if any are
    return [listed[i] for i in numbers] if listed[0] else [str(i) for i in numbers]


def started(config):
    return Path(config.out, "last.pt").is_file()


def finished(config):
    """Whether its folder holds this very run, done. Where it holds another one, train.py will refuse to continue it."""
    checksum = load_meta(config.data)["checksum"]
    if not started(config):
        return False
    checkpoint = load_checkpoint(Path(config.out, "last.pt"))
    return (checkpoint["step"] == config.max_iters and checkpoint["data"] == checksum
            and knobs.decisive(checkpoint["train_config"]).items() <= dataclasses.asdict(config).items())


def start(words, config, gpu, threads):
    """Its process. In a session of its own, so that Ctrl-C reaches it through us only: twice would not let it save."""
    environment = {**os.environ, "OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with open(f"{config.out}.log", "a") as log:
        return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words, f"--resume={started(config)}"],
                                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def last_line(config):
    return Path(f"{config.out}.log").read_text(errors="replace").strip().split("\n")[-1]


def main():
    runs, per_gpu = plan(sys.argv[1:])
    gpus = [] if all(config.device == "cpu" for _, config in runs) else visible_gpus()
    if not gpus:
        for _, config in runs:
            knobs.pick_device(config.device)
    todo = [run for run in runs if not finished(run[1])]
    try:
        Path(runs[0][1].out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {Path(runs[0][1].out).parent}: {error.strerror}: choose another --out") from None
    free = (gpus or [None]) * per_gpu  # every GPU once before one gets a second run
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // len(free)))
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished already; {len(free)} at a time on "
          f"{f'{len(gpus)} GPUs' if gpus else f'this machine, {threads} threads each'}", flush=True)

    asked_to_stop, running, failed = [], {}, []
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
            signal.signal(number, lambda number, _: asked_to_stop.append(number))
    try:
        while (todo or running) and not asked_to_stop:
            while todo and free:
                (words, config), gpu = todo.pop(0), free.pop(0)
                begun = "continued" if started(config) else "started"
                print(f"{config.out}: {begun}{f' on GPU {gpu}' if gpu else ''}", flush=True)
                running[start(words, config, gpu, threads)] = config, gpu
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                config, gpu = running.pop(process)
                free.append(gpu)
                done = process.returncode == 0 and finished(config)  # it also ends with 0 when somebody stopped it
                failed += [] if done else [config.out]
                print(f"{config.out}: {'done' if done else f'FAILED, exit code {process.returncode}'}, "
                      f"{len(todo) + len(running)} to go | {last_line(config)}", flush=True)
    finally:  # whatever ended the loop, nothing is left running
        for process in running:
            process.terminate()  # train.py saves last.pt and leaves
        for process in running:
            process.wait()
    for config, _ in running.values():
        print(f"{config.out}: stopped | {last_line(config)}")
    if asked_to_stop:
        raise SystemExit("stopped: the same command again goes on from here")
    done = [config.out for _, config in runs if config.out not in failed]
    if done:
        print(f"one row a config, mean ± standard deviation over seeds:\npython eval.py {shlex.join(done)} --over_seeds")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed: the same command again tries them once more")


if __name__ == "__main__":
    knobs.cli(main)
