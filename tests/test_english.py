"""Pages, messages and help are plain English: phrases that were replaced do not come back.

A phrase that reads well in one place and badly in another is not in the list."""
import bisect, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for pattern in (
    "nbs/*.ipynb", "nbs/*/*.ipynb", "nbs/*.qmd", "vcb_nb/*.py", "vcb_nb/js/*", "recipes/*.yaml",
    "recipes/studies/*.yaml", "README.md", "SECURITY.md", "Makefile", "benchmarks/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "_modidx.py")

# Nouns. Those in ACTS are verbs too ("it samples a response"): only after a count are they nouns.
THINGS = ("bar|candidate|completion|demonstration|file|folder|line|logit|loss(?:e)?|pair|policie|"
          "prompt|response|row|ruler|seed|token|warning")
ACTS = "label|number|policy|process|sample|score|step|text|value|weight"
UNITS = "bits?|bytes?|characters?|G?FLOPs?|hours?|MB|minutes?|ms|nats?|seconds?|times"
WHOLE = ("batch|candidate|cell|completion|machine|method|pair|part|policy|process|prompt|response|"
         "row|second|sequence|shard|sigma|stage|token|way")
COUNT = r"a|few|free|many|more|n|one|two|three|four|six|eight|\d+"
PHRASES = { # regular expression (a space is any white space) → what to write
    r"mend(s|ed|ing)?": "fix, or what exactly to do",
    r"(where|how far) (this|it|the last one|an earlier call) (ended|stopped)": "resume",
    r"(go|goes|going|went|gone) on (where|from (its|the|their) checkpoint)": "resume",
    r"(training|(cut|killed) (one|run)s?|what was cut off) (goes|went) on": "resumes",
    rf"(?:({THINGS})s|({COUNT}) (\w+ )?({THINGS}|{ACTS})s?) a ({WHOLE})(?! (for|of|to))":
        "per, not a",
    rf"({UNITS}) a ({WHOLE})": "per, not a",
    r"a text is needed|(is|are) needed, not a": "must be a string",
    r"holds work (that|done|of)": "contains results made with different settings",
    r"opens? (its|the) books|without books": "writes its pending manifest",
    r"an? second call|second call": "running it again",
    r"nothing but say so": "reports that everything is up to date",
    r"(left|right) figure of a cell": "each cell: first / second",
    r"ways? in which others got it wrong": "common mistakes",
    r"doubtful models?": "models not known to agree",
    r"an own": "its own",
    r"(is|are|was|were|not|cannot|can) (to )?be had": "available",
    r"f[ae]ll from the sky": "has a derivation",
    r"(be|is|are|was|were) rid of": "eliminate",
    r"information thrown away\.|noise let in": "has no effect; a tiny error has a large one",
    r"under a root": "the square root of",
    r"leans? on the end of training": "limited only by stopping early",
    r"(is|are) close kin": "closely related",
    r"unless told(?! to)": "by default",
    r"come upon": "found",
    r"endlessly (often|many)": "infinitely",
    r"(is|are) no part of": "not part of",
    r"no (finite number|KL estimate|fair search)": "not a",
    r"(puts?|put) bugs in": "insert bugs",
    r"what (its|their) cells gave": "its outputs",
    r"runs? left alone": "an undisturbed run",
    r"for who (sees|reads|has)": "for those who",
    r"shall (be|differ|have|not)": "should, or must",
    # claims that are not true
    r"(an )?upper bound in practice": "1/(2γ²) nats holds for Gaussian rewards only",
    r"(budget|same) (of nats )?for every prompt, stated": "σ(x) removes scale, not shape",
    r"IPO and DPO are pulled": "DPO has no minimum (exercise 10.5)",
}
PATTERNS = {re.compile(rf"(?<![\w'])(?:{phrase})(?!\w)".replace(" ", r"\s+"), re.I): better
            for phrase, better in PHRASES.items()}


def sources(path):
    "(number of the first line in the file, text) of each cell, or of the whole file."
    lines = path.read_text("utf-8").splitlines(keepends=True)
    if path.suffix != ".ipynb": return [(1, "".join(lines))]
    found, start = [], None
    for number, line in enumerate(lines, 1):
        if line == '   "source": [\n': start, cell = number + 1, []
        elif start and line.strip().rstrip(",") == "]":
            found.append((start, "".join(cell)))
            start = None
        elif start: cell.append(json.loads(line.strip().rstrip(",")))
    return found


def faults(text, first=1):
    "(line, phrase, what to write) of each phrase in a text."
    ends = [match.start() for match in re.finditer("\n", text)]
    return [(first + bisect.bisect(ends, hit.start() - 1), " ".join(hit[0].split()), better)
            for pattern, better in PATTERNS.items() for hit in pattern.finditer(text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_phrases_do_not_come_back(path):
    name = path.relative_to(ROOT).as_posix()
    found = sorted(fault for first, text in sources(path) for fault in faults(text, first))
    assert not found, "\n" + "\n".join(f"{name}:{line}: “{phrase}”: write “{better}”"
                                       for line, phrase, better in found)


@pytest.mark.parametrize("bad", [
    "Mend it.", "To go on where this ended: vcb run", "it goes\non where it stopped",
    "six candidates a prompt", "one row a policy", "one number a prompt", "prompts a second",
    "a token a row", "3.78 nats a token", "a text is needed", "runs/a holds work that does not fit",
    "then open its books", "a second call does nothing but say so", "A doubtful model",
    "the left figure of a cell is",
    "an own page", "they are to be had", "did not fall from the sky", "how to be rid of it",
    "over n, under a root", "lean on the end of training"])
def test_a_phrase_is_noticed(bad): assert faults(bad)


@pytest.mark.parametrize("good", [
    "n responses to a prompt", "the policy a row for it", "a sample a model gave", "get rid of it",
    "it goes on raising the best response", "a recommended value", "the amendment", "the end",
    "a number is needed", "per prompt, a policy"])
def test_plain_english_passes(good): assert not faults(good)


def test_a_notebook_is_read_cell_by_cell_and_its_lines_are_counted(tmp_path):
    "Outputs are not searched; the line is that of the file."
    cells = [{"cell_type": "code", "id": "a", "outputs": [{"text": ["mend\n"]}],
              "source": ["x = 1\n", "# mend"]}]
    path = tmp_path/"a.ipynb"
    path.write_text(json.dumps({"cells": cells}, indent=1, sort_keys=True) + "\n", "utf-8")
    (first, text), = sources(path)
    (line, phrase, _), = faults(text, first)
    assert phrase == "mend" and "# mend" in path.read_text("utf-8").splitlines()[line - 1]
