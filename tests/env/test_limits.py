from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from env.settings import LIMITS, Limits

TEXT = LIMITS.read_text(encoding="utf-8")


def test_what_the_image_needs() -> None:
    """NVIDIA's release notes of CUDA 11.8, and the architectures that the image is built for."""
    cuda = Limits.load().cuda["11.8"]
    assert (cuda.driver_min, cuda.capability_min, cuda.capability_max) == ("450.80.02", "7.0", "9.0")


def test_dockers_64_mb_are_too_little_for_two_ranks_and_its_advised_gigabyte_is_enough() -> None:
    assert 64 * 2**20 < 2 * Limits.load().shared_memory.bytes_per_rank <= 2**30


def test_a_card_with_a_desktop_counts_as_idle_and_one_that_holds_opt_1_3b_in_16_bit_does_not() -> None:
    assert 600 * 2**20 < Limits.load().gpu_memory.used_max_bytes < 2_600_000_000


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("inodes_min = 2_000", "", "disk.inodes_min\n  Field required"),
        ("inodes_min = 2_000", "inodes_min = 2_000\ninode_min = 3", "disk.inode_min\n  Extra inputs are not permitted"),
        ("[peer_access]", "[peer_acces]", "peer_access\n  Field required"),
        ("inodes_min = 2_000", 'inodes_min = "2000"', "disk.inodes_min\n  Input should be a valid integer"),
        ("inodes_min = 2_000", "inodes_min = 0", "disk.inodes_min\n  Input should be greater than 0"),
        ("[gpu_memory]", "[gpu]", "gpu_memory\n  Field required"),
        (
            "used_max_bytes = 1_000_000_000",
            "used_max_bytes = 1e9",
            "gpu_memory.used_max_bytes\n  Input should be a valid integer",
        ),
        ('driver_min = "450.80.02"', "driver_min = 450.80", "cuda.`11.8`.driver_min\n  Input should be a valid string"),
        ('driver_min = "450.80.02"', 'driver_min = "R450"', "cuda.`11.8`.driver_min\n  String should match pattern"),
        (
            'broken_cards = ["RTX 40"]',
            "broken_cards = []",
            "peer_access.broken_cards\n  Tuple should have at least 1 item",
        ),
    ],
)
def test_a_mistake_is_not_passed_over(tmp_path: Path, old: str, new: str, where: str) -> None:
    assert TEXT.count(old) == 1
    file = tmp_path / "limits.toml"
    file.write_text(TEXT.replace(old, new), encoding="utf-8")
    with pytest.raises(ValidationError) as caught:
        Limits.load(file)
    assert where in str(caught.value)


def test_each_value_has_its_reason() -> None:
    """A comment on its line, or above it in its block."""
    for block in TEXT.split("\n\n"):
        lines = block.splitlines()
        first_comment = next((number for number, line in enumerate(lines) if line.startswith("#")), len(lines))
        assert [line for line in lines[:first_comment] if "=" in line and " # " not in line] == []
