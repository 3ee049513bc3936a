"""The report: whatever a model writes stays text, the page needs no network, and both forms hold
the same."""
import json, re
from html.parser import HTMLParser

import pytest

from vcb_nb.artifacts import write_json
from vcb_nb.report import (Figure, Heading, ReportConfig, Table, Text, at_equal_kl,
                           render_html, render_markdown, report)

NASTY = ["<script>alert(1)</script>", "</td></table><h1>x", "<img src=x onerror=alert(1)>",
         "a | b\n\n# c", "![x](http://e.vil/p.png)", "&lt;b&gt;"]


class Parsed(HTMLParser):
    "Tags and text of a page."
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)


@pytest.mark.parametrize("nasty", NASTY)
def test_model_text_stays_text(nasty):
    blocks = [Heading(nasty), Text(nasty), Table([nasty], [[nasty]]), Figure("f", b"png", nasty)]
    plain = Parsed(render_html("t", [Heading("x"), Text("x"), Table(["x"], [["x"]]),
                                     Figure("f", b"png", "x")]))
    page = Parsed(render_html("t", blocks))
    assert [t for t, _ in page.tags] == [t for t, _ in plain.tags]
    assert page.text.count(nasty) >= 3


@pytest.mark.parametrize("nasty", NASTY)
def test_markdown_text_stays_text(nasty):
    line = render_markdown("t", [Table(["c"], [[nasty]])]).splitlines()[-1]
    assert "<" not in line
    assert len(re.findall(r"(?<!\\)\|", line)) == 2
    assert not re.search(r"(?<!\\)!?\[", line)


def test_page_is_self_contained():
    page = render_html("t", [Figure("f", b"png", "caption"), Heading("Part")])
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert "default-src 'none'" in page


def policy(method, kl): return {"method": method, "splits": {"test": {"kl": {"value": kl}}}}


def test_policies_are_compared_at_one_kl():
    "The common KL is the largest that every method reaches; each method gives its nearest policy."
    summary = {"policies": {
        "sft": policy("sft", 0.),
        "v1": policy("vcb", .5), "v2": policy("vcb", 2.), "v3": policy("vcb", 9.),
        "d1": policy("dpo", 2.5), "d2": policy("dpo", 7.),
        "r": policy("rrhf", 2.2)}}
    assert at_equal_kl(summary) == {"sft": "sft", "vcb": "v2", "dpo": "d1", "rrhf": "r"}


def test_report_of_a_run_that_has_only_begun(tmp_path):
    write_json(tmp_path/"sft"/"manifest.json",
               {"stage": "sft", "seconds": 3, "summary": {"eval_loss": 1.5},
                "versions": {"torch": "2"}})
    made = report(ReportConfig(run=str(tmp_path), output_dir=str(tmp_path/"report")))
    assert "eval loss 1.5" in (tmp_path/"report"/"report.md").read_text() and made["figures"] == 0
