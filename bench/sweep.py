"""Train every config with every seed: a process a run, as many at a time on each GPU as fit.

    python bench/sweep.py config/baseline.py config/local_k2.py --seeds=1,2,3 --per_gpu=2
    python bench/sweep.py config/demo.py --seeds=1,2 --per_gpu=2 --device=cpu   sharing its cores

Other --name=value words are knobs of train.py, for every run; {seed} in them is the run's own, as
in --init_from=out/sweep/baseline_seed{seed}. CONFIG with seed S is trained into
out/sweep/CONFIG_seedS (another parent folder: --out=FOLDER) and prints into
out/sweep/CONFIG_seedS.log, its evaluations here too. The same command again skips what is finished
and continues the rest: after Ctrl-C or SIGTERM, which stop all runs, or after a failure, which
stops no other.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts bench/ there
import config as knobs
from model import ModelError
from prepare import UserError, load_meta
from train import read_resumable


def plan(argv):
    """Command-line words -> [(words for train.py, the Config they mean)], how many at a time.

    Raises UserError.
    """
    parser = argparse.ArgumentParser(
        usage="python bench/sweep.py config/NAME.py ... [--seeds=S,S] [--knob=value ...]",
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("--seeds", default="1337", help="with commas between them (default 1337)")
    parser.add_argument("--per_gpu", type=int, default=1,
                        help="runs at a time on each GPU, or on the CPU (default 1)")
    parser.add_argument("--out", default="out/sweep",
                        help="parent of the run folders (default out/sweep)")
    args, words = parser.parse_known_args(argv)
    paths = [word for word in words if word[:1] != "-"]
    passed = [word for word in words if word[:1] == "-"]
    if not paths:
        raise UserError("which runs? Name at least one config file, such as config/local_k2.py")
    if args.per_gpu < 1:
        raise UserError(f"--per_gpu={args.per_gpu} must be at least 1")
    if not args.out:
        raise UserError("--out= must name a folder")
    if {word.split("=")[0] for word in passed} & {"--seed", "--resume"}:
        raise UserError("leave out --seed and --resume: --seeds=1,2 names the seeds, and what was "
                        "begun is continued")
    runs = {}
    for seed in args.seeds.split(","):  # one seed of every config: the first whole table is early
        for path in paths:
            out = str(Path(args.out, f"{Path(path).stem}_seed{seed}"))
            if out in runs:
                raise UserError(f"two of these runs would be {out}: give every config and every "
                                f"seed once")
            own = [word.replace("{seed}", seed) for word in passed]
            words = [path, *own, f"--seed={seed}", f"--out={out}"]
            config = knobs.load(words)
            if config.fsdp:
                raise UserError(f"{path}: a run here is one process, which cannot shard: "
                                f"add --fsdp=False or use torchrun")
            runs[out] = words, config
    return list(runs.values()), args.per_gpu


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES has to say for each one of the GPUs that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    numbers = range(torch.cuda.device_count())  # of those listed, if any are
    return [listed[i] if listed[0] else str(i) for i in numbers]


def started(config):
    return Path(config.out, "last.pt").is_file()


def finished(config):
    """Whether its folder holds this very run, done. Raises UserError where its data cannot be read.

    What train.py cannot continue is not finished: it will refuse it, and say why, in its turn.
    """
    meta = load_meta(config.data)
    config = dataclasses.replace(config, vocab_size=meta["vocab_size"])
    if not started(config):
        return False
    try:
        return read_resumable(config, meta["checksum"])["step"] == config.max_iters
    except (UserError, ModelError):
        return False


class Sweep:
    """Runs that wait, runs at work, each with the GPU it has, and what became of the others."""

    def __init__(self, runs, places, threads):
        self.runs, self.threads = runs, threads
        self.waiting = [run for run in runs if not finished(run[1])]
        self.free = places  # GPUs, one named as often as it takes runs; None is the CPU
        self.working = {}  # process -> its Config, its GPU, its log to read on from
        self.failed = []  # run folders

    def start_waiting(self):
        """Start what waits, as far as there is room."""
        while self.waiting and self.free:
            (words, config), gpu = self.waiting.pop(0), self.free.pop(0)
            what = "continued" if started(config) else "started"
            print(f"{config.out}: {what}{f' on GPU {gpu}' if gpu else ''}", flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": self.threads}
            if gpu:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            script, resume = str(ROOT / "train.py"), f"--resume={started(config)}"
            try:
                log = open(f"{config.out}.log", "a")
            except OSError as error:
                raise UserError(f"cannot write {config.out}.log: {error.strerror}") from None
            with log:
                # in a session of its own, so that Ctrl-C reaches it through us only: twice would
                # not let it save
                process = subprocess.Popen(
                    [sys.executable, script, *words, resume], env=environment,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            log = open(log.name, errors="replace")
            log.seek(0, os.SEEK_END)  # what stands there is of an earlier start
            self.working[process] = config, gpu, log

    def tell(self):
        """Print the evaluations of those at work since the last call."""
        for config, _, log in self.working.values():
            for line in log:
                if ": validation " in line:
                    print(f"{config.out}: {line}", end="", flush=True)

    def collect(self):
        """Look which of those at work have ended."""
        for process in [process for process in self.working if process.poll() is not None]:
            config, gpu, log = self.working.pop(process)
            log.close()
            self.free.append(gpu)
            outcome = "done"
            if process.returncode or not finished(config):  # it ends with 0 when stopped, too
                outcome = f"FAILED, exit code {process.returncode}"
                self.failed.append(config.out)
            to_go = len(self.waiting) + len(self.working)
            print(f"{config.out}: {outcome}, {to_go} to go | {last_line(config)}", flush=True)

    def stop_all(self):
        """Leave nothing running: train.py saves last.pt and leaves."""
        for process in self.working:
            process.terminate()
        for process in self.working:
            process.wait()


def last_line(config):
    return Path(f"{config.out}.log").read_text(errors="replace").strip().split("\n")[-1]


def main():
    runs, per_gpu = plan(sys.argv[1:])
    gpus = [] if all(config.device == "cpu" for _, config in runs) else visible_gpus()
    if not gpus:
        for _, config in runs:
            knobs.pick_device(config.device)
    places = (gpus or [None]) * per_gpu  # every GPU once before one gets a second run
    share = max(1, torch.get_num_threads() // len(places))
    threads = os.environ.get("OMP_NUM_THREADS") or str(share)
    sweep = Sweep(runs, list(places), threads)
    parent = Path(runs[0][1].out).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}: "
                        f"choose another --out") from None
    where = f"{len(gpus)} GPUs" if gpus else f"this machine, {threads} threads each"
    print(f"{len(runs)} runs, {len(runs) - len(sweep.waiting)} of them finished already; "
          f"{len(places)} at a time on {where}", flush=True)

    asked_to_stop = []
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
            signal.signal(number, lambda number, _: asked_to_stop.append(number))
    try:
        while (sweep.waiting or sweep.working) and not asked_to_stop:
            sweep.start_waiting()
            time.sleep(0.2)
            sweep.tell()
            sweep.collect()
    finally:  # whatever ended the loop
        sweep.stop_all()
    for config, *_ in sweep.working.values():
        print(f"{config.out}: stopped | {last_line(config)}")
    if asked_to_stop:
        raise SystemExit("stopped: the same command again goes on from here")
    done = [config.out for _, config in runs if config.out not in sweep.failed]
    if done:
        print(f"one row a config, mean ± standard deviation over seeds:\n"
              f"python eval.py {shlex.join(done)} --over_seeds")
    if sweep.failed:
        raise SystemExit(f"{len(sweep.failed)} of {len(runs)} runs failed: the same command again "
                         f"tries them once more")


if __name__ == "__main__":
    knobs.cli(main)
