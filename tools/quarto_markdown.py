"""The part of Quarto's markdown that these pages use, as HTML, for a preview that needs no Quarto.

Maths becomes MathML when the page is built, so that a page shows it without a network. References
are resolved page by page, as in a Quarto website."""
import html, re, unicodedata
from dataclasses import dataclass, field

import mistune
from latex2mathml.converter import convert as mathml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

KINDS = {"eq": "Equation", "fig": "Figure", "tbl": "Table", "sec": "Section"}
KEPT = "\ue000{}\ue001"  # stands for HTML that markdown must not touch
TOKENS = re.compile(r"""
    (?P<code>^(?P<fence>`{3,}|~{3,})[\s\S]*?^(?P=fence)[ ]*$
     | (?<!`)(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`))
  | \$\$(?P<display>[\s\S]+?)\$\$(?:[ ]*\{\#(?P<label>[\w-]+)\})?
  | (?<![\\$])\$(?P<inline>(?=\S)[^$]+?(?<=\S))\$(?!\d)
  | \[(?P<group>[^\[\]\n]*@[^\[\]]*)\](?!\()
  | (?<![\w@./])@(?P<bare>[A-Za-z][\w:-]*\w)
""", re.M | re.X)
FENCE = re.compile(r"^:{3,}[ \t]*(\{[^\n]*\}|[\w-]+)?[ \t]*$")
ATTRIBUTE = re.compile(r"""([\w-]+)=(?:"([^"]*)"|'([^']*)'|([^\s}]+))""")
# What latex2mathml does not know, in words that it does.
SPELLING = [(re.compile(r"\\arg\b"), r"\\operatorname{arg}"), (re.compile(r"\\middle\b"), "")]
# Large delimiters, which it leaves as they were typed, and which browsers do not stretch unasked.
DELIMITERS = {"<mo minsize": '<mo stretchy="true" minsize', r">\{<": ">{<", r">\}<": ">}<",
              r">\|<": ">∥<", r">\Vert<": ">∥<", r">\langle<": ">⟨<", r">\rangle<": ">⟩<"}
CAPTION = re.compile(r"^: +(.+?) *\{#(tbl-[\w-]+)[^}]*\}$", re.M)
SOURCE_LINK = re.compile(r'(<a href="[^"]*")>([^<]*)</a>\{target=[^}]*\}')
KEY = re.compile(r"(-?)@([A-Za-z][\w:-]*\w)")


def is_label(key): return "-" in key and key.split("-")[0] in KINDS


def pandoc_id(text):
    "The identifier that pandoc gives a heading: `## Hard pairs (λ)` becomes `hard-pairs-λ`."
    text = re.sub(r"<[^>]+>", "", html.unescape(text)).lower()
    kept = lambda c: c.isalnum() or c in "_-. " or unicodedata.category(c).startswith("M")
    text = "".join(filter(kept, text))
    return re.sub(r"^[^a-z\u00a1-\uffff]+", "", re.sub(r"\s+", "-", text.strip())) or "section"


def attributes(text):
    "`{#id .class key=\"value\"}` as a dict with `id` and `class`."
    text = (text or "").strip("{} ")
    found = {m[1]: m[2] or m[3] or m[4] or "" for m in ATTRIBUTE.finditer(text)}
    plain = ATTRIBUTE.sub("", text)
    classes = re.findall(r"\.([\w-]+)", plain) or [w for w in plain.split() if w[0] not in "#."]
    identity = re.search(r"#([\w:-]+)", plain)
    return {**found, "class": " ".join(classes), "id": identity[1] if identity else ""}


def colour_code(text, language="python"):
    "Source code as coloured HTML."
    try: lexer = get_lexer_by_name(language or "text")
    except ClassNotFound: lexer = get_lexer_by_name("text")
    return highlight(text, lexer, HtmlFormatter(cssclass="highlight"))


class Renderer(mistune.HTMLRenderer):
    "Headings get pandoc's ids; code is coloured."
    def __init__(self, page):
        super().__init__(escape=False)
        self.page = page

    def heading(self, text, level, **attrs):
        found = re.search(r"\s*\{([^}]*)\}\s*$", text)
        own = attributes(found[1]) if found else {}
        text = text[:found.start()] if found else text
        identity = self.page.heading(text, level, own.get("id"))
        return f'<h{level} id="{identity}">{text}</h{level}>\n'

    def block_code(self, code, info=None):
        return colour_code(code, (info or "").strip("{}. ").split(" ")[0])

    def table(self, text): return f'<div class="table"><table>{text}</table></div>\n'


@dataclass
class Page:
    "One page while it is made: its labels, its headings, and what could not be resolved."
    bibliography: dict = field(default_factory=dict)  # key -> entry
    labels: dict = field(default_factory=dict)        # label -> number
    headings: list = field(default_factory=list)      # (level, id, text)
    cited: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    open: list = field(default_factory=list)          # closing tags of the open divs

    def __post_init__(self):
        plugins = ["table", "footnotes", "strikethrough"]
        self.render = mistune.create_markdown(renderer=Renderer(self), plugins=plugins)

    def keep(self, made):
        self.kept.append(made)
        return KEPT.format(len(self.kept) - 1)

    def restore(self, text):
        "Put back what was kept; kept pieces may hold kept pieces."
        while KEPT[0] in text:
            text = re.sub("\ue000(\\d+)\ue001", lambda m: self.kept[int(m[1])], text)
        return text

    def heading(self, text, level, identity=None):
        identity = base = identity or pandoc_id(self.restore(text))
        taken, n = {i for _, i, _ in self.headings}, 0
        while identity in taken: identity, n = f"{base}-{n + 1}", n + 1
        self.headings.append((level, identity, text))
        if base.startswith("sec-"): self.labels[base] = text
        return identity

    def number(self, label):
        "The number of a new label among its kind; a second use of a label is a problem."
        if label in self.labels: self.problems.append(f"label {label} is used twice")
        kind = label.split("-")[0]
        alike = [known for known in self.labels if known.split("-")[0] == kind and known != label]
        self.labels[label] = 1 + len(alike)
        return self.labels[label]

    def maths(self, tex, display=False):
        for pattern, spelling in SPELLING: tex = pattern.sub(spelling, tex)
        try: made = mathml(tex.strip(), display="block" if display else "inline")
        except Exception as error:
            self.problems.append(f"cannot convert {tex.strip()!r}: {type(error).__name__}")
            return f"<code>{html.escape(tex)}</code>"
        for typed, shown in DELIMITERS.items(): made = made.replace(typed, shown)
        if "\\" in re.sub(r"<mtext>.*?</mtext>", "", made):
            self.problems.append(f"a command was left over in {tex.strip()!r}")
        return made

    def equation(self, tex, label):
        made = self.maths(tex, display=True)
        if not label: return f'<span class="equation">{made}</span>'
        number = f'<span class="number">({self.number(label)})</span>'
        return f'<span class="equation" id="{label}">{made}{number}</span>'

    def reference(self, key, short=False):
        "A link to a label or to a bibliography entry; labels may still be to come."
        if is_label(key): return f'<a data-ref="{key}" data-short="{int(short)}"></a>'
        entry = self.bibliography.get(key)
        if not entry:
            self.problems.append(f"unknown citation {key}")
            return f"@{key}"
        if key not in self.cited: self.cited.append(key)
        return f'<a class="citation" href="#ref-{key}">{entry["short"]} {entry["year"]}</a>'

    def citation_group(self, text):
        "`[see @a, p. 3; @b]`: brackets for literature, none for labels."
        link = lambda m: self.keep(self.reference(m[2], short=bool(m[1])))
        parts = KEY.sub(link, text)
        return parts if all(is_label(key) for _, key in KEY.findall(text)) else f"({parts})"

    def token(self, m):
        if m["code"]: return m[0]
        if m["display"]: return self.keep(self.equation(m["display"], m["label"]))
        if m["inline"]: return self.keep(self.maths(m["inline"]))
        if m["group"]: return self.citation_group(m["group"])
        key = m["bare"]
        return self.keep(self.reference(key)) if is_label(key) or key in self.bibliography else m[0]

    def figure_image(self, m):
        "`![caption](image){#fig-x}` is a numbered figure; other attributes go onto the image."
        own = attributes(m[2])
        image = re.sub(r"\s*/?>$", "", m[1])
        image += "".join(f' {k}="{v}"' for k, v in own.items() if k in ("width", "height")) + ">"
        if not own["id"].startswith("fig-"): return image
        caption = re.search(r'alt="([^"]*)"', image)[1]
        return self.figure(own["id"], image, caption)

    def figure(self, label, body, caption):
        lead = f'Figure {self.number(label)}: ' if label else ""
        identity = f' id="{label}"' if label else ""
        caption = f"<figcaption>{lead}{self.inline(caption)}</figcaption>"
        return f"<figure{identity}>{body}{caption}</figure>"

    def inline(self, text):
        "Markdown of a caption: one paragraph without its tags."
        return re.sub(r"^<p>|</p>\s*$", "", self.markdown(text).strip())

    def table_caption(self, m):
        return f'\n\n<p class="caption" id="{m[2]}">Table {self.number(m[2])}: {m[1]}</p>\n'

    def markdown(self, text):
        "Markdown without fenced divs, as HTML."
        text = CAPTION.sub(self.table_caption, TOKENS.sub(self.token, text))
        made = self.render(text)
        made = re.sub(r"(<img [^>]*>)\{([^}\n]*)\}", self.figure_image, made)
        return self.restore(SOURCE_LINK.sub(r'\1 class="source">\2</a>', made))

    def fence(self, opening):
        "The tags of a `:::` line: a callout, a div, or the end of the innermost one."
        if not opening:
            if self.open: return self.open.pop()
            self.problems.append("::: closes nothing")
            return ""
        own = attributes(opening)
        if own["class"].startswith("callout-"): return self.callout(own)
        self.open.append("</div>\n")
        identity = f' id="{own["id"]}"' if own["id"] else ""
        return f'<div{identity} class="{own["class"]}">\n'

    def callout(self, own):
        kind = own["class"].split("-", 1)[1].split(" ")[0]
        title = self.inline(own.get("title", "")) or kind.capitalize()
        if "collapse" not in own:
            self.open.append("</div>\n")
            return f'<div class="callout {kind}"><p class="callout-title">{title}</p>\n'
        self.open.append("</details>\n")
        shown = " open" if own["collapse"] == "false" else ""
        return f'<details class="callout {kind}"{shown}><summary>{title}</summary>\n'

    def markdown_cell(self, text):
        "Markdown with fenced divs, which may open in one cell and close in another."
        made, plain, code = [], [], ""
        for line in text.splitlines():
            mark = re.match(r"\s*(`{3,}|~{3,})", line)
            if mark: code = "" if code == mark[1] else code or mark[1]
            fence = None if code else FENCE.match(line)
            if not fence: plain.append(line)
            else:
                made += [self.markdown("\n".join(plain)), self.fence(fence[1])]
                plain = []
        return "".join([*made, self.markdown("\n".join(plain))])

    def resolve(self, m):
        label, short = m[1], m[2] == "1"
        if label not in self.labels:
            self.problems.append(f"no such label on this page: {label}")
            return f"?@{label}"
        kind, number = KINDS[label.split("-")[0]], self.labels[label]
        text = number if short or kind == "Section" else f"{kind}&nbsp;{number}"
        return f'<a class="reference" href="#{label}">{text}</a>'

    def finish(self, body):
        "The page's HTML with every reference resolved and the literature at its end."
        if self.open: self.problems.append("a ::: block is not closed")
        body = re.sub(r'<a data-ref="([\w-]+)" data-short="(\d)"></a>', self.resolve, body)
        if not self.cited: return body
        entries = sorted(self.cited, key=lambda k: self.bibliography[k]["text"])
        line = lambda key: self.inline(self.bibliography[key]["text"])
        items = "\n".join(f'<li id="ref-{key}">{line(key)}</li>' for key in entries)
        head = '<section class="references"><h2 id="references">References</h2>'
        return f"{body}{head}<ul>{items}</ul></section>"


def short_name(authors):
    "Mao et al."
    names = [re.sub(r"[{}]", "", a.split(",")[0]).strip() for a in authors.split(" and ")]
    if len(names) > 2 or names[-1] == "others": return f"{names[0]} et al."
    return " and ".join(names)


def read_bibliography(text):
    "Entries of a BibTeX file by key: fields, `short` (authors), `text` (one line of markdown)."
    entries = {}
    for kind, key, body in re.findall(r"^@(\w+)\{([\w-]+),\n(.*?)^\}", text, re.M | re.S):
        fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*?)\},?$", body, re.M))
        plain = {k: re.sub("[{}]", "", v).replace("--", "–") for k, v in fields.items()}
        where = plain.get("booktitle") or plain.get("journal") or plain.get("howpublished", "")
        url = fields.get("url") or f"https://arxiv.org/abs/{fields.get('eprint', '')}"
        names = plain["author"].replace(" and others", " et al.").replace(" and ", "; ")
        where = f" *{where}*." if where else ""
        line = f"{names} ({plain['year']}). [{plain['title']}]({url}).{where}"
        entries[key] = {**fields, "kind": kind, "short": short_name(fields["author"]), "text": line}
    return entries
