"""interp/browse.py: its numbers by brute force on models set by hand, its page in Chromium.

    python -m pytest tests/test_browse.py

Playwright opens the page from disk in the system's chromium. Every test that opens it fails on a
message in the console, an exception, or a request beyond the page itself.
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

import conftest
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


def data_of(path):
    """What the script of a page reads, arrays unpacked, those of units in rows (units, ...)."""
    def unpack(packed):
        return np.frombuffer(base64.b64decode(packed["data"]), packed["type"])

    data = json.loads(re.search('id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])
    data["story_tokens"] = unpack(data["story_tokens"])
    for run in data["runs"]:
        arrays = {name: unpack(packed) for name, packed in run["arrays"].items()}
        for name, array in arrays.items():
            by_unit = not name.startswith(("story", "text"))
            run["arrays"][name] = array.reshape(len(arrays["fires"]), -1) if by_unit else array
    return data


def write(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["browse.py", "--device=cpu", *map(str, words)])
        browse.main()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with pages of a gated model set by hand, of a baseline, of one whose units are
    heads, and of the first two together; and the models."""
    folder = tmp_path_factory.mktemp("browse")
    models = {"gated": by_hand(), "plain": tiny_model("none", **SIZES),
              "heads": tiny_model("global", **SIZES, attn_unit="head", k_attn=1)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PIECES": PIECES, "V": V, "EOT": EOT}.items():
            patch.setattr(conftest, name, value)
        patch.setattr(conftest, "letters", lambda count, seed: VAL.astype("<u2"))
        make_data(folder / "data", 400, 400)
        runs = [make_run(folder / name, folder / "data", models[name]) for name in models]
        patch.setattr(activations, "TOKENS", 48)  # so that every page is read in many batches
        patch.setattr(browse, "AT_ONCE", 1)
        write(*runs)
    write(folder / "plain", folder / "gated", "--page", folder / "both.html")
    return folder, models


# ---- the numbers

# the windows that are read; 12 of their 16 tokens count
STARTS = np.arange(0, 400 - 16 + 1, 12)
IDX = torch.from_numpy(VAL[STARTS[:, None] + np.arange(16)])


def units_in(model, idx):
    """Activations of all units, (B, T, L, U), one unit after the other."""
    layers = []
    for layer in range(2):
        neurons, channels = (read_sites([Site(model, layer, site)], idx) for site in UNITS)
        if model.config.attn_unit == "head":
            heads = [part.square().sum(-1).sqrt() for part in channels.chunk(2, -1)]
            channels = torch.stack(heads, -1)
        layers.append(torch.cat((neurons, channels), -1))
    return torch.stack(layers, 2)


@torch.no_grad()
def masks_of(model, idx):
    out = model.ablated(idx)
    return torch.cat((out.mlp_mask, out.attn_mask), -1)  # (B, T, L, U)


@pytest.mark.parametrize("name", ["gated", "plain", "heads"])
def test_rates_and_snippets_are_those_of_brute_force(pages, name):
    folder, models = pages
    model, arrays = models[name], data_of(folder / name / "browse.html")["runs"][0]["arrays"]
    a = units_in(model, IDX)  # (B, T, L, U)
    strength = torch.cat((a[..., :32], a[..., 32:].abs()), -1)
    bar = strength[..., 32:].pow(2).mean(-1, keepdim=True).sqrt()
    on = torch.cat((a[..., :32] > 0, strength[..., 32:] > bar), -1)
    fires = on[:, 4:].double().mean((0, 1)).flatten()
    assert np.allclose(arrays["fires"][:, 0], fires, atol=1e-7)
    masks = torch.zeros_like(a) if name == "plain" else masks_of(model, IDX)
    if name == "plain":
        arrays["marks"] = np.zeros_like(arrays["begin"])
    else:
        assert np.allclose(arrays["kept"][:, 0], masks[:, 4:].mean((0, 1)).flatten(), atol=1e-6)
    story = np.searchsorted(np.flatnonzero(VAL == EOT), STARTS[:, None] + np.arange(16))  # (B, T)
    strength, values, masks = (x.flatten(2).numpy() for x in (strength, a, masks))  # (B, T, N)
    for unit in range(values.shape[-1]):
        best = {}  # story: its strongest moment
        for b, t in np.ndindex(len(IDX), 16):
            if t >= 4 and strength[b, t, unit] > best.get(story[b, t], (0,))[0]:
                best[story[b, t]] = (strength[b, t, unit], b, t)
        expected = sorted(best.values(), key=lambda moment: -moment[0])[:8]
        assert (arrays["length"][unit] > 0).sum() == len(expected)
        for place, (_, b, t) in enumerate(expected):
            around = [i for i in range(16) if story[b, i] == story[b, t] and i <= t + 8]
            first, size = arrays["begin"][unit, place] - 16 * b, arrays["length"][unit, place]
            assert (first, size) == (around[0], len(around))
            assert first + arrays["peak"][unit, place] == t
            largest = expected[0][0]
            shown = arrays["values"][unit].reshape(8, -1)[place, :size] / 127 * largest
            true = values[b, around, unit].clip(-largest, largest)
            assert np.allclose(shown, true, atol=largest / 250)
            marks = arrays["marks"][unit, place] >> np.arange(size) & 1
            assert marks.tolist() == masks[b, around, unit].tolist()


@pytest.mark.parametrize("name", ["gated", "heads"])
@torch.no_grad()
def test_what_units_write_is_the_lens_of_their_weights(pages, name):
    folder, models = pages
    data, model = data_of(folder / name / "browse.html"), models[name]
    arrays, writes = data["runs"][0]["arrays"], []
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
    assert np.allclose(arrays["lens_values"], expected, atol=1e-4)
    unit = F.normalize(writes, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    assert np.allclose(arrays["cosines"], cosine.topk(6).values, atol=1e-5)
    near = torch.from_numpy(arrays["near"].astype(int))
    assert np.allclose(arrays["cosines"], cosine.gather(1, near), atol=1e-5)


def test_the_neuron_made_for_one_token_peaks_on_it_alone(pages):
    data = data_of(pages[0] / "gated" / "browse.html")
    arrays = data["runs"][0]["arrays"]
    peaks = arrays["text_tokens"][arrays["begin"][3] + arrays["peak"][3]]
    assert arrays["length"][3].all() and {data["texts"][token] for token in peaks} == {" dog"}
    assert data["texts"][arrays["lens_tokens"][3, 0]] == " cat"
    assert arrays["fires"][3, 0] == pytest.approx((IDX[:, 4:] == DOG).double().mean().item())
    assert not arrays["fires"][:32][np.arange(32) != 3].any() and not arrays["length"][4].any()


@pytest.mark.parametrize("name, k", [("gated", 4), ("plain", 4), ("heads", 3)])
def test_stories_show_the_kept_units_or_else_those_that_write_most(pages, name, k):
    model, data = pages[1][name], data_of(pages[0] / name / "browse.html")
    arrays, blocks = data["runs"][0]["arrays"], model.transformer["h"]
    units, values = (torch.from_numpy(arrays[f"story_{part}"].astype(float)).view(-1, 2, k)
                     for part in ("units", "values"))  # (n, L, k) each
    ends = np.cumsum(data["story_lengths"])
    assert ends[-1] == len(units) == len(data["story_tokens"]) and len(ends) == 8
    for end, length in zip(ends, data["story_lengths"]):
        part = slice(end - length, end)
        idx = torch.tensor([[EOT, *data["story_tokens"][part].astype(int)]])
        a, shown = units_in(model, idx)[0, 1:], units[part].long()  # (T, L, U), (T, L, k)
        assert np.allclose(a.gather(-1, shown), values[part], atol=1e-6)
        if name == "plain":
            weights = [torch.cat((b.mlp.c_proj.weight, b.attn["attention"].out_proj.weight), 1)
                       for b in blocks]
            written = a.abs() * torch.stack(weights).norm(dim=1)
            best = torch.cat([x.topk(2).values for x in written.split((32, 8), -1)], -1)
            assert torch.equal(written.gather(-1, shown), best.sort(-1, descending=True).values)
        else:
            mask = masks_of(model, idx)[0, 1:]
            assert torch.equal(torch.zeros_like(mask).scatter_(-1, shown, 1.0), mask)


def test_stories_are_whole_where_they_fit():
    tokens = np.array([1, 2, 9, 9, 3, 9, 4, 5, 6, 7, 8, 9, 1])
    stories = browse.pick_stories(tokens, 9, 4, 10)
    assert [story.tolist() for story in stories] == [[9, 1, 2], [9, 3], [9, 1]]
    (story,) = browse.pick_stories(np.arange(1, 9), 9, 4, 10)  # none fits
    assert story.tolist() == [9, 1, 2, 3]


# ---- the page


@pytest.fixture(scope="module")
def chromium():
    """A browser. Skips where there is none."""
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
def opened(browser, path, place="", **options):
    """The page at this place. Nothing may be said in its console, raised or fetched."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(8000)
    page, noise, urls = context.new_page(), [], set()
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: urls.add(request.url.split("#")[0]))
    page.goto(path.as_uri() + place)
    try:
        yield page
        assert noise == [] and urls == {path.as_uri()}
    finally:
        context.close()


def wait_for(page, name):
    """Until the panel of the unit with this name is shown."""
    page.locator(".unit h3", has_text=re.compile(f"^{name}$")).first.wait_for()


def test_hostile_text_stays_text(pages, chromium):
    path = pages[0] / "gated" / "browse.html"
    assert PIECES[0] not in path.read_text() and "<!--" not in path.read_text()
    with opened(chromium, path, "#S0T0") as page:
        shown = ""
        for story in range(8):
            page.locator("#story-choice").select_option(str(story))
            page.wait_for_timeout(30)
            shown += page.text_content("#story-text")
        assert all(piece.replace("\n", "↵\n") in shown for piece in PIECES)
        page.fill("#query", "</script>")
        assert "</script><img" in page.text_content(".results")
        assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_units_by_address_links_and_search(pages, chromium):
    path = pages[0] / "gated" / "browse.html"
    marks = data_of(path)["runs"][0]["arrays"]["marks"][3].tolist()
    with opened(chromium, path, "#L0N3") as page:
        assert page.title().endswith("gated") and page.locator(".snippet").count() == 8
        assert page.locator(".snippet .peak").all_text_contents() == [" dog"] * 8
        assert page.locator(".writes .chip").first.text_content() == "·cat"
        assert page.locator(".snippet .kept").count() == sum(map(int.bit_count, marks))
        page.get_by_label("The next unit").focus()
        page.keyboard.press("Enter")
        wait_for(page, "L0N4")
        assert "It never fires on this text." in page.text_content(".unit")
        near = page.locator(".near a").first
        name = near.text_content()
        near.click()
        wait_for(page, name)
        page.keyboard.press("/")
        page.keyboard.type("dog")
        results = page.locator(".results")
        assert "·dog" in results.text_content()
        assert results.locator("li").first.text_content() == "L0N38 of 8 snippets"
        page.keyboard.press("Enter")
        wait_for(page, "L0N3")
        page.fill("#query", "nosuchtoken")
        assert "No token begins like that" in results.text_content()
        page.evaluate("location.hash = 'L9N0'")
        page.get_by_text("This model has no L9N0.").wait_for()


def test_units_are_picked_in_the_map(pages, chromium):
    with opened(chromium, pages[0] / "gated" / "browse.html", "#L0N0") as page:
        canvas, tip = page.locator("canvas"), page.locator("#tip")
        x, y = page.evaluate("columns[0].map.corner(models[0].number('L1A2')).map((at) => at + 3)")
        canvas.click(position={"x": x, "y": y})
        wait_for(page, "L1A2")
        for key, there in (("ArrowRight", "L1A3"), ("Home", "L0N0"), ("ArrowDown", "L1N0"),
                           ("End", "L1A7"), ("ArrowLeft", "L1A6")):
            canvas.press(key)
            assert tip.text_content().startswith(f"{there}: kept ")
        canvas.press("Enter")
        wait_for(page, "L1A6")


def test_a_story_token_by_token(pages, chromium):
    path = pages[0] / "gated" / "browse.html"
    data = data_of(path)
    story = int(np.argmax(data["story_lengths"]))
    units = data["runs"][0]["arrays"]["story_units"].reshape(-1, 2, 4)  # (n, L, k)
    units = units[sum(data["story_lengths"][:story]) :]

    def expected(token):
        return {f"L{layer}N{unit}" if unit < 32 else f"L{layer}A{unit - 32}"
                for (layer, _), unit in np.ndenumerate(units[token])}

    with opened(chromium, path, f"#S{story}T1") as page:
        def check(token):
            assert {*page.locator(".layers .name").all_text_contents()} == expected(token)

        check(1)
        page.locator("#T3").hover()
        check(3)
        page.locator("#T2").click()
        page.locator("#T4").hover()  # a click holds the token
        check(2)
        for key, token in (("Escape", 2), ("ArrowRight", 3), ("Home", 0)):
            page.locator("#story-text").press(key)
            check(token)
        page.locator(".entry").first.hover()
        name = page.locator(".entry .name").first.text_content()
        also = [token for token in range(data["story_lengths"][story]) if name in expected(token)]
        assert page.locator("#story-text .also").count() == len(also)
        page.locator(".entry").first.click()
        wait_for(page, name)


def test_runs_side_by_side_without_gates_and_with_heads(pages, chromium):
    with opened(chromium, pages[0] / "both.html", "#L0N3") as page:
        left, right = (box.bounding_box() for box in page.locator(".column .unit").all())
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        legends = page.locator(".legend").all_text_contents()
        assert "this model has no gate" in legends[0] and "Kept by the gate" in legends[1]
        assert page.locator(".unit h3").all_text_contents() == ["L0N3"] * 2
        page.evaluate("location.hash = 'S1T0'")
        tables = page.locator(".layers").all_text_contents()
        assert "writing most" in tables[0] and "kept by the gate" in tables[1]
    with opened(chromium, pages[0] / "heads" / "browse.html", "#L1H1") as page:
        assert "head of layer 1" in page.text_content(".unit")


@pytest.mark.parametrize("same", [True, False])
def test_other_experiments_are_shown_if_they_are_of_these_weights(pages, chromium, tmp_path, same):
    model = pages[1]["gated"]
    run = make_run(tmp_path / "run", pages[0] / "data", model)
    weights = digests(model.state_dict()) if same else {"checkpoint": "other", "gates": "other"}
    importance = {" the": 0.9, "</script>": 0.6, " dog": 1.0} | {f"n{i}": 0.1 for i in range(30)}
    nodes = [{"id": name, "activating": name == " dog", "importance": value}
             for name, value in importance.items()]
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
        if not same:
            made = [f"python -m interp.{name} '{run}'" for name in ("n2g", "explain", "units")]
            assert page.locator("svg").count() == 0 and commands == made
            return
        text = page.text_content(".unit")
        assert "<b>dogs</b>" in text and "score 0.91 · on random text alone 0.50" in text
        assert "F1 0.50 · 9 less important ones left out" in text and not commands
        boxes = page.locator("svg g text").all()
        left = {box.text_content(): box.bounding_box()["x"] for box in boxes}
        assert len(left) == 24 and left["</script>"] < left["·the"] < left["·dog"]
        rows = page.locator(".usage tr").all_text_contents()
        assert rows[1:] == ["L0" + "0.25" * 8, "L1" + "–" * 8]
