"""The eviction viewer in a real browser: what it shows is what the caches hold, and no text runs as code."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, ExpectedAttentionPress, KeyDiffPress
from transformers import DynamicCache

from data.own_question import OwnQuestion
from data.questions import QuestionData
from sparsekv_pl.analysis.eviction_viewer import EvictionViewer
from sparsekv_pl.evaluation.case_view import add_kept
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.evaluation.view_pages import view_pages
from sparsekv_pl.eviction.kept_positions import masked_keys
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.models.backbone import adapter_off
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.viewer.compact_arrays import packed_bits, packed_masses
from sparsekv_pl.viewer.inline_page import INSTEAD, InlinePage
from sparsekv_pl.viewer.viewer_page import viewer_page
from tests.tiny_training import MakeBackbone, MakeTrainer

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>\u2028<!--<b>&lt;%%DATA%%"
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SENTENCE = "The cat sat on a mat and said nothing. "
DARK = {"color_scheme": "dark"}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
CONTRAST = """() => {
  const parts = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c > 0.04045 ? ((c + 0.055) / 1.055) ** 2.4 : c / 12.92))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = parts(getComputedStyle(document.body).backgroundColor);
  const span = document.querySelector('[data-token]');
  return ['', 'minus'].map((name) => {
    span.className = name;
    span.style.setProperty('--share', 1);
    const style = getComputedStyle(span), [r, g, b, alpha] = parts(style.backgroundColor);
    const behind = [r, g, b].map((c, i) => c * alpha + paper[i] * (1 - alpha));
    const pair = [light(behind), light(parts(style.color))].sort();
    return (pair[1] + 0.05) / (pair[0] + 0.05);
  });
}"""


UNNAMED = """() => [...document.querySelectorAll('select, input, button')]
  .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent).map((one) => one.outerHTML)"""


@pytest.fixture(scope="module")
def made(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvictionViewer, Any]:
    """A viewer of a random model with a random adapter, and its one batch."""
    folder = tmp_path_factory.mktemp("viewer")
    model = tiny_backbone().load()[0]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "adapter")
    (folder / "text.txt").write_text(SENTENCE * 6 + "The number of the cat is 4711.\n" + SENTENCE * 6)
    source = OwnQuestion(str(folder / "text.txt"), "What is the number of the cat?", answer="4711")
    data = QuestionData(source, samples=1, max_tokens=400, max_new_tokens=4)
    settings = [Setting(KeyDiffPress(), [0.5, 0.9]), Setting(AdaKVPress(ExpectedAttentionPress()), [0.4])]
    viewer = EvictionViewer(tiny_backbone(adapter=str(folder / "adapter")), settings, str(folder))
    tiny_trainer().predict(viewer, data, return_predictions=False)
    return viewer, next(iter(data.predict_dataloader()))


@torch.no_grad()
def held(viewer: EvictionViewer, batch: Any, side: str, press: Any, ratio: float) -> torch.Tensor:
    """(layers, K, L) bool, by comparing every pair of an evicted cache with every pair of a full one."""
    model, ids = viewer.causal_lm, batch["context_ids"]
    with adapter_off(viewer.model) if side == "base" else torch.no_grad():
        full = prefill(model, ids, None).cache
        if hasattr(press, "press"):
            press.press.compression_ratio = ratio
        else:
            press.compression_ratio = ratio
        left, hidden = prefill(model, ids, press).cache, masked_keys(model)
    found = torch.zeros(len(full.layers), full.layers[0].keys.shape[1], ids.shape[1], dtype=torch.bool)
    for layer in range(len(full.layers)):
        (before, after), mask = pairs(full, layer), hidden[layer]
        equal = (pairs(left, layer)[1][:, :, None] == after[:, None]).all(-1)  # (K, kept, L)
        assert bool((equal.sum(-1) == 1).all()), "every pair is one of the full cache's"
        if mask is not None:
            equal[mask[1], mask[2]] = False
        found[layer] = equal.any(1)
        assert before is full
    return found


def pairs(cache: DynamicCache, layer: int) -> tuple[DynamicCache, torch.Tensor]:
    """One layer's keys and values, (K, S, 2 D)."""
    return cache, torch.cat([cache.layers[layer].keys[0], cache.layers[layer].values[0]], -1)


def choose(page: Any, **values: str) -> None:
    """Set switches as a user would: select boxes by value, radio buttons by label."""
    for name, value in values.items():
        if name in ("side", "ratio"):
            page.tab.locator(f"#{name} label", has_text=value).click()
        else:
            page.tab.select_option(f"#{name}", value)


def test_the_shading_is_what_the_caches_hold(made: Any, open_page: Callable[..., Any]) -> None:
    """Every press, ratio and side; all heads, one layer, one head; and their difference."""
    viewer, batch = made
    page = open_page(viewer.output / "viewer.html")
    points = [(setting.press, ratio) for setting in viewer.settings for ratio in setting.compression_ratios]
    for press, ratio in points:
        kept = {side: held(viewer, batch, side, press, ratio) for side in ("base", "trained")}
        assert not torch.equal(kept["base"], kept["trained"])
        name = "AdaKV(ExpectedAttention)" if hasattr(press, "press") else "KeyDiff"
        choose(page, press=name, ratio=f"{ratio:.0%}".replace("%", " %"))
        for layer, head in ((None, None), (1, None), (None, 0), (1, 1)):
            choose(page, layer="" if layer is None else str(layer), head="" if head is None else str(head))
            part = (slice(None) if layer is None else layer, slice(None) if head is None else head)
            shares = {side: own[part].reshape(-1, own.shape[-1]).float().mean(0) for side, own in kept.items()}
            for side, wanted in {**shares, "difference": shares["trained"] - shares["base"]}.items():
                choose(page, side=side)
                torch.testing.assert_close(torch.tensor(page.shares(), dtype=torch.float32), wanted)
    assert page.said == [] and len(page.fetched) == 1


def test_switches_keys_and_the_map_work_without_a_mouse(made: Any, open_page: Callable[..., Any]) -> None:
    viewer, batch = made
    page = open_page(viewer.output / "viewer.html")
    tokens, case = batch["context_ids"].shape[1], batch["cases"][0]
    assert page.text("#question").startswith("What is the number of the cat?") and "4711" in page.text("#question")
    assert "".join(page.run("() => viewer.content.tokens")).count("4711") == 1
    assert page.text("#text mark").strip() == "4711"
    assert page.tab.locator("#answers tbody tr").count() == 3  # full cache, two ratios
    answers = {record["answer"] for record in viewer.records if record.get("case") == case.id}
    shown = page.tab.locator("#answers tbody td:not(:nth-child(2))").all_inner_texts()
    assert {text.partition("wrong ")[2].strip() for text in shown} <= {answer or "(empty)" for answer in answers}

    page.tab.locator("#needle").focus()
    page.tab.keyboard.press("Tab")
    start = page.run("() => viewer.content.marked[0][0]")
    assert page.text("#token").startswith(f"Token {start + 1} of {tokens},")
    page.tab.keyboard.press("ArrowRight")
    assert page.text("#token").startswith(f"Token {start + 2} of {tokens},")
    page.tab.keyboard.press("Home")
    assert page.text("#token").startswith(f"Token 1 of {tokens},")
    page.tab.keyboard.press("n")
    spoken = page.text("#token")
    counts = [page.run("(side) => viewer.counts[side][viewer.current]", side) for side in ("base", "trained")]
    assert f"kept by {counts[0]} of 4 heads (base), {counts[1]} of 4 heads (trained)" in spoken
    mass = page.run("() => [...viewer.mass]")
    rank = 1 + sum(other > mass[start] for other in mass)
    assert f"rank {rank} of {tokens}" in spoken and 0 < sum(mass) < 1

    page.tab.locator("#heads button").first.focus()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.tab.keyboard.press(key)
    assert page.tab.input_value("#layer") == page.tab.input_value("#head") == "1"
    pressed = page.tab.locator("#heads [aria-pressed=true]")
    assert pressed.get_attribute("aria-label").startswith("layer 1, head 1: ") and "of 1 heads (base)" in page.text(
        "#token"
    )
    assert ", layer 1, head 1: base keeps " in page.text("#summary")
    pressed.click()
    assert page.tab.input_value("#layer") == page.tab.input_value("#head") == ""
    page.tab.locator("[data-token='3']").hover()
    assert page.text("#token").startswith("Token 4 of")
    assert page.run(UNNAMED) == [], "every control has a name"
    assert page.said == []


@pytest.mark.parametrize("look", [{}, DARK, PHONE, PHONE | DARK], ids=["light", "dark", "phone", "dark phone"])
def test_it_is_legible(look: dict[str, Any], made: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(made[0].output / "viewer.html", **look)
    width = page.tab.viewport_size["width"]
    assert page.run("() => document.scrollingElement.scrollWidth") <= width
    assert min(page.run(CONTRAST)) >= 4.5  # WCAG 2.2, 1.4.3, at the darkest shade


def test_the_map_stays_below_the_switches_however_many_lines_they_take(
    made: Any, open_page: Callable[..., Any]
) -> None:
    page = open_page(made[0].output / "viewer.html", viewport={"width": 1400, "height": 700})
    heights = []
    for width in (1400, 962):
        page.tab.set_viewport_size({"width": width, "height": 700})
        page.tab.wait_for_function(
            "() => parseFloat(getComputedStyle(document.querySelector('aside')).top) === controls.offsetHeight + 16"
        )
        heights.append(page.run("() => controls.offsetHeight"))
    assert heights[0] < heights[1]


@pytest.mark.parametrize("name", ["quickstart", "own_model"])
def test_the_page_stored_in_a_notebook_is_todays_and_runs(
    name: str, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    """Where a frame is shown; a program that takes it away leaves the line that says how to see it."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    outputs = ["".join(one.get("data", {}).get("text/html", "")) for cell in cells for one in cell.get("outputs", [])]
    (frame,) = (output for output in outputs if "<iframe" in output)
    page = html.unescape(frame.split('srcdoc="')[1].split('"')[0])
    content = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert frame == InlinePage(viewer_page(content))._repr_html_(), "render its data again: the viewer has changed"
    assert re.sub("<.*?>", "", frame, flags=re.DOTALL) == INSTEAD
    path = tmp_path / "page.html"
    path.write_text(page)
    opened = open_page(path)
    assert " keeps " in opened.text("#summary") and opened.said == []


def test_no_text_runs_as_code(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """Texts of contexts, questions, answers, presses, errors, paths and names."""
    kept = torch.ones(1, 1, 3, dtype=torch.bool).numpy()
    view = {"viewed": HOSTILE, "variant": "base", "question": HOSTILE, "expected": [HOSTILE], "marked": [[1, 2]]}
    view |= {"tokens": ["a", HOSTILE, "\n"], "layers": 1, "heads": 1, "mass": packed_masses(kept / 3.0)}
    case = {"case": HOSTILE, "variant": "base", "press": HOSTILE, "compression_ratio": 0.5, "prefill": "dense"}
    case |= {"answer": HOSTILE, "exact": 0.0, "answer_prefix": HOSTILE, "kept_pairs": 3.0}
    view |= {"kept": {Condition.of(case).name: packed_bits(kept)}, "unknown": {HOSTILE: HOSTILE}}
    pages = view_pages([view, case], 1, HOSTILE, {"model": HOSTILE})
    path = tmp_path / "viewer.html"
    path.write_bytes(pages["viewer.html"][1])
    page = open_page(path)
    for token in range(3):
        page.tab.locator(f"[data-token='{token}']").click()
    assert page.run("() => window.hit") is None and page.said == [] and len(page.fetched) == 1
    shown = page.run("() => document.body.textContent")
    assert shown.count(HOSTILE) >= 7
    assert page.run("() => document.querySelectorAll('img, b, script:not([id])').length") == 1
    assert json.loads(page.run("() => document.getElementById('data').textContent"))["title"] == HOSTILE


def test_layers_and_pairs_have_the_models_numbers(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """Of a model that evicts in layers 5 and 11; its records do not say how many pairs stayed."""
    kept = torch.ones(2, 1, 3, dtype=torch.bool)
    kept[0, :, 1:] = False
    view = {"viewed": "one", "variant": "base", "question": "Who?", "expected": ["b"], "marked": [[1, 2]], "mass": None}
    view |= {"tokens": ["a", "b", "c"], "kept": {}, "pairs": {}, "unknown": {}}
    case = {"case": "one", "variant": "base", "press": "Knorm", "compression_ratio": 0.5, "prefill": "dense"}
    add_kept(view, Condition.of(case).name, kept, [5, 11])
    ((_, content),) = view_pages([view, case | {"answer": "b", "exact": 1.0}], 1, "kept", {}).values()
    path = tmp_path / "viewer.html"
    path.write_bytes(content)
    page = open_page(path)
    assert page.tab.locator("#layer option").all_inner_texts() == ["all", "5", "11"]
    assert page.tab.locator("#heads tfoot td").all_inner_texts() == ["5", "11"]
    assert page.tab.locator("#answers [data-name=pairs]").all_inner_texts() == ["3", "2"]
    labels = [cell.get_attribute("aria-label") for cell in page.tab.locator("#heads button").all()]
    assert labels == ["layer 5, head 0: 0 %", "layer 11, head 0: 100 %"]
    page.tab.select_option("#layer", label="5")
    assert ", layer 5, head all: base keeps 0 %" in page.text("#summary") and page.said == []
