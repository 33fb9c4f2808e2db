"""GPT-Neo trained with self-ablation: a k-winner-takes-all gate over attention units and neurons.

Two residual streams share one set of weights. The *clean* stream is a plain GPT-Neo, and the only
one used at inference. The *ablated* stream keeps, at every token and in every layer, only the
k_attn attention units and the k_mlp neurons that a gate picks by looking at the clean stream.
Training minimises the sum of both cross-entropies ("Self-Ablating Transformers: More
Interpretability, Less Sparsity"). Gates read only the clean stream, so a training step is

    clean_pass     a plain GPT-Neo that remembers each block's input, keys and values
    gate           scores -> k winners; hard in the forward pass, soft in the backward pass
    ablated_pass   the same blocks again, masked, attending to the remembered keys and values
    cross_entropy  of both streams

Shapes: B batch, T tokens, C = n_embd, H heads, D = C / H, M = 4C neurons, L layers, V vocabulary,
N units that compete in one gate. Parameter names are Hugging Face's, plus the gates.
"""

import os
import re
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class ModelError(ValueError):
    """Invalid input or checkpoint. The message is one line, for the user."""


@dataclass
class GPTNeoConfig:
    """A model's geometry, gate and loss; the defaults are the paper's. Checked in config.Config."""

    vocab_size: int = 50257  # set by the prepared data; this default is GPT-2's
    block_size: int = 256  # context: the longest sequence, in tokens
    n_layer: int = 8  # blocks
    n_head: int = 16  # attention heads of a block
    n_embd: int = 128  # width of the residual stream
    attention_layers: str = "global"  # global, local, or a pattern to repeat: global,local
    window_size: int = 256  # tokens that a local layer sees, the current one included
    # local gates read their block's clean input, global ones the final clean hidden state
    ablation: Literal["none", "local", "global"] = "local"  # gates: none, per block, for all layers
    # the gradient is that of: the paper's Eq. 3; the published code's; softmax(scores)
    gate: Literal["softmax", "sigmoid", "constant"] = "softmax"  # Eq. 3, published code, or T = 1
    attn_unit: Literal["dim", "head"] = "dim"  # units are head-output channels, or whole heads
    k_attn: int = 2  # attention units kept per token and layer
    k_mlp: int = 2  # MLP neurons kept per token and layer
    embd_std: float = 0.02  # standard deviation of the initial token embeddings; GPT-Neo's
    clean_coeff: float = 1.0  # loss = clean_coeff * clean + ablated_coeff * ablated cross-entropy
    ablated_coeff: float = 1.0  # see clean_coeff

    @property
    def attn_units(self):
        """Attention units of one layer that compete in its gate."""
        return {"dim": self.n_embd, "head": self.n_head}[self.attn_unit]

    @property
    def windows(self):
        """How many tokens each layer sees, the current one included."""
        sizes = {"global": self.block_size, "local": self.window_size}
        pattern = [sizes[kind] for kind in self.attention_layers.split(",")]
        return pattern * (self.n_layer // len(pattern))


class Losses(NamedTuple):
    loss: torch.Tensor  # what training minimises; the other two are detached
    loss_clean: torch.Tensor  # cross-entropy of the clean stream, nats per token
    loss_ablated: torch.Tensor | None = None  # of the ablated stream, if it was computed


class Streams(NamedTuple):
    logits_clean: torch.Tensor  # (B, T, V)
    logits_ablated: torch.Tensor  # (B, T, V)
    attn_mask: torch.Tensor  # (B, T, L, C), or (B, T, L, H) for heads; exactly k_attn ones a row
    mlp_mask: torch.Tensor  # (B, T, L, M); exactly k_mlp ones a row


# ----------------------------------------------------------------------------------------- the gate

MIN_GAP = 1e-6  # smallest T: a tie would divide by zero, and smaller gaps are rounding noise


def gate(scores, k, form="softmax"):
    """k-winner-takes-all mask with a straight-through gradient.

    scores (..., N), 1 <= k < N -> mask (..., N): exact 0/1, with exactly k ones in every row, on
    the k largest scores. Its gradient is that of soft weights. "softmax" (paper, Eq. 1-3) and
    "sigmoid" (the published code) also have gradients through gamma and the temperature T.
    "constant" is softmax(scores), T = 1: gradients through a T that each token sets grow as 1 / T,
    and models learn less (RESULTS.md).
    """
    floor = max(MIN_GAP, torch.finfo(scores.dtype).eps)  # fp16 gradients of 1 / MIN_GAP overflow
    scores = at_least_fp32(scores)  # in bf16 a few per cent of rows tie at the k-th place
    hard, s_k, s_next = k_largest(scores, k)
    if form == "constant":
        soft = scores.softmax(-1)
    else:
        gamma = (s_k + s_next) / 2  # Eq. 1
        temperature = (s_k - s_next).clamp_min(floor)  # Eq. 2: T
        z = (scores - gamma) * (1 / temperature)  # a product has a faster gradient than a quotient
        if form == "softmax":
            soft = z.softmax(-1)  # Eq. 3; gamma cancels here
        elif form == "sigmoid":  # the published code
            soft = k * z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
        else:
            raise ModelError(f"there is no gate={form}")
    # The value is hard to the last bit, the gradient that of soft. An autograd.Function would not
    # do: torch 2.11 compiles one whose output does not depend on soft to a gradient of zero.
    return hard + (soft - soft.detach())


def k_largest(scores, k):
    """scores (..., N) -> a mask (..., N) with ones at the k largest, exactly k even where scores
    tie; the k-th largest score and the next one, (..., 1) each. There are three ways to this one
    result: eager, compiled for a small k, and compiled for a larger k."""
    compiling = torch.compiler.is_compiling()
    if compiling and k <= 8:
        return k_largest_by_maxima(scores, k)
    top, winners = scores.topk(k + 1, dim=-1)  # (..., k + 1), largest first
    if compiling:  # Inductor (torch 2.13, CPU) may read a mask before it scatters into it
        units = torch.arange(scores.size(-1), device=scores.device)
        hard = (winners[..., :k, None] == units).any(-2).to(scores.dtype)
    else:
        hard = torch.zeros_like(scores).scatter(-1, winners[..., :k], 1.0)
    return hard, top[..., k - 1 : k], top[..., k:]


def k_largest_by_maxima(scores, k):
    """k_largest for compiled code: k + 1 maxima become one kernel, where topk takes six. With TF32
    for the gates this saved 1.9 of the 10.9 ms of a training step on an H200 (RESULTS.md)."""
    units = torch.arange(scores.size(-1), device=scores.device)
    rest, hard, top = scores.detach(), torch.zeros_like(scores), []
    for rank in range(k + 1):
        largest = units == rest.argmax(-1, keepdim=True)  # (..., N): one True a row
        rest = rest.masked_fill(largest, -torch.inf)
        if rank < k:
            hard = hard + largest
        top.append(scores.where(largest, 0.0).sum(-1, keepdim=True))  # (..., 1)
    return hard, top[-2], top[-1]


class GateScores(nn.Linear):
    """A linear layer in at least fp32 under autocast: near-ties decide which units win."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = at_least_fp32(self.weight), at_least_fp32(self.bias)
            return F.linear(at_least_fp32(x), weight, bias)


def at_least_fp32(x):
    """x in fp32; float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- attention


def attention(q, k, v, window, shift=0):
    """Causal attention, each (B, H, T, D) -> (B, H, T, D): a query sees the key at its own position
    and the window - 1 before it. As in GPT-Neo, and unlike in GPT-2, scores are not divided by
    sqrt(D): hence scale=1. With shift=1 every query sees key 0, and key j + 1 is at position j."""
    T = q.size(2)
    seen = None  # all keys up to the query's own
    if T > window:
        query = torch.arange(T, device=q.device)[:, None]  # (T, 1)
        key = torch.arange(T, device=q.device)  # (T)
        seen = (key - shift > query - window) | (key < shift)  # (T, T)
        seen = seen & (key <= query)
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=1.0)


def ablated_attention(q, k, v, k_own, v_own, window):
    """Attention of the ablated stream. In one softmax, a query attends to the clean stream's keys
    and values, k and v, at earlier positions, and to the ablated stream's, k_own and v_own, at its
    own position. Each (B, H, T, D) -> (B, H, T, D)."""
    # Plain causal attention can do this, nearly four times as fast as a matrix of scores with its
    # diagonal replaced. Shift the clean keys by one place: the free place 0 is the query's own key.
    #
    #     query 0    own                       own
    #     query 1    k0    own          =      own   k0
    #     query 2    k0    k1    own           own   k0    k1
    #
    # Every query has a different own key, so the score q . k_own is computed first. One more
    # channel, D, holds it in the queries, and 1 in key 0, 0 in the other keys. In the values the
    # same channel returns the weight that "own" got, and v_own is multiplied with that.
    T, D = k.shape[2:]
    own_score = (q * k_own).sum(-1, keepdim=True)  # (B, H, T, 1)
    q = torch.cat((q, own_score), -1)  # (B, H, T, D + 1)
    is_own = F.pad(q.new_ones(1, 1), (D, 0, 0, T - 1))  # (T, D + 1): 1 in channel D of place 0
    k = F.pad(k, (0, 1, 1, -1)) + is_own  # (B, H, T, D + 1): a new place 0, without the last key
    v = F.pad(v, (0, 1, 1, -1)) + is_own
    y, own_weight = attention(q, k, v, window, shift=1).split((D, 1), -1)
    return y + own_weight * v_own


class Attention(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        C = config.n_embd
        self.n_head, self.window = config.n_head, window
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)

    def qkv(self, h):
        """(B, T, C) -> queries, keys and values, (B, H, T, D) each"""
        return [layer(h).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                for layer in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(self, h):
        """The clean stream: h (B, T, C) -> (B, T, C) and its keys and values, (B, H, T, D) each."""
        q, k, v = self.qkv(h)
        y = attention(q, k, v, self.window).transpose(1, 2)  # (B, T, H, D)
        return self.out_proj(y.flatten(2)), (k, v)

    def ablated(self, h, kv_clean, mask):
        """The ablated stream: h (B, T, C) -> (B, T, C). kv_clean: the clean stream's keys and
        values. mask: 1 for the units that win, (B, T, C), or (B, T, H) for whole heads."""
        q, *kv_own = self.qkv(h)
        y = ablated_attention(q, *kv_clean, *kv_own, self.window).transpose(1, 2)  # (B, T, H, D)
        y = masked(y, mask.unflatten(-1, (self.n_head, -1)))  # mask: (B, T, H, D) or (B, T, H, 1)
        return self.out_proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h, mask=None):
        """h (B, T, C) -> (B, T, C); mask (B, T, M): on the ablated stream, the neurons that win."""
        neurons = F.gelu(self.c_fc(h), approximate="tanh")  # (B, T, M); Hugging Face's gelu_new
        return self.c_proj(neurons if mask is None else masked(neurons, mask))


def masked(x, mask):
    """x with 0 for the units that lose, in its dtype. The mask is fp32 even if x is bf16."""
    return (x * mask).to(x.dtype)


# ------------------------------------------------------------------------------------------ GPT-Neo


class Block(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.ln_1 = nn.LayerNorm(C)
        # the extra level is Hugging Face's: transformer.h.0.attn.attention.q_proj.weight
        self.attn = nn.ModuleDict({"attention": Attention(config, window)})
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = MLP(config)
        if config.ablation == "local":
            self.attn_gate = GateScores(C, config.attn_units)
            self.mlp_gate = GateScores(C, 4 * C)

    def forward(self, x):
        """The clean stream: x (B, T, C) -> (B, T, C) and its keys and values, (B, H, T, D) each."""
        attended, kv = self.attn["attention"](self.ln_1(x))
        x = x + attended
        return x + self.mlp(self.ln_2(x)), kv

    def ablated(self, x, x_clean, kv_clean, scores=None):
        """The ablated stream: x (B, T, C) -> (B, T, C) and its masks (B, T, C or H), (B, T, M).
        x_clean (B, T, C), kv_clean: this block's input, keys and values on the clean stream.
        scores: from global gates, shaped as the masks. None: local gates score x_clean."""
        config = self.config
        attn_scores, mlp_scores = scores or (self.attn_gate(x_clean), self.mlp_gate(x_clean))
        attn_mask = gate(attn_scores, config.k_attn, config.gate)
        mlp_mask = gate(mlp_scores, config.k_mlp, config.gate)
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
            "h": nn.ModuleList(Block(config, window) for window in config.windows),
            "ln_f": nn.LayerNorm(C),
        })
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.ablation == "global":
            self.attn_gate = GateScores(C, L * config.attn_units)
            self.mlp_gate = GateScores(C, L * 4 * C)
        wte = self.transformer["wte"].weight
        for name, p in self.named_parameters():  # as GPT-Neo; LayerNorms have ones and zeros
            if p.dim() == 2:
                nn.init.normal_(p, std=config.embd_std if p is wte else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.lm_head.weight = wte  # tied

    def clean_pass(self, idx):
        """A plain GPT-Neo: idx (B, T) -> its final hidden state, after ln_f (B, T, C), and two
        lists, an entry per layer: block inputs (B, T, C); keys and values, (B, H, T, D) each."""
        T, block_size = idx.size(1), self.config.block_size
        if T > block_size:
            raise ModelError(f"a sequence of {T} tokens is longer than block_size={block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, C)
        inputs, caches = [], []
        for block in self.transformer["h"]:
            inputs.append(x)
            x, kv = block(x)
            caches.append(kv)
        return self.transformer["ln_f"](x), inputs, caches

    def ablated_pass(self, hidden, inputs, caches):
        """The ablated stream, from what clean_pass returned -> its final hidden state (B, T, C),
        and the masks, a pair (B, T, C or H), (B, T, M) per layer. ModelError without ablation."""
        L = self.config.n_layer
        if self.config.ablation == "none":
            raise ModelError("this model has ablation='none', so it has no ablated stream")
        scores = [None] * L  # local gates score inside their block
        if self.config.ablation == "global":
            attn_scores, mlp_scores = self.attn_gate(hidden), self.mlp_gate(hidden)  # (B, T, L * N)
            scores = list(zip(attn_scores.chunk(L, -1), mlp_scores.chunk(L, -1)))
        x, masks = inputs[0], []  # both streams start at the embeddings
        layers = zip(self.transformer["h"], inputs, caches, scores)
        for block, x_clean, kv_clean, layer_scores in layers:
            x, block_masks = block.ablated(x, x_clean, kv_clean, layer_scores)
            masks.append(block_masks)
        return self.transformer["ln_f"](x), masks

    def forward(self, idx, targets=None, ablated_coeff=None):
        """idx (B, T) -> clean logits (B, T, V), which is inference; with targets (B, T) -> Losses.
        ablated_coeff overrides the config's. As a tensor () its value may change without
        recompiling. The number 0 skips the ablated pass: its loss is None."""
        config = self.config
        hidden, inputs, caches = self.clean_pass(idx)
        if targets is None:
            return self.lm_head(hidden)
        clean = cross_entropy(hidden, self.lm_head.weight, targets)
        loss = config.clean_coeff * clean
        if config.ablation == "none" or (not torch.is_tensor(ablated_coeff) and ablated_coeff == 0):
            return Losses(loss, clean.detach())
        hidden, _ = self.ablated_pass(hidden, inputs, caches)
        ablated = cross_entropy(hidden, self.lm_head.weight, targets)
        coeff = config.ablated_coeff if ablated_coeff is None else ablated_coeff
        return Losses(loss + coeff * ablated, clean.detach(), ablated.detach())

    def ablated(self, idx):
        """Both streams and every mask: idx (B, T) -> Streams. ModelError without ablation."""
        clean, inputs, caches = self.clean_pass(idx)
        ablated, masks = self.ablated_pass(clean, inputs, caches)
        masks = [torch.stack(kind, 2) for kind in zip(*masks)]  # (B, T, L, N) each
        return Streams(self.lm_head(clean), self.lm_head(ablated), *masks)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stream="clean"):
        """Continue idx (B, T) -> (B, T + max_new_tokens). temperature 0 is greedy; top_k samples
        from the k likeliest tokens; stream: "clean" or "ablated". The context is at most the last
        block_size tokens."""
        V = self.config.vocab_size
        assert stream in ("clean", "ablated"), stream
        for _ in range(max_new_tokens):
            hidden, inputs, caches = self.clean_pass(idx[:, -self.config.block_size :])
            if stream == "ablated":
                hidden, _ = self.ablated_pass(hidden, inputs, caches)
            logits = self.lm_head(hidden[:, -1]).float()  # (B, V)
            logits, tokens = logits.topk(min(top_k or V, V))  # not more, even where logits tie
            choice = torch.zeros_like(tokens[:, :1])  # (B, 1): the first is the likeliest
            if temperature > 0:
                choice = torch.multinomial((logits / temperature).softmax(-1), 1)
            idx = torch.cat((idx, tokens.gather(-1, choice)), 1)
        return idx

    def clean_state_dict(self):
        """The clean stream's weights. Hugging Face's GPTNeoForCausalLM loads them directly."""
        return {name: value for name, value in self.state_dict().items() if "_gate." not in name}

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """A model from a run folder, a file or what load_checkpoint returned. Raises ModelError."""
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        model = cls(GPTNeoConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model

    @classmethod
    def from_pretrained(cls, name):
        """A GPT-Neo of Hugging Face, in fp32 and without gates: a folder, or a name on the hub."""
        from safetensors.torch import load_file
        from transformers import AutoConfig, GPTNeoForCausalLM

        try:
            theirs = AutoConfig.from_pretrained(name)
            wanted = {"model_type": ["gpt_neo"], "activation_function": ["gelu_new"],
                      "layer_norm_epsilon": [1e-5], "tie_word_embeddings": [True],
                      "intermediate_size": [4 * theirs.hidden_size, None]}
            for field, values in wanted.items():
                if (found := getattr(theirs, field, None)) not in values:
                    raise ValueError(f"{field}={found}, not {values[0]}")
            model, info = GPTNeoForCausalLM.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True)
            for file in (*Path(name).glob("*.safetensors"), *Path(name).glob("pytorch_model*.bin")):
                read = load_torch(file) if file.suffix == ".bin" else load_file(file)  # checks CRCs
                masks = [key for key in read if re.search(r"attention\.(masked_)?bias$", key)]
                require_floats(file, {key: read[key] for key in read.keys() - masks})
            require_floats(name, model.state_dict())
            if not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
                raise ValueError("its lm_head is not its token embedding")
            if info["missing_keys"]:  # transformers fills them with random numbers
                raise ValueError(f"it lacks weights: {', '.join(info['missing_keys'])}")
        except Exception as error:  # a damaged file can raise almost any exception
            reason = " ".join(str(error).split())
            raise ModelError(f"cannot load {name}, as a folder or from the hub: {reason}") from None
        L = theirs.num_layers
        kinds = theirs.attention_layers  # one for each layer
        period = min(n for n in range(1, L + 1) if kinds[:n] * (L // n) == kinds)
        config = GPTNeoConfig(
            theirs.vocab_size, theirs.max_position_embeddings, L, theirs.num_heads,
            theirs.hidden_size, ",".join(kinds[:period]), theirs.window_size, "none")
        return cls.from_checkpoint({"config": asdict(config), "model": model.state_dict()})


# ----------------------------------------------------------------------------------------- the loss


def cross_entropy(hidden, weight, targets):
    """Mean in nats per token: hidden (B, T, C), weight (V, C), targets (B, T) -> ()."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (B T, C), (B T)
    eager_cpu = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager_cpu and hasattr(F, "linear_cross_entropy"):  # torch 2.13
        # in chunks: all (B T, V) logits at once take 1/4 more time, twice the memory (RESULTS.md)
        rows = max(1, 6_500_000 // len(weight))  # of a chunk: 26 MB of fp32 logits
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        return F.linear_cross_entropy(hidden, weight, targets, options=options)
    return F.cross_entropy(at_least_fp32(F.linear(hidden, weight)), targets)


# -------------------------------------------------------------------------------------- checkpoints


def require_floats(path, weights):
    """Raises ModelError unless the tensors of {name: tensor} are floating-point and finite."""
    for name, weight in weights.items():
        floating = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        if not (floating and weight.float().isfinite().all()):
            raise ModelError(f"{path} is damaged: {name} holds values that are not finite floats")


@contextmanager
def replace_file(path):
    """A binary file to write. It replaces path only when it was completely written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut can leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, config, weights, **state):
    """Write a GPTNeoConfig, its model's state_dict and state, which weights_only=True can load."""
    with replace_file(path) as file:
        torch.save({"config": asdict(config), "model": weights, **state}, file)


def load_torch(path):
    """What torch.save wrote to path, on the CPU. Every byte is checked, because torch.load ignores
    the zip's CRCs: it would load a flipped bit as a different model, and fill a tensor whose entry
    is marked as a folder with noise."""
    try:
        with zipfile.ZipFile(path) as archive:
            folders = [file.filename for file in archive.infolist() if file.external_attr & 0x10]
            damaged = archive.testzip() or folders
            if damaged:
                raise ValueError(f"{damaged} has changed since it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise OSError, IndexError, TypeError, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"{path} is damaged, or not a file of this project ({reason:.150})"
        raise ModelError(message) from None


def load_checkpoint(path):
    """The dict in a checkpoint file or in a run folder's best.pt, on the CPU. Raises ModelError."""
    path = Path(path, "best.pt") if os.path.isdir(path) else Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: give a run folder that has a best.pt, such as "
                         f"out/local_k2, or a .pt file")
    match load_torch(path):
        case {"config": {"ablation": _}, "model": dict(weights)} as checkpoint:
            require_floats(path, weights)
            return checkpoint
    raise ModelError(f"{path} is not a checkpoint of this project: it lacks weights or a config")
