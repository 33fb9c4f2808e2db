"""The formulations that model.py could use, timed against each other, forward and backward.

    python bench/alternatives.py                        all of them, at the paper's sizes
    python bench/alternatives.py --what=attention --tokens=1024 --batch_size=1
    python bench/alternatives.py --device=cuda --compile --dtype=bfloat16

attention: one layer of the ablated stream: a query meets the clean keys before it and its own key.
gate:      the masks of one layer's neurons. `written out` has a backward pass by hand. The k + 1
           maxima of `maxima` need no sort, and torch.compile can fuse them. `(constant)` is what
           model.py does with gate="constant".
loss:      cross-entropy of one stream through the head, from hidden states to gradients.

The first line of each part is what model.py does. All take turns, round after round; each line
gives the median of the rounds, the fastest and the slowest of them, the median over that of
model.py, and as `error` the largest difference from it, of result and gradients, relative to the
largest value. What stands in parentheses is another function, whose `error` means nothing. An
alternative that cannot run here says why.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts bench/ there
import config as knobs
from model import MIN_GAP, GPTNeoConfig, ablated_attention, gate, head_losses
from prepare import UserError
from timing import in_turn

WINNERS = 2  # the k of the gates
PARTS = ("attention", "gate", "loss")

# ---- attention: q, clean k and v, own k and v, each (B, H, T, D) -> (B, H, T, D)


def kept_attention(q, k, v, k_own, v_own):
    return ablated_attention(q, k, v, k_own, v_own, window=q.size(2))


def edited_scores(q, k, v, k_own, v_own):
    """The scores as a matrix with its diagonal replaced."""
    clean, own = q @ k.transpose(-1, -2), (q * k_own).sum(-1)  # (B, H, T, T), (B, H, T)
    scores = torch.diagonal_scatter(clean, own, 0, -2, -1)  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)  # (T, T)
    p = scores.float().masked_fill(future, -torch.inf).softmax(-1).to(v.dtype)
    p_own = p.diagonal(0, -2, -1)[..., None]  # (B, H, T, 1)
    return p @ v + p_own * (v_own - v)


def twice_the_keys(q, k, v, k_own, v_own):
    """One SDPA over clean and own keys, masked: j < i of the first half, j = i of the second."""
    T = q.size(2)
    before = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(-1)
    itself = torch.eye(T, dtype=torch.bool, device=q.device)
    mask = torch.cat((before, itself), 1)  # (T, 2T)
    keys, values = torch.cat((k, k_own), 2), torch.cat((v, v_own), 2)  # (B, H, 2T, D)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=1.0)


def flex(q, k, v, k_own, v_own):
    """FlexAttention over the clean keys before i, and its log-sum-exp to weigh the own value in."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def before(batch, head, i, j):
        return j < i

    T, D = q.shape[2:]
    mask = create_block_mask(before, None, None, T, T, device=q.device)
    wide = [F.pad(x, (0, max(0, 16 - D))) for x in (q, k, v)]  # its kernels want 16 or more
    y, lse = torch.compile(flex_attention)(*wide, block_mask=mask, scale=1.0, return_lse=True)
    p_own = torch.sigmoid((q * k_own).float().sum(-1) - lse)[..., None].to(v.dtype)  # (B, H, T, 1)
    return (1 - p_own) * y[..., :D] + p_own * v_own


def plain_causal(q, k, v, k_own, v_own):
    """What the clean stream does: not the same function, but no formulation can be faster."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


ATTENTION = {
    "model.py": kept_attention,
    "edited scores": edited_scores,
    "twice the keys": twice_the_keys,
    "flex + merge": flex,
    "(plain causal)": plain_causal,
}

# ---- gates: scores (B, T, N) -> mask (B, T, N)


class WrittenOut(torch.autograd.Function):
    """Eq. 1-3 with the gradient written out: until then only the scores stay in memory.

    With z = (s - gamma) / T and u = dL/dz it is dL/ds = u / T and dL/dT = -sum(u z) / T. None flows
    through gamma, which the softmax cancels.
    """

    @staticmethod
    def forward(ctx, scores):
        top, units = scores.topk(WINNERS + 1, -1)  # (..., k + 1), largest first
        ctx.save_for_backward(scores, top[..., -2:], units[..., -2:])
        return torch.zeros_like(scores).scatter_(-1, units[..., :WINNERS], 1.0)

    @staticmethod
    def backward(ctx, grad):
        scores, edge, edge_units = ctx.saved_tensors  # edge: s_(k) and s_(k+1), (..., 2)
        gap = edge[..., :1] - edge[..., 1:]  # (..., 1)
        T = gap.clamp_min(MIN_GAP)
        z = (scores - edge.mean(-1, keepdim=True)).div_(T).clamp_min_(-50.0)  # no denormal numbers
        soft = z.softmax(-1)
        u = soft * grad
        u.addcmul_(soft, u.sum(-1, keepdim=True), value=-1).div_(T)
        grad_T = -z.mul_(u).sum(-1, keepdim=True) * (gap >= MIN_GAP)
        return u.scatter_add_(-1, edge_units, torch.cat((grad_T, -grad_T), -1))


def by_maxima(scores):
    """The k + 1 largest scores and units, (..., k + 1): maxima, each masked before the next."""
    values, units, left = [], [], scores
    for _ in range(WINNERS + 1):
        _, unit = left.max(-1, keepdim=True)  # (..., 1)
        values.append(scores.gather(-1, unit))
        units.append(unit)
        left = left.scatter(-1, unit, -torch.inf)
    return torch.cat(values, -1), torch.cat(units, -1)


def by_sort(scores):
    """The same from all scores in order."""
    values, units = scores.sort(-1, descending=True)
    return values[..., : WINNERS + 1], units[..., : WINNERS + 1]


def plain_gate(scores, find_top):
    """Eq. 1-3 in plain operations, for autograd to differentiate."""
    top, units = find_top(scores)
    winner, loser = top[..., -2:-1], top[..., -1:]  # s_(k), s_(k+1): (..., 1)
    gamma, gap = (winner + loser) / 2, (winner - loser).clamp_min(MIN_GAP)
    soft = ((scores - gamma) / gap).softmax(-1)
    hard = torch.zeros_like(scores).scatter(-1, units[..., :WINNERS], 1.0)
    return hard + (soft - soft.detach())


GATE = {
    "model.py": partial(gate, k=WINNERS),
    "written out": WrittenOut.apply,
    "maxima": partial(plain_gate, find_top=by_maxima),
    "sort": partial(plain_gate, find_top=by_sort),
    "(constant)": partial(gate, k=WINNERS, form="constant"),
}

# ---- losses: hidden (B, T, C), weight (V, C), targets (B, T) -> scalar


def kept_loss(hidden, weight, targets):
    return head_losses([hidden], weight, targets, [1.0])[0]


def whole_logits(hidden, weight, targets):
    logits = F.linear(hidden, weight).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_loss(hidden, weight, targets, rows):
    """torch's own, since 2.13, with this many rows a chunk."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), options=options)


LOSS = {
    "model.py": kept_loss,
    "whole logits": whole_logits,
    "torch's, 64 rows": partial(torch_loss, rows=64),
    "torch's, 128 rows": partial(torch_loss, rows=128),
    "torch's, 256 rows": partial(torch_loss, rows=256),
    "torch's, 512 rows": partial(torch_loss, rows=512),
}

# ---- how they are timed


def inputs_of(what, args, device):
    """Random inputs of this part's functions, and a gradient of their result: None of a scalar."""
    paper, B, T = GPTNeoConfig(), args.batch_size, args.tokens
    C, H, dtype = paper.n_embd, paper.n_head, getattr(torch, args.dtype)
    torch.manual_seed(0)
    if what == "attention":
        heads = []
        for _ in range(5):
            x = torch.randn(B, T, H, C // H, device=device).to(dtype)  # laid out as in the model
            heads.append(x.transpose(1, 2).requires_grad_())  # (B, H, T, D)
        return heads, torch.randn_like(heads[0])
    if what == "gate":
        scores = torch.randn(B, T, 4 * C, device=device, requires_grad=True)
        return [scores], torch.randn_like(scores)
    hidden = torch.randn(B, T, C, device=device).to(dtype)
    weight = (0.02 * torch.randn(args.vocab_size, C, device=device)).to(dtype)
    targets = torch.randint(args.vocab_size, (B, T), device=device)
    return [hidden.requires_grad_(), weight.requires_grad_(), targets], None


def forward_and_backward(function, inputs, grad):
    """The function to time: it takes nothing and returns the result and the inputs' gradients."""
    trained = [x for x in inputs if x.requires_grad]

    def run():
        result = function(*inputs)
        return result, *torch.autograd.grad(result, trained, grad, allow_unused=True)
    return run


def largest_error(results, expected):
    """Of result and gradients, relative to the largest value; an unused input counts as 0."""
    errors = [0.0]
    for ours, wanted in zip(results, expected):
        if ours is not None:
            difference = (ours.float() - wanted.float()).abs().max()
            errors.append((difference / wanted.float().abs().max()).item())
    return max(errors)


def time_part(functions, inputs, grad, args, device):
    """Print a line on each of the functions."""
    runs, errors, expected = {}, {}, None
    for name, function in functions.items():
        if args.compile:
            function = torch.compile(function)
        run = forward_and_backward(function, inputs, grad)
        try:
            results = run()
        except Exception as error:  # whatever this device or this torch lacks
            reason = " ".join(str(error).split())[:100]
            print(f"  {name:18} cannot run: {type(error).__name__}: {reason}")
            continue
        expected = expected or results
        runs[name], errors[name] = run, largest_error(results, expected)
    seconds = in_turn(runs, args.rounds, device, 10 if device.type == "cuda" else 1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        ratio = median / next(iter(medians.values()))  # over the first, model.py's
        fastest, slowest = 1e3 * min(seconds[name]), 1e3 * max(seconds[name])
        print(f"  {name:18} {1e3 * median:9.3f} ms ({fastest:.3f} to {slowest:.3f})"
              f"  {ratio:5.2f} x model.py  error {errors[name]:.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    add = parser.add_argument
    add("--what", default=",".join(PARTS), help="which, with commas (default all)")
    add("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"),
        help="of the inputs; gates get float32")
    add("--compile", action="store_true", help="torch.compile each")
    add("--batch_size", type=int, default=4)
    add("--tokens", type=int, default=256, help="context")
    add("--vocab_size", type=int, default=50257)
    add("--rounds", type=int, default=15)
    args = parser.parse_args()
    for name in ("batch_size", "tokens", "vocab_size", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    parts = args.what.split(",")
    if set(parts) - set(PARTS):
        raise UserError(f"--what={args.what} must be some of {', '.join(PARTS)}")
    device = knobs.pick_device(args.device)
    for what in parts:
        functions = {"attention": ATTENTION, "gate": GATE, "loss": LOSS}[what]
        compiled = ", compiled" if args.compile else ""
        print(f"{what}: {args.dtype}, {args.batch_size} x {args.tokens} tokens, "
              f"{device}{compiled}, torch {torch.__version__}")
        time_part(functions, *inputs_of(what, args, device), args, device)


if __name__ == "__main__":
    knobs.cli(main)
