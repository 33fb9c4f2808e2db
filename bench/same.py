"""Does model.py still compute what it computed at another commit? Both take each step at the same weights and tokens.

    python bench/same.py main                                       HEAD's model.py against the one you are changing
    python bench/same.py c0679ce config/local_k2.py --data=data/mine --batch_size=4 --updates=60
    python bench/same.py c0679ce config/demo.py --precision=float64       any knob of train.py

The new one is trained; the old one gets its weights before every step, because two runs left to themselves part: rounding
turns a near-tie in a gate the other way, and its gradient grows as 1 / T. Printed along the run: the loss, how far the
old one's is, the difference of the gradients over their norm, and in float32, to tell what is rounding, the distance of
each from the gradient in float64. Exit code 1 where float64 shows more than rounding.
"""

import argparse
import dataclasses
import importlib.util
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # python puts bench/ there
import config as knobs
import model as new
from prepare import UserError, load_meta, load_tokens
from train import batch_at, learning_rate_at, make_optimizer

BOUND = 1e-9  # of the relative difference of gradients in float64


def model_at(commit):
    """The module that model.py was at a commit. Raises UserError."""
    shown = subprocess.run(["git", "show", f"{commit}:model.py"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        raise UserError(f"git knows no model.py at '{commit}': {shown.stderr.strip().splitlines()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model_before.py")
        path.write_text(shown.stdout)
        spec = importlib.util.spec_from_file_location("model_before", path)
        module = sys.modules["model_before"] = importlib.util.module_from_spec(spec)  # where its dataclass looks for itself
        spec.loader.exec_module(module)
    return module


def step(model, weights, rows):
    """Loss and gradient, flattened, of one model at these weights."""
    model.load_state_dict(weights)
    model.zero_grad(set_to_none=True)
    loss = model(rows[:, :-1], rows[:, 1:]).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = knobs.usage_error
    parser.add_argument("commit", help="whose model.py to compare with")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--precision", default="float32", choices=("float32", "float64"))
    args, words = parser.parse_known_args()
    if args.updates < 1:
        raise UserError(f"--updates={args.updates} must be at least 1")
    config = knobs.load([*words, f"--max_iters={args.updates}"])
    meta, tokens = load_meta(config.data), load_tokens(config.data, "train")
    geometry = dataclasses.asdict(dataclasses.replace(config, vocab_size=meta["vocab_size"]).model)

    def build(module, dtype):
        torch.manual_seed(config.seed)
        return module.GPTNeo(module.GPTNeoConfig(**geometry)).to(dtype)

    trained = build(new, getattr(torch, args.precision))
    before, exact = build(model_at(args.commit), getattr(torch, args.precision)), build(new, torch.float64)
    optimizer, worst = make_optimizer(trained, config, torch.device("cpu")), 0.0
    for update in range(args.updates):
        rows, weights = batch_at(tokens, update, config), trained.state_dict()
        loss_before, grad_before = step(before, weights, rows)
        loss, grad = step(trained, weights, rows)
        norm = grad.norm()
        off = ((grad - grad_before).norm() / norm).item()
        worst = max(worst, off)
        line = f"update {update + 1}: loss {loss:.6f}, the old one's differs by {abs(loss - loss_before):.1e}; gradient by {off:.1e}"
        if args.precision == "float32":
            _, truth = step(exact, weights, rows)
            line += f"; from float64 {(grad - truth).norm() / norm:.1e}, the old one {(grad_before - truth).norm() / norm:.1e}"
        print(line, flush=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, config)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), config.grad_clip or math.inf)
        optimizer.step()
    if args.precision == "float64" and not worst < BOUND:
        raise SystemExit(f"the gradients differ by up to {worst:.1e}: more than rounding")


if __name__ == "__main__":
    knobs.cli(main)
