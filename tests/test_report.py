"""The report page: what it says, that it fetches nothing, and that nothing in a results file can break it."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dlkernels.report import build, data, summary

Json = dict[str, Any]
SECTIONS = ("machine", "limits", "check", "bench", "models", "overhead", "canary", "failures", "skipped")


@pytest.fixture
def example() -> Json:
    """Invented measurements of an invented machine."""
    return json.loads((Path(__file__).parent / "data" / "results_example.json").read_text())


@pytest.fixture
def small(example: Json) -> Json:
    """The same with one op, one dtype and few rows."""
    example["bench"] = [row for row in example["bench"] if row["op"] == "linear" and row["direction"] == "forward"][:6]
    example["check"] = example["check"][:3]
    example["models"] = example["models"][:2]
    return example


class Page(HTMLParser):
    """The elements of a page; fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "wbr"}:  # these have no end
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str, css: str = "") -> int:
        return sum(name == tag and css in [*(attrs.get("class") or "").split(), ""] for name, attrs in self.elements)


def render(results: Json, folder: Path) -> str:
    return build(results, folder / "index.html").read_text(encoding="utf-8")


def test_every_section_is_there(example: Json, tmp_path: Path) -> None:
    page = Page(render(example, tmp_path))
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {"speed", "checks", "roofline", "ops", "models", "overhead", "machine", "op-linear", "op-linear_relu"} <= ids
    panels = {(row["op"], row["dtype"], row["direction"]) for row in example["bench"]}
    dtypes = {row["dtype"] for row in example["bench"]}
    models = {row["model"] for row in example["models"]}
    assert page.count("svg", "plot") == len(panels) + len(dtypes) + 4 * len(models)
    assert example["machine"]["cpu"] in page.text
    assert "the time budget was spent" in page.text


def test_the_file_is_small_and_fetches_nothing(example: Json, tmp_path: Path) -> None:
    text = render(example, tmp_path)
    assert len(text.encode()) < 400_000
    assert not re.search(r"https?://|@import|url\(", text)
    for tag, attrs in Page(text).elements:
        assert "src" not in attrs, tag
        assert (attrs.get("href") or "#").startswith(("#", "data:,")), attrs


def test_a_file_of_many_ops_stays_small(example: Json, tmp_path: Path) -> None:
    sizes = {"8x4096x4096", "64x784x256", "1024x1024x1024"}
    rows = [row for row in example["bench"] if row["op"] == "linear"]
    example["bench"] = [
        {**row, "op": f"op{i}", "dtype": dtype}
        for i in range(8)
        for dtype in ("float32", "float64", "bfloat16", "float16")
        for row in rows
        if i == 0 or row["label"] in sizes
    ]
    example["check"] = [{**row, "op": f"op{i}"} for i in range(8) for row in example["check"]]
    text = render(example, tmp_path)
    assert len(data.read(example).panels) == 64
    assert len(text.encode()) < 400_000
    assert Page(text).count("div", "panel") == 64


def test_anchors_lead_somewhere(example: Json, tmp_path: Path) -> None:
    page = Page(render(example, tmp_path))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {(attrs["href"] or "")[1:] for tag, attrs in page.elements if tag == "a"}
    assert targets <= set(ids)


def test_the_geometric_mean_is_that_of_the_rows(example: Json) -> None:
    for panel in data.read(example).panels:
        rows = [row for row in example["bench"] if (row["op"], row["dtype"], row["direction"]) == (panel.op, panel.dtype, panel.direction)]
        ratios = [row["vs_eager"] for row in rows if row["provider"] == "dlkernels"]
        mean = panel.geomean("eager")
        assert mean is not None
        assert math.isclose(mean ** len(ratios), math.prod(ratios), rel_tol=1e-9)


def test_native_wins_are_listed_widest_first(example: Json, tmp_path: Path) -> None:
    for row in example["bench"]:
        row["vs_eager"] = 2.0 if row["provider"] == "dlkernels" else 1.0
        row["median_s"] = {"dlkernels": 1.0, "eager": 2.0, "compile": 3.0}[row["provider"]]
    beaten = [row for row in example["bench"] if row["provider"] == "dlkernels"][:2]
    beaten[0]["vs_eager"], beaten[1]["vs_eager"] = 0.9, 0.25
    found = data.read(example).losses
    assert [(loss.label, loss.ratio) for loss in found] == [(beaten[1]["label"], 0.25), (beaten[0]["label"], 0.9)]
    text = render(example, tmp_path)
    assert text.index("Where native wins") < text.index("Every op")
    assert 'class="native" style="left:0.0%;width:50.0%"' in text  # a factor of 4 fills the losing half of the bar
    assert 'class="ours" style="left:50.0%;width:25.0%"' in text  # a factor of 2 half of the winning one
    assert "Native wins 2 of" in Page(text).text


def test_a_page_without_losses_says_so(example: Json, tmp_path: Path) -> None:
    for row in example["bench"]:
        row["vs_eager"] = 2.0
        row["median_s"] = 1.0 if row["provider"] == "dlkernels" else 2.0
    text = Page(render(example, tmp_path)).text
    assert "Where native wins" not in text
    assert "No other provider is faster" in text


def test_a_failed_check_leads_the_page(example: Json, tmp_path: Path) -> None:
    assert "72 of 72 checks" in summary(example)
    example["check"][-1].update(ok=False, ours_error=1e9)
    text = Page(render(example, tmp_path)).text
    assert "not all right: 1 of 72 checks against float64 fail" in text
    assert text.count("✗ 1 of 12 fail") == text.count("✗ 1 of 3 fail") == 1  # by op and dtype, and by quantity


def test_a_wrong_result_counts_in_no_mean(small: Json, tmp_path: Path) -> None:
    ours = next(row for row in small["bench"] if row["provider"] == "dlkernels")
    ours.update(ok=False, vs_eager=1000.0)
    (panel,) = data.read(small).panels
    assert max(panel.ratios("eager")) < 1000
    assert len(panel.ratios("eager")) == len(panel.races) - 1
    assert "✗ wrong result" in Page(render(small, tmp_path)).text


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", ["missing", None, [], {}, "text", 3, [None, 7]])
def test_a_section_may_be_missing_or_malformed(small: Json, section: str, value: object, tmp_path: Path) -> None:
    small.pop(section, None)
    if value != "missing":
        small[section] = value
    page = Page(render(small, tmp_path))
    notes = {"check": "No check was run", "bench": "holds no timings", "models": "No model was trained", "overhead": "was not measured"}
    assert notes.get(section, "") in page.text
    assert summary(small)


def test_an_empty_file_gives_a_page(tmp_path: Path) -> None:
    assert "holds no measurement yet" in Page(render({}, tmp_path)).text
    assert "holds no measurement yet" in summary({})


@pytest.mark.parametrize("seed", range(60))
def test_no_value_can_break_the_page(small: Json, seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    odd: list[Any] = [
        None,
        math.nan,
        math.inf,
        -1.0,
        0,
        1e-320,
        1e308,
        10**400,
        "",
        "1.5",
        "\ud800",
        "\x00",
        True,
        [],
        {},
        [math.nan, "x"],
        {"a": {}},
    ]

    def spoil(value: object) -> None:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
        for key, item in items:
            if draw.random() < 0.08:
                value[key] = draw.choice(odd)  # type: ignore[index]
            else:
                spoil(item)

    spoil(small)
    page = Page(render(small, tmp_path))
    assert page.count("section") == 7
    assert not re.search(r"\b(nan|inf)\b", page.text.replace("ISA", ""), re.IGNORECASE)
    assert summary(small)


def test_models_with_dropout_are_compared_on_average(small: Json, tmp_path: Path) -> None:
    def note(random_layers: bool) -> str:
        for run, losses in zip(small["models"], ([2.0, 1.0], [1.0, 4.0])):
            run |= {"first_losses": losses, "random_layers": random_layers}
        return Page(render(small, tmp_path)).text

    assert "the two losses differ by at most 1" in note(False)
    assert "the losses are 1.500 and 2.500 on average" in note(True)


def test_an_interrupted_run_shows_what_is_there(example: Json, tmp_path: Path) -> None:
    example["bench"] = example["bench"][:4]  # one size, and the next without its opponents
    example["models"] = [{"model": "mlp", "provider": "dlkernels", "train_loss": [2.0], "interrupted": True}]
    page = Page(render(example, tmp_path))
    assert "The training was interrupted" in page.text
    assert page.count("svg", "plot") == 1 + 1 + 1  # roofline, one panel, one curve


def test_text_from_the_file_is_escaped(example: Json, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"' onload=x </title>{{ 7 * 7 }}"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return value + attack if isinstance(value, str) and value not in ("dlkernels", "eager") else value

    page = Page(render(poison(example), tmp_path))
    assert page.count("script") == 1
    assert all("onload" not in attrs for _, attrs in page.elements)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_results_must_be_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="results: got list"):
        build([], tmp_path / "index.html")  # type: ignore[arg-type]


def test_build_creates_the_folder_and_changes_nothing(example: Json, tmp_path: Path) -> None:
    before = copy.deepcopy(example)
    first = build(example, tmp_path / "a" / "b" / "index.html")
    assert first == tmp_path / "a" / "b" / "index.html"
    assert first.read_bytes() == build(example, str(tmp_path / "again.html")).read_bytes()
    assert example == before


def test_an_older_file_and_a_busy_machine_are_named(example: Json, tmp_path: Path) -> None:
    example["schema"], example["canary"]["busy"] = 0, True
    text = Page(render(example, tmp_path)).text
    assert "schema 0" in text
    assert "The machine was busy" in text
    assert "The machine was busy" in summary(example)


def test_the_summary_is_an_aligned_table(example: Json) -> None:
    lines = summary(example).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("op "))
    table = lines[start : lines.index("", start)]
    assert len(table) == 1 + len(data.read(example).panels)
    assert len({len(line) for line in table}) == 1
    assert all(line[table[0].index("direction") :].startswith("forward") for line in table[1:])
