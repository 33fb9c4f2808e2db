"""Does a training step on this device compute what float64 on the CPU computes?

    python bench/check.py                     on the GPU if there is one
    python bench/check.py --device=cpu --compile=False

Loss and gradients of a two-layer model, eager and compiled, against eager float64 on the CPU. One
line per case; "error" is |gradient - reference| / |reference|. In fp32 the error of the gates'
gradient and of all other parameters' (the trunk's) is judged. In bfloat16 near-ties have other
winners, and a gate's gradient grows as 1 / T, so that a few tokens dominate it: there the norm of
the gates' gradient is judged, and the trunk's error only where T is constant or there is no gate.
A compiled model must be one graph, also for two coefficients of the ablated loss (the ramp).
Exit code 1 if a case fails.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts bench/ there
import config as knobs
from model import GPTNeo, GPTNeoConfig, k_largest
from prepare import UserError

MODES = {"False": None, "True": "default", "reduce-overhead": "reduce-overhead"}  # of torch.compile
COEFFS = (1.0, 0.25)  # of the ablated loss
LOSS = {"float32": 1e-4, "bfloat16": 2e-2}  # largest difference, nats
ERROR = {"float32": 1e-2, "bfloat16": 0.1}  # largest error of a gradient
RATIO = 2.0  # bfloat16: largest ratio of the norms of the gates' gradients, either way
FORMS = {
    "baseline": {"ablation": "none"},
    "local": {},
    "global": {"ablation": "global"},
    "sigmoid": {"gate": "sigmoid"},
    "constant": {"gate": "constant"},
    "global constant": {"ablation": "global", "gate": "constant"},
    "heads": {"ablation": "global", "attn_unit": "head"},
    "local attention": {"attention_layers": "global,local", "window_size": 24},
    "k = 1": {"k_attn": 1, "k_mlp": 1},
    "k = 8": {"k_attn": 8, "k_mlp": 8},
}
COMPILED = ("local", "global", "constant")  # compiling takes longer than all the rest


def reference_model(form):
    """In float64 on the CPU, and tokens (B, T + 1)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
    reference = GPTNeo(GPTNeoConfig(**sizes, **FORMS[form])).double()
    with torch.no_grad():
        for parameter in reference.parameters():  # larger than at the start: something to compare
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return reference, torch.randint(1000, (4, 65))


def step(model, tokens, coeff):
    """Loss and gradients of the gates (G,) and of the trunk (P,), in float64 on the CPU."""
    device = model.lm_head.weight.device
    tokens, coeff = tokens.to(device), torch.full((), coeff, device=device)
    model.zero_grad(set_to_none=True)
    loss = model(tokens[:, :-1], tokens[:, 1:], coeff).loss
    loss.backward()
    gates, trunk = [torch.zeros(0)], []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        group = gates if "_gate." in name else trunk
        group.append(gradient.flatten().cpu().double())
    return loss.item(), torch.cat(gates), torch.cat(trunk)


def compare(reference, model, tokens, coeff, dtype):
    """-> whether the step is right, and what was measured, in words"""
    device = model.lm_head.weight.device.type
    wanted_loss, *wanted = step(reference, tokens, coeff)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        for _ in range(3):  # a CUDA graph is recorded in the second call and replayed in the third
            loss, *found = step(model, tokens, coeff)
    off = abs(loss - wanted_loss)
    error = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]
    good, words = off <= LOSS[dtype], f"loss {off:.1e}, trunk error {error[1]:.1e}"
    config = model.config
    if dtype == "float32" or config.ablation == "none" or config.gate == "constant":
        good &= error[1] <= ERROR[dtype]
    if config.ablation != "none":
        ratio = (found[0].norm() / wanted[0].norm()).item()
        words += f", gates error {error[0]:.1e}, norm x {ratio:.2f}"
        good &= 1 / RATIO <= ratio <= RATIO
        good &= dtype == "bfloat16" or error[0] <= ERROR[dtype]
    return good, words


def check_step(device, dtype, mode, form):
    """One case: both coefficients through one model. Prints a line. -> whether it is right"""
    # as train.py has it
    torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    reference, tokens = reference_model(form)
    model = GPTNeo(reference.config)
    model.load_state_dict(reference.state_dict())
    model.to(device)
    if MODES[mode]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile(mode=MODES[mode], dynamic=False)
    good = True
    for coeff in COEFFS:
        right, words = compare(reference, model, tokens, coeff, dtype)
        good &= right
    if MODES[mode]:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        good, words = good and graphs == 1, f"{words}, {graphs} graphs"
    return report(good, mode, dtype, form, words)


def check_ties(device, mode, k):
    """The gate's winners where scores tie: exactly k, and the right threshold."""
    torch.manual_seed(0)
    scores = torch.randint(5, (512, 64), device=device).float()  # 13 of each value a row
    find = torch.compile(k_largest, mode=MODES[mode], dynamic=False) if MODES[mode] else k_largest
    hard, s_k, s_next = find(scores, k)
    ordered = scores.sort(-1, descending=True).values
    good = (hard.sum(-1) == k).all() and ((hard == 0) | (hard == 1)).all()
    good &= torch.equal(s_k, ordered[:, k - 1 : k]) and torch.equal(s_next, ordered[:, k : k + 1])
    good &= ((hard == 0) | (scores >= s_k)).all()
    return report(good, mode, "float32", f"ties, k = {k}", "k winners and threshold, exact")


def report(good, mode, dtype, case, words):
    print(f"{'ok  ' if good else 'FAIL'} compile={mode:15} {dtype:8} {case:16} {words}", flush=True)
    return bool(good)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--compile", default="", metavar="MODES",
                        help=f"some of {','.join(MODES)} (default: those for the device)")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    modes = list(MODES) if device.type == "cuda" else ["False", "True"]
    if args.compile:
        modes = args.compile.split(",")
    if set(modes) - MODES.keys():
        raise UserError(f"--compile={args.compile} must be some of {','.join(MODES)}")
    results = []
    for mode in modes:
        results += [check_ties(device, mode, k) for k in (1, 2, 8)]
        for dtype, form in itertools.product(LOSS, COMPILED if MODES[mode] else FORMS):
            results.append(check_step(device, dtype, mode, form))
    if not all(results):
        raise SystemExit(f"FAIL: {results.count(False)} of {len(results)} cases")
    print(f"ok: {len(results)} cases")


if __name__ == "__main__":
    knobs.cli(main)
