"""The real clients against a real HTTP server that fails.

Contents are compared with the bytes that the server has.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.errors import ExitCode
from rlhf_train.data import hub
from tests.hub import PIECE_S, PIECES, TOKEN, Hub

pytestmark = pytest.mark.pinned

ROOT = Path(__file__).parents[3]
WEIGHTS = bytes(range(256)) * 4000  # 1 MB: more than the buffers of a socket
WEIGHTS_FILE = "GET /some/model/resolve/.*/model.safetensors"
ROWS = [{"prompt": f"q{i}", "chosen": f"yes{i}", "rejected": f"no{i}"} for i in range(40)]

# What is asked, in one process: calls of `hub`, each answered by a line of JSON on stdout. Waits
# and chunks are cut a hundredfold.
CLIENT = """
import hashlib, json, sys
from pathlib import Path
from jobs.errors import ToolkitError
from jobs.spec import DataSet
from rlhf_train.data import hub, reading
hub.constants.DOWNLOAD_CHUNK_SIZE = 2**16  # instead of 10 MB
hub.WAITS_S = tuple(wait_s / 100 for wait_s in hub.WAITS_S)
def fetched(name, kind="model", wanted=hub.model_files):
    folder = hub.fetch(name, wanted, kind=kind)
    files = wanted(hub._recall(folder.parents[1]).files)
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
def rows(name, **entry):
    parts = reading.read(DataSet(name=name, **entry), [Path.cwd()])
    return [[*part.rows] if part else [] for part in parts]
for line in sys.stdin:
    try:
        answer = eval(line)
    except ToolkitError as error:
        answer = {"what": error.what, "why": error.why, "hint": error.hint, "code": error.exit_code}
    print(json.dumps(answer), flush=True)
    print("end of", line, file=sys.stderr, flush=True)
"""


class Client:
    """One process with one cache; `ask` returns the answer and the stderr output meanwhile."""

    def __init__(self, url: str, home: Path, **environment: str) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        settings = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home / ".cache"),
            "PYTHONPATH": str(ROOT),
            "HF_TOKEN": "",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        }
        command, pipe = [sys.executable, "-c", CLIENT], subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            cwd=home,
            env=os.environ | settings | environment,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            bufsize=1,
        )

    def ask(self, call: str) -> tuple[Any, list[str]]:
        self.send(call)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        answer, messages = self.process.stdout.readline(), []
        while not (line := self.process.stderr.readline()).startswith("end of"):
            assert line or self.process.poll() is None, messages
            messages.append(line.rstrip())
        return json.loads(answer), messages

    def send(self, call: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(call + "\n")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    for path, content in {
        "models/some/model/model.safetensors": WEIGHTS,
        "models/some/model/config.json": b'{"model_type": "opt"}',
        "models/some/model/tokenizer.json": b"{}",
        "models/some/model/tf_model.h5": b"not wanted",
        "models/some/model/onnx/model.safetensors": b"nor this",
        "models/some/gated/config.json": b"{}",
        "models/some/carded/model.safetensors": WEIGHTS,
        "models/some/carded/config.json": b"{}",
        "models/some/carded/README.md": b"---\nlicense: mit\n---\n",
        "datasets/some/set/train-0.jsonl": jsonl(ROWS[:20]),
        "datasets/some/set/train-1.jsonl": jsonl(ROWS[20:30]),
        "datasets/some/set/test.jsonl": jsonl(ROWS[30:]),
        "datasets/some/set/picture.png": b"not wanted",
        "datasets/some/several/README.md": card([("one", "a/*.jsonl"), ("two", "b/*.jsonl")], default="two"),
        "datasets/some/several/a/train.jsonl": jsonl(ROWS[:5]),
        "datasets/some/several/b/train.jsonl": jsonl(ROWS[5:9]),
        "datasets/some/undecided/README.md": card([("one", "a/*.jsonl"), ("two", "b/*.jsonl")]),
        "datasets/some/undecided/a/train.jsonl": jsonl(ROWS[:5]),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    with Hub(tmp_path, gated=["some/gated"]) as hub:
        yield hub


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(configs: list[tuple[str, str]], default: str = "") -> bytes:
    entries = [
        {"config_name": name, "data_files": files, **({"default": True} if name == default else {})}
        for name, files in configs
    ]
    return f"---\nconfigs: {json.dumps(entries)}\n---\n".encode()


def sums(server: Hub, *files: str, name: str = "models/some/model") -> dict[str, str]:
    return {file: hashlib.sha256((server.root / name / file).read_bytes()).hexdigest() for file in files}


def whole(server: Hub) -> dict[str, str]:
    return sums(server, "config.json", "model.safetensors", "tokenizer.json")


def as_rows(rows: list[dict[str, str]]) -> list[list[str]]:
    return [[row["prompt"], row["chosen"], row["chosen"], row["rejected"]] for row in rows]


def tried_again(messages: list[str]) -> int:
    return sum(line.startswith("warning: some/model: ") and ("trying again in" in line) for line in messages)


def weights_asked(server: Hub, status: str = "") -> int:
    return sum(
        line.startswith("GET ") and "/model.safetensors" in line and line.endswith(status) for line in server.requests
    )


@pytest.fixture
def clients(server: Hub, tmp_path: Path) -> Iterator[Any]:
    """Makes clients: with a fresh cache, or with the named one."""
    made: list[Client] = []

    def make(home: str = "", **environment: str) -> Client:
        made.append(Client(environment.pop("url", server.url), tmp_path / (home or f"home{len(made)}"), **environment))
        return made[-1]

    yield make
    for client in made:
        client.end()


def forget(client: Client) -> None:
    """An empty cache, for the same process."""
    subprocess.run(["rm", "-rf", client.home / ".cache"], check=True)


def test_faults_that_pass_are_tried_again_and_one_error_ends_those_that_do_not(server: Hub, clients: Any) -> None:
    client = clients()
    # Six cuts are more than there are tries, but each of the first four comes further than the one
    # before.
    faults: list[tuple[Any, int, int]] = [
        (500, 2, 2),
        (503, 1, 1),
        (429, 1, 1),
        ("cut", 2, 2),
        ("cut", 6, 6),
        ("flip", 1, 1),
        ("stall", 1, 0),
        ("slow", 1, 0),
    ]
    for how, times, most in faults:
        server.heal()
        server.requests.clear()
        server.fail(WEIGHTS_FILE, how, times)
        start = time.monotonic()
        answer, messages = client.ask("fetched('some/model')")
        assert answer == whole(server), (how, messages)
        assert weights_asked(server) == (1 if how == "slow" else times + 1), (how, server.requests)
        # huggingface_hub resumes by itself after a stall; some versions also after a cut, and some
        # after a 429.
        assert tried_again(messages) <= most, (how, messages)
        if how in (500, 503, "flip"):
            assert tried_again(messages) == times, (how, messages)
        if how == "stall":
            assert weights_asked(server, "206") == 1  # from where it stopped
        if how == "slow":
            # Longer than HF_HUB_DOWNLOAD_TIMEOUT, and never stopped.
            assert time.monotonic() - start >= (PIECES - 1) * PIECE_S > 2 * 1
        forget(client)

    for how, word in ((500, "500"), ("flip", hashlib.sha256(WEIGHTS).hexdigest()), ("cut", "")):
        server.heal()
        server.requests.clear()
        server.fail(WEIGHTS_FILE, how)
        if how == "cut":
            server.fail("GET /api/models/some/model.*", 502)
            server._faults.reverse()
            word = "502"
        answer, messages = client.ask("fetched('some/model')")
        assert answer["what"] == "cannot load some/model from the hub"
        assert word in answer["why"]
        assert server.url in answer["why"]
        assert "HF_ENDPOINT" in answer["hint"]
        assert answer["code"] == ExitCode.UNFIT
        assert tried_again(messages) == 4
        assert not list(client.home.rglob("snapshots/*/model.safetensors"))
        server.heal()
        assert client.ask("fetched('some/model')")[0] == whole(server)  # the same command, later
        forget(client)


@pytest.mark.parametrize(
    ("said_by_hub", "wait"), [("2", "2"), ("0", "0.01"), ("Wed, 21 Oct 2015 07:28:00 GMT", "0.01"), ("", "0.01")]
)
def test_a_hub_that_is_asked_too_often_says_when_to_come_again(
    server: Hub, clients: Any, said_by_hub: str, wait: str
) -> None:
    server.retry_after = said_by_hub
    server.fail("GET /api/models/some/model.*", 429, 1)
    start = time.monotonic()
    answer, messages = clients().ask("fetched('some/model', wanted=hub.config_files)")
    assert answer == sums(server, "config.json")
    (line,) = [line for line in messages if "trying again" in line]
    assert line.endswith(f"; trying again in {wait} s") and time.monotonic() - start >= float(wait)


def test_it_is_not_waited_for_longer_than_a_minute() -> None:
    error = OSError()
    error.response = SimpleNamespace(status_code=429, headers={"Retry-After": "3600"})  # type: ignore[attr-defined]
    assert hub._asked_to_wait_s(error) == 60.0


def test_names_and_tokens(server: Hub, clients: Any) -> None:
    client = clients()
    for name in ("no/such", "some/gated", "white space/x"):
        server.requests.clear()
        answer, messages = client.ask(f"fetched('{name}')")
        assert (answer["what"], answer["code"]) == (f"cannot load {name} from the hub", ExitCode.USAGE)
        assert answer["hint"] == "check the name; HF_TOKEN opens a gated or private model"
        assert not [line for line in messages if "again" in line]
        assert len(server.requests) <= 2  # nothing is asked twice: it would not help
    assert clients(HF_TOKEN=TOKEN).ask("fetched('some/gated')")[0] == sums(
        server, "config.json", name="models/some/gated"
    )


def test_a_models_card_comes_with_it_and_is_not_needed(server: Hub, clients: Any) -> None:
    model = sums(server, "config.json", "model.safetensors", name="models/some/carded")
    front_matter = "hub.front_matter(hub.folder_here('some/carded') / 'README.md')"
    server.fail("GET /some/carded/resolve/.*/README.md", "flip")
    first, offline = clients("home"), clients("home", HF_HUB_OFFLINE="1")
    for client in (first, offline):
        assert client.ask("fetched('some/carded')")[0] == model
        assert client.ask(front_matter)[0] == {}
    server.heal()
    assert first.ask("fetched('some/carded')")[0] == model
    assert first.ask(front_matter)[0] == {"license": "mit"}


def test_without_the_hub_what_is_here_whole_is_used_and_nothing_else(server: Hub, clients: Any) -> None:
    nobody = "http://127.0.0.1:9"  # the port `discard`: nobody answers
    first = clients("home")
    assert first.ask("fetched('some/model', wanted=hub.tokenizer_files)")[0] == sums(
        server, "config.json", "tokenizer.json"
    )
    server.fail("GET /datasets/some/set/resolve/.*/train-1.jsonl", "flip")
    assert first.ask("rows('some/set')")[0]["code"] == ExitCode.UNFIT
    away, offline = clients("home", url=nobody), clients("home", HF_HUB_OFFLINE="1")
    for client in (away, offline):
        answer, messages = client.ask("fetched('some/model', wanted=hub.tokenizer_files)")
        assert answer == sums(server, "config.json", "tokenizer.json")
        assert len([line for line in messages if line.startswith("warning: ")]) == (1 if client is away else 0)
    for call in ("fetched('some/model')", "rows('some/set')"):  # the weights and train-1.jsonl are missing
        answer, _ = offline.ask(call)
        assert answer["code"] == ExitCode.UNFIT
        assert "HF_HUB_OFFLINE" in answer["hint"]
    start = time.monotonic()
    answer, messages = away.ask("rows('some/other')")
    assert (answer["code"], time.monotonic() - start < 50) == (ExitCode.UNFIT, True)
    assert nobody in answer["why"]
    assert not [line for line in messages if "again" in line]


def test_what_another_program_left_in_the_cache_may_not_be_all_and_that_is_said(
    server: Hub, clients: Any, tmp_path: Path
) -> None:
    script = (
        "import sys, huggingface_hub; [huggingface_hub.hf_hub_download('some/model', file) for file in sys.argv[1:]]"
    )

    def other(*files: str) -> None:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home/.cache"), "HF_TOKEN": ""}
        subprocess.run([sys.executable, "-c", script, *files], env=environment, check=True, capture_output=True)

    offline = clients("home", HF_HUB_OFFLINE="1")
    words = (
        "warning: some/model was put into the cache by another program: using what is there ({}); files may be missing"
    )
    for files, named in ((["config.json"], "1 file"), (["config.json", "tokenizer.json"], "2 files")):
        other(*files)
        answer, messages = offline.ask("fetched('some/model')")
        assert answer == sums(server, *files)
        assert list(filter(None, messages)) == [words.format(named)]
    for client in (clients("home"), offline):  # the hub has the list, and then it is kept
        answer, messages = client.ask("fetched('some/model')")
        assert (answer, list(filter(None, messages))) == (whole(server), [])


def test_data_sets_of_several_files_and_configurations(server: Hub, clients: Any) -> None:
    client = clients()
    server.fail("GET /datasets/some/set/resolve/.*/train-0.jsonl", "flip", 1)
    server.fail("GET /datasets/some/set/resolve/.*/train-1.jsonl", 500, 1)
    server.fail("GET /datasets/some/set/resolve/.*/test.jsonl", "cut", 1)
    answer, _ = client.ask("rows('some/set')")
    assert answer == [as_rows(ROWS[:30]), as_rows(ROWS[30:])]
    assert not [line for line in server.requests if "picture" in line]
    assert client.ask("rows('some/several')")[0] == [as_rows(ROWS[5:9]), []]
    assert not [line for line in server.requests if "/a/train.jsonl" in line]
    answer, _ = client.ask("rows('some/undecided')")
    assert (answer["what"], answer["why"]) == (
        "data set `some/undecided` has several configurations, and none is the default",
        "they are one, two",
    )
    # A configuration or a split that is named; where there is none of that name, those that are.
    assert client.ask("rows('some/several', config='one')")[0] == [as_rows(ROWS[:5]), []]
    answer, _ = client.ask("rows('some/undecided', config='three')")
    assert (answer["what"], answer["why"], answer["hint"]) == (
        "data set `some/undecided` has no configuration `three`",
        "they are one, two",
        "name one in data.datasets: {name: some/undecided, config: one}",
    )
    assert client.ask("rows('some/set', split='test')")[0] == [as_rows(ROWS[30:]), []]
    answer, _ = client.ask("rows('some/set', split='train_sft')")
    assert (answer["what"], answer["why"]) == (
        "data set `some/set` has no split `train_sft`",
        "its splits: train, test",
    )

    # The next version of the data set, and a file of the cache that went bad.
    (server.root / "datasets/some/set/train-1.jsonl").write_bytes(jsonl(ROWS[:1]))
    assert client.ask("rows('some/set')")[0] == [as_rows([*ROWS[:20], ROWS[0]]), as_rows(ROWS[30:])]
    blob = next(
        path for path in client.home.rglob("snapshots/*/train-1.jsonl") if path.read_bytes() == jsonl(ROWS[:1])
    ).resolve()
    blob.write_bytes(blob.read_bytes().replace(b"q0", b"q7"))
    assert client.ask("rows('some/set')")[0] == [as_rows([*ROWS[:20], ROWS[0]]), as_rows(ROWS[30:])]


def test_where_files_cannot_be_linked_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    snapshot, plain = tmp_path / "snapshots/c0ffee", tmp_path / "rlhf-box/c0ffee"
    (snapshot / "data").mkdir(parents=True)
    file, place = snapshot / "data/train.jsonl", plain / "data/train.jsonl"
    file.write_bytes(jsonl(ROWS))
    monkeypatch.setattr(os, "link", no_links)
    hub._link(snapshot, plain, ["data/train.jsonl"])
    copied = place.stat()
    hub._link(snapshot, plain, ["data/train.jsonl"])
    assert place.read_bytes() == jsonl(ROWS) and place.stat().st_ino == copied.st_ino  # once
    file.write_bytes(jsonl(ROWS[:1]))  # a blob that was damaged, and fetched again
    hub._link(snapshot, plain, ["data/train.jsonl"])
    assert place.read_bytes() == jsonl(ROWS[:1])
    files = [path for path in (tmp_path / "rlhf-box").rglob("*") if path.is_file()]
    assert files == [place]  # nothing else that could be taken for data


def test_the_libraries_own_calls_go_to_the_mirror(server: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT alone sends plain `load_dataset` and `hf_hub_download` calls to the mirror."""
    script = """
from datasets import load_dataset
from huggingface_hub import hf_hub_download
print([len(load_dataset("some/set", split=split)) for split in ("train", "test")])
print(open(hf_hub_download("some/model", "config.json")).read())
"""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["[30, 10]", '{"model_type": "opt"}']


def test_a_start_after_a_killed_download_gets_the_right_content(server: Hub, clients: Any) -> None:
    server.fail(WEIGHTS_FILE, "stall", 1)
    killed = clients("home", HF_HUB_DOWNLOAD_TIMEOUT="60")
    killed.send("fetched('some/model')")
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in (killed.home / ".cache").rglob("*.incomplete")):
        assert time.monotonic() < deadline, server.requests
        time.sleep(0.05)
    killed.process.send_signal(signal.SIGKILL)
    killed.end()
    for torn in (killed.home / ".cache").rglob("*.incomplete"):
        torn.write_bytes(b"x" * torn.stat().st_size)  # as a disk leaves it after a power cut
    assert clients("home", HF_HUB_OFFLINE="1").ask("fetched('some/model')")[0]["code"] == ExitCode.UNFIT
    assert clients("home").ask("fetched('some/model')")[0] == whole(server)


def test_ranks_share_one_download(server: Hub, clients: Any) -> None:
    server.fail(WEIGHTS_FILE, "slow", 1)
    ranks = [clients("home") for _ in range(2)]
    for rank in ranks:
        rank.send("fetched('some/model')")
    for rank in ranks:
        assert json.loads(rank.process.stdout.readline()) == whole(server)
    assert weights_asked(server) == 1
