"""What self-ablation is, as tests: the gate, its gradient, the two streams, what must never happen.

    python -m pytest test_gate.py            (offline, on a CPU)

References are independent of model.py: finite differences, Hugging Face's GPT-Neo, a slow
transcription of the paper that runs both streams side by side (`soft_weights` and `dual_stream`
below), and, where ../shared/oracles exists, what the authors' published code computes.
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import model as model_file
from model import GPTNeo, GPTNeoConfig, ModelError, gate, k_largest, k_largest_by_maxima, masked

TINY = dict(vocab_size=61, block_size=12, n_layer=2, n_head=4, n_embd=16, k_attn=3, k_mlp=5)
FORMS = ("softmax", "sigmoid", "constant")
VARIANTS = [(ablation, form) for ablation in ("local", "global") for form in FORMS]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
both_ablations = pytest.mark.parametrize("ablation", ["local", "global"])


def tiny(seed=0, dtype=torch.float64, **changes):
    """A small model whose weights, biases included, are all large enough to matter."""
    torch.manual_seed(seed)
    model = GPTNeo(GPTNeoConfig(**{**TINY, **changes})).to(dtype)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model


def tokens(*shape, seed=1):
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


IDX, TARGETS = tokens(2, 12), tokens(2, 12, seed=2)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients(model, idx=IDX, targets=TARGETS, coeff=None):
    """{name: gradient} of the training loss, the tied embedding once."""
    model.zero_grad()
    model(idx, targets, coeff).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ----------------------------------------------------------------------------- the value: k winners


def awkward_scores(dtype):
    huge = min(1e30, torch.finfo(dtype).max)  # far beyond any real score; Eq. 3 is still finite
    yield normal(50, 16).to(dtype)
    yield normal(50, 16).round().to(dtype)  # ties everywhere
    yield torch.zeros(4, 16, dtype=dtype)  # nothing but a tie
    yield torch.full((4, 16), -huge, dtype=dtype)
    yield (normal(50, 16, seed=1).sign() * huge).to(dtype)
    yield (normal(50, 16, seed=2) * 1e-30).to(dtype)  # gaps far below the floor under T
    yield normal(2, 3, 16, seed=3).to(dtype)  # any leading shape


@pytest.mark.parametrize("largest", [k_largest, k_largest_by_maxima])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_exactly_k_ones_on_the_largest_scores(dtype, form, largest, monkeypatch):
    """To the last bit, with and without a gradient: the soft form must not show."""
    monkeypatch.setattr(model_file, "k_largest", largest)
    for scores, k in itertools.product(awkward_scores(dtype), [1, 2, 8, 15]):
        for needs_grad in (False, True):
            mask = gate(scores.clone().requires_grad_(needs_grad), k, form).detach()
            assert mask.dtype == torch.promote_types(dtype, torch.float32)
            assert ((mask == 0) | (mask == 1)).all() and (mask.sum(-1) == k).all()
            worst_winner = scores.to(mask.dtype).masked_fill(mask == 0, torch.inf).amin(-1)
            best_loser = scores.to(mask.dtype).masked_fill(mask == 1, -torch.inf).amax(-1)
            assert (worst_winner >= best_loser).all()


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_are_not_numbers_are_not_hidden(form):
    """Such a run is over. The mask is NaN and so is the loss, which train.py reports."""
    scores = normal(4, 16).index_fill(-1, torch.tensor([3]), torch.nan)
    assert gate(scores, 2, form).isnan().any(-1).all()


@pytest.mark.parametrize("k", [1, 3, 15])
def test_maxima_in_compiled_code_and_topk_elsewhere_are_the_same_function(k):
    """Mask, the two scores at the threshold, and the gradient of these."""
    results = []
    for largest in (k_largest, k_largest_by_maxima):
        scores = normal(50, 16).requires_grad_()
        hard, s_k, s_next = largest(scores, k)
        (s_k * normal(50, 1, seed=1) + s_next * normal(50, 1, seed=2)).sum().backward()
        results.append((hard.detach(), s_k.detach(), s_next.detach(), scores.grad))
    for theirs, ours in zip(*results):
        assert torch.equal(theirs, ours)
    for tied in awkward_scores(torch.float32):  # which of the tied ones win is open
        assert all(map(torch.equal, k_largest(tied, k)[1:], k_largest_by_maxima(tied, k)[1:]))


# -------------------------------------------------------------------- the gradient: that of Eq. 1-3


def soft_weights(s, k, form):
    """Eq. 1-3, or the published code's sigmoid, or T = 1; for scores s (..., N) without ties."""
    ordered = s.sort(-1, descending=True).values
    s_k, s_next = ordered[..., k - 1, None], ordered[..., k, None]
    gamma, T = (s_k + s_next) / 2, s_k - s_next
    z = s if form == "constant" else (s - gamma) / T
    if form == "sigmoid":
        return k * z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
    return z.softmax(-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_gradient_is_that_of_the_soft_weights_through_gamma_and_T(form, k):
    """Against central differences of an independent Eq. 1-3, for a random cotangent."""
    torch.manual_seed(k)
    for _ in range(5):
        s = torch.randperm(10) + 0.6 * torch.rand(10).double() - 0.3  # a step keeps the order
        cotangent, steps = torch.randn(10).double(), 1e-6 * torch.eye(10).double()
        scores = s.clone().requires_grad_()
        (gate(scores, k, form) * cotangent).sum().backward()
        change = soft_weights(s + steps, k, form) - soft_weights(s - steps, k, form)  # (10, 10)
        numeric = change @ cotangent / 2e-6
        scale = numeric.abs().max().item()
        torch.testing.assert_close(scores.grad, numeric, rtol=1e-6, atol=1e-7 * scale)


def test_gradient_of_the_constant_form_is_that_of_a_plain_softmax():
    """To the bit, also where scores tie."""
    s, cotangent = normal(20, 12).round(decimals=1), normal(20, 12, seed=1)
    for k in (1, 4, 11):
        plain, ours = s.clone().requires_grad_(), s.clone().requires_grad_()
        (plain.softmax(-1) * cotangent).sum().backward()
        (gate(ours, k, "constant") * cotangent).sum().backward()
        assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_finite_at_ties(dtype, form):
    one_tie = torch.tensor([[1.0] * 3 + [0.0] * 13])
    for rows in (torch.zeros(4, 16), one_tie, normal(50, 16).round()):
        for k in (1, 2, 15):
            scores = rows.to(dtype).requires_grad_()
            (gate(scores, k, form) * torch.randn(16)).sum().backward()
            assert scores.grad.isfinite().all()


# ----------------------------------------------------- both streams, against a slow transcription


def plain_gate(s, k, form):
    """k ones in the forward pass, the soft weights' gradient in the backward pass, by autograd."""
    soft = soft_weights(s, k, form)
    hard = (s >= s.sort(-1).values[..., -k, None]).to(s.dtype)
    return hard + soft - soft.detach()


def dual_stream(p, config, idx):
    """The paper read literally, in the order of the published code: both streams side by side, a
    token's keys assembled one token at a time. p: state dict -> logits (B, T, V) of both streams,
    masks (B, T, L, N)."""
    L, H, C = config.n_layer, config.n_head, config.n_embd

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attend(q, keys, values):  # q (B, H, D), lists of (B, H, D)
        scores = torch.stack([(q * key).sum(-1) for key in keys], -1)  # (B, H, S), not scaled
        weights = scores.softmax(-1).unbind(-1)
        return sum(weight[..., None] * value for weight, value in zip(weights, values))

    def gates(x, prefix, layer=0):  # (B, T, C) -> masks of one layer
        masks = []
        kinds = (("attn", config.attn_units, config.k_attn), ("mlp", 4 * C, config.k_mlp))
        for kind, n, k in kinds:
            scores = linear(x, f"{prefix}{kind}_gate")
            masks.append(plain_gate(scores[..., layer * n : (layer + 1) * n], k, config.gate))
        return masks

    def block(layer, x, clean_keys=None, masks=None):
        """One block on one stream; clean_keys: the clean stream's (k, v), each (B, T, H, D)."""
        name, window = f"transformer.h.{layer}", config.windows[layer]
        h = norm(x, f"{name}.ln_1")
        q, k, v = (
            (h @ p[f"{name}.attn.attention.{kind}_proj.weight"].T).unflatten(-1, (H, C // H))
            for kind in "qkv")
        k_seen, v_seen = clean_keys or (k, v)
        y = []
        for t in range(x.size(1)):  # sees `window` positions, its own one on its own stream
            before = slice(max(0, t - window + 1), t)
            keys = [*k_seen[:, before].unbind(1), k[:, t]]
            values = [*v_seen[:, before].unbind(1), v[:, t]]
            y.append(attend(q[:, t], keys, values))
        y = torch.stack(y, 1).flatten(2)
        if masks:
            y = y * masks[0].repeat_interleave(C // masks[0].size(-1), -1)
        x = x + linear(y, f"{name}.attn.attention.out_proj")
        h = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        neurons = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        if masks:
            neurons = neurons * masks[1]
        return x + linear(neurons, f"{name}.mlp.c_proj"), (k, v)

    start = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][: idx.size(1)]
    masks = [None] * L
    if config.ablation == "global":  # scores come from a whole clean pass before the two streams
        x = start
        for layer in range(L):
            x, _ = block(layer, x)
        masks = [gates(norm(x, "transformer.ln_f"), "", layer) for layer in range(L)]
    clean = ablated = start
    for layer in range(L):
        masks[layer] = masks[layer] or gates(clean, f"transformer.h.{layer}.")
        clean_next, keys = block(layer, clean)
        ablated, _ = block(layer, ablated, keys, masks[layer])
        clean = clean_next
    logits = [norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T for x in (clean, ablated)]
    return *logits, *(torch.stack(kind, 2) for kind in zip(*masks))


def compare(model, idx, targets, reference, gradient_tolerance):
    """reference: logits_clean, logits_ablated, attn_mask, mlp_mask, loss_clean, loss_ablated and
    gradients, {name: tensor}."""
    *logits, attn_mask, mlp_mask, loss_clean, loss_ablated, expected = reference
    streams, losses = model.ablated(idx), model(idx, targets)
    assert torch.equal(streams.attn_mask.bool(), attn_mask.bool())
    assert torch.equal(streams.mlp_mask.bool(), mlp_mask.bool())
    ours = (streams.logits_clean, streams.logits_ablated, model(idx), *losses)
    theirs = (*logits, logits[0], loss_clean + loss_ablated, loss_clean, loss_ablated)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found = gradients(model, idx, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=gradient_tolerance)


WINDOWS = [{"attention_layers": "global,local", "window_size": n} for n in (1, 4, 11, 12, 99)]


@pytest.mark.parametrize("changes", [{}, {"attn_unit": "head"}, *WINDOWS], ids=str)
@pytest.mark.parametrize("ablation, form", VARIANTS)
def test_two_passes_compute_what_the_dual_stream_model_does(ablation, form, changes):
    """Logits, masks, losses and every gradient, in float64."""
    model = tiny(ablation=ablation, gate=form, **changes)
    p = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    *logits, attn_mask, mlp_mask = dual_stream(p, model.config, IDX)
    losses = [F.cross_entropy(x.flatten(0, 1), TARGETS.flatten()) for x in logits]
    expected = dict(zip(p, torch.autograd.grad(sum(losses), p.values())))
    compare(model, IDX, TARGETS, (*logits, attn_mask, mlp_mask, *losses, expected), 1e-10)


ORACLES = sorted(Path(__file__).parent.parent.glob("shared/oracles/*.npz"))


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_published_model(path):
    """The numbers of the authors' code where they are at hand; the transcription stands in for
    them elsewhere. Their sigmoid adds 1e-12 to T, so its gradients agree less closely."""
    oracle = {name: torch.from_numpy(value) for name, value in np.load(path).items()
              if name != "config"}
    model = GPTNeo(GPTNeoConfig(**json.loads(str(np.load(path)["config"])))).double()
    weights = {name[6:]: value for name, value in oracle.items() if name.startswith("param/")}
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    names = ("logits_clean", "logits_ablated", "attn_mask", "mlp_mask", "loss_clean",
             "loss_ablated")
    expected = {name[5:]: value for name, value in oracle.items() if name.startswith("grad/")}
    compare(model, oracle["idx"], oracle["targets"], (*map(oracle.get, names), expected),
            1e-10 if model.config.gate == "softmax" else 1e-6)


# ---------------------------------------------------------------------- what streams must never do


@pytest.mark.parametrize("attention_layers", ["global", "global,local"])
@both_ablations
def test_no_output_depends_on_a_later_token(ablation, attention_layers):
    model = tiny(ablation=ablation, attention_layers=attention_layers, window_size=4)
    with torch.no_grad():
        before = model.ablated(IDX)
        for t in range(1, 12):
            changed = torch.cat((IDX[:, :t], (IDX[:, t:] + 7) % TINY["vocab_size"]), 1)
            for old, new in zip(before, model.ablated(changed)):
                torch.testing.assert_close(new[:, :t], old[:, :t], rtol=0, atol=1e-12)
                assert not torch.allclose(new[:, t], old[:, t])  # the change is seen where it may


@both_ablations
def test_no_gradient_leaks_from_later_tokens_through_the_masks(ablation):
    """The soft weights, which only exist in the backward pass, must be causal as well."""
    model, embedded = tiny(ablation=ablation), []
    model.transformer["wte"].register_forward_hook(lambda module, args, out: embedded.append(out))
    logits = model.ablated(tokens(1, 12)).logits_ablated
    for t in range(12):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), embedded[0], retain_graph=True)
        assert torch.equal(grad[0].any(-1), torch.arange(12) <= t)


@both_ablations
def test_gates_learn_from_the_ablated_loss_only(ablation):
    for ablated_coeff in (0.0, 1.0):
        model = tiny(ablation=ablation, clean_coeff=1 - ablated_coeff, ablated_coeff=ablated_coeff)
        for name, grad in gradients(model).items():
            assert (grad != 0).any() == (ablated_coeff > 0 or "_gate." not in name), name


@both_ablations
def test_inference_does_not_touch_the_gates(ablation):
    model = tiny(ablation=ablation)
    before = model(IDX)
    for name, p in model.named_parameters():
        if "_gate." in name:
            p.data.fill_(torch.nan)
    assert torch.equal(model(IDX), before)


# --------------------------------------------------------------------------------- other precisions


def test_autocast_rounds_neither_gates_nor_their_gradients():
    model, x = tiny(dtype=torch.float32), normal(4, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.transformer["h"][0].attn_gate(x)
        streams = model.ablated(IDX)
        found = gradients(model)
    assert scores.dtype == streams.mlp_mask.dtype == torch.float32
    assert (streams.mlp_mask.sum(-1) == 5).all() and (streams.attn_mask.sum(-1) == 3).all()
    assert all(grad.isfinite().all() for grad in found.values())
    mask, cotangent = torch.ones(4, 16, requires_grad=True), normal(4, 16, seed=1).bfloat16()
    masked(x, mask).backward(cotangent)  # activations stay in bf16
    assert masked(x, mask).dtype == torch.bfloat16
    assert torch.equal(mask.grad, cotangent.float() * x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_ablations
def test_models_in_half_precision_have_both_streams(ablation, dtype):
    """All weights in bf16 or fp16, without autocast: logits are in that, masks stay exact."""
    model = tiny(ablation=ablation)
    clean, streams = model(IDX), model.to(dtype).ablated(IDX)  # the same weights, rounded
    assert streams.logits_clean.dtype == streams.logits_ablated.dtype == dtype
    assert (streams.logits_clean - clean).norm() < 0.1 * clean.norm()
    assert streams.logits_ablated.isfinite().all()
    assert (streams.mlp_mask.sum(-1) == 5).all() and (streams.attn_mask.sum(-1) == 3).all()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


# --------------------------------------------------------------------------------------- compiled

# Inductor's C++ takes 20 s a model: one of them here, all six with INDUCTOR=1
INDUCTOR = VARIANTS if os.environ.get("INDUCTOR") else [("global", "constant")]


@pytest.mark.parametrize("backend, ablation, form", [
    ("inductor" if variant in INDUCTOR else "aot_eager", *variant) for variant in VARIANTS])
def test_compiled_gradients_are_eagers(backend, ablation, form):
    """Of every parameter, without a graph break; a ramp's coefficients recompile nothing. The sizes
    are such that Inductor (torch 2.13) reads a mask before a scatter has written it."""
    changes = dict(ablation=ablation, gate=form, n_layer=1, vocab_size=32, dtype=torch.float32)
    eager, model, rows = tiny(**changes), tiny(**changes), tokens(2, 13) % 32
    torch._dynamo.reset()
    model.compile(backend=backend, fullgraph=True, dynamic=False)
    with (torch._dynamo.config.patch(error_on_recompile=True),
          torch._inductor.config.patch({"cpp.simdlen": 1})):  # compiles twice as fast
        for coeff in map(torch.tensor, (0.25, 0.5, 1.0)):
            found = gradients(model, rows[:, :-1], rows[:, 1:], coeff)
            for name, expected in gradients(eager, rows[:, :-1], rows[:, 1:], coeff).items():
                scale = expected.abs().max().item()
                assert scale > 0, name
                torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-3 * scale)


# ----------------------------------------------------------------------------- the model around it


@pytest.mark.parametrize("attention_layers", ["global", "global,local"])
def test_clean_stream_is_hugging_face_gpt_neo(attention_layers):
    """Same weights, same keys, same logits, windowed layers included (sequence 12, window 4)."""
    model = tiny(dtype=torch.float32, attention_layers=attention_layers, window_size=4)
    kinds = attention_layers.split(",")
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(
        vocab_size=61, max_position_embeddings=12, hidden_size=16, num_layers=2, num_heads=4,
        attention_types=[[kinds, 2 // len(kinds)]], window_size=4)).eval()
    theirs.load_state_dict(model.clean_state_dict())  # strict: exactly their keys
    with torch.no_grad():
        torch.testing.assert_close(model(IDX), theirs(IDX).logits, rtol=1e-5, atol=1e-5)


def test_parameter_counts_of_the_paper():
    def count(**changes):
        with torch.device("meta"):
            return sum(p.numel() for p in GPTNeo(GPTNeoConfig(**changes)).parameters())

    assert count(ablation="none") == 8_049_024
    assert count(ablation="local") == count(ablation="global") == 8_709_504
    assert count(vocab_size=10_000) == 3_556_608  # the paper's "3.6M"


def test_without_ablation_there_is_one_stream():
    model = tiny(ablation="none")
    assert not [name for name in model.state_dict() if "gate" in name]
    losses = model(IDX, TARGETS)
    assert losses.loss_ablated is None and torch.equal(losses.loss, losses.loss_clean)
    with pytest.raises(ModelError, match="no ablated stream"):
        model.ablated(IDX)
