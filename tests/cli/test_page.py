"""The page stands alone, can be read by machines and keyboards, and says what happened."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from moe_fuzz.campaign.events import Cell
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.report import heat, html, svg
from moe_fuzz.report.story import MAX_SAMPLES, Story
from tests.cli.campaign_told import OTHER, TARGET, story, told

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects what matters, and refuses tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.mark.parametrize("end", [True, False])
def test_the_page_loads_nothing(finding: Finding, end: bool) -> None:
    text = html.render(story(told(finding, end=end)))
    page = Page(text)
    assert "default-src 'none'" in text
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "base")
        assert not {"src", "srcset", "data", "action"} & set(attributes), tag
        assert str(attributes.get("href", "#")).startswith("#")
    assert "@import" not in text
    assert "url(" not in text


def test_what_a_target_said_stays_text(finding: Finding) -> None:
    page = Page(html.render(story(told(finding))))
    assert "<script>alert(1)</script>" in page.text
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_links_and_names_hold(finding: Finding) -> None:
    page = Page(html.render(story(told(finding))))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name in ("aria-labelledby", "href"):
            if name in attributes:
                assert str(attributes[name]).lstrip("#") in ids, tag
        if tag == "div" and attributes.get("class") == "scroll":  # or a keyboard cannot reach what is cut off
            assert attributes["tabindex"] == "0"
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


def test_the_page_says_what_happened(finding: Finding) -> None:
    page = Page(html.render(story(told(finding))))
    for needed in (
        "1 new finding", "100 cases in 5.0 s", finding.replay, finding.label, "1111111111", "2222222222",
        "git bisect run",
        "flaky case", "1 kind of bad cases not examined", "killed from outside", "align@vllm",
            "more like them are not examined",
        "80 cases, at most 40 %", "processes started 4", "mean time to start one 50 ms",
    ):  # fmt: skip
        assert needed in page.text, needed
    cut = Page(html.render(story(told(finding, end=False)))).text
    assert "not finished, 1 new finding so far" in cut
    assert finding.replay in cut


def test_a_page_of_a_clean_campaign_claims_no_proof(finding: Finding) -> None:
    ends = {"new": (), "known": (), "fixed": (), "exit_code": 0}
    for verdicts, said in (({"pass": 60}, "no proof"), ({"pass": 59, "crash": 1}, "1 case of 60 broke a rule")):
        clean = [e for e in told(finding, cases=60, verdicts=verdicts, **ends) if not e.kind.startswith("finding-")]
        text = html.render(story(clean))
        assert "no new finding" in text
        assert said in text
        assert ("no proof" in text) is (said == "no proof")
    assert 'class="banner"' in text
    assert 'class="banner red"' in html.render(story(told(finding)))


# ---- the heat map


def test_holes_are_seen() -> None:
    cells = (
        Cell(OTHER, "all", "none", "eager", 5, 0, 0.0),
        Cell(TARGET, "all", "none", "eager", 1000, 0, 0.5),
        Cell(TARGET, "all", "nan_rows", "eager", 1, 1, 0.0),
        Cell(TARGET, "E>32", "none", "eager", 30, 0, 0.1),
        Cell(TARGET, "E>8", "none", "eager", 60, 0, 0.1),
    )
    first, second = heat.maps(cells)
    assert (first.target, second.target) == (TARGET, OTHER)  # what is bad stands first
    assert [row.name for row in first.rows] == ["all", "E>8", "E>32"]
    assert {"nan_rows", "ties"} <= set(first.faults)  # drawn, and never drawn
    at = dict(zip(first.faults, first.rows[0].spots, strict=True))
    assert (at["none"].heat, at["nan_rows"].heat, at["ties"].heat) == (heat.LEVELS, 1, 0)
    assert at["nan_rows"].bad == 1
    assert "largest error 50% of its bound" in at["none"].tip
    assert (first.covered, first.total) == (4, 3 * len(first.faults))


# ---- pictures


def bar_heights(picture: str) -> list[float]:
    return [float(height) for height in re.findall(r'class="bar"[^>]* height="([\d.]+)"', picture)]


def test_a_bar_for_each_bin_and_a_single_case_can_be_seen() -> None:
    heights = bar_heights(svg.budgets((10_000, 0, 2500, *[0] * 16, 1), "x"))
    assert len(heights) == 3
    assert heights[1] == pytest.approx(heights[0] / 2, abs=0.1)
    assert heights[2] >= 2


def test_a_timeline_of_nothing_is_still_a_picture() -> None:
    assert "<svg" in svg.timeline([], [], [], "nothing")
    assert svg.timeline([(0.0, 0), (10.0, 100)], [(5.0, "a<b")], [2.0], "x").count("a&lt;b") == 1


def test_the_rate_is_that_of_the_samples() -> None:
    samples = [(float(second), 20 * second) for second in range(61)]
    assert {round(rate, 6) for _, rate in svg._rates(samples)} == {20.0}


def test_the_memory_of_a_long_campaign_is_bounded(finding: Finding) -> None:
    made = Story()
    progress = told(finding)[5]
    for at in range(20_000):
        made.take(type(progress)(**{**vars(progress), "seconds": at / 4, "cases": at}))
    assert len(made.samples) <= MAX_SAMPLES
    assert made.samples[-1][0] > 4900
    gaps = {round(b[0] - a[0], 3) for a, b in zip(made.samples, made.samples[1:], strict=False)}
    assert len(gaps) <= 2  # evenly thinned
