"""interp/activations.py: sites against the model's tensors, strongest moments by brute force."""

from functools import partial

import numpy as np
import pytest
import torch

from conftest import EOT, T, letters, tiny_model
from interp import activations
from interp.activations import (
    SITES, UNITS, Site, Strongest, Text, held_out_windows, read_sites, read_windows,
    token_text, windows_at)
from prepare import UserError, load_tokenizer


def ids(stream):
    return torch.from_numpy(stream.astype(np.int64)).view(-1, T)


@pytest.mark.parametrize("site", list(SITES))
def test_a_site_is_that_tensor_of_the_clean_stream(site):
    model, idx = tiny_model().double(), ids(letters(40))
    block = model.transformer["h"][1]
    with torch.no_grad():
        _, inputs, _ = model.clean_pass(idx)
        attended = block.attn["attention"](block.ln_1(inputs[1]))[0]
        h = block.ln_2(inputs[1] + attended)
        neurons = torch.nn.functional.gelu(block.mlp.c_fc(h), approximate="tanh")
        out_proj = block.attn["attention"].out_proj
        heads = (attended - out_proj.bias) @ torch.linalg.inv(out_proj.weight).T
        whole = model(idx)
    x = {"mlp_out": block.mlp(h), "attn_out": attended, "resid": inputs[2], "mlp_act": neurons,
         "attn_act": heads}[site]
    raw, centred = Site(model, 1, site, center=False), Site(model, 1, site)
    assert torch.allclose(raw.read(idx), x) and raw.d == x.size(-1)
    shift = 0 if site in UNITS else x.mean(-1, keepdim=True)
    assert torch.allclose(centred.read(idx), x - shift)
    assert torch.allclose(centred.run(idx, lambda x: x), whole)  # LayerNorm hides the shift
    changed = raw.run(idx, lambda x: torch.where(torch.arange(T)[:, None] < 5, x, 0 * x))
    assert torch.allclose(changed[:, :5], whole[:, :5])
    assert not torch.allclose(changed[:, 5:], whole[:, 5:])
    assert torch.allclose(model(idx), whole)  # no hook is left


def test_all_sites_are_read_in_one_pass_that_stops_after_the_last():
    """Centred ones among them: looking must not change what comes after."""
    model, idx = tiny_model(), ids(letters(40))
    sites = [Site(model, layer, site) for layer in (1, 0) for site in SITES]
    alone = torch.cat([site.read(idx) for site in sites], -1)
    passes = []
    for layer, block in enumerate(model.transformer["h"]):
        block.register_forward_hook(lambda *_, layer=layer: passes.append(layer))
    assert torch.equal(read_sites(sites, idx), alone)
    assert passes == [0, 1]  # one pass, and block 2 was not reached


def test_a_site_that_fails_leaves_no_hook():
    model, idx = tiny_model(), ids(letters(40))
    with pytest.raises(ZeroDivisionError):
        Site(model, 1, "mlp_out").run(idx, lambda x: 1 / 0)
    with pytest.raises(IndexError):
        read_sites([Site(model, 1, "mlp_out"), Site(model, 1, "mlp_act")], idx + 1000)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bytes_that_are_not_text_are_shown_as_numbers():
    tokenizer = load_tokenizer({"name": "words", "pieces": ["ab"]})
    assert [token_text(tokenizer, token) for token in (256, 0xE2)] == ["ab", "\\xe2"]


def test_held_out_windows_are_spread_evenly_over_whole_ones():
    stream = letters(45)
    assert held_out_windows(stream, T, 400).tolist() == [0, 8, 16, 24, 32]  # 5 fill no window
    assert held_out_windows(stream, T, 2).tolist() == [0, 16]
    assert windows_at(stream, [3], T, "cpu").tolist() == [stream[3:11].tolist()]
    with pytest.raises(UserError, match="5 validation tokens are fewer than a window of 8"):
        held_out_windows(stream[:5], T, 400)


@pytest.mark.parametrize("context", [0, 3, 7])
def test_every_token_counts_once_and_after_its_context(context, monkeypatch):
    monkeypatch.setattr(activations, "TOKENS", 24)
    stream = letters(203)
    text = Text(stream, EOT, T, "cpu", context)
    as_they_are = partial(torch.unsqueeze, dim=-1)  # activations (B, T, 1): the tokens themselves
    read = [*read_windows(as_they_are, stream, text.starts, T, "cpu")]
    assert {len(starts) for starts, _ in read[:-1]} == {3}
    assert np.concatenate([starts for starts, _ in read]).tolist() == text.starts.tolist()
    numbers, counted = np.cumsum(stream == EOT) - (stream == EOT), []
    for x, at, stories in text.read(as_they_are):
        assert x[:, 0].tolist() == stream[at].tolist()
        assert stories.tolist() == numbers[at].tolist()
        counted += at.tolist()
    assert counted == list(range(context, counted[-1] + 1)) and 203 - counted[-1] <= T


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
    return [[*zip(*rows)] for rows in zip(*(part.tolist() for part in best.found()))]


def test_the_strongest_are_those_of_a_loop_over_everything():
    """Few values, so ties; stories of one token up to all of them; units that never fire."""
    rng = np.random.default_rng(1)
    for case in range(300):
        n, U, count = rng.integers(1, 60), rng.integers(1, 5), int(rng.integers(1, 6))
        x = torch.from_numpy(rng.integers(-3, rng.choice([0, 2, 100]), (n, U))).float()
        x[:, rng.random(U) < 0.2] = 0
        positions = np.sort(rng.choice(500, n, replace=False))
        stories = np.cumsum(rng.random(n) < rng.choice([0.0, 0.1, 0.5, 1.0]))
        cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 8)))  # batches, empty ones too
        best = Strongest(count)
        for low, high in zip([0, *cuts], [*cuts, n]):
            best.add(x[low:high], positions[low:high], stories[low:high])
        assert pairs(best) == strongest_by_hand(x, positions, stories, count), case


@pytest.mark.parametrize("context, left, right", [(0, 3, 2), (4, 4, 0), (5, 100, 100)])
def test_snippets_stay_in_their_story_and_window(context, left, right, monkeypatch):
    monkeypatch.setattr(activations, "TOKENS", 24)
    stream, site = letters(203), Site(tiny_model().double(), 1, "mlp_act")
    text = Text(stream, EOT, T, "cpu", context)
    positions = np.arange(context, context + 180).reshape(4, 45)  # 4 units, 45 places each
    shown = text.snippets(lambda idx: site.read(idx)[..., :4], positions, left, right)
    stories = text.stories(np.arange(203))
    for (unit, place), position in np.ndenumerate(positions):
        tokens, values, peak = shown[unit][place]
        start = (position - context) // (T - context) * (T - context)
        around = [i for i in range(position - left, position + right + 1)
                  if start <= i < start + T and stories[i] == stories[position]]
        assert tokens == stream[around].tolist() and around[peak] == position
        x = site.read(ids(stream[start : start + T]))[0, :, unit]
        assert values == pytest.approx(x[[i - start for i in around]].tolist())
