"""The probe over a real sshd, as doctor and deploy wait for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from env.settings import Provider
from remote import output
from remote.survey.probe_cache import probe


def test_it_shows_bytes_and_a_clock(sshd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "FIRST_S", 0.01)
    monkeypatch.setattr(output, "EACH_S", 0.01)
    shown, box = list[str](), sshd.box(data_folder=str(tmp_path))
    with sshd.connection(tmp_path, box=box) as connection:
        known = probe(connection, box, Provider.load_all(), shown.append)
    sizes = [
        re.fullmatch(r"probing gpu-box \(\d+s\): (\S+ (bytes|kB)) of its answer have come", text) for text in shown[:-1]
    ]
    assert all(sizes) and shown[-1] == ""
    assert len({found[1] for found in sizes if found}) > 1  # its parts come one after the other
    assert known.facts.complete
