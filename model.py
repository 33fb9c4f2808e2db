"""GPT-Neo trained with self-ablation: a k-winner-takes-all gate over attention units and MLP neurons.

Two residual streams share one set of weights. The *clean* stream is a plain GPT-Neo and the only one used at inference.
The *ablated* stream keeps, at every token and in every layer, only the k_attn attention units and the k_mlp neurons that
a gate picks by looking at the clean stream. Training minimises the sum of both cross-entropies ("Self-Ablating
Transformers: More Interpretability, Less Sparsity"). As gates read nothing but the clean stream, a training step is

    clean_pass    a plain GPT-Neo that remembers each block's input, keys and values
    gate          scores -> k winners; hard in the forward pass, soft in the backward pass
    ablated_pass  the same blocks again, masked, attending to the remembered keys and values

Shape letters: B batch, T tokens, S tokens attended to (cached ones included), C = n_embd, H heads, D = C / H, M = 4C
neurons, L layers, V vocabulary, N units competing in one gate. Parameter names are Hugging Face's, plus the gates.
"""

import os
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn

MIN_GAP = 1e-6  # floor under the gate's T: a tie would divide by zero, and below this scores differ by noise
CHUNK = 6_500_000  # logits alive at a time in the loss on a CPU: 26 MB, 129 rows of GPT-2's vocabulary


class ModelError(ValueError):
    """A config, an input or a file that cannot work. The message is one line, for the user."""


@dataclass
class GPTNeoConfig:
    """Geometry and gate of a model; the defaults are the paper's. Raises ModelError on what cannot work."""

    vocab_size: int = 50257
    block_size: int = 256  # longest sequence, in tokens
    n_layer: int = 8
    n_head: int = 16
    n_embd: int = 128
    attention_layers: str = "global"  # "global", "local" or a pattern to repeat, such as "global,local"
    window_size: int = 256  # tokens that a local layer sees, the current one included
    ablation: Literal["none", "local", "global"] = "local"  # gates in every block, or after the clean pass
    gate: Literal["softmax", "sigmoid"] = "softmax"  # the paper's Eq. 3 or the published code
    attn_unit: Literal["dim", "head"] = "dim"  # a unit is one of the C head-output channels or a whole head
    k_attn: int = 2  # attention units kept per token and layer
    k_mlp: int = 2  # neurons kept per token and layer
    clean_coeff: float = 1.0  # loss = clean_coeff * clean + ablated_coeff * ablated cross-entropy
    ablated_coeff: float = 1.0

    def __post_init__(self):
        for field in fields(self):  # those of a class that inherits these included
            choices, value = get_args(field.type), getattr(self, field.name)
            if choices and value not in choices:
                raise ModelError(f"{field.name}={value!r} is not one of: {', '.join(choices)}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "window_size"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them")
        if set(self.attention_pattern) - {"global", "local"} or self.n_layer % len(self.attention_pattern):
            raise ModelError(f"attention_layers={self.attention_layers!r} must be 'global' and 'local', separated by "
                             f"commas, in a pattern whose length divides n_layer={self.n_layer}")
        for name, units in (("k_attn", self.attn_units), ("k_mlp", 4 * self.n_embd)):
            if self.ablation != "none" and not 1 <= getattr(self, name) < units:
                raise ModelError(f"{name}={getattr(self, name)} must be from 1 to {units - 1}: "
                                 f"a layer has {units} units and at least one must lose")

    @property
    def attention_pattern(self):
        return self.attention_layers.split(",")

    @property
    def windows(self):
        """How many tokens each layer sees, the current one included."""
        pattern = self.attention_pattern * (self.n_layer // len(self.attention_pattern))
        return [self.window_size if kind == "local" else self.block_size for kind in pattern]

    @property
    def attn_units(self):
        """Attention units of one layer that compete in its gate."""
        return self.n_embd if self.attn_unit == "dim" else self.n_head


class Losses(NamedTuple):
    loss: torch.Tensor  # what training minimises; it alone has a gradient
    loss_clean: torch.Tensor  # cross-entropy of the clean stream, nats per token
    loss_ablated: torch.Tensor | None  # the same of the ablated stream; None without ablation


class Streams(NamedTuple):
    logits_clean: torch.Tensor  # (B, T, V)
    logits_ablated: torch.Tensor  # (B, T, V)
    attn_mask: torch.Tensor  # (B, T, L, C), or (B, T, L, H) with attn_unit="head"; exactly k_attn ones a row
    mlp_mask: torch.Tensor  # (B, T, L, M); exactly k_mlp ones a row


# ------------------------------------------------------------------------------------------- the gate


def gate(scores, k, form="softmax"):
    """k-winner-takes-all mask with a straight-through gradient (paper, Eq. 1-3).

    scores (..., N), 1 <= k < N -> mask (..., N): exact 0/1, with exactly k ones in every row, on the k largest
    scores (of tied ones, those that topk lists first). With s_(i) the i-th largest score:
        gamma = (s_(k) + s_(k+1)) / 2           Eq. 1, between the last winner and the first loser
        T     =  s_(k) - s_(k+1)                Eq. 2, at least MIN_GAP
        w     = softmax((s - gamma) / T)        Eq. 3, form="softmax"; gamma cancels here
        w     = k * sigmoid((s - gamma) / T), normalised        form="sigmoid", the published code
    The gradient is that of w, through gamma and T too; on rows held at MIN_GAP none flows through T.
    Computed and returned in at least fp32: in bf16 a few per cent of rows tie at the k-th place.
    """
    if form not in ("softmax", "sigmoid"):
        raise ModelError(f"form={form!r} is neither 'softmax' nor 'sigmoid'")
    min_gap = max(MIN_GAP, torch.finfo(scores.dtype).eps)  # half precision cannot hold a gradient of 1 / MIN_GAP
    return KWinners.apply(scores.to(torch.promote_types(scores.dtype, torch.float32)), k, form, min_gap)


class KWinners(torch.autograd.Function):
    """Hard forward, soft backward. The gradient of w is written out: in half the time that autograd would need, and
    the scores alone stay in memory. With z = (s - gamma) / T and u = dL/dz,
        dL/ds = u / T        dL/dgamma = -sum(u) / T        dL/dT = -sum(u z) / T
    """

    @staticmethod
    def forward(ctx, scores, k, form, min_gap):
        top, winners = scores.topk(k + 1, dim=-1)  # (..., k + 1), largest first
        ctx.save_for_backward(scores, top[..., -2:], winners[..., -2:])
        ctx.k, ctx.form, ctx.min_gap = k, form, min_gap
        return torch.zeros_like(scores).scatter_(-1, winners[..., :k], 1.0)

    @staticmethod
    def backward(ctx, grad):
        scores, edge, edge_units = ctx.saved_tensors  # edge: s_(k) and s_(k+1), (..., 2)
        gap = edge[..., :1] - edge[..., 1:]  # (..., 1)
        T = gap.clamp_min(ctx.min_gap)
        # exp(-50) is nothing beside the winners' 1; further down come denormal numbers, which cost half of the time on a CPU
        z = (scores - edge.mean(-1, keepdim=True)).div_(T).clamp_min_(-50.0)
        on = z.sigmoid() if ctx.form == "sigmoid" else None
        share = z.softmax(-1) if on is None else on / on.sum(-1, keepdim=True)  # sums to 1; w is k times it for sigmoids
        u = share * grad
        u.addcmul_(share, u.sum(-1, keepdim=True), value=-1)  # share (grad - share . grad), the softmax's u
        if on is not None:
            u.mul_(ctx.k * (1 - on))
        u.div_(T)
        grad_gamma, grad_T = -u.sum(-1, keepdim=True), -z.mul_(u).sum(-1, keepdim=True) * (gap >= ctx.min_gap)
        edge_grads = torch.cat((grad_gamma / 2 + grad_T, grad_gamma / 2 - grad_T), -1)  # (..., 2)
        return u.scatter_add_(-1, edge_units, edge_grads), None, None, None


class GateScores(nn.Linear):
    """A linear layer in at least fp32, whatever autocast says: near-ties decide which units win."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


# ------------------------------------------------------------------------------------------- GPT-Neo


def attention(q, k, v, window, own=()):
    """Causal attention without GPT-2's 1/sqrt(D): q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    own: on the ablated stream, that stream's own (k, v), each (B, H, T, D). A query then takes its own key
    and value at its own position and the clean stream's, k and v, before it, all in one softmax.
    """
    T, S, D = q.size(2), k.size(2), q.size(3)
    if own:
        # Plain causal attention can do this, in the kernels made for it: shift the clean keys by one place and put before
        # them a key that stands for "own". An extra channel holds the query's score with its own key, and 1 in that
        # key, 0 in the others; in the values it returns the weight that the own value gets (bench/alternatives.py).
        q = torch.cat((q, (q * own[0]).sum(-1, keepdim=True)), -1)  # (B, H, T, D + 1)
        one = F.pad(q.new_ones(1, 1), (D, 0, 0, S - 1))  # (S, D + 1)
        k, v = (F.pad(clean, (0, 1, 1, -1)) + one for clean in (k, v))  # (B, H, S, D + 1)
    if T == S <= window:  # no mask to build
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    else:
        at, key = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)  # (T, 1), (S)
        seen = (key - 1 > at - window) | (key == 0) if own else key > at - window  # (T, S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen & (key <= at), scale=1.0)
    if own:
        y, p_own = y.split((D, 1), -1)
        y = y + p_own * own[1]
    return y


class Attention(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        C = config.n_embd
        self.n_head, self.window = config.n_head, window
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)

    def forward(self, h, past=None, clean=None, mask=None):
        """h (B, T, C) -> (B, T, C) and this stream's keys and values, each (B, S, C).

        past: keys and values of the S - T tokens before h, to generate with. On the ablated stream,
        clean: the clean stream's keys and values; mask (B, T, C) or (B, T, H): the winning units.
        """
        q, kv = self.q_proj(h), (self.k_proj(h), self.v_proj(h))  # each (B, T, C)
        if past is not None:
            kv = tuple(torch.cat(pair, 1) for pair in zip(past, kv))  # (B, S, C)
        q, k, v, *own = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T or S, D)
                         for x in (q, *(kv if clean is None else (*clean, *kv))))
        y = attention(q, k, v, self.window, own).transpose(1, 2)  # (B, T, H, D)
        if mask is not None:
            y = y * mask.unflatten(-1, (self.n_head, -1))  # (B, T, H, D) or, for whole heads, (B, T, H, 1)
        return self.out_proj(y.flatten(2)), kv


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h, mask=None):
        """h (B, T, C) -> (B, T, C); mask (B, T, M), on the ablated stream, keeps the winning neurons."""
        neurons = F.gelu(self.c_fc(h), approximate="tanh")  # (B, T, M); Hugging Face calls it gelu_new
        return self.c_proj(neurons if mask is None else neurons * mask)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.ln_1 = nn.LayerNorm(C)
        # the extra level is Hugging Face's: transformer.h.0.attn.attention.q_proj.weight
        self.attn = nn.ModuleDict({"attention": Attention(config, config.windows[layer])})
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = MLP(config)
        if config.ablation == "local":
            self.attn_gate = GateScores(C, config.attn_units)
            self.mlp_gate = GateScores(C, 4 * C)

    def forward(self, x, past=None):
        """The clean stream: x (B, T, C) -> (B, T, C) and the keys and values, each (B, S, C)."""
        attended, kv = self.attn["attention"](self.ln_1(x), past=past)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), kv

    def ablated(self, x, x_clean, kv_clean, scores=None):
        """The ablated stream: x (B, T, C) -> (B, T, C) and its masks (B, T, C or H), (B, T, M).

        x_clean (B, T, C), kv_clean: this block's input and keys and values on the clean stream.
        scores: what a global gate gave this layer, (B, T, C or H) and (B, T, M); local gates read x_clean.
        """
        config = self.config
        attn_scores, mlp_scores = scores or (self.attn_gate(x_clean), self.mlp_gate(x_clean))
        attn_mask = gate(attn_scores, config.k_attn, config.gate)
        mlp_mask = gate(mlp_scores, config.k_mlp, config.gate)
        x = x + self.attn["attention"](self.ln_1(x), clean=kv_clean, mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x), mlp_mask), (attn_mask, mlp_mask)


class GPTNeo(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, L = config.n_embd, config.n_layer
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, C),
            "wpe": nn.Embedding(config.block_size, C),
            "h": nn.ModuleList(Block(config, layer) for layer in range(L)),
            "ln_f": nn.LayerNorm(C),
        })
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.ablation == "global":
            self.attn_gate = GateScores(C, L * config.attn_units)
            self.mlp_gate = GateScores(C, L * 4 * C)
        for module in self.modules():  # GPT-Neo's: N(0, 0.02), biases 0; LayerNorm starts at 1 and 0
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        self.lm_head.weight = self.transformer["wte"].weight  # tied

    def clean_pass(self, idx, past=None):
        """A plain GPT-Neo: idx (B, T) -> ln_f of the last block (B, T, C), and, one a layer, the block inputs
        (B, T, C) and the (keys, values), each (B, S, C). past: the (keys, values) of earlier tokens."""
        start = past[0][0].size(1) if past else 0
        check_tokens(idx, self.config, start)
        positions = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, C)
        inputs, caches = [], []
        for layer, block in enumerate(self.transformer["h"]):
            inputs.append(x)
            x, kv = block(x, past[layer] if past else None)
            caches.append(kv)
        return self.transformer["ln_f"](x), inputs, caches

    def ablated_pass(self, hidden, inputs, caches):
        """The masked stream over what clean_pass returned: -> ln_f of its last block (B, T, C), and the
        masks, one pair a layer: (B, T, C or H), (B, T, M)."""
        L = self.config.n_layer
        scores = [None] * L  # local gates score inside their block
        if self.config.ablation == "global":
            scores = list(zip(self.attn_gate(hidden).chunk(L, -1), self.mlp_gate(hidden).chunk(L, -1)))
        x, masks = inputs[0], []  # both streams start at the embeddings
        for layer, block in enumerate(self.transformer["h"]):
            x, block_masks = block.ablated(x, inputs[layer], caches[layer], scores[layer])
            masks.append(block_masks)
        return self.transformer["ln_f"](x), masks

    def forward(self, idx, targets=None):
        """idx (B, T) -> clean logits (B, T, V), which is inference; with targets (B, T) -> Losses.

        Raises ModelError when T exceeds block_size or, on CPU, when a token is outside the vocabulary.
        """
        config = self.config
        hidden, inputs, caches = self.clean_pass(idx)
        if targets is None:
            return self.lm_head(hidden)
        check_tokens(targets, config)
        streams, coeffs = [hidden], [config.clean_coeff]
        if config.ablation != "none":
            streams.append(self.ablated_pass(hidden, inputs, caches)[0])
            coeffs.append(config.ablated_coeff)
        loss, means = head_losses(streams, self.lm_head.weight, targets, coeffs)
        return Losses(loss, means[0], means[1] if config.ablation != "none" else None)

    def ablated(self, idx):
        """Both streams and every mask in one call: idx (B, T) -> Streams. ValueError without ablation."""
        if self.config.ablation == "none":
            raise ModelError("this model has ablation='none', so it has no ablated stream")
        hidden, inputs, caches = self.clean_pass(idx)
        hidden_ablated, masks = self.ablated_pass(hidden, inputs, caches)
        return Streams(self.lm_head(hidden), self.lm_head(hidden_ablated), *(torch.stack(m, 2) for m in zip(*masks)))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
                 stream="clean", stop_token=None):
        """Continue idx (B, T) by up to max_new_tokens -> (B, T + new).

        temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the fewest that together hold
        that probability. stream: "clean" or "ablated", whose logits to sample from. A row that has written
        stop_token writes nothing else; when every row has, the call ends. Past block_size tokens the
        context is the last block_size ones. Raises ModelError on what cannot be sampled from.
        """
        block_size, past = self.config.block_size, None
        if stream not in ("clean", "ablated") or (stream == "ablated" and self.config.ablation == "none"):
            raise ModelError(f"a model with ablation={self.config.ablation!r} cannot write from stream={stream!r}")
        if idx.size(1) == 0:
            raise ModelError("the prompt is empty: give at least one token, such as end-of-text")
        if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ModelError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: sampling wants "
                             f"temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            crop = past is None or idx.size(1) > block_size  # a window that moves has new positions: no cache fits
            hidden, inputs, past = self.clean_pass(idx[:, -block_size:] if crop else idx[:, -1:], None if crop else past)
            if stream == "ablated":
                hidden, _ = self.ablated_pass(hidden, inputs, past)
            token = sample(self.lm_head(hidden[:, -1]).float(), temperature, top_k, top_p, generator)  # (B, 1)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped |= token == stop_token
            idx = torch.cat((idx, token), 1)
            if stop_token is not None and stopped.all():
                break
        return idx

    def clean_state_dict(self):
        """The weights of the clean stream alone, which Hugging Face's GPTNeoForCausalLM loads as they are."""
        return {name: value for name, value in self.state_dict().items() if "_gate." not in name}

    def hf_config(self):
        """Keyword arguments of the transformers.GPTNeoConfig that describes the clean stream."""
        c, no_dropout = self.config, dict.fromkeys(("embed_dropout", "attention_dropout", "resid_dropout"), 0.0)
        attention_types = [[c.attention_pattern, c.n_layer // len(c.attention_pattern)]]
        return dict(vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd, num_layers=c.n_layer,
                    num_heads=c.n_head, window_size=c.window_size, attention_types=attention_types, **no_dropout)

    @classmethod
    def from_checkpoint(cls, checkpoint, device="cpu"):
        """A model from a run folder, a checkpoint file or what load_checkpoint returned. Raises ModelError."""
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        try:
            model = cls(GPTNeoConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, TypeError, AttributeError) as error:  # of load_state_dict, of GPTNeoConfig
            raise ModelError("the checkpoint's config and weights do not fit: " + " ".join(str(error).split())) from None
        return model.to(device)


def check_tokens(idx, config, start=0):
    """Refuse what no embedding has. Values only where looking costs nothing: on a CPU, outside torch.compile."""
    if start + idx.size(1) > config.block_size:
        raise ModelError(f"a sequence of {start + idx.size(1)} tokens is longer than block_size={config.block_size}")
    if idx.device.type == "cpu" and not torch.compiler.is_compiling() and idx.numel():
        low, high = idx.aminmax()
        if low < 0 or high >= config.vocab_size:
            raise ModelError(f"token {int(low if low < 0 else high)} is outside the vocabulary of {config.vocab_size}")


def sample(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> next tokens (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0, so that no temperature overflows
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        logits = logits.masked_fill((p.cumsum(-1) - p >= top_p).gather(-1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# ------------------------------------------------------------------------------------------- the loss


def head_losses(streams, weight, targets, coeffs):
    """Cross-entropies of softmax(hidden weight^T), of one or more streams in one product.

    streams: hidden states, each (B, T, C); weight (V, C); targets (B, T); coeffs: a number per stream -> the sum of
    coeff x mean cross-entropy, a scalar with a gradient, and the means themselves, (streams,), without one.
    """
    hidden = torch.cat([x.flatten(0, 1) for x in streams])  # (R, C), R = streams x B x T rows
    rows = targets.numel()
    targets = targets.flatten().repeat(len(streams))  # (R)
    scale = torch.cat([hidden.new_full((rows,), coeff / rows) for coeff in coeffs])  # (R), without a copy from the CPU
    if hidden.is_cuda and torch.compiler.is_compiling():  # which fuses cast and loss: only bf16 logits are stored
        nll = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
        loss = nll @ scale
    else:
        loss, nll = ChunkedCrossEntropy.apply(hidden, weight, targets, scale)
    return loss, nll.detach().view(len(streams), rows).mean(1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """scale @ nll, and nll, without the R x V logits: takes the gradient while a chunk of them is at hand, in one
    buffer. On a CPU, fresh memory is what a big vocabulary costs. d nll / d logits = softmax(logits) - onehot."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale):
        hidden, R, V = hidden.to(weight.dtype), len(hidden), len(weight)
        nll, grad_hidden, grad_weight = hidden.new_empty(R), torch.empty_like(hidden), torch.zeros_like(weight)
        step = -(-R // -(-R * V // CHUNK))  # rows of a chunk: even ones, of at most CHUNK logits
        buffer = hidden.new_empty(step, V)
        for start in range(0, R, step):
            rows, target = slice(start, start + step), targets[start : start + step, None]
            logits = torch.mm(hidden[rows], weight.T, out=buffer[: len(target)])  # (step, V)
            logp = torch.log_softmax(logits, -1, out=logits)
            nll[rows] = -logp.gather(-1, target)[:, 0]
            if any(ctx.needs_input_grad):
                grad = logp.exp_().scatter_add_(-1, target, logp.new_full(target.shape, -1.0))
                torch.mm(grad, weight, out=grad_hidden[rows])
                grad_weight.addmm_(grad.T, hidden[rows] * scale[rows, None])
        ctx.save_for_backward(grad_hidden.mul_(scale[:, None]), grad_weight)
        ctx.mark_non_differentiable(nll)
        return nll @ scale, nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None, None


# ----------------------------------------------------------------------------------------- checkpoints


@contextmanager
def replace_file(path):
    """A binary file to write. When it is whole it takes path's place; if that fails, path stays as it was.

    Raises ModelError when it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ModelError(f"cannot write {path}: {error.strerror}") from None
        raise


def save_checkpoint(path, config, weights, **state):
    """Write a GPTNeoConfig, its model's state_dict and state (what weights_only=True can load) to path, atomically."""
    with replace_file(path) as file:
        torch.save({"config": asdict(config), "model": weights, **state}, file)


def load_torch(path):
    """What torch.save wrote to path, tensors on the CPU, every byte of it checked. Raises ModelError.

    The zip's own CRCs are compared, at which torch.load does not look: one flipped bit is another model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = f"{damaged} has changed since it was written"
    except Exception as error:  # damage shows as almost any kind: OSError where the file was cut, IndexError, TypeError ...
        reason = type(error).__name__
    raise ModelError(f"{path} is damaged, or no file of this project ({reason})")


def load_checkpoint(path):
    """The dict of a checkpoint file, or of a run folder's best.pt, on the CPU. Raises ModelError if it is neither."""
    if os.path.isdir(path):
        path = os.path.join(path, "best.pt")
    if not os.path.isfile(path):
        raise ModelError(f"no checkpoint at {path}: give a run folder that has a best.pt, such as out/local_k2, or a .pt file")
    checkpoint = load_torch(path)
    if not isinstance(checkpoint, dict) or not {"config", "model"} <= checkpoint.keys():
        raise ModelError(f"{path} holds no 'config' and 'model': it is not a checkpoint of this project")
    return checkpoint
