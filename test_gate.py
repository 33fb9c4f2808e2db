"""What self-ablation is, as tests: the gate, its gradient, the two streams, and what they must never do.

    python -m pytest test_gate.py            (about half a minute; offline, on a CPU)

References are independent of model.py: finite differences, Hugging Face's GPT-Neo, a slow transcription of the
paper that runs both streams side by side (`dual_stream` below), and, where ../shared/oracles exists, what the
authors' published code computes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import model as model_file
from model import GPTNeo, GPTNeoConfig, gate, masked

TINY = dict(vocab_size=61, block_size=12, n_layer=2, n_head=4, n_embd=16, k_attn=3, k_mlp=5)
VARIANTS = [(ablation, form) for ablation in ("local", "global") for form in ("softmax", "sigmoid", "constant")]


def tiny(seed=0, dtype=torch.float64, **changes):
    """A small model whose weights, biases included, are all large enough to matter."""
    torch.manual_seed(seed)
    model = GPTNeo(GPTNeoConfig(**{**TINY, **changes})).to(dtype)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model


def tokens(*shape, seed=1, vocab_size=TINY["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- the value: k winners


def awkward_scores(dtype):
    generator = torch.Generator().manual_seed(0)
    big = torch.finfo(dtype).max
    yield torch.randn(50, 16, generator=generator).to(dtype)
    yield torch.randint(3, (50, 16), generator=generator).to(dtype)  # ties everywhere
    yield torch.zeros(4, 16, dtype=dtype)  # nothing but a tie
    yield torch.full((4, 16), -big, dtype=dtype)
    yield torch.randn(50, 16, generator=generator).sign().to(dtype) * big  # s - gamma overflows
    yield torch.randn(50, 16, generator=generator).sign().to(dtype) * torch.inf
    yield (torch.randn(50, 16, generator=generator) * 1e-30).to(dtype)  # gaps far below the floor under T
    yield torch.randn(2, 3, 16, generator=generator).to(dtype)  # any leading shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["softmax", "sigmoid", "constant"])
@pytest.mark.parametrize("k", [1, 2, 8, 15])
def test_exactly_k_ones_on_the_largest_scores(dtype, form, k):
    for scores in awkward_scores(dtype):
        for needs_grad in (False, True):  # the soft form, which only exists with a gradient, must not show
            mask = gate(scores.clone().requires_grad_(needs_grad), k, form).detach()
            assert ((mask == 0) | (mask == 1)).all()
            assert (mask.sum(-1) == k).all()
            scores_of = scores.to(mask.dtype)
            worst_winner = scores_of.masked_fill(mask == 0, torch.inf).amin(-1)
            best_loser = scores_of.masked_fill(mask == 1, -torch.inf).amax(-1)
            assert (worst_winner >= best_loser).all()


def test_the_mask_is_at_least_single_precision():
    assert gate(torch.randn(3, 8, dtype=torch.bfloat16), 2).dtype == torch.float32
    assert gate(torch.randn(3, 8, dtype=torch.float64), 2).dtype == torch.float64


# --------------------------------------------------------------------------- the gradient: that of Eq. 3


def soft_weights(s, k, form):
    """Eq. 1-3 for one row in NumPy, or the published code's sigmoid, or T = 1; s (N,) float64."""
    ordered = np.sort(s)[::-1]
    gamma, T = (ordered[k - 1] + ordered[k]) / 2, ordered[k - 1] - ordered[k]
    z = s if form == "constant" else (s - gamma) / T
    w = k / (1 + np.exp(-z)) if form == "sigmoid" else np.exp(z - z.max())
    return w / (w.sum() / k) if form == "sigmoid" else w / w.sum()


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "constant"])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_gradient_is_that_of_the_soft_weights_through_gamma_and_T(form, k):
    """Against central differences of an independent Eq. 3, for a random cotangent."""
    rng = np.random.default_rng(k)
    for _ in range(5):
        s = rng.permutation(np.arange(10) + rng.uniform(-0.3, 0.3, 10))  # apart enough that a step keeps the order
        cotangent, eps = rng.normal(size=10), 1e-6
        scores = torch.tensor(s, requires_grad=True)
        (gate(scores, k, form) * torch.tensor(cotangent)).sum().backward()
        numeric = [((soft_weights(s + eps * e, k, form) - soft_weights(s - eps * e, k, form)) @ cotangent) / (2 * eps)
                   for e in np.eye(10)]
        np.testing.assert_allclose(scores.grad, numeric, rtol=1e-6, atol=1e-7 * np.abs(numeric).max())


def test_gradient_equals_autograd_of_eq_3():
    s = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cotangent = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for k in (1, 4, 11):
        ours, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
        (gate(ours, k) * cotangent).sum().backward()
        ordered = plain.sort(-1, descending=True).values
        ((plain / (ordered[:, k - 1 : k] - ordered[:, k : k + 1])).softmax(-1) * cotangent).sum().backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-10)


def test_a_constant_T_takes_autograds_gradient_of_a_plain_softmax():
    s = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s[:5] = s[:5].round()  # rows with ties: nothing depends on the gap
    cotangent = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for k in (1, 4, 11):
        ours, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
        (gate(ours, k, "constant") * cotangent).sum().backward()
        (plain.softmax(-1) * cotangent).sum().backward()
        assert torch.equal(ours.grad, plain.grad)
        assert torch.equal(gate(s, k, "constant"), gate(s, k, "softmax"))  # the mask is the same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["softmax", "sigmoid", "constant"])
def test_gradient_is_finite_at_ties(dtype, form):
    for rows in (torch.zeros(4, 16), torch.tensor([[1.0] * 3 + [0.0] * 13]), torch.randint(3, (50, 16)).float()):
        for k in (1, 2, 15):
            scores = rows.to(dtype).requires_grad_()
            (gate(scores, k, form) * torch.randn(16)).sum().backward()
            assert scores.grad.isfinite().all()


# ------------------------------------------------------------- both streams, against a slow transcription


def dual_stream(p, config, idx):
    """The paper read literally, in the order of the published code: both streams side by side, a token's keys
    assembled one token at a time. p: state dict -> logits (B, T, V) of both, masks (B, T, L, N)."""
    L, H, C = config.n_layer, config.n_head, config.n_embd

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def heads(x, name):
        return (x @ p[name].T).view(*x.shape[:2], H, C // H)

    def attend(q, keys, values):  # q (B, H, D), lists of (B, H, D)
        scores = torch.stack([(q * key).sum(-1) for key in keys], -1)  # (B, H, S), not scaled
        return sum(w[..., None] * value for w, value in zip(scores.softmax(-1).unbind(-1), values))

    def winners(s, k):
        ordered = s.sort(-1, descending=True).values
        s_k, s_next = ordered[..., k - 1, None], ordered[..., k, None]
        z = s if config.gate == "constant" else (s - (s_k + s_next) / 2) / (s_k - s_next)
        soft = k * z.sigmoid() / z.sigmoid().sum(-1, keepdim=True) if config.gate == "sigmoid" else z.softmax(-1)
        return (s >= s_k).to(s.dtype) + soft - soft.detach()

    def gates(x, prefix, layer=None):  # (B, T, C) -> masks of one layer
        masks = []
        for kind, n, k in (("attn", config.attn_units, config.k_attn), ("mlp", 4 * C, config.k_mlp)):
            s = x @ p[f"{prefix}{kind}_gate.weight"].T + p[f"{prefix}{kind}_gate.bias"]
            masks.append(winners(s if layer is None else s[..., layer * n : (layer + 1) * n], k))
        return masks

    def block(layer, x, keys=None, masks=None):
        """One block on one stream; keys: the clean stream's (k, v), each (B, T, H, D)."""
        name = f"transformer.h.{layer}"
        h = norm(x, f"{name}.ln_1")
        q, k, v = (heads(h, f"{name}.attn.attention.{kind}_proj.weight") for kind in "qkv")
        k_seen, v_seen = keys or (k, v)
        y = torch.stack([attend(q[:, t], [*k_seen[:, :t].unbind(1), k[:, t]], [*v_seen[:, :t].unbind(1), v[:, t]])
                         for t in range(x.size(1))], 1).flatten(2)
        if masks:
            y = y * masks[0].repeat_interleave(C // masks[0].size(-1), -1)
        x = x + y @ p[f"{name}.attn.attention.out_proj.weight"].T + p[f"{name}.attn.attention.out_proj.bias"]
        h = norm(x, f"{name}.ln_2") @ p[f"{name}.mlp.c_fc.weight"].T + p[f"{name}.mlp.c_fc.bias"]
        neurons = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        if masks:
            neurons = neurons * masks[1]
        return x + neurons @ p[f"{name}.mlp.c_proj.weight"].T + p[f"{name}.mlp.c_proj.bias"], (k, v)

    start = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][: idx.size(1)]
    masks = [None] * L
    if config.ablation == "global":  # scores come from a whole clean pass before the two streams start
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


def compare_with(reference, model, idx, targets, gradient_tolerance):
    """reference: logits_clean, logits_ablated, attn_mask, mlp_mask, loss_clean, loss_ablated, {name: gradient}."""
    logits_clean, logits_ablated, attn_mask, mlp_mask, loss_clean, loss_ablated, gradients = reference
    streams, losses = model.ablated(idx), model(idx, targets)
    losses.loss.backward()
    assert torch.equal(streams.attn_mask.bool(), attn_mask.bool())
    assert torch.equal(streams.mlp_mask.bool(), mlp_mask.bool())
    for ours, theirs in ((streams.logits_clean, logits_clean), (streams.logits_ablated, logits_ablated),
                         (losses.loss_clean, loss_clean), (losses.loss_ablated, loss_ablated),
                         (losses.loss, loss_clean + loss_ablated), (model(idx), logits_clean)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    parameters = dict(model.named_parameters())  # the tied embedding once
    assert gradients.keys() == parameters.keys()
    worst = max((parameters[name].grad - gradient).abs().max().item() for name, gradient in gradients.items())
    assert worst < gradient_tolerance
    return worst


@pytest.mark.parametrize("attn_unit", ["dim", "head"])
@pytest.mark.parametrize("ablation, form", VARIANTS)
def test_two_passes_compute_what_the_dual_stream_model_does(ablation, form, attn_unit):
    """Logits, masks, losses and every gradient, in float64."""
    model = tiny(ablation=ablation, gate=form, attn_unit=attn_unit)
    idx, targets = tokens(2, 12), tokens(2, 12, seed=2)
    p = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    *outputs, attn_mask, mlp_mask = dual_stream(p, model.config, idx)
    losses = [F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in outputs]
    gradients = dict(zip(p, torch.autograd.grad(sum(losses), p.values())))
    compare_with((*outputs, attn_mask, mlp_mask, *losses, gradients), model, idx, targets, 1e-10)


# the published code adds 1e-12 to T, so its sigmoid gradients agree less closely
ORACLES = sorted(Path(__file__).parent.parent.glob("shared/oracles/*.npz"))


@pytest.mark.parametrize("path", ORACLES or [None], ids=lambda path: path.stem if path else "none given")
def test_published_model(path):
    """The numbers of the authors' code where they are at hand; elsewhere the transcription above stands in."""
    if path is None:
        return test_two_passes_compute_what_the_dual_stream_model_does("local", "softmax", "dim")
    oracle = {name: torch.from_numpy(value) for name, value in np.load(path).items() if name != "config"}
    config = GPTNeoConfig(**json.loads(str(np.load(path)["config"])))
    model = GPTNeo(config).double()
    parameters = {name[6:]: value for name, value in oracle.items() if name.startswith("param/")}
    model.load_state_dict({**parameters, "lm_head.weight": parameters["transformer.wte.weight"]})
    gradients = {name[5:]: value for name, value in oracle.items() if name.startswith("grad/")}
    names = ("logits_clean", "logits_ablated", "attn_mask", "mlp_mask", "loss_clean", "loss_ablated")
    worst = compare_with((*(oracle[name] for name in names), gradients), model, oracle["idx"], oracle["targets"],
                         1e-10 if config.gate == "softmax" else 1e-6)
    print(f"{path.stem}: loss {oracle['loss_clean']:.6f} / {oracle['loss_ablated']:.6f}, worst gradient error {worst:.1e}")


# --------------------------------------------------------------------------- what the streams must never do


@pytest.mark.parametrize("attention_layers", ["global", "global,local"])
@pytest.mark.parametrize("ablation", ["local", "global"])
def test_no_output_depends_on_a_later_token(ablation, attention_layers):
    """Neither logits nor masks before t move when the tokens from t on change."""
    model = tiny(ablation=ablation, attention_layers=attention_layers, window_size=4)
    idx = tokens(2, 12)
    with torch.no_grad():
        before = model.ablated(idx)
        for t in range(1, 12):
            changed = torch.cat((idx[:, :t], (idx[:, t:] + 7) % TINY["vocab_size"]), 1)
            for old, new in zip(before, model.ablated(changed)):
                torch.testing.assert_close(new[:, :t], old[:, :t], rtol=0, atol=1e-12)
                assert not torch.allclose(new[:, t], old[:, t])  # and the change is seen where it may be


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_no_gradient_leaks_from_later_tokens_through_the_masks(ablation):
    """The soft weights, which only exist in the backward pass, must be causal as well."""
    model = tiny(ablation=ablation)
    embedded = []
    model.transformer["wte"].register_forward_hook(lambda module, args, out: embedded.append(out))
    logits = model.ablated(tokens(1, 12)).logits_ablated
    for t in range(12):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), embedded[0], retain_graph=True)
        assert (grad[0, t + 1 :] == 0).all()
        assert (grad[0, : t + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_gates_learn_from_the_ablated_loss_only(ablation):
    idx, targets = tokens(2, 12), tokens(2, 12, seed=2)
    for clean_coeff, ablated_coeff in ((1.0, 0.0), (0.0, 1.0)):
        model = tiny(ablation=ablation, clean_coeff=clean_coeff, ablated_coeff=ablated_coeff)
        gates = [p for name, p in model.named_parameters() if "_gate." in name]
        for grad in torch.autograd.grad(model(idx, targets).loss, gates):
            assert (grad.abs().max() > 0) == (ablated_coeff > 0)


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_inference_does_not_touch_the_gates(ablation):
    model, idx = tiny(ablation=ablation), tokens(2, 12)
    before = model(idx)
    for name, p in model.named_parameters():
        if "_gate." in name:
            p.data.fill_(torch.nan)
    assert torch.equal(model(idx), before)


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_streams_coincide_when_nothing_is_ablated(ablation, monkeypatch):
    model, idx = tiny(ablation=ablation), tokens(2, 12)
    monkeypatch.setattr(model_file, "gate", lambda scores, k, form: torch.ones_like(scores))
    streams = model.ablated(idx)
    torch.testing.assert_close(streams.logits_ablated, streams.logits_clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_one_unit_less_is_nearly_clean(ablation):
    """The largest k allowed, at a width where one unit is little: close to clean, where k = 1 is far from it."""
    def distance(**k):
        streams = tiny(ablation=ablation, n_embd=128, **k).ablated(tokens(4, 12))
        return (streams.logits_ablated - streams.logits_clean).norm() / streams.logits_clean.norm()

    assert distance(k_attn=127, k_mlp=511) < 0.2
    assert distance(k_attn=1, k_mlp=1) > 1


def test_whole_heads_win_or_lose_together():
    model, seen = tiny(attn_unit="head", k_attn=1), []
    model.transformer["h"][0].attn["attention"].out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = model.ablated(tokens(2, 12)).attn_mask  # (B, T, L, H)
    kept = seen[1].view(2, 12, 4, 4).abs().sum(-1) > 0  # seen[0] is the clean stream
    assert torch.equal(kept, mask[:, :, 0].bool())


def test_gates_stay_in_full_precision_under_autocast():
    model = tiny(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        gate_scores = model.transformer["h"][0].attn_gate(torch.randn(2, 12, 16, dtype=torch.bfloat16))
        streams = model.ablated(tokens(2, 12))
        model(tokens(2, 12), tokens(2, 12, seed=2)).loss.backward()
    assert gate_scores.dtype == streams.mlp_mask.dtype == torch.float32
    assert (streams.mlp_mask.sum(-1) == 5).all() and (streams.attn_mask.sum(-1) == 3).all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_mask_has_its_whole_gradient_under_autocast():
    """Activations in bf16 stay so, but what a gate learns from is not rounded to bf16."""
    x, mask = torch.randn(4, 16).bfloat16(), torch.ones(4, 16, requires_grad=True)
    cotangent = torch.randn(4, 16).bfloat16()
    kept = masked(x, mask)
    kept.backward(cotangent)
    assert kept.dtype == torch.bfloat16 and torch.equal(kept, x)
    assert torch.equal(mask.grad, cotangent.float() * x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_unit", ["dim", "head"])
@pytest.mark.parametrize("ablation", ["local", "global"])
def test_models_in_half_precision_have_both_streams(ablation, attn_unit, dtype):
    """All weights in bf16 or fp16, without autocast: logits are in that, masks stay exact."""
    exact, idx = tiny(ablation=ablation, attn_unit=attn_unit), tokens(2, 12)
    clean, model = exact(idx), exact.to(dtype)  # the same weights, rounded
    streams, losses = model.ablated(idx), model(idx, tokens(2, 12, seed=2))
    assert streams.logits_clean.dtype == streams.logits_ablated.dtype == dtype
    assert torch.equal(streams.logits_clean, model(idx)) and streams.logits_ablated.isfinite().all()
    assert (streams.mlp_mask.sum(-1) == 5).all() and (streams.attn_mask.sum(-1) == 3).all()
    losses.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (streams.logits_clean - clean).norm() < 0.1 * clean.norm()


# ----------------------------------------------------------------------------------- the model around it


@pytest.mark.parametrize("attention_layers", ["global", "global,local"])
def test_clean_stream_is_hugging_face_gpt_neo(attention_layers):
    """Same weights, same keys, same logits, windowed layers included (sequence 12, window 4)."""
    model = tiny(dtype=torch.float32, attention_layers=attention_layers, window_size=4)
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**model.hf_config())).eval()
    theirs.load_state_dict(model.clean_state_dict())  # strict: exactly their keys
    idx = tokens(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)


def test_parameter_counts_of_the_paper():
    def count(**changes):
        return sum(p.numel() for p in GPTNeo(GPTNeoConfig(**changes)).parameters())

    assert count(ablation="none") == 8_049_024  # the plain GPT-Neo: "none" adds nothing
    assert count(ablation="local") == 8_709_504  # 660,480 more
    assert count(ablation="global") == 8_709_504
    assert count(ablation="local", vocab_size=10_000) == 3_556_608  # the paper's "3.6M"


def test_without_ablation_there_is_one_stream():
    model = tiny(ablation="none")
    assert not [name for name in model.state_dict() if "gate" in name]
    losses = model(tokens(2, 12), tokens(2, 12, seed=2))
    assert losses.loss_ablated is None and torch.equal(losses.loss, losses.loss_clean)
    with pytest.raises(ValueError, match="no ablated stream"):
        model.ablated(tokens(2, 12))


@pytest.mark.parametrize("changes, message", [
    (dict(k_attn=0), "k_attn=0 must be from 1 to 15"),
    (dict(k_attn=16), "k_attn=16 must be from 1 to 15"),
    (dict(attn_unit="head", k_attn=4), "k_attn=4 must be from 1 to 3"),
    (dict(k_mlp=64), "k_mlp=64 must be from 1 to 63"),
    (dict(n_head=3), "n_embd=16 is not divisible by n_head=3"),
    (dict(gate="relu"), "gate='relu' is not one of: softmax, sigmoid"),
    (dict(ablation="both"), "ablation='both' is not one of: none, local, global"),
    (dict(attention_layers="global,local,local"), "attention_layers"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(n_layer="2"), "n_layer='2' is not of type int"),
    (dict(clean_coeff=None), "clean_coeff=None is not of type float"),
])
def test_configurations_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTNeoConfig(**{**TINY, **changes})


def test_sequences_and_tokens_that_do_not_fit_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="13 tokens is longer than block_size=12"):
        model(tokens(1, 13))
    with pytest.raises(ValueError, match="token 61 is outside the vocabulary of 61"):
        model(torch.tensor([[3, 61]]))
    with pytest.raises(ValueError, match="token -1 is outside"):
        model(torch.tensor([[3, 4]]), torch.tensor([[4, -1]]))
