"""interp/activations.py: sites against the model's own tensors, the strongest moments against brute force.

    python -m pytest tests/test_activations.py
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from interp import activations
from interp.activations import (SITES, Site, Stopped, Strongest, Text, held_out_windows, read_sites,
                                read_windows, windows_at)
from model import GPTNeo, GPTNeoConfig
from prepare import UserError

EOT, V, T = 20, 21, 8


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=8)
    model = GPTNeo(GPTNeoConfig(**{**sizes, **changes}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model.double()


def words(count, seed=0, share=0.1):
    """Random tokens; this share of them ends a story."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, EOT, count)
    stream[rng.random(count) < share] = EOT
    return stream.astype("<u2")


def ids(stream):
    return torch.from_numpy(stream.astype(np.int64)).view(-1, T)


# ---- a place in the stream


@pytest.mark.parametrize("site", list(SITES))
def test_a_site_is_that_tensor_of_the_clean_stream(site):
    model, idx = tiny(), ids(words(40))
    block = model.transformer["h"][1]
    with torch.no_grad():
        hidden, inputs, _ = model.clean_pass(idx)
        attended = block.attn["attention"](block.ln_1(inputs[1]))[0]
        h = block.ln_2(inputs[1] + attended)
        kept = {"mlp_out": block.mlp(h), "attn_out": attended, "resid": inputs[2],
                "mlp_act": torch.nn.functional.gelu(block.mlp.c_fc(h), approximate="tanh")}
        out_proj = block.attn["attention"].out_proj
        kept["attn_act"] = (attended - out_proj.bias) @ torch.linalg.inv(out_proj.weight).T
        whole = model(idx)
    x = kept[site]
    raw, centered = Site(model, 1, site, center=False), Site(model, 1, site)
    assert torch.allclose(raw.read(idx), x) and raw.d == x.size(-1)
    if site not in activations.UNITS:
        assert torch.allclose(centered.read(idx), x - x.mean(-1, keepdim=True))
        assert torch.allclose(centered.run(idx, lambda x: x), whole)  # LayerNorm hides the shift
    assert torch.allclose(raw.run(idx, lambda x: x), whole)
    changed = raw.run(idx, lambda x: torch.where(torch.arange(T)[:, None] < 5, x, 0 * x))
    assert torch.allclose(changed[:, :5], whole[:, :5])
    assert not torch.allclose(changed[:, 5:], whole[:, 5:])
    assert torch.allclose(model(idx), whole)  # no hook is left


def test_there_is_no_such_block():
    with pytest.raises(UserError, match="--layer=3: the blocks of this model are 0 to 2"):
        Site(tiny(), 3, "resid")


def test_all_sites_are_read_in_one_pass_that_stops_after_the_last():
    """Centred ones among them: looking must not change what comes after."""
    model, idx = tiny(), ids(words(40))
    sites = [Site(model, layer, site) for layer in (1, 0) for site in SITES]
    alone = torch.cat([site.read(idx) for site in sites], -1)
    passes = []
    for layer, block in enumerate(model.transformer["h"]):
        block.register_forward_hook(lambda *_, layer=layer: passes.append(layer))
    assert torch.equal(read_sites(sites, idx), alone)
    assert passes == [0, 1]  # one pass, and block 2 was not reached
    read_sites([Site(model, 1, "mlp_out")], idx)
    assert passes == [0, 1, 0]  # nor is the rest of a block
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_site_that_fails_leaves_no_hook():
    model, idx = tiny(), ids(words(40))
    for call in (lambda: Site(model, 1, "mlp_out").run(idx, lambda x: 1 / 0),
                 lambda: read_sites([Site(model, 1, "mlp_out")], idx + 1000)):
        with pytest.raises((ZeroDivisionError, IndexError)):
            call()
    assert not any(module._forward_hooks for module in model.modules())


# ---- windows


def test_held_out_windows_are_spread_evenly_over_whole_ones():
    stream = words(45)
    assert held_out_windows(stream, T, 400).tolist() == [0, 8, 16, 24, 32]  # 5 tokens fill no window
    assert held_out_windows(stream, T, 2).tolist() == [0, 16]
    assert windows_at(stream, [3, 16], T, "cpu").tolist() == [stream[3:11].tolist(), stream[16:24].tolist()]
    with pytest.raises(UserError, match="5 validation tokens are fewer than a window of 8"):
        held_out_windows(stream[:5], T, 400)
    with pytest.raises(UserError, match="5 tokens are fewer than a window of 8"):
        Text(stream[:5], EOT, T, "cpu")


def test_windows_are_read_in_order_and_a_stop_comes_between_two_batches(monkeypatch):
    monkeypatch.setattr(activations, "TOKENS", 24)
    stop, stream, starts = SimpleNamespace(requested=False), words(200), np.arange(10)[::-1] * 5
    read = list(read_windows(lambda idx: idx[..., None], stream, starts, T, "cpu", stop))
    assert [len(part) for part, _ in read] == [3, 3, 3, 1]
    assert np.concatenate([part for part, _ in read]).tolist() == starts.tolist()
    assert torch.equal(torch.cat([x for _, x in read])[..., 0], windows_at(stream, starts, T, "cpu"))
    batches = read_windows(lambda idx: idx[..., None], stream, starts, T, "cpu", stop)
    next(batches)
    stop.requested = True
    with pytest.raises(Stopped):
        next(batches)


@pytest.mark.parametrize("context", [0, 1, 3, 7])
def test_every_token_counts_once_and_after_its_context(context):
    stream, seen = words(203), []
    text = Text(stream, EOT, T, "cpu", context)
    for start in text.starts:
        seen.append(np.arange(start + context, start + T))
    counted = np.concatenate([at for _, at, _ in text.read(lambda idx: idx[..., None])])
    assert counted.tolist() == np.concatenate(seen).tolist()
    assert counted.tolist() == list(range(context, counted[-1] + 1)) and 203 - counted[-1] <= T
    stories = np.cumsum(stream == EOT) - (stream == EOT)
    for x, at, story in text.read(lambda idx: idx[..., None]):
        assert x[:, 0].tolist() == stream[at].tolist() and story.tolist() == stories[at].tolist()


# ---- the strongest moments


def strongest_by_hand(x, positions, stories, count):
    """For every unit (value, position), a list of at most count: a loop over everything."""
    found = []
    for unit in x.T.tolist():
        best = {}  # of each story
        for value, position, story in zip(unit, positions.tolist(), stories.tolist()):
            if story not in best or value > best[story][0]:
                best[story] = value, position
        found.append(sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))[:count])
    return found


def pairs(best):
    values, positions = best.found()
    return [list(zip(*rows)) for rows in zip(values.tolist(), positions.tolist())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_strongest_are_those_of_a_loop_over_everything(dtype):
    """Random streams: few values, so ties; stories of one token to all of them; units that never fire."""
    rng = np.random.default_rng(1)
    for case in range(300):
        n, U, count = rng.integers(1, 60), rng.integers(1, 5), int(rng.integers(1, 6))
        x = torch.from_numpy(rng.integers(-3, rng.choice([0, 2, 100]), (n, U))).to(dtype)
        x[:, rng.random(U) < 0.2] = 0
        positions = np.sort(rng.choice(500, n, replace=False))
        stories = np.cumsum(rng.random(n) < rng.choice([0.0, 0.1, 0.5, 1.0]))
        expected = strongest_by_hand(x, positions, stories, count)
        for _ in range(2):  # cut into batches anywhere: empty ones, stories over many
            best, cuts = Strongest(count), np.sort(rng.integers(0, n + 1, rng.integers(0, 8)))
            for low, high in zip([0, *cuts], [*cuts, n]):
                best.add(x[low:high], positions[low:high], stories[low:high])
            assert pairs(best) == expected, case
            assert best.found()[0].dtype == dtype and best.found()[0].shape[1] <= count


def test_a_model_is_read_alike_in_batches_of_any_size(monkeypatch):
    """All neurons of all layers, over stories that span windows; with values of the text for brute force."""
    model, stream = tiny(), words(403, share=0.05)
    activate = partial(read_sites, [Site(model, layer, "mlp_act") for layer in range(3)])
    found = []
    for size in (1, 24, 10**6):
        monkeypatch.setattr(activations, "TOKENS", size)
        text = Text(stream, EOT, T, "cpu", context=3)
        best, parts = Strongest(4), []
        for part in text.read(activate):
            best.add(*part)
            parts.append(part)
        x, at, stories = torch.cat([x for x, _, _ in parts]), *map(np.concatenate, list(zip(*parts))[1:])
        hand = strongest_by_hand(x, at, stories, 4)
        assert pairs(best) == hand
        found.append(best.found())
    assert all(torch.allclose(found[0][0], values) for values, _ in found)
    assert all(torch.equal(found[0][1], positions) for _, positions in found)


def test_snippets_stay_in_their_story_and_window(monkeypatch):
    """Against cutting them out of all activations at once; every position of a window, as far as it goes."""
    monkeypatch.setattr(activations, "TOKENS", 24)
    model, stream = tiny(), words(203)
    site = Site(model, 1, "mlp_act")
    for context, left, right in ((0, 3, 2), (4, 4, 0), (5, 100, 100)):
        text = Text(stream, EOT, T, "cpu", context)
        positions = np.arange(context, context + 180).reshape(4, 45)  # 4 units, 45 places each
        shown = text.snippets(lambda idx: site.read(idx)[..., :4], positions, left, right)
        stories = text.stories(np.arange(203))
        for unit, row in enumerate(shown):
            for position, (tokens, values, peak) in zip(positions[unit].tolist(), row, strict=True):
                start = (position - context) // (T - context) * (T - context)
                inside = [i for i in range(start, start + T) if stories[i] == stories[position]]
                around = [i for i in inside if position - left <= i <= position + right]
                assert tokens == stream[around].tolist() and around[peak] == position
                x = site.read(ids(stream[start : start + T]))[0, :, unit]
                assert values == pytest.approx(x[[i - start for i in around]].tolist())
                assert peak >= min(left, context) or stories[position - peak - 1] != stories[position]


def test_random_windows_serve_as_well_as_all_of_them():
    """Held-out windows that do not follow on each other: a story in two of them still counts once."""
    stream = np.zeros(80, "<u2")
    stream[[50, 79]] = EOT
    x = torch.arange(80.0)
    text = Text(stream, EOT, T, "cpu", starts=held_out_windows(stream, T, 5))
    best = Strongest(3)
    for _, at, stories in text.read(lambda idx: idx[..., None]):
        best.add(x[at][:, None], at, stories)
    assert pairs(best) == [[(71.0, 71), (50.0, 50)]]


def test_the_neurons_of_the_papers_model():
    """8 layers of 512, in one pass over 16 windows: the shapes, and one unit of each layer by hand."""
    model = tiny(block_size=64, n_layer=8, n_head=16, n_embd=128).float()
    stream = words(16 * 64, share=0.03)
    activate = partial(read_sites, [Site(model, layer, "mlp_act") for layer in range(8)])
    text, best = Text(stream, EOT, 64, "cpu"), Strongest(20)
    for part in text.read(activate):
        best.add(*part)
    values, positions = best.found()
    stories = text.stories(positions.numpy())
    assert values.shape == positions.shape == (4096, 20)
    assert all(len(set(row)) == 20 for row in stories.tolist()) and (values[:, :-1] >= values[:, 1:]).all()
    x = activate(windows_at(stream, np.arange(16) * 64, 64, "cpu")).flatten(0, 1)  # (1024, 4096)
    units = range(7, 4096, 512)
    assert [pairs(best)[u] for u in units] == strongest_by_hand(
        x[:, units], np.arange(1024), text.stories(np.arange(1024)), 20)
