"""Is a training step on this device the step that the mechanism says? Against float64 on the CPU, eager and compiled.

    python bench/check.py                     on the GPU if there is one
    python bench/check.py --device=cpu --compile=False

One step of a two-layer model from the same weights and tokens, for each variant, attention unit and form of the gate: the
difference of the loss, the sine of the angle between the gradients, and, of the eager model, which can be asked for its
masks, the share of winners that others replace. Near-ties fall the other way in lower precision, and a gate's gradient
grows as 1 / T: in bfloat16 a few near-tied tokens dominate it, so there the angle is shown and not judged. Exit code 1
beyond BOUNDS.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts bench/ there
import config as knobs
from model import GPTNeo, GPTNeoConfig
from prepare import UserError

BOUNDS = {"float32": (1e-4, 1e-2, 1e-3), "bfloat16": (5e-2, 1.0, 3e-2)}  # loss, angle, winners


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = knobs.usage_error
    parser.add_argument("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--compile", default="False,True,reduce-overhead", help="which of these, with commas")
    args = parser.parse_args()
    device, failed = knobs.pick_device(args.device), False
    modes = {"False": None, "True": "default", "reduce-overhead": "reduce-overhead"}
    if set(args.compile.split(",")) - modes.keys():
        raise UserError(f"--compile={args.compile} must be some of {', '.join(modes)}")
    forms = [dict(ablation="none"), *(dict(ablation=a) for a in ("local", "global")), dict(ablation="local", gate="sigmoid"),
             dict(ablation="global", attn_unit="head"), dict(ablation="local", attention_layers="global,local", window_size=24)]
    for mode, dtype, form in itertools.product(args.compile.split(","), BOUNDS, forms):
        if modes[mode] and form not in forms[1:3]:
            continue  # compiling takes longer than all the rest
        torch.manual_seed(0)
        config = GPTNeoConfig(vocab_size=1000, block_size=64, n_layer=2, n_head=4, n_embd=64, **form)
        reference = GPTNeo(config).double()
        with torch.no_grad():
            for parameter in reference.parameters():  # wider than at the start of training: something to compare
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        tokens = torch.randint(1000, (4, 65))
        expected = reference(tokens[:, :-1], tokens[:, 1:])
        expected.loss.backward()

        model, idx, targets = GPTNeo(config), tokens[:, :-1].to(device), tokens[:, 1:].to(device)
        model.load_state_dict(reference.state_dict())
        model.to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        masks = ()
        if modes[mode]:
            torch._dynamo.reset()
            model.compile(mode=modes[mode])
        elif config.ablation != "none":
            with torch.no_grad(), autocast:
                masks = model.ablated(idx)[2:]
        for _ in range(3):  # a CUDA graph is recorded at the second call and replayed at the third
            model.zero_grad(set_to_none=True)
            with autocast:
                losses = model(idx, targets)
            losses.loss.backward()

        loss = abs(losses.loss.item() - expected.loss.item())
        ours = torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])
        theirs = torch.cat([p.grad.flatten() for p in reference.parameters()])
        cosine = (ours @ theirs / ours.norm() / theirs.norm()).item()
        angle = max(0.0, 1 - cosine**2) ** 0.5
        with torch.no_grad():
            pairs = zip(masks, reference.ablated(tokens[:, :-1])[2:]) if masks else ()
            flipped = max([((a.cpu() != b).sum() / (2 * b.sum())).item() for a, b in pairs], default=None)
        good = all(value <= bound for value, bound in zip((loss, angle, flipped or 0.0), BOUNDS[dtype]))
        failed |= not good
        print(f"{'ok  ' if good else 'FAIL'} compile={mode:16}{dtype:9} {' '.join(map(str, form.values())):22} "
              f"loss {loss:.1e}  gradient {angle:.1e}" + (f"  winners {flipped:.2%}" if masks else ""), flush=True)
    if failed:
        raise SystemExit("beyond the bounds: see the lines above")


if __name__ == "__main__":
    knobs.cli(main)
