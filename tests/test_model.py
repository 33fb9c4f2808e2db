"""The model around the gate: the loss in chunks, generation, Hugging Face."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_model

from model import GPTNeo, ModelError, cross_entropy, gate


def tiny(**changes):
    size = dict(vocab_size=50, block_size=16, n_layer=2, n_embd=16, k_attn=3, k_mlp=5)
    return tiny_model(**{**size, **changes}).double()


def refused(call, *arguments):
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prompt(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


# ---- the loss


@pytest.mark.parametrize("chunked", [True, False])
def test_cross_entropy_is_torchs_with_both_gradients(chunked, monkeypatch):
    """450 rows in chunks of 130, and without F.linear_cross_entropy, as in torch 2.11."""
    if not chunked:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    V, results, generator = 50_000, [], torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 150, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, 4, dtype=torch.float64, generator=generator)
    targets = torch.randint(V, (3, 150), generator=generator)

    def reference(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())

    for loss_of in (cross_entropy, reference):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(h, w, targets)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


def test_losses_are_weighted_and_not_rounded_by_autocast():
    model, idx, targets = tiny(clean_coeff=0.1, ablated_coeff=0.9), prompt(2, 16), prompt(2, 16)
    streams, losses = model.ablated(idx), model(idx, targets)
    means = [F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in streams[:2]]
    torch.testing.assert_close(losses[1:], tuple(means))
    torch.testing.assert_close(losses.loss, 0.1 * means[0] + 0.9 * means[1])
    ramped = model(idx, targets, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(ramped.loss, 0.1 * means[0] + 0.3 * means[1])
    assert model(idx, targets, 0).loss_ablated is None
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(idx, targets).loss.dtype == torch.float32


# ---- generation


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("changes", [{"ablation": "global"}, {"attention_layers": "global,local"}])
def test_greedy_generation_is_a_plain_loop(stream, changes):
    """Also past the end of the context, which is the last block_size tokens."""
    model, idx = tiny(window_size=4, **changes), prompt(3, 5)
    written = model.generate(idx, 20, temperature=0, stream=stream)
    for _ in range(20):
        logits = getattr(model.ablated(idx[:, -16:]), f"logits_{stream}")
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(written, idx)


def frequencies(model, **how):
    torch.manual_seed(0)
    drawn = model.generate(prompt(1, 5).expand(8000, -1), 1, **how)[:, -1]
    return torch.bincount(drawn, minlength=50) / 8000


def test_sampling_follows_temperature_and_top_k():
    model = tiny()
    p = (model(prompt(1, 5))[0, -1] / 2).softmax(-1).float()
    torch.testing.assert_close(frequencies(model, temperature=2.0), p, rtol=0, atol=0.025)
    p[p.argsort(descending=True)[4:]] = 0
    found = frequencies(model, temperature=2.0, top_k=4)
    torch.testing.assert_close(found, p / p.sum(), rtol=0, atol=0.025)
    assert torch.equal(frequencies(model, top_k=500), frequencies(model))
    model.lm_head.weight.data[10:20] = model.lm_head.weight.data[10]  # ten tokens tie
    assert (frequencies(model, temperature=1e9, top_k=5) > 0).sum() == 5


# ---- Hugging Face


def their_config(**changes):
    return transformers.GPTNeoConfig(**{**dict(
        vocab_size=50, max_position_embeddings=16, hidden_size=16, num_layers=6, num_heads=2,
        window_size=3, attention_types=[[["global", "local", "local"], 2]], bos_token_id=0,
        eos_token_id=0), **changes})


def test_a_folder_of_hugging_face_gives_its_logits(tmp_path):
    theirs = transformers.GPTNeoForCausalLM(their_config()).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPTNeo.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(prompt(2, 16)), theirs(prompt(2, 16)).logits)
    assert ours.config.attention_layers == "global,local,local"  # what train.py compares knobs with
    masks = {"bias": torch.ones(16, 16).bool(), "masked_bias": torch.tensor(-torch.inf).half()}
    masks = {f"transformer.h.0.attn.attention.{name}": mask for name, mask in masks.items()}
    half = {name: weight.half() for name, weight in theirs.state_dict().items()}
    their_config().save_pretrained(tmp_path / "old")
    torch.save(half | masks, tmp_path / "old" / "pytorch_model.bin")  # as older transformers did
    wpe = GPTNeo.from_pretrained(tmp_path / "old").transformer["wpe"].weight
    assert torch.equal(wpe, half["transformer.wpe.weight"].float())
    longer = dict(num_layers=8, attention_types=[[["global", "local"], 4]])
    for config, message in (
            (their_config(activation_function="relu"), "activation_function=relu, not gelu_new"),
            (their_config(layer_norm_epsilon=0.1), "layer_norm_epsilon=0.1, not 1e-05"),
            (their_config(tie_word_embeddings=False), "tie_word_embeddings=False, not True"),
            (transformers.GPT2Config(), "model_type=gpt2, not gpt_neo"),
            (their_config(**longer), "lacks weights: transformer.h.")):
        config.save_pretrained(tmp_path)
        assert message in refused(GPTNeo.from_pretrained, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    their_config().save_pretrained(tmp_path)
    assert "cannot load" in refused(GPTNeo.from_pretrained, tmp_path)
    assert "cannot load" in refused(GPTNeo.from_pretrained, tmp_path / "missing")


def test_what_the_model_refuses():
    assert "no gate=sofmax" in refused(gate, torch.randn(2, 5), 2, "sofmax")
    assert "17 tokens is longer than block_size=16" in refused(tiny(), prompt(1, 17))
