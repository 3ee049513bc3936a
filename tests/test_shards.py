"Parts of a stage's output: every part to one process, each whole or absent, and no mixture."
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, strategies as st

from vcb_nb.artifacts import InputError
from vcb_nb.data import load_rows
from vcb_nb.shards import (claim_folder, list_parts, make_parts, my_parts, part_path,
                           pending_parts, rank_and_world, wait_for_parts)
from vcb_nb.settings import option


@dataclass
class DrawConfig:
    output_dir: str = option(None, "Folder of the parts.", decides=False)
    seed: int = option(0, "Seed of the draw.")
    n: int = option(8, "Numbers to draw.")
    batch_size: int = option(16, "Numbers at a time.", decides=False)


def as_process(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


@given(total=st.integers(0, 40), world=st.integers(1, 9))
def test_every_part_falls_to_exactly_one_process(total, world):
    with pytest.MonkeyPatch.context() as patch:
        shares = []
        for rank in range(world):
            as_process(patch, rank, world)
            shares += my_parts(total)
    assert sorted(shares) == list(range(total))


@pytest.mark.parametrize("rank, world", [(2, 2), (-1, 2), (0, 0)])
def test_an_impossible_rank_is_named(monkeypatch, rank, world):
    as_process(monkeypatch, rank, world)
    with pytest.raises(InputError, match=f"RANK={rank} and WORLD_SIZE={world}"): rank_and_world()


def test_what_is_there_is_not_made_again(tmp_path):
    "A call that dies in the middle loses the part in work only."
    def dies_at_two(index):
        if index == 2: raise KeyboardInterrupt
        return [{"index": index}]

    with pytest.raises(KeyboardInterrupt): make_parts(tmp_path, 4, dies_at_two)
    assert pending_parts(tmp_path, 4) == [2, 3]
    kept = part_path(tmp_path, 0, 4).stat().st_mtime_ns
    with pytest.raises(InputError, match="holds 2 of 4 parts .part 2 is missing"):
        list_parts(tmp_path)
    assert make_parts(tmp_path, 4, lambda i: [{"index": i}]) == 2
    assert len(list_parts(tmp_path)) == 4 and part_path(tmp_path, 0, 4).stat().st_mtime_ns == kept


def test_two_processes_make_what_one_makes(tmp_path, monkeypatch):
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        make_parts(tmp_path/"two", 5, lambda i: [{"index": i}])
    as_process(monkeypatch, 0, 1)
    make_parts(tmp_path/"one", 5, lambda i: [{"index": i}])
    read = lambda folder: [p.read_bytes() for p in list_parts(folder)]
    assert read(tmp_path/"two") == read(tmp_path/"one")


def test_a_mixture_of_two_divisions_is_refused(tmp_path):
    make_parts(tmp_path, 2, lambda i: [{"index": i}])
    make_parts(tmp_path, 3, lambda i: [{"index": i}])
    with pytest.raises(InputError, match="mixes parts of 2 with parts of 3"): list_parts(tmp_path)


HARMS = {"deleted": lambda p: p.unlink(),
         "cut within a line": lambda p: p.write_bytes(p.read_bytes()[:-9]),
         "a line missing": lambda p: p.write_text(p.read_text().split("\n", 1)[1]),
         "a digit changed": lambda p: p.write_text(p.read_text().replace("1", "7", 1)),
         "emptied": lambda p: p.write_text("")}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_part_harmed_behind_the_runs_back(tmp_path, harm, caplog):
    "Readers refuse it by name, and the stage makes that part again, and no other."
    make = lambda i: [{"row": 2*i + j} for j in (0, 1)]
    make_parts(tmp_path, 3, make)
    before = [p.read_bytes() for p in list_parts(tmp_path)]
    harm(part_path(tmp_path, 0, 3))
    for read in (list_parts, lambda folder: load_rows(str(folder))):
        with pytest.raises(InputError, match="part-00000-of-00003|part 0 is missing|2 of 3 shards"):
            read(tmp_path)
    assert pending_parts(tmp_path, 3) == [0] and make_parts(tmp_path, 3, make) == 1
    assert [p.read_bytes() for p in list_parts(tmp_path)] == before
    said = [r.getMessage() for r in caplog.records if "made again" in r.getMessage()]
    assert len(said) == (harm is not HARMS["deleted"])


def test_a_part_without_a_seal_is_taken_as_it_is(tmp_path):
    "Parts that a user made or copied without hidden files."
    (tmp_path/"data").mkdir()
    part_path(tmp_path, 0, 1).write_text('{"index": 0}\n')
    assert pending_parts(tmp_path, 1) == [] and len(list_parts(tmp_path)) == 1


def test_parts_whose_settings_are_gone_are_not_continued(tmp_path):
    "Nobody could say whether old and new parts belong together."
    make_parts(tmp_path, 2, lambda i: [{"index": i}])
    with pytest.raises(InputError, match="which says how they were made, is missing"):
        claim_folder(DrawConfig(tmp_path))


def test_a_folder_keeps_to_its_settings(tmp_path):
    """Parts made with one seed are never continued with another;
    an empty folder may change its mind."""
    claim_folder(DrawConfig(tmp_path, seed=0))
    claim_folder(DrawConfig(tmp_path, seed=1))
    make_parts(tmp_path, 2, lambda i: [{"index": i}])
    claim_folder(DrawConfig(tmp_path, seed=1, batch_size=4))
    with pytest.raises(InputError, match="seed: 1 → 2"):
        claim_folder(DrawConfig(tmp_path, seed=2))


def test_a_group_of_one_waits_for_nobody(process_group, tmp_path):
    "vLLM starts a group of its own: one of several processes must not wait for the others in it."
    waiting = threading.Thread(target=wait_for_parts, args=(tmp_path, 2), daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
