"""What all verbs have in common."""

from __future__ import annotations

import pytest

from env.settings import Settings
from jobs.spec import load_job
from remote.inventory import Box
from remote.verbs.base import VerbContext


def test_only_a_job_that_tracks_takes_the_trackers_key_to_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_1")
    monkeypatch.setenv("WANDB_API_KEY", "key_2")
    context, box = VerbContext(Settings.from_environ({}), {}), Box(name="gpu-box", address="1.2.3.4")
    assert context.secrets(box) == context.secrets(box, load_job("demo")) == {"HF_TOKEN": "hf_1"}
    assert context.secrets(box, load_job("demo", ["track=[trackio]"])) == {"HF_TOKEN": "hf_1"}
    both = {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "key_2"}
    assert context.secrets(box, load_job("demo", ["track=[wandb]"])) == both
