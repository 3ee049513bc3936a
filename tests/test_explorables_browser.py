"""Every figure in a real browser: by keyboard, mouse and finger, on light and dark, wide and
narrow.

Times are printed, never asserted (`pytest -s`): the machine may be busy."""
import re, time

import pytest

from vcb_nb.explorables import EXPLORABLES

NAMES = list(EXPLORABLES)
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Figure</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width"></head>
<body style="margin:12px;{style}">{body}</body></html>"""
STYLES = {"light": "background:#fff;color:#222", "dark": "background:#111;color:#eee"}
RANGES, HANDLES = "input[type=range]", "svg [role=slider]"
# What a figure shows: the drawings without what only a screen reader sees, and the canvases.
PICTURE = """(k => [...document.querySelectorAll('.vcbx')[k]
                    .querySelectorAll('svg, canvas')].map(n => {
  if (n.toDataURL) return n.toDataURL();
  const copy = n.cloneNode(true);
  copy.querySelectorAll('[visibility=hidden]').forEach(c => c.remove());
  return copy.outerHTML.replace(/ aria-[a-z]+="[^"]*"/g, '');
}).join('\\n'))"""


@pytest.fixture
def figures(browser, tmp_path):
    "A function: names -> the browser with a page of these figures, and nothing else."
    def show(*names, style="light", width=1000, mobile=False):
        body = "\n".join(EXPLORABLES[name]()._repr_html_() for name in names)
        path = tmp_path/"page.html"
        path.write_text(PAGE.format(style=STYLES[style], body=body), "utf-8")
        browser.viewport(width, 2400, mobile)
        browser.dark(style == "dark")
        browser.send("Emulation.setTouchEmulationEnabled", enabled=mobile)
        browser.open(path.as_uri())
        browser.settle()
        return browser
    yield show
    assert browser.errors == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


def picture(page, k=0):
    page.settle()
    return page.evaluate(f"{PICTURE}({k})")


def count(page, selector): return page.evaluate(f"document.querySelectorAll({selector!r}).length")


def node(selector, k): return f"document.querySelectorAll({selector!r})[{k}]"


def box(page, selector, k=0):
    "Left, top, width, height of the k-th, in the window; scrolled into view."
    return page.evaluate("(n => { n.scrollIntoView({block: 'center'}); "
                         "const b = n.getBoundingClientRect();"
                         f"return [b.left, b.top, b.width, b.height] }})({node(selector, k)})")


def changes(page, act, seconds=5, k=0):
    "Does the picture change after `act()`? Waits for an animation to begin."
    before = picture(page, k)
    act()
    for _ in range(int(seconds * 10)):
        if picture(page, k) != before: return True
        page.evaluate("new Promise(r => setTimeout(r, 100))")
    return False


def reset(page, figure=0):
    page.evaluate(f"[...document.querySelectorAll('.vcbx')[{figure}].querySelectorAll('button')]"
                  ".find(b => b.textContent === 'Reset')?.click()")
    page.settle()


MOVES = {RANGES: ("ArrowRight", "ArrowLeft", "PageDown"), HANDLES: ("PageUp", "PageDown"),
         "select": ("ArrowDown", "ArrowUp"), "input[type=checkbox]": (" ",)}


def moved_by_keyboard(page, figure=0):
    "Every control of a page's figure is moved by its keys; how many there are. Any page will do."
    total = 0
    for selector, keys in MOVES.items():
        inside = f"document.querySelectorAll('.vcbx')[{figure}].querySelectorAll({selector!r})"
        for k in range(page.evaluate(f"{inside}.length")):
            page.evaluate(f"{inside}[{k}].focus()")
            assert page.evaluate(f"document.activeElement === {inside}[{k}]")
            moved = any(changes(page, lambda: page.key(key), .5, figure) for key in keys)
            assert moved, f"figure {figure}, {selector} {k}"
            reset(page, figure)
            total += 1
    return total


@pytest.mark.parametrize("name", NAMES)
def test_every_control_moves_the_picture_by_keyboard(name, figures):
    assert moved_by_keyboard(figures(name)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_control_moves_the_picture_by_mouse(name, figures):
    page = figures(name)
    for k in range(count(page, RANGES)):
        left, top, width, height = box(page, RANGES, k)
        at = lambda share: page.click(left + share * width, top + height / 2)
        assert any(changes(page, lambda: at(share), .5) for share in (.2, .8)), f"slider {k}"
        reset(page)
    for k in range(count(page, "input[type=checkbox]")):
        left, top, width, height = box(page, "input[type=checkbox]", k)
        assert changes(page, lambda: page.click(left + width / 2, top + height / 2)), (
            f"checkbox {k}")
        reset(page)


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "touch"])
@pytest.mark.parametrize("name", NAMES)
def test_drawn_handles_drag(name, touch, figures):
    "Each drawn handle follows the pointer; the time of a redraw is printed."
    page = figures(name, width=390 if touch else 1000, mobile=touch)
    assert count(page, HANDLES) >= 1
    for k in range(count(page, HANDLES)):
        left, top, width, height = box(page, HANDLES, k)
        start = left + width / 2, top + height / 2
        for move in ((34, -30), (-34, 30), (34, 30), (-34, -30)):
            end = start[0] + move[0], start[1] + move[1]
            if changes(page, lambda: page.drag(start, end, touch=touch), .3): break
        else: pytest.fail(f"handle {k} does not move")
        reset(page)
    left, top, width, height = box(page, HANDLES)
    middle = left + width / 2, top + height / 2
    page.evaluate("Object.assign(VCBX.stats, {draws: 0, ms: 0, longest: 0})")
    page.drag(middle, (middle[0] + 60, middle[1] - 60), steps=40, touch=touch)
    page.settle()
    stats = page.evaluate("VCBX.stats")
    print(f"\n{name}: {stats['draws']} redraws, "
          f"mean {stats['ms'] / max(stats['draws'], 1):.2f} ms, "
          f"longest {stats['longest']:.2f} ms")


@pytest.mark.parametrize("name", NAMES)
def test_buttons_and_reset(name, figures):
    "Every button acts; Reset brings the first picture back."
    page = figures(name)
    first = picture(page)
    labels = page.evaluate("[...document.querySelectorAll('.vcbx button')].map(b => b.textContent)")
    assert "Reset" in labels
    for k, label in enumerate(labels):
        if label == "Reset": continue
        page.evaluate(f"{node('.vcbx button', k)}.focus()")
        assert changes(page, lambda: page.key("Enter")), label
    page.evaluate(f"{node(RANGES, 0)}.focus()")
    page.key("PageUp")
    reset(page)
    page.evaluate("new Promise(r => setTimeout(r, 300))")
    assert picture(page) == first


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_follows(name, figures):
    "The live region states the result in words, and changes with it."
    page = figures(name)
    said = "document.querySelector('.vcbx [aria-live=polite]').textContent"
    before = page.wait(said)
    page.evaluate(f"{node(RANGES, 0)}.focus()")
    for _ in range(6): page.key("PageUp")
    for _ in range(3): page.key("ArrowLeft")
    page.wait(f"{said} !== {before!r}")
    assert len(before.split()) > 8 and not re.search("NaN|undefined|Infinity", page.evaluate(said))


@pytest.mark.parametrize("name", NAMES)
def test_every_control_has_a_name(name, figures):
    page = figures(name)
    controls = page.send("Accessibility.getFullAXTree")["nodes"]
    wanted = ("slider", "checkbox", "combobox", "button")
    named = [n.get("name", {}).get("value") for n in controls
             if n.get("role", {}).get("value") in wanted]
    assert named and all(named), named


@pytest.mark.parametrize("name", NAMES)
def test_drawings_have_names_of_their_own(name, figures):
    "Each drawing of a figure is a group with a name in words; no two are alike."
    labels = figures(name).evaluate("[...document.querySelectorAll('.vcbx svg.vcbx-panel')]"
                                    ".map(n => n.getAttribute('aria-label'))")
    assert labels and len(set(labels)) == len(labels)
    assert all(len(label.split()) > 2 and "undefined" not in label for label in labels), labels


def test_play_moves_by_itself_unless_motion_is_unwanted(figures):
    "Play runs through the steps; where less motion is asked for it shows the end at once."
    page = figures("two_methods")
    steps = ("(n => n.closest('label').querySelector('output').textContent)"
             "(document.querySelector('input[aria-label=\"Gradient steps\"]'))")
    press = "[...document.querySelectorAll('button')].find(b => b.textContent === 'Play').click()"
    page.evaluate(press)
    page.wait(f"150 < +{steps} && +{steps} < 300")
    reset(page)
    assert page.evaluate(steps) == "150"
    page.send("Emulation.setEmulatedMedia",
              features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    page.evaluate(press)
    page.settle()
    assert page.evaluate(steps) == "300"
    page.send("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("name", NAMES)
def test_narrow_page(name, figures):
    "At 360 px nothing sticks out and no letter of a drawing is below 10.5 px."
    page = figures(name, width=360, mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sizes = page.evaluate("[...document.querySelectorAll('.vcbx svg text')]"
                          ".filter(t => t.textContent).map(t => "
                          "parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)")
    assert min(sizes) >= 10.5
    out = page.evaluate("[...document.querySelectorAll('.vcbx *')]"
                        ".map(n => n.getBoundingClientRect())"
                        ".filter(b => b.width > 1 && (b.right > 361 || b.left < -1)).length")
    assert out == 0


CONTRAST = """(background => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = colour => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = background; context.fillRect(0, 0, 1, 1);
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const part = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(part);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05), page = light(background);
  return Math.min(...[...document.querySelectorAll('.vcbx svg text')].filter(t => t.textContent)
    .map(t => ratio(light(getComputedStyle(t).fill), page)));
})"""


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_text_is_readable_on_light_and_dark(name, style, figures):
    "The contrast of every text of a drawing with the page is 4.5 or more."
    page = figures(name, style=style)
    background = re.search("#[0-9a-f]+", STYLES[style])[0]
    assert page.evaluate(f"{CONTRAST}({background!r})") >= 4.5


def test_many_on_one_page(figures):
    "All figures, one of them twice: each moves alone."
    page = figures(*NAMES, NAMES[0])
    total = len(NAMES) + 1
    assert page.evaluate("document.querySelectorAll('.vcbx[data-vcbx-ready] svg').length") >= total
    for k in range(total):
        before = [picture(page, i) for i in range(total)]
        page.evaluate(f"document.querySelectorAll('.vcbx')[{k}]"
                      ".querySelector('input[type=range]').focus()")
        assert any(changes(page, lambda: page.key(key), 0.2, k) for key in ("PageUp", "PageDown"))
        assert [i for i in range(total) if picture(page, i) != before[i]] == [k]
    assert page.evaluate("(ids => ids.length === new Set(ids).size)"
                         "([...document.querySelectorAll('[id]')].map(n => n.id))")


@pytest.mark.parametrize("name", NAMES)
def test_without_javascript(name, browser, tmp_path):
    "The text in words stands on the page."
    figure, path = EXPLORABLES[name](), tmp_path/"page.html"
    path.write_text(PAGE.format(style="", body=figure._repr_html_()), "utf-8")
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.send("Page.navigate", url=path.as_uri())
        seen = lambda: " ".join(n.get("name", {}).get("value", "") for n in
                                browser.send("Accessibility.getFullAXTree")["nodes"])
        for _ in range(50):
            if figure.alt in seen(): break
            time.sleep(.1)
        assert figure.alt in seen()
    finally: browser.send("Emulation.setScriptExecutionDisabled", value=False)
