"""What all verbs have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from env.settings import Settings
from jobs.errors import ToolkitError
from jobs.spec import load_job
from remote.inventory import Box
from remote.output import Sayer
from remote.ssh.host_keys import HostKey, NoSuchHost, changed, unreachable
from remote.verbs.base import VerbContext


def test_only_a_job_that_tracks_takes_the_trackers_key_to_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_1")
    monkeypatch.setenv("WANDB_API_KEY", "key_2")
    context, box = VerbContext(Settings.from_environ({}), {}), Box(name="gpu-box", address="1.2.3.4")
    assert context.secrets(box) == context.secrets(box, load_job("demo")) == {"HF_TOKEN": "hf_1"}
    assert context.secrets(box, load_job("demo", ["track=[trackio]"])) == {"HF_TOKEN": "hf_1"}
    both = {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "key_2"}
    assert context.secrets(box, load_job("demo", ["track=[wandb]"])) == both


CHANGED = changed("far", "SHA256:new", "ssh-ed25519", [HostKey("ssh-ed25519", b"old")])
SILENT = unreachable("no answer from `far` within 10 s", hint="is the box running?")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (NoSuchHost("far", why=""), "`far` is not in boxes.yaml; boxes.yaml knows: gpu-box"),
        # The name is one of ~/.ssh/config: that it is not in boxes.yaml is no mistake.
        (NoSuchHost("h.invalid", why=""), NoSuchHost("", why="").hint),
        (CHANGED, CHANGED.hint),
        (SILENT, "is the box running?"),
    ],
    ids=["no such host", "an address of the configuration", "changed key", "silent"],
)
def test_only_a_name_that_leads_nowhere_is_answered_with_the_known_ones(
    tmp_path: Path, error: ToolkitError, hint: str
) -> None:
    settings = Settings.from_environ({"XDG_STATE_HOME": str(tmp_path)})
    context = VerbContext(settings, {"gpu-box": Box(name="gpu-box", address="1.2.3.4")})
    with pytest.raises(ToolkitError) as raised, context.connection(Box(name="far", address="far"), Sayer()):
        raise error
    assert raised.value.hint == hint and raised.value.exit_code == 8
    assert "somebody may be intercepting" in CHANGED.hint
