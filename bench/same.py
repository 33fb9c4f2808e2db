"""Does model.py still compute what it computed at another commit?

    python bench/same.py HEAD                     the last commit's against the one you are changing
    python bench/same.py c0679ce config/local_k2.py --data=data/mine --batch_size=4 --updates=60
    python bench/same.py HEAD config/demo.py --precision=float64              any knob of train.py

Both versions take every step of a run at the same weights and on the same tokens, on the CPU.
The new one is trained; the old one gets its weights before every step, because two runs left to
themselves part: rounding turns a near-tie in a gate the other way, and its gradient grows as 1 / T.
Printed at every update: the loss, how far the old one's is, and the norm of the difference of the
two gradients over the norm of the new one's. In float32 also, to tell what is rounding, how far
each of them is from the gradient in float64, over the same norm. Exit code 1 where float64 shows
more than rounding.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import importlib.util
import io
import math
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts bench/ there
import config as knobs
import model as new
from prepare import UserError, load_meta, load_tokens
from train import Machine, batch_at, check_memory, make_optimizer, set_learning_rate

BOUND = 1e-9  # of the relative difference of gradients in float64


def export(commit, folder, *names):
    """Write the files of these names, or all of them, as a commit has them. Raises UserError."""
    wanted = " ".join(names) or "tree"
    command = ["git", "archive", "--format=tar", "--end-of-options", commit, *names]
    try:
        archive = subprocess.run(command, cwd=ROOT, capture_output=True)
    except (OSError, ValueError) as error:  # no git here; a NUL in the name of the commit
        raise UserError(f"git cannot be asked for {wanted} at {commit!r}: {error}") from None
    if archive.returncode:
        reason = " ".join(archive.stderr.decode(errors="replace").split())
        raise UserError(f"git knows no {wanted} at '{commit}': {reason}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def model_at(commit):
    """The module that model.py was at a commit. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        export(commit, folder, "model.py")
        spec = importlib.util.spec_from_file_location("model_before", Path(folder, "model.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules["model_before"] = module  # where its dataclass looks for itself
        spec.loader.exec_module(module)
    return module


def build(module, config, dtype):
    """The model that this version of model.py makes from config and its seed. Raises UserError."""
    torch.manual_seed(config.seed)
    try:
        values = dataclasses.asdict(config.model)
        theirs = [field.name for field in dataclasses.fields(module.GPTNeoConfig)]
        for name in values.keys() - theirs:
            # it came later: at its default it changes nothing, and this one only the first weights,
            # which every step loads anew
            if name == "embd_std" or values[name] == knobs.FIELDS[name].default:
                del values[name]
        geometry = module.GPTNeoConfig(**values)
    except (TypeError, ValueError) as error:  # a field or a value that came later
        raise UserError(f"the other model.py cannot build this model: {error}") from None
    return module.GPTNeo(geometry).to(dtype)


def loss_and_gradient(model, weights, rows):
    """Loss and gradient, flattened, of a model at these weights on rows (B, T + 1)."""
    model.load_state_dict(weights)
    model.zero_grad(set_to_none=True)
    loss = model(rows[:, :-1], rows[:, 1:]).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def train_beside(commit, config, updates, tokens, precision):
    """Train a model by a run's first updates, so many, beside the commit's; print how they differ.
    -> the largest relative difference of gradients"""
    dtype = getattr(torch, precision)
    before = build(model_at(commit), config, dtype)
    trained, exact = build(new, config, dtype), build(new, config, torch.float64)
    optimizer, worst = make_optimizer(trained, config, torch.device("cpu")), 0.0
    for step in range(updates):
        rows, weights = batch_at(tokens, step, config), trained.state_dict()
        loss_before, grad_before = loss_and_gradient(before, weights, rows)
        loss, grad = loss_and_gradient(trained, weights, rows)
        norm = grad.norm()
        off = ((grad - grad_before).norm() / norm).item()
        worst = max(worst, off)
        line = (f"update {step + 1}: loss {loss:.6f}, the old one's differs by "
                f"{abs(loss - loss_before):.1e}; gradient by {off:.1e}")
        if precision == "float32":
            _, truth = loss_and_gradient(exact, weights, rows)
            line += (f"; from float64 {(grad - truth).norm() / norm:.1e}, "
                     f"the old one {(grad_before - truth).norm() / norm:.1e}")
        print(line, flush=True)
        set_learning_rate(optimizer, config.at(step).learning_rate)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), config.grad_clip or math.inf)
        optimizer.step()
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("commit", help="whose model.py to compare with")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--precision", default="float32", choices=("float32", "float64"))
    args, words = parser.parse_known_args()
    if args.updates < 1:
        raise UserError(f"--updates={args.updates} must be at least 1")
    config = knobs.load(words)
    vocab_size, tokens = load_meta(config.data)["vocab_size"], load_tokens(config.data, "train")
    if len(tokens) <= config.block_size:
        raise UserError(f"{config.data} has {len(tokens)} tokens to train on, too few for "
                        f"block_size={config.block_size}")
    config = dataclasses.replace(config, vocab_size=vocab_size)
    check_memory(config, Machine())
    worst = train_beside(args.commit, config, args.updates, tokens, args.precision)
    if args.precision == "float64" and not worst < BOUND:
        raise SystemExit(f"the gradients differ by up to {worst:.1e}: more than rounding")


if __name__ == "__main__":
    knobs.cli(main)
