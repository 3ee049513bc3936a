"""The report: whatever a model writes stays text, the page needs no network and no script, can be
read on a telephone, in the dark and by ear, and both forms hold the same."""
import io, re
from html.parser import HTMLParser

import pytest
from report_runs import SWEEP, numbers_of, summary_of, write_run

from vcb_nb.artifacts import read_json, write_json
from vcb_nb.findings import compare_methods, ties_of
from vcb_nb.plots import STYLE
from vcb_nb.report import (COLORS, Details, Figure, Heading, Marked, Points, ReportConfig, Table,
                           Text, at_equal_kl, mark_own_words, methods_table, most_different,
                           policies_table, render_html, render_markdown, report, stage_rows,
                           summary_line)

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
    def blocks(text):
        said = Marked([(text, "mark"), (text, "strong"), (text, "")])
        return [Heading(text), Text(text), Points([text, said]), Figure("f", b"png", text, text),
                Details(text, [Table([text], [[text, said]], name=text)])]
    plain, page = (Parsed(render_html("t", blocks(text))) for text in ("x", nasty))
    assert [t for t, _ in page.tags] == [t for t, _ in plain.tags]
    assert page.text.count(nasty) >= 10


@pytest.mark.parametrize("nasty", NASTY)
def test_markdown_text_stays_text(nasty):
    line = render_markdown("t", [Table(["c"], [[Marked([(nasty, "strong")])]])]).splitlines()[-1]
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


# --- a whole page ---------------------------------------------------------------------------------

def page_of(folder, **given):
    "A run with planted numbers, and its pages."
    summary = write_run(folder, **given)
    made = report(ReportConfig(run=str(folder), output_dir=str(folder/"report")))
    pages = ((folder/"report"/name).read_text("utf-8") for name in ("index.html", "report.md"))
    return summary, *pages, made


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return page_of(tmp_path_factory.mktemp("whole"))


VOID = {"meta", "img", "br", "link"}


class Checked(HTMLParser):
    "Elements closed in order, ids, headings, and what a screen reader needs."
    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.heads, self.tags, self.links = [], [], [], [], []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, pairs):
        attrs = dict(pairs)
        assert len(attrs) == len(pairs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, attrs))
        if "id" in attrs: self.ids.append(attrs["id"])
        if re.fullmatch("h[1-6]", tag): self.heads.append(int(tag[1]))
        if tag == "a": self.links.append(attrs["href"])
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag


RUNS = {"whole": {}, "without methods": dict(sweep={}), "one method": dict(sweep={"vcb": {1.: .4}}),
        "no gold": dict(judges=("reward",)), "no judge": dict(judges=()), "no ood": dict(ood=False),
        "one prompt": dict(prompts=1), "not on policy": dict(on_policy=False),
        "no calibration": dict(fit=False), "no reward model": dict(reward=False),
        "no samples": dict(samples=False),
        "online": dict(sweep={"grpo": {1.: .3}, "vcb_online": {2.: .5}}),
        "other names": dict(sweep={"mine": {1.: .3}, "yours": {2.: .5}})}


@pytest.mark.parametrize("case", RUNS)
def test_every_run_has_a_page_that_is_sound(case, tmp_path, monkeypatch):
    "Well formed, one h1, one main, no level skipped; links lead somewhere, images are told."
    monkeypatch.setitem(STYLE, "savefig.dpi", 30) # small pictures are drawn fast
    _, page, markdown, _ = page_of(tmp_path, **RUNS[case])
    found = Checked(page)
    kinds = [tag for tag, _ in found.tags]
    assert kinds.count("main") == kinds.count("h1") == 1 and found.heads[0] == 1
    assert all(b - a <= 1 for a, b in zip(found.heads, found.heads[1:]))
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    for tag, attrs in found.tags:
        if tag == "img": assert attrs["alt"].strip()
        if tag == "th": assert attrs["scope"] in ("row", "col")
        if attrs.get("role") == "region": assert attrs["aria-label"] and attrs["tabindex"] == "0"
    text = re.sub("data:image[^\"]*", "", page)
    assert not re.search(r"\bnan\b|\bNone\b|\d\.\d{5}|<script", text)
    assert markdown.index("## Findings") < markdown.index("## Details")


def test_the_answer_comes_first_and_the_details_are_folded(whole):
    _, page, markdown, made = whole
    assert markdown.index("VCB gains most") < markdown.index("| method |") < markdown.index("![")
    outside = re.sub(r"(?s)<details>.*?</details>", "", page)
    assert "Out of distribution" in page and "Out of distribution" not in outside
    assert made["figures"] == page.count("<figure") == markdown.count("](figures/")
    assert page.count("<details>") == markdown.count("<details>") == 4


def test_methods_have_one_name_everywhere(whole):
    "The names of folders and columns are not those of a page."
    for page in whole[1:3]:
        text = re.sub(r"data:image[^\"]*|\(figures[^)]*\)", "", page)
        assert not re.search(r"vcb-|dpo-|\bsft\b|\bvcb\b|\bdpo\b", text)
        assert "VCB γ=0.5" in text and "DPO β=0.5" in text


def test_both_forms_say_the_same(whole):
    def words(text): return re.findall(r"\w+", text)
    page, plain = Parsed(re.sub(r"(?s)<style>.*?</style>", "", whole[1])), whole[2]
    plain = re.sub(r"!\[[^]]*\]\([^)]*\)|</?(details|summary|mark)>|\\\\", "", plain)
    for sentence in re.findall(r"(?m)^- (.*)$", whole[2]):
        assert words(sentence) and " ".join(words(sentence)) in " ".join(words(" ".join(page.text)))
    assert "".join(words(plain)).count("VCBγ") == "".join(words("".join(page.text))).count("VCBγ")


def test_the_table_marks_the_best_and_its_ties():
    "By the paired difference: SLiC is told from the best, IPO is not."
    sweep = {"slic": {2.: .2}, "vcb": {2.: 1.}, "ipo": {2.: .99}}
    numbers = numbers_of(sweep, noise=.5)
    summary, per_prompt = summary_of(numbers), {"test": {"policies": numbers}}
    found, table = compare_methods(summary, per_prompt), methods_table(summary, per_prompt)
    assert ties_of(found) == ["ipo"] and table.columns[0] == "method"
    rows = {row[0]: row[1] for row in table.rows}
    assert list(rows) == ["VCB", "IPO", "SLiC"]
    assert rows["VCB"].parts[0][1] == "strong"
    assert rows["IPO"].startswith("≈ ") and not rows["SLiC"].startswith("≈ ")
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_one_method_is_not_bold():
    numbers = numbers_of({"vcb": {2.: 1.}})
    table = methods_table(summary_of(numbers), {"test": {"policies": numbers}})
    assert isinstance(table.rows[0][1], str) and "≈" not in table.rows[0][1]


def test_a_column_has_one_number_of_decimals(whole):
    for table in (policies_table(whole[0]), policies_table(whole[0], "ood")):
        for column in list(zip(*table.rows))[1:]:
            digits = {len(n.partition(".")[2]) for cell in column
                      for n in re.findall(r"\d+(?:\.\d+)?", cell)}
            assert len(digits) <= 1, column


# --- equal stages, samples ------------------------------------------------------------------------

def manifest(stage, **summary): return dict(stage=stage, seconds=4., summary=summary)


def test_repeats_of_a_stage_are_one_line():
    six = [manifest(f"calibrate/v{i}", loss="vcb", steps=20, seconds=4 + i/7, dropped={"empty": i})
           for i in range(6)]
    rows = stage_rows([manifest("sft", loss=1.23456), *six,
                       manifest("calibrate/d", loss="dpo", steps=20, seconds=1.2345678)])
    assert [row[0] for row in rows] == ["sft", "calibrate, 7 runs"]
    assert rows[0][2] == "loss 1.23" and rows[1][1].split() == ["28", "s"]
    assert rows[1][2] == "loss VCB, DPO, steps 20, seconds 1.23 to 4.71, dropped 15 (empty)"


def test_numbers_of_a_stage_have_three_digits():
    assert summary_line({"a": 1.2345678, "b": 6702.3, "c": 12345, "d_e": 0.0, "f": True}) == (
        "a 1.23, b 6,702, c 12,345, d e 0")


def test_the_prompts_on_which_responses_differ_most():
    same, half, apart = ["a b c"]*3, ["a b c", "a b c", "a b d"], ["a b", "c d", "e f"]
    assert most_different([same, half, apart], 1) == [2]
    assert most_different([apart, same, half], 2) == [0, 2]
    assert most_different([same]*3, 2) == [0, 1] and most_different([], 3) == []
    assert most_different([same, half], 9) == [0, 1]


def test_marked_words_are_those_that_no_other_response_has():
    texts = ["It was good.", "it was  very good", "It was dull, very.", ""]
    found = mark_own_words(texts)
    for text, marked in zip(texts, found):
        assert "".join(part for part, _ in marked.parts) == " ".join(text.split())
    assert [[p for p, tag in m.parts if tag] for m in found] == [[], [], ["dull,"], []]


def test_marks_are_elements_in_both_forms():
    said = [Points(mark_own_words(["It was good.", "It was bad."]))]
    assert "It was <mark>bad.</mark>" in render_html("t", said)
    assert "- It was <mark>bad.</mark>\n" in render_markdown("t", said)


def test_samples_have_their_rewards_where_these_are_stored(tmp_path):
    write_run(tmp_path)
    for folder in (tmp_path/"evaluate"/"samples").iterdir():
        write_json(folder/"gold-x.json", [[1.25 + i] for i in range(40)])
    made = report(ReportConfig(run=str(tmp_path), output_dir=str(tmp_path/"a")))
    page = open(made["markdown"], encoding="utf-8").read()
    number = int(re.search(r"### Prompt (\d+)", page)[1])
    assert f"| SFT | {number + .25:.2f} |" in page
    for folder in (tmp_path/"evaluate"/"samples").iterdir():
        write_json(folder/"gold-y.json", [[0.]]*40)
    made = report(ReportConfig(run=str(tmp_path), output_dir=str(tmp_path/"b")))
    assert "| policy | response |" in open(made["markdown"], encoding="utf-8").read()


# --- to be seen -----------------------------------------------------------------------------------

def luminance(color):
    parts = [int(color[i:i + 2], 16)/255 for i in (1, 3, 5)]
    r, g, b = (v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4 for v in parts)
    return .2126*r + .7152*g + .0722*b


def ratio(a, b):
    low, high = sorted(map(luminance, (a, b)))
    return (high + .05)/(low + .05)


@pytest.mark.parametrize("scheme", COLORS)
def test_text_stands_out_from_its_ground(scheme):
    "WCAG 2.2, 1.4.3: 4.5 to 1; the formula is held to black on white, 21 to 1."
    assert ratio("#000000", "#ffffff") == pytest.approx(21)
    c = COLORS[scheme]
    for text in ("text", "quiet", "link"):
        for ground in ("ground", "soft"): assert ratio(c[text], c[ground]) >= 4.5
    assert ratio(c["marked"], c["mark"]) >= 4.5


def test_every_color_of_the_page_is_one_of_the_list(whole):
    style = re.search(r"(?s)<style>(.*?)</style>", whole[1])[1]
    rules = re.sub(r"--\w+: #\w+;", "", style)
    assert not re.search(r"#[0-9a-f]{3,}", rules)
    assert {*re.findall(r"var\(--(\w+)\)", rules)} == {*COLORS["light"]} == {*COLORS["dark"]}


WIDE = """[document.documentElement.scrollWidth > innerWidth,
  [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll *, figure *') &&
    e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))]"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_is_never_wider_than_its_window(browser, whole, tmp_path, width):
    "With everything unfolded; what is wider scrolls in its own box."
    (tmp_path/"a.html").write_text(whole[1], "utf-8")
    browser.viewport(width, mobile=width < 500)
    browser.open((tmp_path/"a.html").as_uri())
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.settle()
    assert browser.evaluate(WIDE) == [False, []] and not browser.errors
    assert browser.evaluate("document.querySelectorAll('figure img').length") == whole[3]["figures"]


def test_dark_and_light_are_what_the_reader_asked_for(browser, whole, tmp_path):
    "And the first stop of the keyboard leads past the links."
    (tmp_path/"a.html").write_text(whole[1], "utf-8")
    for dark in (False, True):
        browser.dark(dark)
        browser.open((tmp_path/"a.html").as_uri())
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        want = COLORS["dark" if dark else "light"]["ground"]
        assert re.findall(r"\d+", ground) == [str(int(want[i:i + 2], 16)) for i in (1, 3, 5)]
        turned = browser.evaluate("getComputedStyle(document.querySelector('img')).filter")
        assert (turned != "none") == dark
    browser.key("Tab")
    assert browser.evaluate("document.activeElement.getAttribute('href')") == "#content"
    browser.key("Enter")
    browser.settle()
    assert browser.evaluate("document.activeElement.id") == "content"
    browser.dark(False)


def test_the_page_names_the_level_of_its_intervals(tmp_path):
    for folder, level in (("a", .95), ("b", .8)):
        summary = write_run(tmp_path/folder)
        summary["settings"]["level"] = level
        write_json(tmp_path/folder/"evaluate"/"summary.json", summary)
        report(ReportConfig(run=str(tmp_path/folder), output_dir=str(tmp_path/folder/"report")))
        page = (tmp_path/folder/"report"/"report.md").read_text("utf-8")
        assert f"{100*level:g} % bootstrap" in page and f"{100*level:g} % interval" in page


def test_a_policy_that_has_collapsed_is_told_of_first(tmp_path):
    "Of two policies of one kind too, whose stages are one line of the pipeline."
    lost = "entropy 2.1 → 0.02 nats"
    for name, found in (("ppo", {"collapsed": lost}), ("grpo", {})):
        write_json(tmp_path/"online"/name/"manifest.json",
                   dict(stage=f"online/{name}", seconds=1., versions={},
                        summary=dict(loss=name, steps=3, **found)))
    report(ReportConfig(run=str(tmp_path), output_dir=str(tmp_path/"report")))
    page = (tmp_path/"report"/"report.md").read_text("utf-8")
    top = page[:page.index("## Details")]
    assert f"PPO has collapsed: {lost}" in top and "GRPO has" not in page
