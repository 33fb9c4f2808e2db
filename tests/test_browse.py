"""interp/browse.py: its numbers by brute force on models set by hand, its page in Chromium.

    python -m pytest tests/test_browse.py

Playwright opens the page from disk in the system's chromium. Every test that opens it fails on a
message in the console, an exception, or a request beyond the page itself.
"""

import base64
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import make_run, tiny_model
from interp import activations, browse
from interp.activations import UNITS, Site, read_sites
from interp.results import digests

PIECES = ["</script><img src=x onerror=alert(1)>", '"quotes\'', "\u2028", " \U0001f431",
          "<!--<script>", " &lt;b&gt;", "\n\n", " dog", " cat", "Dog"]
V = 257 + len(PIECES)
EOT, DOG, CAT = V - 1, 256 + 7, 256 + 8
SIZES = dict(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=8)
NUMBERS = {"int8": np.int8, "uint8": np.uint8, "uint32": np.uint32, "float32": np.float32}
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
    data = json.loads(re.search('id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])

    def unpack(packed):
        return np.frombuffer(base64.b64decode(packed["data"]), NUMBERS[packed["type"]])

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
    (folder / "data").mkdir()
    meta = {"tokenizer": {"name": "words", "pieces": PIECES}, "vocab_size": V, "eot": EOT,
            "checksum": "abc", "source": {}}
    for split in ("train", "val"):
        text = VAL.astype("<u2").tobytes()
        (folder / "data" / f"{split}.bin").write_bytes(text)
        meta[split] = {"tokens": 400, "stories": int((VAL == EOT).sum()), "bytes": 400,
                       "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "data" / "meta.json").write_text(json.dumps(meta))
    models = {"gated": by_hand(), "plain": tiny_model("none", **SIZES),
              "heads": tiny_model("global", **SIZES, attn_unit="head", k_attn=1)}
    runs = [make_run(folder / name, folder / "data", models[name]) for name in models]
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
    counted = strength[:, 4:].flatten(0, 1)  # (n, L, U)
    bar = counted[..., 32:].pow(2).mean(-1, keepdim=True).sqrt()
    on = torch.cat((counted[..., :32] > 0, counted[..., 32:] > bar), -1)
    assert np.allclose(arrays["fires"][:, 0], on.double().mean(0).flatten(), atol=1e-7)
    assert ("kept" in arrays) == ("marks" in arrays) == (name != "plain")
    masks = torch.zeros_like(a)
    if name != "plain":
        masks = masks_of(model, IDX)
        kept = masks[:, 4:].mean((0, 1)).flatten()
        assert np.allclose(arrays["kept"][:, 0], kept, atol=1e-6)

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
            marks = arrays["marks"][unit, place] if name != "plain" else 0
            assert [marks >> i & 1 for i in range(size)] == masks[b, around, unit].tolist()


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
            m = [torch.linalg.lstsq(part.norm(dim=1, keepdim=True), part).solution
                 for part in z.chunk(2, 1)]
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
    assert np.allclose(cosine.gather(1, torch.from_numpy(arrays["near"].astype(int))),
                       arrays["cosines"], atol=1e-5)


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
    arrays = data["runs"][0]["arrays"]
    units = torch.from_numpy(arrays["story_units"].astype(int)).view(-1, 2, k)
    ends = np.cumsum(data["story_lengths"])
    assert ends[-1] == len(units) == len(data["story_tokens"]) and len(ends) == 8
    for end, length in zip(ends, data["story_lengths"]):
        story = data["story_tokens"][end - length : end].astype(int)
        idx = torch.tensor([[EOT, *story]])
        a, shown = units_in(model, idx)[0, 1:], units[end - length : end]  # (T, L, U), (T, L, k)
        values = arrays["story_values"].reshape(-1, 2, k)[end - length : end]
        assert np.allclose(a.gather(-1, shown), values, atol=1e-6)
        if name != "plain":
            mask = masks_of(model, idx)[0, 1:]
            assert torch.equal(torch.zeros_like(mask).scatter_(-1, shown, 1.0), mask)
            continue
        weights = [(b.mlp.c_proj.weight, b.attn["attention"].out_proj.weight)
                   for b in model.transformer["h"]]
        written = a.abs() * torch.stack([torch.cat(pair, 1).norm(dim=0) for pair in weights])
        best = torch.cat((written[..., :32].topk(2).values, written[..., 32:].topk(2).values), -1)
        assert torch.equal(written.gather(-1, shown), best.sort(-1, descending=True).values)


def test_stories_are_whole_where_they_fit():
    tokens = np.array([1, 2, 9, 9, 3, 9, 4, 5, 6, 7, 8, 9, 1])
    stories = browse.pick_stories(tokens, 9, 4, 10)
    assert [story.tolist() for story in stories] == [[9, 1, 2], [9, 3], [9, 1]]
    (story,) = browse.pick_stories(np.arange(1, 9), 9, 4, 10)  # none fits
    assert story.tolist() == [9, 1, 2, 3]


@pytest.mark.parametrize("name", ["gated", "heads"])
def test_pages_do_not_depend_on_how_much_is_read_at_a_time(pages, name, monkeypatch, tmp_path):
    once = data_of(pages[0] / name / "browse.html")
    monkeypatch.setattr(activations, "TOKENS", 48)
    monkeypatch.setattr(browse, "AT_ONCE", 1)
    write(pages[0] / name, "--page", tmp_path / "page.html")
    again = data_of(tmp_path / "page.html")["runs"][0]["arrays"]
    for array_name, array in once["runs"][0]["arrays"].items():
        near = 1e-5 if array.dtype == np.float32 else 1
        assert np.allclose(array.astype(float), again[array_name].astype(float), atol=near)


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


def go(page, place, heading=None):
    """Show this place, and wait until the heading of the unit is this, its name by default."""
    if place:
        page.evaluate(f"location.hash = '{place}'")
    heading = heading or place
    page.locator(".unit h3", has_text=re.compile(f"^{heading}$")).first.wait_for(state="attached")


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


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
    context = chromium.new_context()  # handlers and scripts that are not the page's do not run
    page = context.new_page()
    page.goto(path.as_uri())
    page.evaluate("""() => {
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.broken = 1'>");
        const script = document.createElement("script");
        script.textContent = "window.broken = 2";
        document.body.append(script);
    }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.broken") is None
    context.close()


def test_units_by_address_links_and_search(pages, chromium):
    path = pages[0] / "gated" / "browse.html"
    arrays = data_of(path)["runs"][0]["arrays"]
    with opened(chromium, path, "#L0N3") as page:
        assert page.title().endswith("gated") and page.locator(".snippet").count() == 8
        peaks = page.locator(".snippet .peak").all_text_contents()
        assert {text.strip() for text in peaks} == {"dog"}
        assert page.locator(".writes .chip").first.text_content() == "·cat"
        marks = sum(bin(mark).count("1") for mark in arrays["marks"][3].tolist())
        assert page.locator(".snippet .kept").count() == marks
        page.get_by_label("The next unit").focus()
        page.keyboard.press("Enter")
        go(page, "", "L0N4")
        assert "It never fires on this text." in page.text_content(".unit")
        go(page, "L1A5")
        name = page.evaluate(f"models[0].name({arrays['near'][40 + 32 + 5, 0]})")
        page.locator(".near a").first.click()
        go(page, "", name)
        page.keyboard.press("/")
        page.keyboard.type("dog")
        results = page.locator(".results")
        assert "·dog" in results.text_content() and "Dog" in results.text_content()
        assert results.locator("li").first.text_content() == "L0N38 of 8 snippets"
        page.keyboard.press("Enter")
        go(page, "", "L0N3")
        page.fill("#query", "nosuchtoken")
        assert "No token begins like that" in results.text_content()
        page.evaluate("location.hash = 'L9N0'")
        page.get_by_text("This model has no L9N0.").wait_for()


def test_units_are_picked_in_the_map(pages, chromium):
    with opened(chromium, pages[0] / "gated" / "browse.html", "#L0N0") as page:
        corner = "columns[0].map.corner(models[0].number('L1A2')).map((at) => at + 3)"
        x, y = page.evaluate(corner)
        page.locator("canvas").hover(position={"x": x, "y": y})
        assert page.text_content("#tip").startswith("L1A2: kept ")
        page.locator("canvas").click(position={"x": x, "y": y})
        go(page, "", "L1A2")
        for key, there in (("ArrowRight", "L1A3"), ("Home", "L0N0"), ("ArrowDown", "L1N0"),
                           ("End", "L1A7"), ("ArrowLeft", "L1A6")):
            page.locator("canvas").press(key)
            assert page.text_content("#tip").startswith(f"{there}: ")
        page.locator("canvas").press("Enter")
        go(page, "", "L1A6")


def test_a_story_token_by_token(pages, chromium):
    path = pages[0] / "gated" / "browse.html"
    data = data_of(path)
    story = int(np.argmax(data["story_lengths"]))
    units = data["runs"][0]["arrays"]["story_units"].reshape(-1, 8)
    units = units[sum(data["story_lengths"][:story]) :]

    def expected(token):
        shown = list(enumerate(units[token].tolist()))  # the first 4 are of layer 0
        neurons = {f"L{i // 4}N{unit}" for i, unit in shown if unit < 32}
        return neurons | {f"L{i // 4}A{unit - 32}" for i, unit in shown if unit >= 32}

    with opened(chromium, path, f"#S{story}T1") as page:
        def shown():
            return set(page.locator(".layers .name").all_text_contents())

        assert shown() == expected(1)
        page.locator("#T3").hover()
        assert shown() == expected(3)
        page.locator("#T2").click()
        page.locator("#T4").hover()  # a click holds the token
        assert shown() == expected(2)
        for key, token in (("Escape", 2), ("ArrowRight", 3), ("Home", 0)):
            page.locator("#story-text").press(key)
            assert shown() == expected(token)
        page.locator(".entry").first.hover()
        name = page.locator(".entry .name").first.text_content()
        also = sum(name in expected(token) for token in range(data["story_lengths"][story]))
        assert page.locator("#story-text .also").count() == also
        page.locator(".entry").first.click()
        go(page, "", name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(pages, chromium, scheme):
    """Contrast of at least 4.5 (WCAG 2)."""
    def luminance(colour):
        parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    path = pages[0] / "gated" / "browse.html"
    with opened(chromium, path, "#L0N3", color_scheme=scheme) as page:
        for dark in (scheme == "dark", scheme != "dark"):
            bright = {}
            for name in ("paper", "card", "ink", "faint", "link", "hot", "cold", "pick"):
                colour = page.evaluate(f"""() => {{
                    const probe = document.body.appendChild(document.createElement("i"));
                    probe.style.color = "var(--{name})";
                    return getComputedStyle(probe).color; }}""")
                bright[name] = luminance(colour) + 0.05
            assert (bright["paper"] < 0.5) == dark
            for pair in ("ink paper", "ink card", "faint paper", "faint card", "link paper",
                         "link card", "ink hot", "ink cold", "pick paper"):
                low, high = sorted(bright[name] for name in pair.split())
                assert high / low >= 4.5, pair
            page.locator("#theme").click()


@pytest.mark.parametrize("which", ["gated/browse.html", "both.html"])
def test_a_phone_needs_no_scrolling_sideways(pages, chromium, which):
    phone = {"viewport": {"width": 375, "height": 700}, "has_touch": True}
    with opened(chromium, pages[0] / which, "#L0N3", **phone) as page:
        for place in ("#L0N3", "#L1A0", "#S0T0"):
            page.evaluate(f"location.hash = '{place}'")
            page.wait_for_timeout(50)
            assert overflow(page) <= 0


def test_runs_side_by_side_without_gates_and_with_heads(pages, chromium):
    with opened(chromium, pages[0] / "both.html", "#L0N3") as page:
        boxes = page.locator(".column .unit").all()
        left, right = (box.bounding_box() for box in boxes)
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        legends = page.locator(".legend").all_text_contents()
        assert "this model has no gate" in legends[0] and "Kept by the gate" in legends[1]
        x, y = page.evaluate("columns[1].map.corner(models[1].number('L1N9')).map((at) => at + 3)")
        page.locator("canvas").last.click(position={"x": x, "y": y})
        go(page, "", "L1N9")
        assert page.locator(".unit h3").all_text_contents() == ["L1N9"] * 2
        page.evaluate("location.hash = 'S1T0'")
        tables = page.locator(".layers").all_text_contents()
        assert "writing most" in tables[0] and "kept by the gate" in tables[1]
    with opened(chromium, pages[0] / "heads" / "browse.html", "#L1H1") as page:
        assert "head of layer 1" in page.text_content(".unit")


def test_other_experiments_are_shown_if_they_are_of_these_weights(pages, chromium, tmp_path):
    model = pages[1]["gated"]
    run = make_run(tmp_path / "run", pages[0] / "data", model)

    def save(name, weights, **content):
        (run / name).write_text(json.dumps({"settings": {}, **weights, **content}))

    def node(text, importance, activating=False):
        return {"id": text, "activating": activating, "importance": importance}

    nodes = [node(" the", 0.9), node("</script>", 0.6), node(" dog", 1.0, True),
             *(node(f"n{i}", 0.1) for i in range(30))]
    edges = [{"source": " the", "target": " dog"}, {"source": "</script>", "target": " the"},
             {"source": "n29", "target": " dog"}, {"source": " dog", "target": " dog"}]
    neuron = {"layer": 0, "neuron": 3}
    use = dict.fromkeys(browse.USAGE, [0.25, None])
    for weights in (digests(model.state_dict()), {"checkpoint": "other", "gates": "other"}):
        save("n2g_neurons.json", weights, neurons=[
            {**neuron, "graph": {"nodes": nodes, "edges": edges}, "precision": 0.75,
             "recall": None, "f1": 0.5}])
        save("explain_neurons.json", weights, neurons=[
            {**neuron, "score": 0.91, "random_score": 0.5, "explanation": "<b>dogs</b>"}])
        save("units.json", weights, kinds={"attn": use, "mlp": use})
        write(run)
        with opened(chromium, run / "browse.html", "#L0N3") as page:
            unit, commands = page.locator(".unit"), page.locator(".column code")
            if weights["gates"] == "other":
                made = [f"python -m interp.{name} '{run}'" for name in ("n2g", "explain", "units")]
                assert page.locator("svg").count() == 0 and commands.all_text_contents() == made
                continue
            text = unit.text_content()
            assert "<b>dogs</b>" in text and "score 0.91 · on random text alone 0.50" in text
            assert "precision 0.75 · F1 0.50 · 9 less important ones left out" in text
            assert page.locator("svg rect").count() == 24 and commands.count() == 0
            left = {box.text_content(): box.bounding_box()["x"]
                    for box in page.locator("svg g text").all()}
            assert left["</script>"] < left["·the"] < left["·dog"]
            rows = page.locator(".usage tr").all_text_contents()
            assert rows[1:] == ["L0" + "0.25" * 16, "L1" + "–" * 16]
