"""cards.toml, and the names that PyTorch has for its cards."""

from __future__ import annotations

import pytest

from env.settings import Cards


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA L40", None),
        ("NVIDIA A100X", None),
    ],
)
def test_a_card_is_known_by_pytorch_s_name(name: str, card: str | None) -> None:
    assert Cards.load().seen_as(name) == card


def test_each_number_has_a_source() -> None:
    for card in Cards.load().cards.values():
        assert "datasheet" in card.source or "whitepaper" in card.source
        assert card.measured is None or "docs/" in card.measured.source
