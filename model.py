"""GPT-Neo trained with self-ablation: a k-winner-takes-all gate over attention units and neurons.

Two residual streams share one set of weights. The *clean* stream is a plain GPT-Neo, and the only
one used at inference. The *ablated* stream keeps, at every token and in every layer, only the
k_attn attention units and the k_mlp neurons that a gate picks by looking at the clean stream.
Training minimises the sum of both cross-entropies ("Self-Ablating Transformers: More
Interpretability, Less Sparsity"). Gates read nothing but the clean stream, so a training step is

    clean_pass    a plain GPT-Neo that remembers each block's input, keys and values
    gate          scores -> k winners; hard in the forward pass, soft in the backward pass
    ablated_pass  the same blocks again, masked, attending to the remembered keys and values
    head_losses   the cross-entropies of both streams

Shape letters: B batch, T tokens, S tokens attended to (cached ones included), C = n_embd, H heads,
D = C / H, M = 4C neurons, L layers, V vocabulary, N units competing in one gate, R rows of a loss.
Parameter names are Hugging Face's, plus the gates.
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


class ModelError(ValueError):
    """A config, an input or a file that cannot work. The message is one line, for the user."""


@dataclass
class GPTNeoConfig:
    """A model's geometry, gate and loss; the defaults are the paper's. Raises ModelError on what
    cannot work. The fields are knobs of train.py too, and their comments what its --help says."""

    vocab_size: int = 50257  # comes with the data; GPT-2's
    block_size: int = 256  # context: the longest sequence, in tokens
    n_layer: int = 8  # blocks
    n_head: int = 16  # in each
    n_embd: int = 128  # width of the residual stream
    attention_layers: str = "global"  # global, local, or a pattern to repeat: global,local
    window_size: int = 256  # tokens that a local layer sees, the current one included
    # local: gates in every block read its clean input; global: one pair, after the clean pass
    ablation: Literal["none", "local", "global"] = "local"  # none: plain GPT-Neo, the baseline
    # softmax: the paper's Eq. 3; sigmoid: the published code's; constant: softmax(scores), T = 1
    gate: Literal["softmax", "sigmoid", "constant"] = "softmax"  # the gradient's soft weights
    attn_unit: Literal["dim", "head"] = "dim"  # units are head-output channels, or whole heads
    k_attn: int = 2  # attention units kept per token and layer
    k_mlp: int = 2  # MLP neurons kept per token and layer
    embd_std: float = 0.02  # token embeddings begin as N(0, embd_std); GPT-Neo's
    clean_coeff: float = 1.0  # loss = clean_coeff * clean + ablated_coeff * ablated cross-entropy
    ablated_coeff: float = 1.0  # see clean_coeff

    def __post_init__(self):
        for field in fields(self):  # those of a class that inherits these included
            value, choices = getattr(self, field.name), get_args(field.type)
            if choices and value not in choices:
                raise ModelError(f"{field.name}={value!r} is not one of: {', '.join(choices)}")
            kinds = (int, float) if field.type is float else field.type
            if not choices and not isinstance(value, kinds):
                raise ModelError(f"{field.name}={value!r} is not of type {field.type.__name__}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "window_size"):
            value = getattr(self, name)
            if value < 1:
                raise ModelError(f"{name}={value} must be at least 1")
        if not 0 < self.embd_std <= 1e3:  # "not <" refuses nan too
            raise ModelError(f"embd_std={self.embd_std} must be above 0 and at most 1000")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             f"change one of them")
        pattern = self.attention_pattern
        if set(pattern) - {"global", "local"} or self.n_layer % len(pattern):
            raise ModelError(f"attention_layers={self.attention_layers!r} must be 'global' and "
                             f"'local', separated by commas, in a pattern whose length divides "
                             f"n_layer={self.n_layer}")
        for name, units in (("k_attn", self.attn_units), ("k_mlp", 4 * self.n_embd)):
            value = getattr(self, name)
            if self.ablation != "none" and not 1 <= value < units:
                raise ModelError(f"{name}={value} must be from 1 to {units - 1}: "
                                 f"a layer has {units} units and at least one must lose")

    @property
    def attention_pattern(self):
        return self.attention_layers.split(",")

    @property
    def attention_kinds(self):
        """"global" or "local", one a layer."""
        return self.attention_pattern * (self.n_layer // len(self.attention_pattern))

    @property
    def windows(self):
        """How many tokens each layer sees, the current one included."""
        kinds = self.attention_kinds
        return [self.window_size if kind == "local" else self.block_size for kind in kinds]

    @property
    def attn_units(self):
        """Attention units of one layer that compete in its gate."""
        return self.n_embd if self.attn_unit == "dim" else self.n_head


class Losses(NamedTuple):
    loss: torch.Tensor  # what training minimises; it alone has a gradient
    loss_clean: torch.Tensor  # cross-entropy of the clean stream, nats per token
    loss_ablated: torch.Tensor | None = None  # of the ablated stream, if it was computed


class Streams(NamedTuple):
    logits_clean: torch.Tensor  # (B, T, V)
    logits_ablated: torch.Tensor  # (B, T, V)
    attn_mask: torch.Tensor  # (B, T, L, C), or (B, T, L, H) for heads; exactly k_attn ones a row
    mlp_mask: torch.Tensor  # (B, T, L, M); exactly k_mlp ones a row


# ----------------------------------------------------------------------------------------- the gate

MIN_GAP = 1e-6  # floor under T: a tie would divide by zero, and below it scores differ by noise


def gate(scores, k, form="softmax"):
    """k-winner-takes-all mask with a straight-through gradient.

    scores (..., N), 1 <= k < N -> mask (..., N): exact 0/1, with exactly k ones in every row, on
    the k largest scores (of tied ones, those that topk lists first). Its gradient is that of soft
    weights. "softmax" (paper, Eq. 1-3) and "sigmoid" (the published code): through gamma and T too;
    in rows held at the floor under T, none flows through T. "constant" has neither: T = 1, since
    with a T of each token's own gradients grow as 1 / T, and models learn less (RESULTS.md).
    """
    if form == "constant":
        scores = at_least_fp32(scores)
        return StraightThrough.apply(scores.softmax(-1), scores.topk(k, dim=-1).indices)
    if form not in ("softmax", "sigmoid"):
        raise ModelError(f"form={form!r} is none of 'softmax', 'sigmoid' and 'constant'")
    floor = max(MIN_GAP, torch.finfo(scores.dtype).eps)  # fp16 has no gradient of 1 / MIN_GAP
    scores = at_least_fp32(scores)  # in bf16 a few per cent of rows tie at the k-th place

    top, winners = scores.topk(k + 1, dim=-1)  # (..., k + 1), largest first
    s_k = top[..., k - 1 : k]  # (..., 1): the last winner
    s_next = top[..., k:]  # (..., 1): the first loser
    gamma = (s_k + s_next) / 2  # Eq. 1
    T = (s_k - s_next).clamp_min(floor)  # Eq. 2
    z = (scores - gamma) * (1 / T)  # (..., N); a product has a faster gradient than a quotient
    with torch.no_grad():  # exp(-50) is nothing beside the winners' 1, nor is its gradient
        z.clamp_min_(-50.0)  # further down come denormal numbers, which are slow on a CPU
    if form == "softmax":
        soft = z.softmax(-1)  # Eq. 3; gamma cancels here
    else:
        on = z.sigmoid()  # the published code
        soft = k * on / on.sum(-1, keepdim=True)
    return StraightThrough.apply(soft, winners[..., :k])


class StraightThrough(torch.autograd.Function):
    """Forward, the hard mask: 1 for the winners, 0 for the rest. Backward, as if it were soft."""

    @staticmethod
    def forward(ctx, soft, winners):
        return torch.zeros_like(soft).scatter_(-1, winners, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class GateScores(nn.Linear):
    """A linear layer in at least fp32, whatever autocast says: near-ties decide which units win."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = at_least_fp32(self.weight), at_least_fp32(self.bias)
            return F.linear(at_least_fp32(x), weight, bias)


def at_least_fp32(x):
    """x in fp32; float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- attention


def attention(q, k, v, window):
    """Causal attention: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    The queries are those of the last T of S tokens. As in GPT-Neo, and unlike in GPT-2, scores are
    not divided by sqrt(D): hence scale=1.
    """
    seen = seen_keys(q.size(2), k.size(2), window, q.device)
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=1.0)


def ablated_attention(q, k, v, k_own, v_own, window):
    """The same for the ablated stream, whose queries meet two kinds of keys in one softmax: before
    their own position the clean stream's, k and v (B, H, S, D), and at it their own stream's, k_own
    and v_own (B, H, T, D)."""
    # Plain causal attention can do this, in the kernels made for it, nearly four times as fast as a
    # matrix of scores with its diagonal replaced (bench/alternatives.py). Shift the clean keys by
    # one place, and let the free place 0 stand for "own", the query's own key:
    #
    #     place      0     1     2     3              0     1     2     3
    #     query 0    own                              own
    #     query 1    k0    own                        own   k0
    #     query 2    k0    k1    own                  own   k0    k1
    #     query 3    k0    k1    k2    own            own   k0    k1    k2
    #                what is wanted                   the same, and causal
    #
    # "own" is another key for every query. So its score is put in ready-made: one more channel, D,
    # holds q . k_own in the queries, and 1 in key 0, 0 in the other keys. In the values, the same
    # channel brings back the weight that "own" got, to multiply v_own with.
    S, D = k.shape[2:]
    own_score = (q * k_own).sum(-1, keepdim=True)  # (B, H, T, 1)
    q = torch.cat((q, own_score), -1)  # (B, H, T, D + 1)
    own = F.pad(q.new_ones(1, 1), (D, 0, 0, S - 1))  # (S, D + 1): 1 in channel D of place 0
    k = F.pad(k, (0, 1, 1, -1)) + own  # (B, H, S, D + 1): a new place 0, without the last key
    v = F.pad(v, (0, 1, 1, -1)) + own
    seen = seen_keys(q.size(2), S, window, q.device, shift=1)
    y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=1.0)
    y, own_weight = y.split((D, 1), -1)
    return y + own_weight * v_own


def seen_keys(T, S, window, device, shift=0):
    """A mask (T, S) of the keys that each of the last T of S queries sees, itself and window - 1
    before it; None for all before it. Keys are shifted by so many places, and those before seen."""
    if T == S <= window:
        return None  # the kernels need no mask for that
    query = torch.arange(S - T, S, device=device)[:, None]  # (T, 1)
    place = torch.arange(S, device=device)  # (S)
    in_window = (place - shift > query - window) | (place < shift)
    return in_window & (place <= query)


def split_heads(x, n_head):
    """(B, S, C) -> (B, H, S, D)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        C = config.n_embd
        self.n_head, self.window = config.n_head, window
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)

    def forward(self, h, past=None):
        """The clean stream: h (B, T, C) -> (B, T, C) and its keys and values, each (B, S, C).

        past: keys and values of the S - T tokens before h, to generate with.
        """
        H = self.n_head
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)  # each (B, T, C)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)  # (B, S, C)
        y = attention(split_heads(q, H), split_heads(k, H), split_heads(v, H), self.window)
        y = y.transpose(1, 2)  # (B, T, H, D)
        return self.out_proj(y.flatten(2)), (k, v)

    def ablated(self, h, kv_clean, mask):
        """The ablated stream: h (B, T, C) -> (B, T, C).

        kv_clean: the clean stream's keys and values, each (B, S, C).
        mask: 1 for the units that win, (B, T, C), or (B, T, H) where a unit is a whole head.
        """
        H = self.n_head
        q = split_heads(self.q_proj(h), H)  # (B, H, T, D)
        k_own = split_heads(self.k_proj(h), H)
        v_own = split_heads(self.v_proj(h), H)
        k, v = (split_heads(x, H) for x in kv_clean)  # (B, H, S, D)
        y = ablated_attention(q, k, v, k_own, v_own, self.window)
        y = y.transpose(1, 2)  # (B, T, H, D)
        y = masked(y, mask.unflatten(-1, (H, -1)))  # the mask: (B, T, H, D) or (B, T, H, 1)
        return self.out_proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h, mask=None):
        """h (B, T, C) -> (B, T, C); mask (B, T, M): on the ablated stream, the neurons that win."""
        neurons = F.gelu(self.c_fc(h), approximate="tanh")  # (B, T, M); Hugging Face's gelu_new
        if mask is not None:
            neurons = masked(neurons, mask)
        return self.c_proj(neurons)


def masked(x, mask):
    """The winners of x, in its dtype. A mask and its gradient are fp32 even if x is bf16."""
    return (x * mask).to(x.dtype)


# ------------------------------------------------------------------------------------------ GPT-Neo


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
        attended, kv = self.attn["attention"](self.ln_1(x), past)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), kv

    def ablated(self, x, x_clean, kv_clean, scores=None, k=None):
        """The ablated stream: x (B, T, C) -> (B, T, C) and its masks (B, T, C or H), (B, T, M).

        x_clean (B, T, C), kv_clean: this block's input and its keys and values on the clean stream.
        scores: what global gates gave this layer, (B, T, C or H) and (B, T, M); local gates read
        x_clean. k: (k_attn, k_mlp) in place of the config's.
        """
        config = self.config
        k_attn, k_mlp = k or (config.k_attn, config.k_mlp)
        attn_scores, mlp_scores = scores or (self.attn_gate(x_clean), self.mlp_gate(x_clean))
        attn_mask = gate(attn_scores, k_attn, config.gate)
        mlp_mask = gate(mlp_scores, k_mlp, config.gate)
        x = x + self.attn["attention"].ablated(self.ln_1(x), kv_clean, attn_mask)
        x = x + self.mlp(self.ln_2(x), mlp_mask)
        return x, (attn_mask, mlp_mask)


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
        wte = self.transformer["wte"]
        for module in self.modules():  # as GPT-Neo: N(0, 0.02), biases 0; LayerNorms have 1 and 0
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.embd_std if module is wte else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        self.lm_head.weight = wte.weight  # tied

    def clean_pass(self, idx, past=None):
        """A plain GPT-Neo: idx (B, T) -> ln_f of the last block (B, T, C), and, one a layer, the
        block inputs (B, T, C) and the (keys, values), each (B, S, C).

        past: the (keys, values) of the S - T tokens before.
        """
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

    def ablated_pass(self, hidden, inputs, caches, k=None):
        """The masked stream over what clean_pass returned: -> ln_f of its last block (B, T, C),
        and, one pair a layer, the masks (B, T, C or H) and (B, T, M). k: (k_attn, k_mlp) in place
        of the config's."""
        L = self.config.n_layer
        scores = [None] * L  # local gates score inside their block
        if self.config.ablation == "global":
            attn_scores = self.attn_gate(hidden).chunk(L, -1)  # L of (B, T, C or H)
            mlp_scores = self.mlp_gate(hidden).chunk(L, -1)  # L of (B, T, M)
            scores = list(zip(attn_scores, mlp_scores))
        x, masks = inputs[0], []  # both streams start at the embeddings
        for layer, block in enumerate(self.transformer["h"]):
            x, block_masks = block.ablated(x, inputs[layer], caches[layer], scores[layer], k)
            masks.append(block_masks)
        return self.transformer["ln_f"](x), masks

    def forward(self, idx, targets=None, ablated_coeff=None, k=None):
        """idx (B, T) -> clean logits (B, T, V), which is inference; with targets (B, T) -> Losses.

        ablated_coeff: in place of the config's, a tensor (), whose value no compiled code depends
        on; or 0, and the ablated pass is left out: its loss is None. k: (k_attn, k_mlp) in place
        of the config's.
        Raises ModelError when T exceeds block_size or, on a CPU, a token is outside the vocabulary.
        """
        config = self.config
        hidden, inputs, caches = self.clean_pass(idx)
        if targets is None:
            return self.lm_head(hidden)
        check_tokens(targets, config)
        streams, coeffs = [hidden], [config.clean_coeff]
        left_out = isinstance(ablated_coeff, (int, float)) and ablated_coeff == 0
        if config.ablation != "none" and not left_out:
            hidden_ablated, _ = self.ablated_pass(hidden, inputs, caches, k)
            streams.append(hidden_ablated)
            coeffs.append(config.ablated_coeff if ablated_coeff is None else ablated_coeff)
        loss, means = head_losses(streams, self.lm_head.weight, targets, coeffs)
        return Losses(loss, *means)

    def ablated(self, idx):
        """Both streams and every mask: idx (B, T) -> Streams. ModelError without ablation."""
        if self.config.ablation == "none":
            raise ModelError("this model has ablation='none', so it has no ablated stream")
        hidden, inputs, caches = self.clean_pass(idx)
        hidden_ablated, masks = self.ablated_pass(hidden, inputs, caches)
        attn_masks, mlp_masks = zip(*masks)
        return Streams(self.lm_head(hidden), self.lm_head(hidden_ablated),
                       torch.stack(attn_masks, 2), torch.stack(mlp_masks, 2))  # (B, T, L, N)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
                 stream="clean", stop_token=None):
        """Continue idx (B, T) by up to max_new_tokens -> (B, T + new).

        temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the fewest that together
        hold that probability. stream: "clean" or "ablated", whose logits to sample from. A row that
        has written stop_token writes nothing else; when every row has, the call ends. Past
        block_size tokens the context is the last block_size ones. Raises ModelError.
        """
        check_sampling(temperature, top_k, top_p)
        if stream != "clean" and (stream != "ablated" or self.config.ablation == "none"):
            raise ModelError(f"a model with ablation={self.config.ablation!r} "
                             f"cannot write from stream={stream!r}")
        if idx.size(1) == 0:
            raise ModelError("the prompt is empty: give at least one token, such as end-of-text")
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        block_size, past = self.config.block_size, None
        for _ in range(max_new_tokens):
            if past is None or idx.size(1) > block_size:  # a moving window: new positions, no cache
                hidden, inputs, past = self.clean_pass(idx[:, -block_size:])
            else:
                hidden, inputs, past = self.clean_pass(idx[:, -1:], past)
            if stream == "ablated":
                hidden, _ = self.ablated_pass(hidden, inputs, past)
            logits = self.lm_head(hidden[:, -1]).float()  # (B, V)
            token = sample(logits, temperature, top_k, top_p, generator)  # (B, 1)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped |= token == stop_token
            idx = torch.cat((idx, token), 1)
            if stop_token is not None and stopped.all():
                break
        return idx

    def clean_state_dict(self):
        """The clean stream's weights, which Hugging Face's GPTNeoForCausalLM loads as they are."""
        return {name: value for name, value in self.state_dict().items() if "_gate." not in name}

    def hf_config(self):
        """Keyword arguments of the transformers.GPTNeoConfig that describes the clean stream."""
        c, pattern = self.config, self.config.attention_pattern
        dropouts = ("embed_dropout", "attention_dropout", "resid_dropout")
        return dict(vocab_size=c.vocab_size, max_position_embeddings=c.block_size,
                    hidden_size=c.n_embd, num_layers=c.n_layer, num_heads=c.n_head,
                    attention_types=[[pattern, c.n_layer // len(pattern)]],
                    window_size=c.window_size, **dict.fromkeys(dropouts, 0.0))

    @classmethod
    def from_checkpoint(cls, checkpoint, device="cpu"):
        """A model from a run folder, a file or what load_checkpoint returned. Raises ModelError."""
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        try:
            model = cls(GPTNeoConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, TypeError, AttributeError) as error:  # of config, weights
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"the checkpoint's config and weights do not fit: {reason}") from None
        return model.to(device)


def check_tokens(idx, config, start=0):
    """Refuse what no embedding has. Values only where it costs nothing: on a CPU, not compiled."""
    length = start + idx.size(1)
    if length > config.block_size:
        raise ModelError(f"a sequence of {length} tokens is longer than "
                         f"block_size={config.block_size}")
    if idx.device.type == "cpu" and not torch.compiler.is_compiling() and idx.numel():
        low, high = idx.aminmax()
        if low < 0 or high >= config.vocab_size:
            token = int(low if low < 0 else high)
            raise ModelError(f"token {token} is outside the vocabulary of {config.vocab_size}")


# ----------------------------------------------------------------------------------------- sampling


def check_sampling(temperature, top_k, top_p):
    bad_top_k = top_k is not None and top_k < 1
    bad_top_p = top_p is not None and not 0 < top_p <= 1
    if not temperature >= 0 or bad_top_k or bad_top_p:  # "not >=" refuses nan too
        raise ModelError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: sampling wants "
                         f"temperature >= 0, top_k >= 1 and 0 < top_p <= 1")


def sample(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> next tokens (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits - logits.amax(-1, keepdim=True)  # at most 0: no temperature overflows
    logits = logits / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.size(-1))).values  # (B, top_k), largest first
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p  # what comes before it holds top_p already
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# ----------------------------------------------------------------------------------------- the loss


def head_losses(streams, weight, targets, coeffs):
    """Cross-entropies of softmax(hidden weight^T), of one or more streams in one product.

    streams: hidden states, each (B, T, C); weight (V, C); targets (B, T); coeffs, one a stream
    -> the sum of coeff x mean cross-entropy, a scalar with a gradient, and the means themselves,
    (streams,), without one.
    """
    n = targets.numel()
    hidden = torch.cat([x.flatten(0, 1) for x in streams])  # (R, C), R = streams x n rows
    targets = targets.flatten().repeat(len(streams))  # (R)
    scales = [hidden.new_full((n,), 1 / n) * coeff for coeff in coeffs]  # no copy from the CPU
    fuses = hidden.is_cuda and torch.compiler.is_compiling()  # then only bf16 logits are stored
    scaled_loss = cross_entropy if fuses else ChunkedCrossEntropy.apply
    loss, nll = scaled_loss(hidden, weight, targets, torch.cat(scales))
    return loss, nll.detach().view(len(streams), n).mean(1)


def cross_entropy(hidden, weight, targets, scale):
    """hidden (R, C), weight (V, C), targets and scale (R) -> scale . nll and nll (R), in nats."""
    logits = at_least_fp32(F.linear(hidden, weight))  # (R, V)
    nll = F.cross_entropy(logits, targets, reduction="none")  # -log softmax(logits)[target]
    return nll.dot(scale.to(nll.dtype)), nll  # a product with @ autocast would round to bf16


# -------------------------------------------------------------------------------------- checkpoints


@contextmanager
def replace_file(path):
    """A binary file to write. When it is whole it takes path's place; else path stays as it was.

    Raises ModelError when it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name with nothing behind it
        os.replace(temporary, path)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        with suppress(OSError):
            temporary.unlink()
        # torch.save hides the file's OSError: closing its zip raises a RuntimeError on the way out
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise ModelError(f"cannot write {path}: {cause.strerror or cause}") from None
        raise


def save_checkpoint(path, config, weights, **state):
    """Write a GPTNeoConfig, its model's state_dict and state, which weights_only=True can load."""
    with replace_file(path) as file:
        torch.save({"config": asdict(config), "model": weights, **state}, file)


def load_torch(path):
    """What torch.save wrote to path, on the CPU, every byte of it checked. Raises ModelError.

    torch.load alone does not look at the zip's CRCs: a flipped bit would be another model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # the name of a member, or None
            for member in archive.infolist():
                if member.external_attr & 0x10:  # "a folder": its tensor would be noise
                    damaged = member.filename
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = f"{damaged} has changed since it was written"
    except Exception as error:  # damage shows as almost any kind: OSError, IndexError, TypeError
        words = [type(error).__name__ + ":", *str(error).split()]
        reason = " ".join(words)[:150]
    raise ModelError(f"{path} is damaged, or no file of this project ({reason})")


def load_checkpoint(path):
    """The dict in a checkpoint file or in a run folder's best.pt, on the CPU. Raises ModelError."""
    if os.path.isdir(path):
        path = os.path.join(path, "best.pt")
    if not os.path.isfile(path):
        raise ModelError(f"no checkpoint at {path}: give a run folder that has a best.pt, "
                         f"such as out/local_k2, or a .pt file")
    checkpoint = load_torch(path)
    if not isinstance(checkpoint, dict) or not {"config", "model"} <= checkpoint.keys():
        raise ModelError(f"{path} holds no 'config' and 'model': "
                         f"it is not a checkpoint of this project")
    return checkpoint


# ----------------------------------------------------------------------------------- for speed only

CHUNK = 6_500_000  # logits alive at a time: 26 MB, 129 rows of GPT-2's vocabulary


class ChunkedCrossEntropy(torch.autograd.Function):
    """cross_entropy without its R x V logits: on a CPU in half of its time and 0.4 of its memory.

    Fresh memory is what a big vocabulary costs there. So the logits are made a chunk of rows at a
    time, in one buffer, and turned at once into their gradient, softmax(logits) - onehot(target).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale):
        hidden = hidden.to(weight.dtype)
        targets, row_scale = targets[:, None], scale[:, None]  # (R, 1)
        R, V = len(hidden), len(weight)
        nll = hidden.new_empty(R)
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # else it is frozen
            grad_weight = torch.zeros_like(weight)
        chunks = -(-R * V // CHUNK)  # rounded up
        step = -(-R // chunks)  # rows of a chunk: even ones, of at most CHUNK logits
        buffer = hidden.new_empty(step, V)
        for start in range(0, R, step):
            rows = slice(start, start + step)
            x, target = hidden[rows], targets[rows]  # (step, C), (step, 1); fewer rows at the end
            logits = torch.mm(x, weight.T, out=buffer[: len(x)])  # (step, V)
            logp = torch.log_softmax(logits, -1, out=logits)
            nll[rows] = -logp.gather(-1, target)[:, 0]
            if any(ctx.needs_input_grad):
                grad = logp.exp_()
                grad.scatter_add_(-1, target, grad.new_full(target.shape, -1.0))
                torch.mm(grad, weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, x * row_scale[rows])
        ctx.save_for_backward(grad_hidden.mul_(row_scale), grad_weight)
        ctx.mark_non_differentiable(nll)
        return nll.dot(scale), nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad * grad_weight
        return grad * grad_hidden, grad_weight, None, None
