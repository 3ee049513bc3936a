"The bugs of tools/mutants.py: each still applies, and a few are put in and noticed."
import importlib.util, os, random, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("mutants", ROOT/"tools"/"mutants.py")
mutants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_applies(mutant):
    "Its text stands in the module once, so a change of the library cannot retire a bug unseen."
    compile(mutants.mutated(mutant), mutant.module, "exec")
    files = mutant.tests.partition(" -k ")[0].split()
    assert files and all((ROOT/"tests"/file).is_file() for file in files)
    assert 0 <= mutant.pitfall <= 30


def test_names_are_distinct():
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS)


DRIVER = """
import sys
sys.path.insert(0, "tools")
import mutants
from mutants import MUTANTS, Mutant
tests = "test_shards.py -k impossible_rank"
bad = [Mutant("harmless", "shards", "# %% auto #0", "# harmless", tests),
       Mutant("gone", "shards", "no such text", "", tests)]
mutants.MUTANTS = [m for m in MUTANTS if m.name in sys.argv[1:]] + bad
sys.exit(mutants.main([]))
"""


@pytest.mark.slow
def test_a_few_are_killed_and_survivors_are_reported():
    "The sample dies; a harmless change survives and one that does not apply is said: exit 1."
    quick = [m.name for m in mutants.MUTANTS if m.module in ("losses", "shards", "training")]
    chosen = random.Random(0).sample(quick, 2)
    done = subprocess.run([sys.executable, "-c", DRIVER, *chosen], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    states = {line.rpartition(": ")[2]: line.split("  ")[0] for line in done.stdout.splitlines()
              if line.split("  ")[0] in ("killed", "survived", "does not apply")}
    assert states == {**dict.fromkeys(chosen, "killed"), "harmless": "survived",
                      "gone": "does not apply"}, done.stdout + done.stderr
    assert done.returncode == 1 and "2 of 4 mutants killed" in done.stdout
