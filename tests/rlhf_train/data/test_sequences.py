"""Test which rows an update takes and how they are cut: by hand, over ranks and micro batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from jobs.errors import ToolkitError
from rlhf_train.data import sequences as batch_module
from rlhf_train.data.sequences import (
    BatchPlan,
    Sequences,
    assign_passes,
    count_updates,
    evaluation_batches,
    largest_divisor,
    rows_of_update,
    split_into_passes,
)

pytestmark = pytest.mark.pinned

CPU = torch.device("cpu")


def test_plan_divides_the_global_batch():
    plan = BatchPlan.of(128, 8, 2, "sft")
    assert (plan.micro_batch, plan.gradient_accumulation, plan.world_size, plan.global_batch) == (8, 8, 2, 128)
    assert str(plan) == "128 = 8 micro batch x 8 accumulation x 2 ranks"


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "what", "choices"),
    [
        (64, 8, 3, "sft.global_batch 64 cannot be shared by 3 ranks", "[1, 2, 4, 8, 16, 32, 64]"),
        (12, 8, 1, "sft.global_batch 12 over 1 rank is 12, not a multiple of micro_batch 8", "[1, 2, 3, 4, 6, 12]"),
    ],
)
def test_plan_refuses_what_does_not_divide(global_batch, micro_batch, ranks, what, choices):
    with pytest.raises(ToolkitError) as caught:
        BatchPlan.of(global_batch, micro_batch, ranks, "sft")
    assert caught.value.what == what
    assert choices in caught.value.hint


@pytest.mark.parametrize(("number", "limit", "expected"), [(128, 16, 16), (30, 16, 15), (7, 4, 1), (5, 0, 1)])
def test_largest_divisor(number, limit, expected):
    assert largest_divisor(number, limit) == expected


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "limit", "expected"),
    [
        (100, 10, 1.0, None, 10),
        (101, 10, 1.0, None, 11),
        (100, 10, 0.5, None, 5),
        (3, 10, 1.0, None, 1),
        (100, 10, 2.0, 7, 7),
        (30, 10, 0.1, None, 1),
    ],
)
def test_count_updates(rows, batch, epochs, limit, expected):
    assert count_updates(rows, batch, epochs, limit) == expected


def test_updates_pass_over_every_row_once_an_epoch():
    """With 10 rows and batches of 4, five updates are two epochs; the third takes rows of both."""
    seen = np.concatenate([rows_of_update(update, 10, 4, (1, 2)) for update in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert list(rows_of_update(2, 10, 4, (1, 2))) == list(seen[8:12])
    assert list(rows_of_update(0, 10, 4, (1, 3))) != list(seen[:4])


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (4, 1), (2, 2), (1, 4), (8, 1)])
def test_deal_gives_every_row_to_one_rank_once(micro_batch, ranks):
    lengths = np.array([5, 9, 1, 7, 7, 2, 8, 3])
    plan = BatchPlan.of(8, micro_batch, ranks, "sft")
    dealt = [assign_passes(lengths, plan, rank) for rank in range(ranks)]
    assert sorted(int(i) for part in dealt for micro in part for i in micro) == list(range(8))
    assert all(len(part) == plan.gradient_accumulation for part in dealt)
    assert all(len(micro) == micro_batch for part in dealt for micro in part)
    # A pass takes rows alike in length: none is shorter than the longest of any later pass.
    for part in dealt:
        for first, second in pairwise(part):
            assert lengths[first].min() >= lengths[second].max()


@pytest.mark.parametrize(("rows", "micro_batch", "ranks"), [(10, 3, 1), (10, 3, 2), (1, 4, 2), (8, 4, 2), (7, 2, 3)])
def test_evaluation_sees_each_row_once_and_ranks_stay_in_step(rows, micro_batch, ranks):
    lengths = np.arange(rows) % 5 + 1
    parts = [list(evaluation_batches(lengths, micro_batch, ranks, rank)) for rank in range(ranks)]
    real = [int(i) for part in parts for indexes, keep in part for i in indexes[keep]]
    assert sorted(real) == list(range(rows))
    assert len({tuple(len(indexes) for indexes, _ in part) for part in parts}) == 1
    tokens = [len(indexes) * lengths[indexes].max() for part in parts for indexes, _ in part]
    assert max(tokens) <= micro_batch * lengths.max()


def cost(lengths, parts, pass_tokens):
    return sum(max(lengths[part]) * len(lengths[part]) + pass_tokens for part in parts)


@pytest.mark.parametrize(("tokens", "pass_tokens"), [(20, 3), (20, 0), (9, 3), (5, 1), (1000, 4), (1000, 100)])
def test_the_cut_computes_the_fewest_tokens_of_all_cuts(monkeypatch, tokens, pass_tokens):
    """Against all 512 cuts of ten rows."""
    monkeypatch.setattr(batch_module, "PASS_TOKENS", pass_tokens)
    lengths = np.array([9, 9, 8, 7, 4, 4, 3, 2, 2, 1])
    every = []
    for bits in range(2**9):
        edges = [0, *(i + 1 for i in range(9) if bits >> i & 1), 10]
        parts = [slice(*pair) for pair in pairwise(edges)]
        if all(len(lengths[p]) == 1 or len(lengths[p]) * lengths[p][0] <= tokens for p in parts):
            every.append(parts)
    found = split_into_passes(lengths, tokens)
    assert found in every
    assert cost(lengths, found, pass_tokens) == min(cost(lengths, parts, pass_tokens) for parts in every)


def test_nothing_is_cut_into_no_passes():
    assert split_into_passes(np.array([], dtype=int), 10) == []
    assert list(evaluation_batches(np.array([], dtype=int), 4, 2, 1)) == []


def test_short_rows_go_many_at_a_time_and_ranks_stay_in_step():
    """Two rows of 60 fill a pass, or many of 5 that share its cost."""
    lengths = np.array([60, 5, 60, 5, 60, 5, 60, 5, 5, 5, 5, 5])
    plan = BatchPlan.of(12, 1, 2, "sft")
    dealt = [assign_passes(lengths, plan, rank, tokens=120) for rank in range(2)]
    assert [[lengths[rows].tolist() for rows in part] for part in dealt] == [[[60, 60], [5, 5, 5, 5]]] * 2
    assert sorted(int(i) for part in dealt for rows in part for i in rows) == list(range(12))


def sequences():
    prompts = [np.array([2, 5, 6]), np.array([2])]
    responses = [np.array([7, 3]), np.array([8, 9, 4, 3])]
    return Sequences.of(prompts, responses, 1, CPU)


def test_sequences_are_padded_on_the_right_with_masks_from_lengths():
    batch = sequences()
    assert batch.input_ids.tolist() == [[2, 5, 6, 7, 3], [2, 8, 9, 4, 3]]
    shorter = Sequences.of([np.array([2, 5])], [np.array([1, 3])], 1, CPU)  # a sampled pad token is a token
    assert shorter.attention_mask.tolist() == [[1, 1, 1, 1]]
    ragged = Sequences.of([np.array([2]), np.array([2])], [np.array([3]), np.array([7, 7, 3])], 1, CPU)
    assert ragged.input_ids.tolist() == [[2, 3, 1, 1], [2, 7, 7, 3]]
    assert ragged.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert ragged.response_mask().tolist() == [[True, False, False], [True, True, True]]


def test_predicted_names_the_state_before_each_token():
    index, labels = sequences().predicted()
    assert index.tolist() == [2, 3, 5, 6, 7, 8]  # 5 columns: row 0 positions 2, 3; row 1 positions 0 to 3
    assert labels.tolist() == [7, 3, 8, 9, 4, 3]
    index, labels = sequences().predicted(from_prompt=True)
    assert index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert labels.tolist() == [5, 6, 7, 3, 8, 9, 4, 3]


def test_learned_tokens_of_a_prompt_are_predicted_too():
    prompts = [np.array([2, 5, 6, 9]), np.array([2])]
    responses = [np.array([3]), np.array([7, 8, 3])]
    learned = [np.array([0, 0, 1, 1]), np.array([0])]
    padded = Sequences.of(prompts, responses, 1, CPU, learned)  # 5 columns
    index, labels = padded.predicted()
    assert (index.tolist(), labels.tolist()) == ([1, 2, 3, 5, 6, 7], [6, 9, 3, 7, 8, 3])
    assert padded.predicted(from_prompt=True)[1].tolist() == [5, 6, 9, 3, 7, 8, 3]
    packed = Sequences.of(prompts, responses, None, CPU, learned)
    index, labels = packed.predicted()
    assert (index.tolist(), labels.tolist()) == ([1, 2, 3, 5, 6, 7], [6, 9, 3, 7, 8, 3])


def test_spread_puts_flat_numbers_back_and_keeps_their_gradient():
    flat = torch.arange(1.0, 7.0, requires_grad=True)
    grid = sequences().spread(flat)
    assert grid.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]
    (grid * torch.tensor([[1.0, 10, 100, 100], [2, 3, 4, 5]])).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [1, 10, 2, 3, 4, 5]


def test_packed_rows_are_found_in_flat_numbers():
    batch = Sequences.of([np.array([2, 5]), np.array([2])], [np.array([3]), np.array([7, 8, 3])], None, CPU)
    assert batch.input_ids.tolist() == [[2, 5, 3, 2, 7, 8, 3]]
    index, labels = batch.predicted()
    assert index.tolist() == [1, 3, 4, 5]
    assert labels.tolist() == [3, 7, 8, 3]
    assert batch.predicted(from_prompt=True)[0].tolist() == [0, 1, 3, 4, 5]
    assert batch.last().tolist() == [2, 6]
    assert batch.response_mask().tolist() == [[True, False, False], [True, True, True]]
    assert batch.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [[1, 0, 0], [2, 3, 4]]
    rows = batch.by_row(torch.arange(7))
    assert rows.shape == (2, 4)
    assert (rows[0, :3].tolist(), rows[1].tolist()) == ([0, 1, 2], [3, 4, 5, 6])


def test_packed_rows_fill_passes():
    """9, 6 and 5 tokens are 20; padded to the longest they would be 27."""
    lengths = np.array([9, 6, 5])
    assert [lengths[part].tolist() for part in split_into_passes(lengths, 20, packed=True)] == [[9, 6, 5]]
    assert [lengths[part].tolist() for part in split_into_passes(lengths, 20)] == [[9], [6, 5]]


def test_rows_and_their_last_tokens_are_found_in_flat_numbers():
    batch = Sequences.of([np.array([2]), np.array([2])], [np.array([3]), np.array([7, 7, 3])], 1, CPU)
    assert batch.last().tolist() == [1, 7]
    assert batch.by_row(torch.arange(8)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
