"""Train every config with every seed: a process per run, as many at a time on each GPU as fit.

    python -m bench.sweep config/baseline.py config/local_k2.py --seeds=1,2,3 --per_gpu=2
    python -m bench.sweep config/demo.py --seeds=1,2 --per_gpu=2 --device=cpu   sharing its cores

Other --name=value words are knobs of train.py and apply to every run; {seed} in them is the run's
own seed, as in --init_from=out/sweep/baseline_seed{seed}. CONFIG with seed S is trained in
out/sweep/CONFIG_seedS (parent: --out=FOLDER), its output is in CONFIG_seedS.log beside it. The same
command again continues what is not finished. Ctrl-C stops all runs; a failing run stops no other.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import config as knobs
from model import ModelError
from prepare import UserError, load_meta
from train import read_resumable

ROOT = Path(__file__).resolve().parent.parent


def plan(argv):
    """-> {run folder: (words for train.py, Config)} and runs per GPU. Raises UserError."""
    parser = knobs.Parser(description=__doc__)
    add = parser.add_argument
    add("--seeds", default="1337", help="with commas (default 1337)")
    add("--per_gpu", type=int, default=1, help="runs at a time on each GPU, or on the CPU")
    add("--out", default="out/sweep", help="parent folder of the runs (default out/sweep)")
    args, words = parser.parse_known_args(argv)
    paths = [word for word in words if not word.startswith("-")]
    passed = [word for word in words if word.startswith("-")]
    if not paths or args.per_gpu < 1:
        raise UserError("name config files, such as config/local_k2.py, and --per_gpu=1 or more")
    if {word.split("=")[0] for word in passed} & {"--seed", "--resume"}:
        raise UserError("leave out --seed and --resume: --seeds=1,2 names seeds, runs continue")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds={args.seeds} must be whole numbers with commas") from None
    runs = {}
    for seed in seeds:  # one seed of every config first: the first table comes early
        for path in paths:
            out = str(Path(args.out, f"{Path(path).stem}_seed{seed}"))
            if out in runs:
                raise UserError(f"two runs would be {out}: give each config and seed once")
            own = [word.replace("{seed}", str(seed)) for word in passed]
            own = [path, *own, f"--seed={seed}", f"--out={out}"]
            runs[out] = own, knobs.load(own)
    return runs, args.per_gpu


def finished(config):
    """Whether its folder holds this very run, complete. Raises UserError without its data."""
    checksum = load_meta(config.data)["checksum"]
    try:
        return read_resumable(config, checksum)["step"] == config.max_iters
    except (UserError, ModelError):  # train.py will say why it cannot continue that run
        return False


def start(out, words, environment):
    """Starts train.py. -> its process, and its log file, opened at the end."""
    begun = any(Path(out).glob("*.pt"))
    words = [sys.executable, str(ROOT / "train.py"), *words, f"--resume={begun}"]
    with open(f"{out}.log", "a") as log:
        # in a session of its own: a Ctrl-C that reaches it twice would kill it at once
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, start_new_session=True)
    log = open(f"{out}.log", errors="replace")  # noqa: SIM115 (read until the run ends)
    log.seek(0, os.SEEK_END)
    print(f"{out}: {'continued' if begun else 'started'}", flush=True)
    return process, log


def main():
    runs, per_gpu = plan(sys.argv[1:])
    places = [[]]  # words for train.py: where to compute
    if {config.device for _, config in runs.values()} <= {"auto", "cuda"}:
        places = [[f"--device=cuda:{i}"] for i in range(torch.cuda.device_count())] or places
    places *= per_gpu  # every GPU once before one gets a second run
    threads = max(1, torch.get_num_threads() // len(places))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    waiting = [out for out, (_, config) in runs.items() if not finished(config)]
    print(f"{len(runs)} runs, {len(waiting)} to go, {len(places)} at a time", flush=True)
    working, failed, stop = {}, [], knobs.StopRequest()
    try:
        while (waiting or working) and not stop.requested:
            while waiting and places:
                out, place = waiting.pop(0), places.pop(0)
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                working[out] = *start(out, runs[out][0] + place, environment), place
            time.sleep(0.2)
            for out, (process, log, place) in list(working.items()):
                code = process.poll()  # before reading, or the last lines could be missed
                for line in log:
                    if ": validation " in line:
                        print(f"{out}: {line}", end="", flush=True)
                if code is None:
                    continue
                places.append(place)
                del working[out]
                outcome = "done"
                if code or not finished(runs[out][1]):  # a run that was stopped ends with 0, too
                    printed = Path(f"{out}.log").read_text(errors="replace").strip().split("\n")
                    outcome = f"FAILED, exit code {code} | {printed[-1]}"
                    failed.append(out)
                print(f"{out}: {outcome}", flush=True)
    finally:  # train.py saves last.pt and leaves
        for process, *_ in working.values():
            process.terminate()
        for process, *_ in working.values():
            process.wait()
    if stop.requested:
        raise SystemExit("stopped: the same command again goes on from here")
    if done := [out for out in runs if out not in failed]:
        print("python eval.py", *done, "--over_seeds")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed: the same command tries again")


if __name__ == "__main__":
    knobs.cli(main)
