"""Does a training step on this device compute what float64 on the CPU computes?

    python -m bench.check                     on the GPU if there is one
    python -m bench.check --device=cpu --compile=False

Loss and gradients of a two-layer model, eager and compiled, against eager float64 on the CPU, for
two coefficients of the ablated loss; a compiled model must be one graph for both. Each case prints
a line: the difference of the loss, and |gradient - reference| / |reference| of the trunk (all
parameters but the gates') and of the gates. bfloat16 changes the winners of near-ties. Where
gradients grow as 1 / T, a few such tokens decide the result, so T is at least GAP in bfloat16, also
in the reference. Exit code 1 if a case fails.
"""

import itertools
from unittest import mock

import torch

import config as knobs
import model as model_file
from model import GPTNeo, GPTNeoConfig
from prepare import UserError

MODES = {"False": None, "True": "default", "reduce-overhead": "reduce-overhead"}  # of torch.compile
COEFFS = (1.0, 0.25)  # of the ablated loss
# Largest difference of the loss in nats, error of the trunk, error of the gates. In bfloat16 on a
# CPU they reach 0.009, 0.12 and 0.19 over 6 seeds. A gradient of zero has an error of 1.
BOUNDS = {"float32": (1e-4, 1e-2, 1e-2), "bfloat16": (3e-2, 0.3, 0.5)}
GAP = {"float32": model_file.MIN_GAP, "bfloat16": 1.0}  # smallest T
FORMS = {
    "baseline": {"ablation": "none"},
    "local": {},
    "global": {"ablation": "global"},
    "sigmoid": {"gate": "sigmoid"},
    "constant": {"gate": "constant"},
    "heads": {"ablation": "global", "attn_unit": "head"},
    "local attention": {"attention_layers": "global,local", "window_size": 24},
    "k = 1": {"k_attn": 1, "k_mlp": 1},
    "k = 8": {"k_attn": 8, "k_mlp": 8},
}
# compiling takes 15 seconds a case on an H200: each mode in the dtype that needs it most
COMPILED = {"True": "float32", "reduce-overhead": "bfloat16"}
COMPILED_FORMS = ("local", "global", "constant")


def reference_model(form):
    """In float64 on the CPU, and tokens (B, T + 1)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
    reference = GPTNeo(GPTNeoConfig(**sizes, **FORMS[form])).double()
    with torch.no_grad():
        for parameter in reference.parameters():  # larger than at the start: something to compare
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return reference, torch.randint(1000, (4, 65))


def copy_here(reference, device, mode):
    """The same weights in fp32 on the device, compiled as train.py compiles."""
    model = GPTNeo(reference.config)
    model.load_state_dict(reference.state_dict())
    model.to(device)
    if MODES[mode]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile(mode=MODES[mode], dynamic=False)
    return model


def step(model, tokens, coeff):
    """Loss (1,) and the gradients of trunk (P,) and gates (G,), in float64 on the CPU."""
    device = model.lm_head.weight.device
    tokens, coeff = tokens.to(device), torch.full((), coeff, device=device)
    model.zero_grad(set_to_none=True)
    loss = model(tokens[:, :-1], tokens[:, 1:], coeff).loss
    loss.backward()
    trunk, gates = [], [torch.zeros(0)]
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        group = gates if "_gate." in name else trunk
        group.append(gradient.flatten().cpu().double())
    return loss.detach().cpu().double()[None], torch.cat(trunk), torch.cat(gates)


def differences(reference, model, tokens, dtype):
    """Difference of the loss, error of the trunk, error of the gates, (3,): the worst of COEFFS."""
    device = model.lm_head.weight.device.type
    rows = []
    for coeff in COEFFS:
        wanted = step(reference, tokens, coeff)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            for _ in range(3):  # a CUDA graph is recorded in the second call, replayed in the third
                found = step(model, tokens, coeff)
        off = torch.stack([(a - b).norm() for a, b in zip(found, wanted)])  # (3,)
        sizes = torch.stack([torch.ones(()), wanted[1].norm(), wanted[2].norm()])
        rows.append(off / sizes.clamp_min(1e-30))  # a baseline has no gates: 0 / 0
    return torch.stack(rows).amax(0)  # NaN stays NaN, and fails


def check_step(device, dtype, mode, form):
    """Print the line of a case. -> whether it is right"""
    if device.type == "cuda":  # as train.py has it
        torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    reference, tokens = reference_model(form)
    model = copy_here(reference, device, mode)
    with mock.patch.object(model_file, "MIN_GAP", GAP[dtype]):
        values = differences(reference, model, tokens, dtype).tolist()
    good = all(value <= most for value, most in zip(values, BOUNDS[dtype]))
    words = "loss {:.0e}  trunk {:.0e}  gates {:.0e}".format(*values)
    if MODES[mode]:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        good, words = good and graphs == 1, f"{words}  graphs {graphs}"
    return report(good, mode, dtype, form, words)


def check_ties(device, mode, k):
    """The same for the winners where scores tie: exactly k of the largest, and the threshold."""
    torch.manual_seed(0)
    scores = torch.randint(5, (512, 64)).to(device).float()  # 13 of each value in a row
    k_largest = model_file.k_largest
    if MODES[mode]:
        k_largest = torch.compile(k_largest, mode=MODES[mode], dynamic=False)
    for _ in range(3):
        hard, *found = k_largest(scores, k)
    wanted = scores.sort(-1, descending=True).values[:, k - 1 : k + 1]  # (512, 2)
    good = torch.equal(torch.cat(found, -1), wanted)
    good &= torch.equal(hard.sum(-1), torch.full((512,), float(k), device=device))
    good &= torch.equal((hard * scores).sum(-1), scores.topk(k).values.sum(-1))
    return report(good, mode, "float32", f"ties, k = {k}", "exact")


def report(good, mode, dtype, case, words):
    print(f"{'ok  ' if good else 'FAIL'} compile={mode:16}{dtype:9} {case:16} {words}", flush=True)
    return good


def main():
    parser = knobs.Parser(description=__doc__)
    parser.add_argument("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--compile", default=",".join(MODES), help="which of these, with commas")
    args = parser.parse_args()
    device, modes = knobs.pick_device(args.device), args.compile.split(",")
    if set(modes) - MODES.keys():
        raise UserError(f"--compile={args.compile} must be some of {','.join(MODES)}")
    results = []
    for mode in modes:
        if mode == "reduce-overhead" and device.type != "cuda":
            continue  # CUDA graphs
        results += [check_ties(device, mode, k) for k in (1, 8)]
        dtypes, forms = BOUNDS, FORMS
        if mode in COMPILED:
            dtypes, forms = [COMPILED[mode]], COMPILED_FORMS
        for dtype, form in itertools.product(dtypes, forms):
            results.append(check_step(device, dtype, mode, form))
    if not all(results):
        raise SystemExit(f"FAIL: {results.count(False)} of {len(results)} cases")
    print(f"ok: {len(results)} cases")


if __name__ == "__main__":
    knobs.cli(main)
