"""Is a training step on this device the step that the mechanism says?

    python bench/check.py                     on the GPU if there is one
    python bench/check.py --device=cpu --compile=False

One step of a two-layer model, eager and compiled, against the same step in float64 on the CPU, for
each variant, attention unit and form of the gate. Printed: the difference of the loss; the sine of
the angle between the gradients; and, of the eager model, which can be asked for its masks, the
share of winners that others replace. Near-ties fall the other way in lower precision, and a gate's
gradient grows as 1 / T: in bfloat16 a few near-tied tokens dominate it, so there the angle is shown
and not judged. Exit code 1 beyond BOUNDS.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts bench/ there
import config as knobs
from model import GPTNeo, GPTNeoConfig
from prepare import UserError

MODES = {"False": None, "True": "default", "reduce-overhead": "reduce-overhead"}  # of torch.compile
BOUNDS = {"float32": (1e-4, 1e-2, 1e-3), "bfloat16": (5e-2, 1.0, 3e-2)}  # loss, angle, winners
FORMS = [
    {"ablation": "none"},
    {"ablation": "local"},
    {"ablation": "global"},
    {"ablation": "local", "gate": "sigmoid"},
    {"ablation": "global", "attn_unit": "head"},
    {"ablation": "local", "attention_layers": "global,local", "window_size": 24},
]
COMPILED_FORMS = FORMS[1:3]  # compiling takes longer than all the rest


def reference_step(form):
    """The model in float64 on the CPU after a backward pass, its tokens (B, T + 1) and its loss."""
    torch.manual_seed(0)
    config = GPTNeoConfig(vocab_size=1000, block_size=64, n_layer=2, n_head=4, n_embd=64, **form)
    reference = GPTNeo(config).double()
    with torch.no_grad():
        for parameter in reference.parameters():  # wider than at the start: something to compare
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    tokens = torch.randint(1000, (4, 65))
    loss = reference(tokens[:, :-1], tokens[:, 1:]).loss
    loss.backward()
    return reference, tokens, loss.item()


def step_here(reference, tokens, device, dtype, mode):
    """The same step on this device -> gradients (P,), loss, and the masks of an eager model."""
    model = GPTNeo(reference.config)
    model.load_state_dict(reference.state_dict())
    model.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    idx, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    masks = ()
    if MODES[mode]:
        torch._dynamo.reset()
        model.compile(mode=MODES[mode])
    elif reference.config.ablation != "none":
        with torch.no_grad(), autocast:
            masks = model.ablated(idx)[2:]
    for _ in range(3):  # a CUDA graph is recorded at the second call and replayed at the third
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = model(idx, targets).loss
        loss.backward()
    gradients = torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])
    return gradients, loss.item(), masks


def share_replaced(masks, expected):
    """The share of winners that others replace, in the worst mask; 0 where there is no mask."""
    shares = [0.0]
    for mask, wanted in zip(masks, expected):
        changed = (mask.cpu() != wanted).sum()  # a winner that left and one that came
        shares.append((changed / (2 * wanted.sum())).item())
    return max(shares)


def passes(device, dtype, mode, form):
    """Compare one step, print a line on it -> whether it stays within the bounds."""
    reference, tokens, expected = reference_step(form)
    gradients, loss, masks = step_here(reference, tokens, device, dtype, mode)
    wanted = torch.cat([p.grad.flatten() for p in reference.parameters()])  # (P,)
    cosine = (gradients @ wanted / gradients.norm() / wanted.norm()).item()
    off, angle = abs(loss - expected), max(0.0, 1 - cosine**2) ** 0.5
    line = f"loss {off:.1e}  gradient {angle:.1e}"
    replaced = 0.0
    if masks:
        with torch.no_grad():
            replaced = share_replaced(masks, reference.ablated(tokens[:, :-1])[2:])
        line += f"  winners {replaced:.2%}"
    loss_bound, angle_bound, winners_bound = BOUNDS[dtype]
    good = off <= loss_bound and angle <= angle_bound and replaced <= winners_bound
    verdict, what = "ok  " if good else "FAIL", " ".join(map(str, form.values()))
    print(f"{verdict} compile={mode:16}{dtype:9} {what:22} {line}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--compile", default=",".join(MODES), help="which of these, with commas")
    args = parser.parse_args()
    device, modes = knobs.pick_device(args.device), args.compile.split(",")
    if set(modes) - MODES.keys():
        raise UserError(f"--compile={args.compile} must be some of {', '.join(MODES)}")
    failed = False
    for mode, dtype in itertools.product(modes, BOUNDS):
        for form in COMPILED_FORMS if MODES[mode] else FORMS:
            failed |= not passes(device, dtype, mode, form)
    if failed:
        raise SystemExit("beyond the bounds: see the lines above")


if __name__ == "__main__":
    knobs.cli(main)
