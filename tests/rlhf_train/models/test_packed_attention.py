"""Attention that keeps packed rows apart; whole models with it are in test_networks.py."""

import numpy as np
import pytest
import torch

from rlhf_train.models.packed_attention import Rows, run_by_run


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("lengths", [(3, 3, 5, 1, 1, 1), (4, 4), (6,), (2, 5, 2)])
def test_each_row_looks_at_itself_and_back(lengths, window, keys):
    """Held to softmax(scale q k) v, row by row and token by token.

    window: that many tokens back, itself included; keys: heads of keys and values, of 2 of queries.
    """
    torch.manual_seed(0)
    query, key, value = torch.randn(3, sum(lengths), 2, 4).unbind(0)
    rows = Rows.of(np.array(lengths), torch.device("cpu"))
    found = run_by_run(query, key[:, :keys], value[:, :keys], rows, 0.7, window)
    key, value = (tensor[:, [0, keys - 1]] for tensor in (key, value))
    first = 0
    for length in lengths:
        for token in range(first, first + length):
            seen = slice(first if window is None else max(first, token + 1 - window), token + 1)
            weights = torch.einsum("thd,hd->ht", 0.7 * key[seen], query[token]).softmax(1)
            torch.testing.assert_close(found[token], torch.einsum("ht,thd->hd", weights, value[seen]))
        first += length
    assert found.shape == (sum(lengths), 2, 4)
