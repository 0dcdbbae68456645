"""`rlhf-train --download` as it is typed, against a hub on loopback: what it asks for, and says."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
import yaml

from jobs.errors import ExitCode, ToolkitError
from rlhf_train.data import downloads, hub
from tests import tiny
from tests.hub import TOKEN, Hub

pytestmark = pytest.mark.pinned

ROOT = Path(__file__).parents[3]
WEIGHTS = bytes(range(256)) * 4000  # 1.024 MB
ROW = b'{"prompt": "q", "chosen": "yes", "rejected": "no"}'.ljust(59) + b"\n"
# Calls of `rlhf-train` in one process, since its imports take seconds: a line of words in JSON, and
# a line back.
CLIENT = """
import contextlib, io, json, os, sys
from rlhf_train.__main__ import main
from rlhf_train.data import hub
hub.WAITS_S = (0.01, 0.02)
for line in sys.stdin:
    words, os.environ["HF_TOKEN"], os.environ["RLHF_FLAVOUR"] = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    heavy = sorted({"torch", "deepspeed", "transformers", "datasets"} & {*sys.modules})
    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    for path, content in {
        "models/some/actor/model.safetensors": WEIGHTS,
        "models/some/actor/config.json": b'{"model_type": "opt"}',
        "models/some/actor/tokenizer.json": b"{}",
        "models/some/actor/tf_model.h5": b"not wanted",
        "models/some/critic/pytorch_model.bin": WEIGHTS[:1000],
        "models/some/critic/config.json": b"{}",
        "models/some/unneeded/config.json": b"{}",
        "models/some/newer/model.safetensors": WEIGHTS,
        "models/some/newer/config.json": b'{"model_type": "qwen3"}',
        "models/some/gated/config.json": b"{}",
        "datasets/some/rows/train.jsonl": ROW * 40,
        "datasets/some/rows/picture.png": b"not wanted",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    for kind in ("one", "two"):  # for the two signals
        shutil.copytree(folder / "models/some/actor", folder / f"models/some/actor-{kind}")
        shutil.copytree(folder / "models/some/critic", folder / f"models/some/critic-{kind}")
    with Hub(folder, gated=["some/gated"]) as hub:
        yield hub


class Place:
    """A folder with a job, a cache of its own, and processes there."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.cache = folder, folder / "cache" / "hub"
        folder.mkdir()
        job = tiny.job(tiny.write_rows(folder / "own rows")) | {"name": "far"}
        job["actor"], job["critic"] = {"model": "some/unneeded", "sft_model": "some/actor"}, {"model": "some/critic"}
        job["data"]["datasets"] = ["some/rows", str(folder / "own rows")]
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RLHF_"))}
        more = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT), "HOME": str(folder)}
        self.environment = kept | more
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", CLIENT]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        self.processes.append(process)
        return process

    def send(self, *settings: str, token: str = "", flavour: str = "", words: Sequence[str] = (), to: int = 0) -> None:
        sets = [word for each in settings for word in ("--set", each)]
        stdin = self.processes[to].stdin
        assert stdin is not None
        stdin.write(json.dumps([["--download", "--job", "job.yaml", *sets, *words], token, flavour]) + "\n")
        stdin.flush()

    def call(self, *settings: str, **more: Any) -> tuple[int, str, str]:
        self.send(*settings, **more)
        stdout = self.processes[0].stdout
        assert stdout is not None
        code, out, err, heavy = json.loads(stdout.readline())
        assert heavy == []
        return code, out, err

    def files(self, repository: str) -> dict[str, bytes]:
        (snapshot,) = (self.cache / repository / "snapshots").iterdir()
        return {path.name: path.read_bytes() for path in snapshot.iterdir()}


@pytest.fixture(scope="module")
def place(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("download") / "place", server.url)
    place.start()
    yield place
    for process in place.processes:
        process.kill()
        process.communicate()


def fetched(server: Hub) -> list[str]:
    """The files whose content was asked for."""
    gets = (re.fullmatch(r"GET /(\S+)/resolve/\w+/(\S+) 20\d", line) for line in server.requests)
    return [f"{get[1]}/{get[2]}" for get in gets if get]


def test_all_that_the_steps_load_comes_once_and_is_verified(server: Hub, place: Place) -> None:
    code, out, err = place.call(words=["--dry-run"])
    assert (code, fetched(server), place.cache.exists()) == (0, [], False), err
    assert out.splitlines() == [
        "some/actor: would fetch 1.02 MB of 1.02 MB",
        "some/critic: would fetch 1 kB of 1 kB",
        "some/rows: would fetch at most 2.4 kB of 2.4 kB",
    ]
    server.fail("GET /some/actor/resolve/.*model.safetensors", "flip", times=1)
    code, out, err = place.call()
    assert (code, out) == (0, ""), err
    assert re.search(r"^warning: some/actor: .* has the hash ", err, re.MULTILINE)
    assert re.search(r"^some/actor: 1.02 MB, fetched and verified \(\d+s\)$", err, re.MULTILINE)
    assert err.splitlines()[-1] == f"all that the job needs is in {place.cache}"
    assert place.files("models--some--actor") == {
        "model.safetensors": WEIGHTS,
        "config.json": b'{"model_type": "opt"}',
        "tokenizer.json": b"{}",
    }
    assert place.files("models--some--critic") == {"pytorch_model.bin": WEIGHTS[:1000], "config.json": b"{}"}
    assert place.files("datasets--some--rows") == {"train.jsonl": ROW * 40}
    assert not (place.cache / "models--some--unneeded").exists()  # the model of step 1, which is left out
    assert not (place.folder / "runs").exists()

    server.requests.clear()
    code, out, err = place.call()
    assert (code, fetched(server)) == (0, []), err
    assert err.splitlines() == [
        "some/actor: 1.02 MB, all there, verified",
        "some/critic: 1 kB, all there, verified",
        "some/rows: 2.4 kB, all there, verified",
        f"all that the job needs is in {place.cache}",
    ]


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGINT, ExitCode.INTERRUPTED, "one"), (signal.SIGTERM, ExitCode.PREEMPTED, "two")],
)
def test_a_signal_ends_it_and_the_next_call_resumes(
    server: Hub, place: Place, number: int, code: int, name: str
) -> None:
    weights = f"some/critic-{name}/pytorch_model.bin"
    server.fail(f"GET /some/critic-{name}/resolve/.*pytorch_model.bin", "stall", times=1)
    settings = (f"actor.sft_model=some/actor-{name}", f"critic.model=some/critic-{name}")
    process = place.start()
    place.send(*settings, to=-1)
    deadline = time.monotonic() + 60
    while weights not in fetched(server):
        assert time.monotonic() < deadline and process.poll() is None, server.requests
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)  # the stalled body would take longer
    assert process.returncode == code and err == "\nstopped: the same command resumes\n"
    server.requests.clear()
    ended, _, err = place.call(*settings)
    assert ended == 0, err
    assert weights in fetched(server) and not any("actor" in file for file in fetched(server))
    assert place.files(f"models--some--critic-{name}")["pytorch_model.bin"] == WEIGHTS[:1000]


def test_the_errors_are_those_of_a_run(server: Hub, place: Place) -> None:
    server.requests.clear()
    code, _, err = place.call("actor.sft_model=some/nothing", "critic.model=some/gated")
    assert code == ExitCode.USAGE and "error: cannot load some/nothing from the hub" in err
    assert fetched(server) == []  # although the others are there
    code, _, err = place.call("actor.sft_model=some/gated")
    assert code == ExitCode.USAGE and "HF_TOKEN opens a gated or private model" in err
    assert place.call("actor.sft_model=some/gated", token=TOKEN)[0] == 0
    code, _, err = place.call("data.datasets=[no.jsonl]")
    assert code == ExitCode.USAGE and "error: there is no data set `no.jsonl`" in err
    code, _, err = place.call("actor.sft_model=./no")
    assert code == ExitCode.USAGE and "error: there is no folder ./no" in err
    code, _, err = place.call("actor.sft_model=./own rows", "critic.model=actor", "data.datasets=[./own rows]")
    assert (code, err) == (0, "nothing to fetch: the job names no model or data set of a hub\n")


def test_a_model_that_the_stack_lacks_is_refused_by_its_config(server: Hub, place: Place) -> None:
    server.requests.clear()
    code, _, err = place.call("actor.sft_model=some/newer", flavour="cu118")
    assert code == ExitCode.UNFIT and fetched(server) == ["some/newer/config.json"]
    assert "error: some/newer does not run in flavour cu118, which this stack has\n" in err
    assert "its transformers has no Qwen 3" in err and "`FLAVOUR=cu130 docker compose run --rm train ...`" in err
    assert place.call("actor.sft_model=some/newer", flavour="cu130")[0] == 0
    assert "some/newer/model.safetensors" in fetched(server)


def test_without_the_hub_what_is_here_is_enough(server: Hub, place: Place) -> None:
    assert place.call()[0] == 0
    server.fail(".*", 503)
    try:
        code, _, err = place.call()
        assert code == 0 and "some/actor is taken from the cache" in err and "some/actor: 1.02 MB, fetched" not in err
        code, _, err = place.call("actor.sft_model=some/unneeded")
        assert code == ExitCode.UNFIT and "error: cannot load some/unneeded from the hub" in err
    finally:
        server.heal()


MODEL = hub.Repository(
    "c0", (hub.HubFile("model.safetensors", 4_000_000, "aa"), hub.HubFile("config.json", 1_000_000, "bb"))
)


@pytest.fixture
def half_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> downloads.Download:
    """A download of 5 MB of which 3 are here: a whole file, and a part of another."""
    store = tmp_path / "models--some--model"
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / "aa.0a1b2c3d.incomplete").write_bytes(bytes(2_000_000))
    (store / "snapshots" / "c0").mkdir(parents=True)
    (store / "snapshots" / "c0" / "config.json").write_bytes(bytes(1_000_000))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(downloads, "SHOW_S", 0.01)
    return downloads.Download("some/model", "model", hub.model_files, MODEL)


def shown(download: downloads.Download, stream: TextIO, *, seconds: float) -> None:
    with downloads._shown(download, downloads.DownloadScreen(stream)):
        time.sleep(seconds)


def test_a_line_says_how_much_has_come(half_here: downloads.Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "LINE_S", 0.1)
    stream = io.StringIO()
    shown(half_here, stream, seconds=0.5)
    lines = stream.getvalue().splitlines()
    assert {*lines} == {"downloading some/model: 3 MB of 5 MB, 0 bytes/s, 0s"} and 1 <= len(lines) <= 5
    (Path(hub.constants.HF_HUB_CACHE) / "models--some--model/blobs/aa").write_bytes(bytes(4_000_000))
    shown(half_here, stream, seconds=0.3)
    assert stream.getvalue().splitlines()[-1] == "downloading some/model: 5 MB are here, verifying, 0s"


def test_on_a_terminal_one_line_is_drawn_again(half_here: downloads.Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream:
        shown(half_here, stream, seconds=0.04)
        downloads.DownloadScreen(stream).say("done")
        drawn = ""
        while "done" not in drawn:
            drawn += os.read(ours, 100_000).decode()
    os.close(ours)
    line = "\r\x1b[Kdownloading some/model: 3 MB of 5 MB, 0 bytes/s, 0s\r"
    assert drawn.startswith(line * 2) and drawn.endswith("\r\x1b[Kdone\r\n") and drawn.count("\n") == 1


def test_a_disk_without_room_is_told_before_anything_comes(half_here: downloads.Download) -> None:
    large = hub.Repository("c0", (*MODEL.files, hub.HubFile("model-2.safetensors", 10**18, "cc")))
    with pytest.raises(ToolkitError) as caught:
        downloads._check_room([replace(half_here, listed=large)])
    assert caught.value.exit_code == ExitCode.UNFIT
    assert caught.value.why.startswith("1e+09 GB are still to come, and ")
    downloads._check_room([half_here])
