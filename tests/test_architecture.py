"The house rules that hold for every module: directions of imports, and what they leave out."
import ast, importlib, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p.stem for p in (ROOT/"vcb_nb").glob("*.py") if not p.stem.startswith("_"))

# Each layer may import the layers before it, and within a layer what stands before it.
LAYERS = [["losses"], ["worlds"], ["plots"], ["figures", "explorables"], ["widgets"],
          ["artifacts"], ["settings"], ["hub"], ["chat"], ["shards"], ["layouts"],
          ["data", "world"], ["tokenizers"],
          ["models"], ["adapters"], ["loading"], ["saving", "batches"],
          ["packing", "preflight"], ["prepare", "logprobs", "training", "measures"],
          ["judges", "decoding"], ["checks", "chat_api", "verdicts", "contrasts"],
          ["findings"], ["ppo"],
          ["sft", "reward", "sample", "calibrate"], ["score", "online"], ["evaluate"],
          ["diagnosis"], ["judge"], ["live"], ["stages"], ["recipes"], ["pipeline"], ["budget"],
          ["cards"], ["report"], ["inspection", "study"],
          ["study_results", "run_results"], ["cli"]]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
TRAINERS = {"sft", "reward", "calibrate", "online"}
TORCH_ONLY = {"losses": {"torch"}, "worlds": {"torch"}, "explorables": set(),
              "plots": {"matplotlib"}, "figures": {"matplotlib", "numpy"},
              "artifacts": {"tqdm", "filelock"}, "settings": set(),
              "measures": {"numpy", "torch"}, "verdicts": {"numpy"}, "contrasts": {"numpy"},
              "findings": {"numpy"},
              "judge": set(),
              "chat_api": {"openai"}, "stages": set()}


def imports(name):
    "Top-level packages that a module imports, and the modules of ours, wherever the import stands."
    tree, outside, ours = ast.parse((ROOT/"vcb_nb"/f"{name}.py").read_text("utf-8")), set(), set()
    for node in ast.walk(tree):
        found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            parent = "vcb_nb." * bool(node.level) + (node.module or "")
            found = ([f"vcb_nb.{a.name}" for a in node.names] if parent in ("vcb_nb", "vcb_nb.")
                     else [parent])
        for full in found:
            first, _, rest = (full or "").partition(".")
            if first == "vcb_nb": ours.add(rest.split(".")[0])
            elif first not in sys.stdlib_module_names: outside.add(first)
    return outside, ours - {"", "__version__"}


def test_every_module_has_its_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    outside, ours = imports(name)
    up = {m for m in ours if RANK[m] >= RANK[name]}
    assert not up, f"{name} imports {up}, which stand beside or above it"
    assert not outside & {"nbdev", "fastcore", "trl", "IPython"}
    if name != "sample": assert "vllm" not in outside, "vLLM is one backend of `sample`"
    if name != "chat_api": assert "openai" not in outside, "one module asks over HTTP"
    if name in TORCH_ONLY: assert outside <= TORCH_ONLY[name]
    if RANK[name] < RANK["recipes"]:
        assert not (ours & TRAINERS), "stages meet in files, not in trainers"


def top_level(name):
    "The names that a module defines: functions, classes, constants."
    for node in ast.parse((ROOT/"vcb_nb"/f"{name}.py").read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def test_a_name_stands_for_one_thing():
    "No name, public or private, is defined in two modules; each has its own `log`."
    homes = {}
    for module in MODULES:
        for name in {*top_level(module)} - {"__all__", "log"}:
            homes.setdefault(name, []).append(module)
    doubles = {name: found for name, found in homes.items() if len(found) > 1}
    assert not doubles, "Give each its own name, or let one module import the other's."


def test_loggers_have_one_name():
    "`log` in every module: a reader of one knows it in all."
    for module in MODULES:
        text = (ROOT/"vcb_nb"/f"{module}.py").read_text("utf-8")
        made = "logging.getLogger(__name__)"
        assert text.count(made) == text.count(f"\nlog = {made}"), module


def test_losses_import_is_light():
    "The theory layer needs torch, not transformers."
    code = "import sys, vcb_nb.losses; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_library_imports_without_nbdev():
    """A user's machine has no nbdev, TRL, vLLM or openai: every module imports where they are
    blocked."""
    code = ("import sys, importlib\n"
            "for name in ('nbdev', 'fastcore', 'trl', 'execnb', 'vllm', 'openai'):\n"
            "    sys.modules[name] = None\n"
            f"for name in {MODULES!r}: importlib.import_module('vcb_nb.' + name)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_face_is_lazy_and_whole():
    "`import vcb_nb` costs nothing; each name that it offers is there, and no other."
    code = "import sys, vcb_nb; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    import vcb_nb
    for name in vcb_nb.__all__: assert getattr(vcb_nb, name) is not None
    assert set(vcb_nb.__all__) <= set(dir(vcb_nb))
    with pytest.raises(AttributeError, match="has no attribute 'DPOTrainer'"): vcb_nb.DPOTrainer


def test_the_public_interface_stays_small():
    """What a module offers in `__all__`, over all modules: what users meet on the site.
    A new name takes the place of another, unless users call it: `inspect_data`,
    `convert`, `model_card`, `push_to_hub`, a judge and the figures of a lesson they do."""
    offered = {name: importlib.import_module(f"vcb_nb.{name}").__all__ for name in MODULES}
    assert sum(map(len, offered.values())) <= 161, offered
