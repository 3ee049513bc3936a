"What is kept of a run says what the run said, and names no folder of whoever ran it."
import json

import numpy as np, pytest
from report_runs import TEXTS, write_run

from vcb_nb.artifacts import InputError, read_json, write_json
from vcb_nb.findings import findings, sweeps_of
from vcb_nb.recipes import load_recipe, shipped_recipes
from vcb_nb.report import methods_table, policies_table
from vcb_nb.run_results import keep_run, kept_run

STORED = sorted(path.name.removesuffix(".json.gz") for folder in
                {p.parent for p in shipped_recipes().values()}
                for path in (folder/"results").glob("*.json.gz"))


def test_what_is_kept_is_reported_alike(tmp_path):
    "Tables and sentences of the report, from the run and from what was kept of it."
    run = tmp_path/"own"
    summary = write_run(run)
    write_json(run/"judge"/"summary.json", {"wins": .12345678})
    keep_run(run, tmp_path/"kept")
    kept, per_prompt = kept_run("own", tmp_path/"kept"), read_json(run/"evaluate"/"per_prompt.json")
    assert methods_table(kept["summary"], kept["per_prompt"]) == methods_table(summary, per_prompt)
    for split in ("test", "ood"):
        assert policies_table(kept["summary"], split) == policies_table(summary, split)
    reward = read_json(run/"reward"/"evaluation.json")
    assert (findings(kept["summary"], kept["per_prompt"], kept["reward"])
            == findings(summary, per_prompt, reward))
    assert kept["judge"] == {"wins": .123457} and kept["reward"]["brier"] == .138889 # six digits
    assert kept["seconds"] == pytest.approx(4*4.2) and kept["versions"] == {"torch": "2"}
    assert kept["stages"][0][:2] == ["calibrate, 4 runs", "17\u00a0s"]
    packed = (tmp_path/"kept"/"own.json.gz").read_bytes()
    assert packed[4:8] == bytes(4) # no date (RFC 1952): the same run is the same file
    keep_run(f"{run}/", tmp_path/"again")
    assert (tmp_path/"again"/"own.json.gz").read_bytes() == packed


def test_of_a_prompt_only_what_was_chosen_is_kept(tmp_path):
    "Its first word; then its number, which is that of the rewards beside its responses."
    run = tmp_path/"own"
    write_run(run)
    folders = list((run/"evaluate"/"samples").iterdir())
    for folder in folders[1:]: write_json(folder/"gold-1.json", [[i + .5] for i in range(40)])
    keep_run(run, tmp_path, samples=3, prompt=lambda text: text.split()[0])
    kept = kept_run("own", tmp_path)["samples"]
    assert [s["prompt"] for s in kept] == ["Topic"]*3
    assert all(len(s["responses"]) == 3 and set(s["responses"].values()) <= set(TEXTS)
               for s in kept)
    assert "Topic 1" not in json.dumps(kept_run("own", tmp_path))
    keep_run(run, tmp_path, samples=3, prompt=lambda text: int(text.split()[1].strip(":")))
    for s in kept_run("own", tmp_path)["samples"]:
        known = set(s["responses"]) - {folders[0].name} # that policy's rewards are not stored
        assert known and s["rewards"] == dict.fromkeys(known, s["prompt"] + .5)
    keep_run(run, tmp_path, samples=0)
    assert kept_run("own", tmp_path)["samples"] == []


def test_what_cannot_be_kept_or_found_is_said(tmp_path):
    (tmp_path/"run").mkdir()
    with pytest.raises(InputError, match="run has no evaluation. Run its evaluate stage first"):
        keep_run(tmp_path/"run", tmp_path)
    write_run(tmp_path/"own")
    keep_run(tmp_path/"own", tmp_path)
    with pytest.raises(InputError, match="no results of a run 'owl'.*Did you mean 'own'"):
        kept_run("owl", tmp_path)


@pytest.mark.parametrize("name", STORED)
def test_stored_means_are_those_of_the_stored_prompts(name):
    "And the policies are those that the recipe of that name still asks for."
    kept, recipe = kept_run(name), load_recipe(name)
    asked = {method: len(next(iter(about["sweep"].values())))
             for method, about in recipe["calibrate"]["methods"].items()}
    assert {m: len(names) for m, names in sweeps_of(kept["summary"]).items()} == asked
    for split, rows in kept["per_prompt"].items():
        for policy, numbers in rows["policies"].items():
            for measure, values in numbers.items():
                said = kept["summary"]["policies"][policy]["splits"][split][measure]
                if said is None: continue
                assert len(values) == said["prompts"] if "prompts" in said else True
                known = [v for v in values if v is not None]
                assert said["value"] == pytest.approx(np.mean(known), rel=1e-4, abs=1e-5)
    assert findings(kept["summary"], kept["per_prompt"], kept["reward"], kept["judge"])
    assert not any(word in json.dumps(kept) for word in ("/home/", "/tmp/", "/work", "../"))
