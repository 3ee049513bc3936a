"Batches: every row once, within the budget, masked by its length."
from hypothesis import given, strategies as st

from vcb_nb.batches import pad_rows, token_batches


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_token_batches_partition_the_rows(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


def test_pad_rows_masks_by_length_not_by_id():
    ids, mask = pad_rows([[1, 0], [0, 0, 0], [2]], pad_id=0)
    assert ids.tolist() == [[1, 0, 0], [0, 0, 0], [2, 0, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
