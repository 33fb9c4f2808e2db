"""The formulations that model.py could use, timed against each other: forward and backward, all in turn.

    python bench/alternatives.py                        all of them, at the paper's sizes
    python bench/alternatives.py --what=attention --tokens=1024 --batch_size=1
    python bench/alternatives.py --device=cuda --compile --dtype=bfloat16

attention: one layer of the ablated stream, where a query meets the clean keys before it and its own key.
gate:      the masks of one layer's neurons. The k + 1 maxima of `maxima` need no sort, and torch.compile can fuse them.
loss:      cross-entropy of one stream through the head, from hidden states to gradients.
The first line of each part is what model.py does; `error` is the largest difference from it, relative to the largest
value, of result and gradients. An alternative that cannot run here says why.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed import clock  # which also lets the project's own files be found
import config as knobs
import model as model_file
from model import GPTNeoConfig, attention, gate, head_losses
from prepare import UserError


# ---- attention: q, clean k and v, own k and v, each (B, H, T, D) -> (B, H, T, D)


def kept_attention(q, k, v, k_own, v_own):
    return attention(q, k, v, q.size(2), (k_own, v_own))


def edited_scores(q, k, v, k_own, v_own):
    """The scores as a matrix with its diagonal replaced."""
    scores = torch.diagonal_scatter(q @ k.transpose(-1, -2), (q * k_own).sum(-1), 0, -2, -1)  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    p = scores.float().masked_fill(future, -torch.inf).softmax(-1).to(v.dtype)
    return p @ v + p.diagonal(0, -2, -1)[..., None] * (v_own - v)


def twice_the_keys(q, k, v, k_own, v_own):
    """One SDPA over the clean and the own keys, masked: j < i of the first half, j = i of the second."""
    T = q.size(2)
    before = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(-1)
    mask = torch.cat((before, torch.eye(T, dtype=torch.bool, device=q.device)), 1)  # (T, 2T)
    return F.scaled_dot_product_attention(q, torch.cat((k, k_own), 2), torch.cat((v, v_own), 2), attn_mask=mask, scale=1.0)


def flex(q, k, v, k_own, v_own):
    """FlexAttention over the clean keys before i, and its log-sum-exp to weigh the own value in."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    T, D, device = q.size(2), q.size(3), q.device
    mask = create_block_mask(lambda b, h, i, j: j < i, None, None, T, T, device=device)
    wide = (F.pad(x, (0, max(0, 16 - D))) for x in (q, k, v))  # its kernels want 16 channels at least
    y, lse = torch.compile(flex_attention)(*wide, block_mask=mask, scale=1.0, return_lse=True)
    p = torch.sigmoid((q * k_own).float().sum(-1) - lse)[..., None].to(v.dtype)  # (B, H, T, 1)
    return (1 - p) * y[..., :D] + p * v_own


def plain_causal(q, k, v, k_own, v_own):
    """What the clean stream does: not the same function, but the floor."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


# ---- gates: scores (B, T, N) -> mask (B, T, N)


def kept_gate(scores):
    return gate(scores, 2)


def by_autograd(scores, top=lambda s: s.topk(3, -1)):
    """The soft weights in plain operations, for autograd to differentiate."""
    top, winners = top(scores)
    s_k, s_next = top[..., 1:2], top[..., 2:]
    w = ((scores - (s_k + s_next) / 2) / (s_k - s_next).clamp_min(model_file.MIN_GAP)).softmax(-1)
    hard = torch.zeros_like(scores).scatter(-1, winners[..., :2], 1.0)
    return hard + (w - w.detach())


def maxima(scores):
    """The winners as k + 1 maxima, each masked before the next."""
    def top(s):
        values, units, left = [], [], s
        for _ in range(3):
            value, unit = left.max(-1, keepdim=True)
            values.append(s.gather(-1, unit)), units.append(unit)
            left = left.scatter(-1, unit, -torch.inf)
        return torch.cat(values, -1), torch.cat(units, -1)
    return by_autograd(scores, top)


def full_sort(scores):
    def top(s):
        values, units = s.sort(-1, descending=True)
        return values[..., :3], units[..., :3]
    return by_autograd(scores, top)


# ---- losses: hidden (B, T, C), weight (V, C) -> scalar


def kept_loss(hidden, weight):
    return head_losses([hidden], weight, TARGETS, [1.0])[0]


def whole_logits(hidden, weight):
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), TARGETS.flatten())


def linear_cross_entropy(rows):
    """torch's own, since 2.13, with this many rows a chunk."""
    def loss(hidden, weight):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        return F.linear_cross_entropy(hidden.flatten(0, 1), weight, TARGETS.flatten(), options=options)
    return loss


def main():
    global TARGETS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = knobs.usage_error
    parser.add_argument("--what", default="attention,gate,loss", help="which, with commas (default all)")
    parser.add_argument("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the inputs; gates get float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile each")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="context")
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for name in ("batch_size", "tokens", "vocab_size", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    device, dtype = knobs.pick_device(args.device), getattr(torch, args.dtype)
    paper, B, T = GPTNeoConfig(), args.batch_size, args.tokens
    C, H = paper.n_embd, paper.n_head
    torch.manual_seed(0)
    TARGETS = torch.randint(args.vocab_size, (B, T), device=device)

    def random(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(*shape, device=device)).to(dtype).requires_grad_()

    heads = [random(B, T, H, C // H).detach().transpose(1, 2).requires_grad_() for _ in range(5)]
    sets = {
        "attention": (heads, {"model.py": kept_attention, "edited scores": edited_scores, "twice the keys": twice_the_keys,
                              "flex + merge": flex, "(plain causal)": plain_causal}),
        "gate": ([random(B, T, 4 * C, dtype=torch.float32)],
                 {"model.py": kept_gate, "autograd, topk": by_autograd, "autograd, maxima": maxima, "autograd, sort": full_sort}),
        "loss": ([random(B, T, C), random(args.vocab_size, C, scale=0.02)],
                 {"model.py": kept_loss, "whole logits": whole_logits,
                  **{f"torch's, {rows} rows": linear_cross_entropy(rows) for rows in (64, 128, 256, 512)}}),
    }
    if set(args.what.split(",")) - sets.keys():
        raise UserError(f"--what={args.what} must be some of {', '.join(sets)}")
    for what in args.what.split(","):
        inputs, functions = sets[what]
        print(f"{what}: {args.dtype}, {B} x {T} tokens, {device}{', compiled' if args.compile else ''}, torch {torch.__version__}")
        runs, expected, grad_output = {}, None, None
        for name, function in functions.items():
            function = torch.compile(function) if args.compile else function

            def run(function=function):
                out = function(*inputs)
                return out, torch.autograd.grad(out, inputs, grad_output, allow_unused=True)
            try:
                out = functions[name](*inputs)
                if grad_output is None:
                    grad_output = torch.randn_like(out) if out.dim() else torch.ones_like(out)
                got = run()
            except Exception as error:  # whatever this device or this torch lacks
                print(f"  {name:18} cannot run: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
                continue
            results = [got[0].detach(), *got[1]]
            expected = expected or results
            errors = [((a.float() - b.float()).abs().max() / b.float().abs().max()).item() if a is not None else 0.0
                      for a, b in zip(results, expected)]
            runs[name] = run, max(errors), []
        for _ in range(args.rounds):
            for run, _, seconds in runs.values():
                seconds.append(clock(run, device, 10 if device.type == "cuda" else 1))
        first = statistics.median(next(iter(runs.values()))[2])
        for name, (_, error, seconds) in runs.items():
            median = statistics.median(seconds)
            print(f"  {name:18} {1e3 * median:9.3f} ms ({1e3 * min(seconds):.3f} to {1e3 * max(seconds):.3f})"
                  f"  {median / first:5.2f} x model.py  error {error:.0e}")


if __name__ == "__main__":
    knobs.cli(main)
