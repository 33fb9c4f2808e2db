"""The model around the gate: attention, the loss in chunks, generation, export.

    python -m pytest tests/test_model.py
"""

import pytest
import torch
import torch.nn.functional as F
import transformers

import model as model_file
from model import (ChunkedCrossEntropy, GPTNeo, GPTNeoConfig, ablated_attention, attention, cross_entropy,
                   head_losses)

V = 50


def tiny(ablation="local", **changes):
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(**{**dict(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=16, k_attn=3, k_mlp=5,
                                          ablation=ablation), **changes})).double()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model


def prompt(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


# ---- attention


@pytest.mark.parametrize("window", [1, 3, 6, 7, 100])
@pytest.mark.parametrize("T", [7, 3, 1])  # of 7 tokens, the last T are queries: the others are cached
def test_attention_is_a_softmax_over_what_a_query_sees(T, window):
    """Each query on its own: its position and the window - 1 before it, in one softmax, unscaled. On the ablated
    stream the key and the value at its own position are its own."""
    S, generator = 7, torch.Generator().manual_seed(0)
    q, k_own, v_own, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator) for n in (T, T, T, S, S))

    def expected(own):
        rows = []
        for row, at in enumerate(range(S - T, S)):
            first = max(0, at - window + 1)
            keys, values = k[:, :, first : at + 1].clone(), v[:, :, first : at + 1].clone()  # (2, 3, seen, 4)
            if own:
                keys[:, :, -1], values[:, :, -1] = k_own[:, :, row], v_own[:, :, row]
            weights = (q[:, :, row, None] * keys).sum(-1).softmax(-1)  # (2, 3, seen)
            rows.append((weights[..., None] * values).sum(2))
        return torch.stack(rows, 2)

    torch.testing.assert_close(attention(q, k, v, window), expected(own=False), rtol=0, atol=1e-12)
    torch.testing.assert_close(ablated_attention(q, k, v, k_own, v_own, window), expected(own=True), rtol=0, atol=1e-12)


# ---- the loss


def test_chunks_compute_what_the_plain_loss_does(monkeypatch):
    """Value, losses of the rows and both gradients, with another weight for every row."""
    monkeypatch.setattr(model_file, "CHUNK", 7 * V)
    hidden, weight = torch.randn(30, 8, dtype=torch.float64), torch.randn(V, 8, dtype=torch.float64)
    targets, scale, results = prompt(30), torch.rand(30, dtype=torch.float64), []
    for loss_of in (ChunkedCrossEntropy.apply, cross_entropy):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, nll = loss_of(h, w, targets, scale)
        (3 * loss).backward()
        results.append((loss.detach(), nll.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_frozen_head_gets_no_gradient_and_passes_on_the_same():
    hidden, weight, targets, scale = torch.randn(30, 8), torch.randn(V, 8), prompt(30), torch.rand(30)
    passed_on = []
    for frozen in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss = ChunkedCrossEntropy.apply(h, w, targets, scale)[0]
        assert (loss.grad_fn.saved_tensors[1] is None) == frozen
        loss.backward()
        assert (w.grad is None) == frozen
        passed_on.append(h.grad)
    assert torch.equal(*passed_on)


@pytest.mark.parametrize("chunk", [1, 7 * V, 10**9])
@pytest.mark.parametrize("coeffs", [[1.0], [0.3, 2.0]])
def test_chunked_losses_are_cross_entropies_with_all_their_gradients(chunk, coeffs, monkeypatch):
    monkeypatch.setattr(model_file, "CHUNK", chunk)
    streams, weight = torch.randn(len(coeffs), 3, 10, 8, dtype=torch.float64), torch.randn(V, 8, dtype=torch.float64)
    targets, results = prompt(3, 10), []

    def reference(hidden, weight, targets, coeffs):
        means = torch.stack([F.cross_entropy((h @ weight.T).flatten(0, 1), targets.flatten()) for h in hidden])
        return means @ torch.tensor(coeffs, dtype=means.dtype), means

    for losses_of in (head_losses, reference):
        h, w = streams.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, means = losses_of(list(h), w, targets, coeffs)
        (3 * loss).backward()
        results.append((loss.detach(), means.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_autocast_rounds_no_loss():
    model, idx, targets = tiny().float(), prompt(2, 16), prompt(2, 16).flip(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(idx, targets)
    assert losses.loss.dtype == torch.float32
    torch.testing.assert_close(losses.loss, losses.loss_clean + losses.loss_ablated)


def test_loss_coefficients_weight_the_two_streams():
    idx, targets = prompt(2, 16), prompt(2, 16).flip(0)
    plain = tiny()(idx, targets)
    weighted = tiny(clean_coeff=0.1, ablated_coeff=0.9)(idx, targets)
    torch.testing.assert_close(weighted.loss, 0.1 * plain.loss_clean + 0.9 * plain.loss_ablated)


def test_the_full_logits_never_exist_in_training(monkeypatch):
    """No tensor as large as (B T, V) is made between the hidden states and the gradients."""
    monkeypatch.setattr(model_file, "CHUNK", 4 * V)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    hidden, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    with Watch():
        head_losses([hidden, hidden], weight, prompt(2, 16), [1.0, 1.0])[0].backward()
    assert max(sizes) < 32 * V  # one stream's; there are two


# ---- generation


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("changes", [{}, {"ablation": "global"}, {"attention_layers": "global,local", "window_size": 4}])
def test_generation_with_the_cache_is_generation_without(stream, changes):
    """Greedy, against a full pass over the last block_size tokens for every token, past the end of the context."""
    model, idx = tiny(**changes), prompt(3, 5)
    written = model.generate(idx, 20, temperature=0, stream=stream)
    for _ in range(20):
        streams = model.ablated(idx[:, -16:])
        logits = streams.logits_clean if stream == "clean" else streams.logits_ablated
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(written, idx)


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_each_new_token_costs_one_position(stream):
    model, widths = tiny(), []
    model.transformer["wte"].register_forward_hook(lambda module, args, out: widths.append(out.size(1)))
    model.generate(prompt(1, 5), 6, stream=stream)
    assert widths == [5, 1, 1, 1, 1, 1]


def frequencies(model, idx, **how):
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(idx.expand(8_000, -1), 1, generator=generator, **how)[:, -1]
    return torch.bincount(drawn, minlength=V) / 8_000


def test_sampling_follows_temperature_top_k_and_top_p():
    """Against probabilities cut by hand, in the order temperature, top_k, top_p."""
    model, idx = tiny(), prompt(1, 5)
    p = (model(idx)[0, -1] / 2.0).softmax(-1)
    top = p.argsort(descending=True)
    assert torch.allclose(frequencies(model, idx, temperature=2.0), p.float(), atol=0.025)
    kept = torch.zeros_like(p)
    kept[top[:4]] = p[top[:4]]
    assert torch.allclose(frequencies(model, idx, temperature=2.0, top_k=4), (kept / kept.sum()).float(), atol=0.025)
    count = int((p[top].cumsum(0) < 0.6).sum()) + 1  # the fewest that hold 0.6
    kept = torch.zeros_like(p)
    kept[top[:count]] = p[top[:count]]
    assert torch.allclose(frequencies(model, idx, temperature=2.0, top_p=0.6), (kept / kept.sum()).float(), atol=0.025)
    assert frequencies(model, idx, top_p=1e-9)[top[0]] == 1  # the likeliest always stays
    assert torch.equal(frequencies(model, idx, top_k=10 * V), frequencies(model, idx))


def test_a_seeded_generator_repeats_itself():
    model, idx = tiny(), prompt(2, 5)
    first, second, other = (model.generate(idx, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_rows_stop_at_the_stop_token_each_on_its_own():
    model, idx = tiny(), prompt(6, 3)
    free = model.generate(idx, 30, generator=torch.Generator().manual_seed(0))
    stop = int(free[0, 8])
    written = model.generate(idx, 30, generator=torch.Generator().manual_seed(0), stop_token=stop)
    lengths = []
    for row, unstopped in zip(written[:, 3:].tolist(), free[:, 3:].tolist()):
        length = row.index(stop) if stop in row else len(row)
        assert row[:length] == unstopped[:length] and set(row[length:]) <= {stop}
        lengths.append(length)
    assert written.size(1) - 3 == min(30, max(lengths) + 1)  # the call ended with its last row


@pytest.mark.parametrize("how, message", [
    (dict(stream="soft"), "stream='soft'"), (dict(temperature=-1), "temperature=-1"), (dict(top_k=0), "top_k=0"),
    (dict(top_p=0), "top_p=0"), (dict(top_p=1.5), "top_p=1.5"),
])
def test_what_cannot_be_sampled_from_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(prompt(1, 5), 1, **how)


def test_generation_refuses_bad_prompts_and_missing_streams():
    with pytest.raises(ValueError, match="ablation='none'"):
        tiny("none").generate(prompt(1, 5), 1, stream="ablated")
    with pytest.raises(ValueError, match="empty"):
        tiny().generate(prompt(1, 0), 1)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tiny().generate(torch.tensor([[V]]), 1)


# ---- export and analysis


def test_exported_weights_generate_the_same_text_in_transformers():
    model = tiny().float()
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**model.hf_config())).eval()
    theirs.load_state_dict(model.clean_state_dict())
    idx = prompt(1, 5)
    ours = model.generate(idx, 8, temperature=0)
    assert torch.equal(ours, theirs.generate(idx, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None))


def test_plain_hooks_reach_the_activations_of_interest():
    """Neurons, head outputs and the residual stream are inputs or outputs of plainly named modules."""
    model, seen = tiny(), {}
    block = model.transformer["h"][1]
    for name, module in {"neurons": block.mlp.c_proj, "heads": block.attn["attention"].out_proj, "resid": block.ln_2}.items():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    for name, module in {"mlp_out": block.mlp, "q": block.attn["attention"].q_proj, "block": block}.items():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    model(prompt(2, 7))
    shapes = {name: tuple(x.shape) for name, x in seen.items() if name != "block"}
    assert shapes == {"neurons": (2, 7, 64), "heads": (2, 7, 16), "resid": (2, 7, 16), "mlp_out": (2, 7, 16), "q": (2, 7, 16)}
    torch.testing.assert_close(seen["block"][0], seen["resid"] + seen["mlp_out"])
