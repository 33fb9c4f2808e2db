"""interp/browse.py: its numbers by brute force on models set by hand, its page in Chromium.

Tests of the page fail on a message in its console, an exception, or a request to elsewhere.
"""

import base64
import json
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import make_data, make_run, tiny_model
from interp import activations, browse
from interp.activations import UNITS, Site, read_sites
from interp.results import digests

PIECES = ["</script><img src=x onerror=alert(1)>", '"quotes\'', "\u2028", " \U0001f431",
          "<!--<script>", " &lt;b&gt;", "\n\n", " dog", " cat", "Dog"]
V = 257 + len(PIECES)
EOT, DOG, CAT = V - 1, 256 + 7, 256 + 8
SIZES = dict(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=8)
RNG = np.random.default_rng(1)
VAL = np.where(RNG.random(400) < 0.5, RNG.integers(256, EOT, 400), RNG.integers(97, 123, 400))
VAL[RNG.random(400) < 0.08] = EOT
STARTS = np.arange(0, 400 - 16 + 1, 12)  # of the windows that are read; 12 of 16 tokens count
IDX = torch.from_numpy(VAL[STARTS[:, None] + np.arange(16)])


def by_hand():
    """Neuron 3 of layer 0 fires on dog alone and writes cat; the others of its layer are silent."""
    model = tiny_model(**SIZES)
    wte, block = model.transformer["wte"].weight.data, model.transformer["h"][0]
    out, mlp = block.attn["attention"].out_proj, block.mlp
    wte[CAT] *= 5
    for p in (out.weight, out.bias, mlp.c_fc.weight, block.ln_2.bias,
              model.transformer["wpe"].weight):
        p.data.zero_()
    for p in (block.ln_2.weight, model.transformer["ln_f"].weight):
        p.data.fill_(1.0)
    seen = F.layer_norm(wte, (8,))  # what the neurons of layer 0 see of every token
    likeness = seen @ seen[DOG]
    mlp.c_fc.bias.data.fill_(-1.0)
    mlp.c_fc.weight.data[3] = seen[DOG]
    mlp.c_fc.bias.data[3] = -likeness.sort().values[-2:].mean()
    mlp.c_proj.weight.data[:, 3] = wte[CAT]
    return model


MODELS = {"gated": by_hand(), "plain": tiny_model("none", **SIZES),
          "heads": tiny_model("global", **SIZES, attn_unit="head", k_attn=1)}


def write(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["browse.py", "--device=cpu", *map(str, words)])
        browse.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With data, a run and a page of each of MODELS, and one page of the first two."""
    folder = tmp_path_factory.mktemp("browse")
    make_data(folder / "data", VAL, VAL, PIECES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "TOKENS", 48)  # so that every page is read in many batches
        patch.setattr(browse, "AT_ONCE", 1)
        write(*(make_run(folder / name, folder / "data", MODELS[name]) for name in MODELS))
    write(folder / "plain", folder / "gated", "--page", folder / "both.html")
    return folder


def data_of(path):
    """What the script of a page reads, and the arrays of its first run and the stories."""
    data = json.loads(re.search('id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])
    packed = data["runs"][0]["arrays"] | {"story_tokens": data["story_tokens"]}
    return data, {name: np.frombuffer(base64.b64decode(array["data"]), array["type"])
                  for name, array in packed.items()}


def units_in(model, idx):
    """Activations of all units, (B, T, L, U), one unit after the other."""
    layers = []
    for layer in range(2):
        neurons, attention = (read_sites([Site(model, layer, site)], idx) for site in UNITS)
        if model.config.attn_unit == "head":
            attention = attention.view(*idx.shape, 2, -1).square().sum(-1).sqrt()
        layers.append(torch.cat((neurons, attention), -1))
    return torch.stack(layers, 2)


@torch.no_grad()
def masks_of(model, idx):
    """What the gates keep, (B, T, L, U) of zeros and ones; zeros without a gate."""
    if model.config.ablation == "none":
        return torch.zeros_like(units_in(model, idx))
    _, _, attention, neurons = model.ablated(idx)
    return torch.cat((neurons, attention), -1)


@pytest.mark.parametrize("name", MODELS)
def test_rates_and_snippets_are_those_of_brute_force(folder, name):
    model, (_, arrays) = MODELS[name], data_of(folder / name / "browse.html")
    a, masks = units_in(model, IDX), masks_of(model, IDX)  # (B, T, L, U) each
    strength = torch.cat((a[..., :32], a[..., 32:].abs()), -1)
    bar = strength[..., 32:].pow(2).mean(-1, keepdim=True).sqrt()
    on = torch.cat((a[..., :32] > 0, strength[..., 32:] > bar), -1).double()
    assert np.allclose(arrays["fires"], on[:, 4:].mean((0, 1)).flatten(), atol=1e-7)
    assert np.allclose(arrays.get("kept", 0), masks[:, 4:].mean((0, 1)).flatten(), atol=1e-6)
    story = np.searchsorted(np.flatnonzero(VAL == EOT), STARTS[:, None] + np.arange(16))  # (B, T)
    strength, values, masks = (x.flatten(2).numpy() for x in (strength, a, masks))  # (B, T, N)
    marks = arrays.get("marks", np.zeros_like(arrays["begin"]))
    for unit in range(values.shape[-1]):
        best = {}  # story: its strongest moment
        for b, t in np.ndindex(len(IDX), 16):
            if t >= 4 and strength[b, t, unit] > best.get(story[b, t], (0,))[0]:
                best[story[b, t]] = (strength[b, t, unit], b, t)
        expected = sorted(best.values(), key=lambda moment: -moment[0])[:8]
        assert (arrays["length"][8 * unit :][:8] > 0).sum() == len(expected)
        for at, (_, b, t) in enumerate(expected, 8 * unit):
            around = [i for i in range(16) if story[b, i] == story[b, t] and i <= t + 8]
            size, first = arrays["length"][at], arrays["begin"][at] - 16 * b
            assert (first, size) == (around[0], len(around)) and first + arrays["peak"][at] == t
            largest = expected[0][0]
            shown = arrays["values"].reshape(-1, browse.WIDTH)[at, :size] / 127 * largest
            true = values[b, around, unit].clip(-largest, largest)
            assert np.allclose(shown, true, atol=largest / 250)
            assert (marks[at] >> np.arange(size) & 1).tolist() == masks[b, around, unit].tolist()


@pytest.mark.parametrize("name", ["gated", "heads"])
@torch.no_grad()
def test_what_units_write_is_the_lens_of_their_weights(folder, name):
    model, (_, arrays), writes = MODELS[name], data_of(folder / name / "browse.html"), []
    for layer, block in enumerate(model.transformer["h"]):
        attention = block.attn["attention"].out_proj.weight.T
        if name == "heads":  # the output z of a head is nearest to its norm times m
            z = Site(model, layer, "attn_act").read(IDX)[:, 4:].flatten(0, 1).double()
            m = [torch.linalg.lstsq(part.norm(dim=1)[:, None], part)[0] for part in z.chunk(2, 1)]
            attention = torch.block_diag(*m).float() @ attention
        writes += [block.mlp.c_proj.weight.T, attention]
    writes = torch.cat(writes).double()
    writes = writes - writes.mean(1, keepdim=True)
    logits = writes * model.transformer["ln_f"].weight.double() @ model.lm_head.weight.double().T
    logits = (logits - logits.mean(1, keepdim=True)).sort().values.numpy()
    expected = np.concatenate((logits[:, ::-1][:, :8], logits[:, :8]), 1)
    assert np.allclose(arrays["lens_values"], expected.ravel(), atol=1e-4)
    unit = F.normalize(writes, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    assert np.allclose(arrays["cosines"], cosine.topk(6).values.flatten(), atol=1e-5)
    near = torch.from_numpy(arrays["near"].astype(int)).view(-1, 6)
    assert np.allclose(arrays["cosines"], cosine.gather(1, near).flatten(), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_stories_show_the_kept_units_or_else_those_that_write_most(folder, name):
    model, (data, arrays) = MODELS[name], data_of(folder / name / "browse.html")
    tokens = torch.from_numpy(arrays["story_tokens"].astype(int))
    units = torch.from_numpy(arrays["story_units"].astype(int)).view(len(tokens), 2, -1)
    parts = (part.split(data["story_lengths"]) for part in (tokens, units))
    for story, shown in zip(*parts, strict=True):  # (T), (T, L, k)
        idx = torch.cat((torch.tensor([EOT]), story))[None]
        a = units_in(model, idx)[0, 1:]  # (T, L, U)
        values, arrays["story_values"] = np.split(arrays["story_values"], [shown.numel()])
        assert np.allclose(a.gather(-1, shown).flatten(), values, atol=1e-6)
        if name == "plain":
            weights = [torch.cat((b.mlp.c_proj.weight, b.attn["attention"].out_proj.weight), 1)
                       for b in model.transformer["h"]]
            written = a.abs() * torch.stack(weights).norm(dim=1)
            best = torch.cat([x.topk(2).values for x in written.split((32, 8), -1)], -1)
            assert torch.equal(written.gather(-1, shown), best.sort(-1, descending=True).values)
        else:
            mask = masks_of(model, idx)[0, 1:]
            assert torch.equal(torch.zeros_like(mask).scatter_(-1, shown, 1.0), mask)


def test_stories_are_whole_where_they_fit():
    tokens = np.array([1, 2, 9, 9, 3, 9, 4, 5, 6, 7, 8, 9, 1])
    for T, expected in ((4, [[9, 1, 2], [9, 3], [9, 1]]), (1, [[9]] * 4)):  # of 1 token none fits
        stories = browse.pick_stories(tokens, 9, T, 10)
        assert [story.tolist() for story in stories] == expected


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium here, so the page was not tested: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = driver.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, place):
    """The page at this place. Nothing may be said in its console, raised or fetched."""
    page, noise, urls = browser.new_page(), [], set()
    for event in ("console", "pageerror", "dialog"):
        page.on(event, lambda said: noise.append(str(said)))
    page.on("request", lambda request: urls.add(request.url.split("#")[0]))
    page.goto(path.as_uri() + place)
    yield page
    assert noise == [] and urls == {path.as_uri()}
    page.close()


def test_hostile_text_stays_text(folder, chromium):
    path, shown = folder / "gated" / "browse.html", ""
    assert PIECES[0] not in path.read_text() and "<!--" not in path.read_text()
    with opened(chromium, path, "#S0T0") as page:
        for story in range(8):
            page.locator("#story-choice").select_option(str(story))
            page.wait_for_timeout(30)
            shown += page.text_content("#story-text")
        assert all(piece.replace("\n", "↵\n") in shown for piece in PIECES)
        page.fill("#query", "</script>")
        assert "</script><img" in page.text_content(".results")
        assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_units_by_address_links_search_and_map(folder, chromium):
    path = folder / "gated" / "browse.html"
    marks = data_of(path)[1]["marks"][24:32].tolist()
    with opened(chromium, path, "#L0N3") as page:
        canvas, tip, results = (page.locator(name) for name in ("canvas", "#tip", ".results"))
        assert page.locator(".snippet .peak").all_text_contents() == [" dog"] * 8
        assert page.locator(".writes .chip").first.text_content() == "·cat"
        assert page.locator(".snippet .kept").count() == sum(map(int.bit_count, marks))
        name = page.locator(".near a").first.text_content()
        page.locator(".near a").first.click()
        page.get_by_role("heading", name=name, exact=True).wait_for()
        page.keyboard.press("/")
        page.keyboard.type("dog")
        assert results.locator("li").first.text_content() == "L0N38 of 8 snippets"
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="L0N3", exact=True).wait_for()
        x, y = page.evaluate("columns[0].map.corner(models[0].number('L1A2')).map((at) => at + 3)")
        canvas.click(position={"x": x, "y": y})
        page.get_by_role("heading", name="L1A2", exact=True).wait_for()
        for key, there in (("ArrowRight", "L1A3"), ("Home", "L0N0"), ("ArrowDown", "L1N0")):
            canvas.press(key)
            assert tip.text_content().startswith(f"{there}: kept ")
        canvas.press("Enter")
        page.get_by_role("heading", name="L1N0", exact=True).wait_for()


def test_a_story_token_by_token(folder, chromium):
    path = folder / "gated" / "browse.html"
    data, arrays = data_of(path)
    story = int(np.argmax(data["story_lengths"]))
    units = arrays["story_units"].reshape(-1, 2, 4)[sum(data["story_lengths"][:story]) :]
    with opened(chromium, path, f"#S{story}T1") as page:
        def check(token):
            names = {f"L{layer}N{unit}" if unit < 32 else f"L{layer}A{unit - 32}"
                     for (layer, _), unit in np.ndenumerate(units[token])}
            assert {*page.locator(".layers .name").all_text_contents()} == names

        check(1)
        page.locator("#T3").hover()
        check(3)
        page.locator("#T2").click()
        page.locator("#T4").hover()  # a click holds the token
        check(2)
        for key, token in (("Escape", 2), ("ArrowRight", 3), ("Home", 0)):
            page.locator("#story-text").press(key)
            check(token)


def test_runs_side_by_side_one_without_a_gate(folder, chromium):
    with opened(chromium, folder / "both.html", "#L0N3") as page:
        left, right = (box.bounding_box() for box in page.locator(".column .unit").all())
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        legends = page.locator(".legend").all_text_contents()
        assert "this model has no gate" in legends[0] and "Kept by the gate" in legends[1]
        page.evaluate("location.hash = 'S1T0'")
        tables = page.locator(".layers").all_text_contents()
        assert "writing most" in tables[0] and "kept by the gate" in tables[1]


@pytest.mark.parametrize("same", [True, False])
def test_other_experiments_are_shown_if_they_are_of_these_weights(folder, chromium, tmp_path, same):
    run = make_run(tmp_path / "run", folder / "data", MODELS["gated"])
    weights = digests(MODELS["gated"].state_dict()) | ({} if same else {"gates": "others"})
    names = [" dog", " the", "</script>", *(f"n{i}" for i in range(30))]
    nodes = [{"id": name, "activating": i == 0, "importance": 1 / (i + 1)}
             for i, name in enumerate(names)]
    pairs = (" the", " dog"), ("</script>", " the"), ("n29", " dog"), (" dog", " dog")
    edges = [dict(zip(("source", "target"), pair)) for pair in pairs]
    neuron = {"layer": 0, "neuron": 3, "score": 0.91, "random_score": 0.5, "f1": 0.5,
              "explanation": "<b>dogs</b>", "graph": {"nodes": nodes, "edges": edges}}
    use = dict.fromkeys(browse.USAGE, [0.25, None])
    for name in ("n2g_neurons", "explain_neurons", "units"):
        found = {"settings": {}, **weights, "neurons": [neuron], "kinds": {"attn": use}}
        (run / f"{name}.json").write_text(json.dumps(found))
    write(run)
    with opened(chromium, run / "browse.html", "#L0N3") as page:
        commands = page.locator(".column code").all_text_contents()
        boxes = page.locator("svg g text").all()
        if same:
            text = page.text_content(".unit")
            assert "<b>dogs</b>" in text and "score 0.91 · on random text alone 0.50" in text
            assert "F1 0.50 · 9 less important ones left out" in text and not commands
            left = {box.text_content(): box.bounding_box()["x"] for box in boxes}
            assert len(left) == 24 and left["</script>"] < left["·the"] < left["·dog"]
            rows = page.locator(".usage tr").all_text_contents()
            assert rows[1:] == ["L0" + "0.25" * 8, "L1" + "–" * 8]
        else:
            made = [f"python -m interp.{name} '{run}'" for name in ("n2g", "explain", "units")]
            assert not boxes and commands == made
