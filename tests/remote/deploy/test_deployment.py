"""Deploys to a real sshd: what is done, and what is not done again.

Also what a deploy leaves behind that is killed, cut off, or not the only one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from env.settings import Limits, Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.spec import Job, load_job
from remote.deploy import deployment as deploying
from remote.deploy.deployment import BoxContents, DeployResult, check_fit, deploy, environment_key, parse_look, plan_for
from remote.deploy.lock import holder
from remote.deploy.sync import checkout_tree
from remote.scripts import script
from remote.survey.facts import BoxFacts
from remote.survey.probe_cache import CachedProbe, arguments, hub_mirror, mirror_values, recall, remember
from tests.disks import unmount
from tests.remote.small_checkout import HOSTILE, make_checkout, make_index, wheel_of, write

LIMITS, PROVIDERS = Limits.load(), Provider.load_all()
ROOMY = LIMITS.model_copy(
    update={"environment": LIMITS.environment.model_copy(update={"bytes_cpu": 1, "bytes_cuda": 1})}
)
GPU = "gpu\t0|GPU-0|00000000:01:00.0|24564|1|0|535.129.03|NVIDIA GeForce RTX 4090"


def probed(
    folder: Path, *more: str, python: str = "", conda: str = "", machine: str = "x86_64", free_kb: int = 10**9
) -> str:
    """What the probe would say of a box with this data disk; more: lines of its own."""
    root = f"{folder}/rlhf-box"
    lines = [
        "probe\t1", "clock\t1700000000.5", f"machine\t{machine}", "home\t/root", f"root\t0|{root}",
        f"place\t0|1|1|0|{folder}",
        f"disk\t0|/dev/x {2 * free_kb} {free_kb} {free_kb} 50% /", "tool\trsync|/usr/bin/rsync",
        "tool\ttar|/usr/bin/tar",
    ]  # fmt: skip
    lines += [f"python\t3.10.13|1|{python}"] if python else []
    lines += [f"conda\t24.1|{conda}"] if conda else []
    return "".join(f"{line}\n" for line in (*lines, *more, "end\t100"))


class Scene:
    """A laptop with a checkout, and a box that it knows: its disk is a folder here."""

    def __init__(self, folder: Path, sshd: Any, index: Path, *, data_folder: str = "the data disk") -> None:
        self.sshd, self.state, self.disk = sshd, folder / "state", folder / data_folder
        self.checkout = make_checkout(folder / "my checkout", index)
        self.disk.mkdir()
        self.root = self.disk / "rlhf-box"
        self.box = sshd.box(data_folder=str(self.disk), mirror="")
        self.said: list[str] = []
        self.moments: list[str] = []
        self.knows(probed(self.disk, python=sys.executable))

    def knows(self, probe: str, identity: str = "") -> None:
        self.state.mkdir(exist_ok=True)
        if not identity:
            said = subprocess.run(
                ["sh", "-s", "--", "look", self.root, "-", "-", "-"],
                input=script("land.sh"),
                capture_output=True,
                check=True,
            )
            identity = parse_look(said.stdout.decode()).identity
        remember(
            self.state,
            self.box.name,
            CachedProbe(arguments(self.box, PROVIDERS), probe, 0.0, 0.0, identity, str(self.root)),
        )

    def deploy(self, **more: Any) -> DeployResult:
        connection = more.pop("connection", None) or self.sshd.connection(self.state, box=self.box)
        with connection:
            return deploy(
                connection, self.checkout, more.pop("box", self.box), limits=more.pop("limits", ROOMY),
                providers=PROVIDERS, state=self.state,
                say=self.said.append, now=self.moments.append, **more,
            )  # fmt: skip

    def environment_is_there(self) -> str:
        """As if it had been made before."""
        key = deploying.environment_key(self.checkout, "bare", "cu118", "torch-cu118-cpu", "default", {}, "cpu")
        write(self.root / f"env/{key}/bin/python", "#!/bin/sh\n", 0o755)
        write(self.root / f"env/{key}/complete", "1\n")
        write(self.root / ".rlhf-box", "")
        return key

    def deployed(self) -> dict[str, str]:
        return dict(line.split(" ", 1) for line in (self.root / "deployed").read_text().splitlines())

    def whole_code(self) -> list[str]:
        return sorted(path.name for path in (self.root / "code").iterdir())


class Counting:
    """A line that counts what goes over it."""

    def __init__(self, line: Any) -> None:
        self.connection = line
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.connection, name)
        if name not in ("query", "change", "local"):
            return value

        def counted(*words: Any, **options: Any) -> Any:
            self.calls.append(name)
            return value(*words, **options)

        return counted

    def __enter__(self) -> Counting:
        self.connection.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.connection.__exit__(*error)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("index") / "simple")


@pytest.fixture
def scene(tmp_path: Path, sshd: Any, index: Path) -> Scene:
    return Scene(tmp_path, sshd, index)


@pytest.fixture
def own_scene(tmp_path: Path, own_sshd: Any, index: Path) -> Iterator[Scene]:
    yield Scene(tmp_path, own_sshd, index)


# --- the whole of it


def with_python310(scene: Scene, python: Path | str) -> dict[str, Provider]:
    """Let the box have a Python that says it is 3.10, and is another."""
    text = f'#!/bin/sh\ncase "$2" in *sys.version_info*) echo \'3.10.13|1\' ;; *) exec {python} "$@" ;; esac\n'
    path = write(scene.disk / "python3.10", text, 0o755)
    return {**PROVIDERS, "generic": PROVIDERS["generic"].model_copy(update={"pythons": (str(path),)})}


def test_from_an_unknown_box_to_one_that_is_ready_and_then_only_what_changed(scene: Scene, index: Path) -> None:
    """The probe is real, except for its way to a hub; the environment is real, of small wheels."""
    for mirror in ("default", "cn"):
        write(scene.checkout / f"env/mirrors/{mirror}.env", (scene.checkout / "env/mirrors/here.env").read_text())
    shutil.rmtree(scene.state)
    providers = with_python310(scene, sys.executable)
    connection = Counting(scene.sshd.connection(scene.state, box=scene.box))
    with connection:
        first = deploy(
            connection,
            scene.checkout,
            scene.box,
            limits=ROOMY,
            providers=providers,
            state=scene.state,
            say=scene.said.append,
            now=scene.moments.append,
        )  # type: ignore[arg-type]
    assert [part.name for part in first.parts] == ["probe", "look", "lock", "sync", "environment", "settle"]
    assert first.changed and "3 packages as locked" in " ".join(first.notes)
    written = scene.deployed()
    tree = checkout_tree(scene.checkout)
    assert (written["code"], written["runtime"], written["device"], written["p2p"]) == (tree.key, "bare", "cpu", "0")
    assert subprocess.run([written["python"], "-c", "import torch"], check=False).returncode == 0
    assert scene.whole_code() == [tree.key]
    assert (scene.root / f"code/{tree.key}/rlhf_train/main.py").read_text() == "print('hello')\n"
    assert not (scene.root / "lock").exists()
    stages = [text for text in scene.said if text.startswith("environment: ")]
    assert (
        stages[0] == "environment: a virtual environment ..."
        and len(stages) == 13
        and stages[-1].startswith("environment: a virtual environment, ")
    )
    assert all(text.endswith(" ...") for text in stages[:-1:2]) and all(": done (" in text for text in stages[1:-1:2])
    assert all(re.search(r" \(\S+s\)", text) for text in scene.moments if text) and scene.moments[-1] == ""
    assert json.loads(json.dumps(first.as_json()))["environment"] == first.plan.environment

    def again() -> tuple[DeployResult, list[str]]:
        with Counting(scene.sshd.connection(scene.state, box=scene.box)) as connection:
            return deploy(
                connection, scene.checkout, scene.box, limits=ROOMY, providers=providers, state=scene.state
            ), connection.calls  # type: ignore[arg-type]

    before = (scene.root / "deployed").stat()
    second, calls = again()
    assert (second.changed, calls, [part.said for part in second.parts]) == (False, ["query"], ["already up to date"])
    assert (scene.root / "deployed").stat().st_mtime_ns == before.st_mtime_ns
    assert second.time == int(written["time"])

    write(scene.checkout / "rlhf_train/main.py", "print('changed')\n")
    third, calls = again()
    assert (third.changed, calls) == (True, ["query", "change", "local", "change"])
    assert [part.name for part in third.parts] == ["look", "lock", "sync"]
    new = third.plan.code
    assert scene.deployed()["code"] == new != tree.key
    assert scene.whole_code() == sorted([tree.key, new])
    assert (scene.root / f"code/{new}/tool.sh").samefile(scene.root / f"code/{tree.key}/tool.sh")
    assert (scene.root / f"code/{tree.key}/rlhf_train/main.py").read_text() == "print('hello')\n"


def test_a_box_that_has_the_locked_pytorch_need_not_download_it(tmp_path: Path, sshd: Any) -> None:
    """The Python that makes the environment has it, as in a provider's image."""
    index = make_index(tmp_path / "index/simple")
    scene, theirs = Scene(tmp_path, sshd, index), tmp_path / "theirs"
    subprocess.run([sys.executable, "-m", "venv", theirs], check=True)
    pip = [theirs / "bin/python", "-m", "pip", "install", "-q", "--no-index"]
    subprocess.run([*pip, wheel_of(index, "torch")], check=True)
    shutil.rmtree(index / "torch")  # so it cannot come from there
    shutil.rmtree(scene.state)
    write(scene.checkout / "env/mirrors/default.env", (scene.checkout / "env/mirrors/here.env").read_text())
    providers = with_python310(scene, theirs / "bin/python")
    with Counting(scene.sshd.connection(scene.state, box=scene.box)) as connection:
        deploy(
            connection,
            scene.checkout,
            scene.box,
            limits=ROOMY,
            providers=providers,
            state=scene.state,
            say=scene.said.append,
        )  # type: ignore[arg-type]
    stages = [text for text in scene.said if "PyTorch" in text]
    assert stages[0] == "environment: PyTorch (torch-cu118-cpu), which this box has ..." and len(stages) == 2
    found = subprocess.run(
        [scene.deployed()["python"], "-c", "import torch; print(torch.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(scene.root / "env")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Progress 1500000000 of 2300000000", "1.5 GB of 2.3 GB"),
        ("Progress 1500 of 0", "Progress 1500 of 0"),  # how much it is, is not known
        ("Collecting torch", "Collecting torch"),
    ],
)
def test_a_download_shows_bytes_and_each_second_a_clock(line: str, shown: str) -> None:
    said, moments = list[str](), list[str]()
    times = iter([1000.0, 1001.0, 1002.0, 1075.0, 1100.0, 1101.0])
    output = deploying._EnvironmentOutput(said.append, moments.append, lambda: next(times))
    for text in ("begin PyTorch", "beat", f"now {line}", "beat", "done 80 PyTorch", "begin DeepSpeed", "beat"):
        output(text)
    assert moments == ["PyTorch (1s)", f"PyTorch (2s): {shown}", f"PyTorch (1m15s): {shown}", "", "DeepSpeed (1s)"]
    assert said == ["environment: PyTorch ...", "environment: PyTorch: done (1m20s)", "environment: DeepSpeed ..."]


def test_old_code_and_environments_go_but_not_while_a_job_is_there(scene: Scene) -> None:
    """A running job keeps its code; the one before the last stays for a start under way."""
    key = scene.environment_is_there()
    write(scene.root / f"env/{'a' * 16}/complete", "")
    write(scene.root / f"env/{'a' * 16}.log", "")
    write(scene.root / "env/somebody's own", "")
    codes = []
    write(scene.root / "slot/run", "ppo\n")
    for number in range(3):
        write(scene.checkout / "jobs/spec.py", f"x = {number}\n")
        codes.append(scene.deploy().plan.code)
    assert scene.whole_code() == sorted(codes)
    assert (scene.root / f"env/{'a' * 16}").exists()
    shutil.rmtree(scene.root / "slot")
    write(scene.checkout / "jobs/spec.py", "x = 3\n")
    last = scene.deploy()
    assert scene.whole_code() == sorted([codes[-1], last.plan.code])
    assert sorted(path.name for path in (scene.root / "env").iterdir()) == sorted([key, "somebody's own"])
    assert "2 old code removed, 1 old environment removed" in last.parts[-1].said
    write(scene.checkout / "jobs/spec.py", "x = 2\n")  # back to what is still there: nothing is sent
    assert [part.name for part in scene.deploy().parts] == ["look", "lock", "settle"]
    assert scene.deployed()["code"] == codes[-1]


def test_hostile_names_and_a_hostile_place(tmp_path: Path, sshd: Any, index: Path) -> None:
    scene = Scene(tmp_path, sshd, index, data_folder='it\'s $(a) "disk"; `id`')
    scene.environment_is_there()
    for name in HOSTILE:
        write(scene.checkout / name, name)
        write(scene.checkout / "rlhf_train" / name / "file", name)
    scene.deploy()
    there = scene.root / "code" / scene.deployed()["code"]
    assert [
        name
        for name in HOSTILE
        if (there / name).read_text() != name or not (there / "rlhf_train" / name / "file").exists()
    ] == []
    assert scene.deploy().changed is False


@pytest.mark.parametrize("with_git", [True, False])
def test_deleted_files_are_gone_there_and_a_checkout_needs_no_git(scene: Scene, with_git: bool) -> None:
    scene.environment_is_there()
    if not with_git:
        shutil.rmtree(scene.checkout / ".git")
    scene.deploy()
    (scene.checkout / "tool.sh").unlink()
    (scene.checkout / "jobs/spec.py").rename(scene.checkout / "jobs/renamed.py")
    (scene.checkout / "link").symlink_to("jobs/renamed.py")
    (scene.checkout / "rlhf_train/main.py").chmod(0o755)
    there = Path(scene.root / "code" / scene.deploy().plan.code)
    assert not (there / "tool.sh").exists() and not (there / "jobs/spec.py").exists()
    assert (there / "jobs/renamed.py").read_text() == "x = 1\n"
    assert (there / "link").readlink() == Path("jobs/renamed.py")
    assert (there / "rlhf_train/main.py").stat().st_mode & 0o777 == 0o755


def test_tar_serves_where_no_rsync_is(scene: Scene) -> None:
    scene.environment_is_there()
    done = scene.deploy(rsync="/no/such/rsync")
    assert "by tar (no rsync here, or an old one), verified there" in done.parts[-1].said
    assert scene.deploy().changed is False


def test_a_checkout_that_changes_while_it_is_sent_is_sent_as_it_is_then(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.environment_is_there()
    real = deploying.sync.send

    def edited_first(*words: Any, **options: Any) -> Any:
        monkeypatch.setattr(deploying.sync, "send", real)
        write(scene.checkout / "jobs/spec.py", "x = 'edited'\n")
        return real(*words, **options)

    monkeypatch.setattr(deploying.sync, "send", edited_first)
    done = scene.deploy()
    assert "the checkout changed while it was sent: its present state is sent" in done.notes
    assert (scene.root / f"code/{done.plan.code}/jobs/spec.py").read_text() == "x = 'edited'\n"
    assert done.plan.code == checkout_tree(scene.checkout).key == scene.deployed()["code"]
    assert scene.whole_code() == [done.plan.code]


def test_a_dry_run_changes_nothing_and_shows_what_would_be_run(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    done = scene.deploy(connection=scene.sshd.connection(scene.state, box=scene.box, dry_run=True))
    assert done.changed and not scene.root.exists()
    shown = capsys.readouterr().err
    tree = checkout_tree(scene.checkout)
    said = [
        "lock: would be taken",
        f"sync: would send {tree}",
        f"environment: would make a virtual environment, {done.plan.environment}",
    ]
    assert [text for text in scene.said[1:] if not text.startswith("note: ")] == [
        *said,
        "settle: would record what is deployed",
    ]
    assert scene.deploy(connection=scene.sshd.connection(scene.state, box=scene.box, dry_run=True), rsync="").parts[
        2
    ].said == (f"would send {tree} by tar (no rsync here, or an old one)")
    for command in ("sh -s -- look", "sh -s -- lock", "rsync --recursive", "environment.sh", "sh -s -- settle"):
        assert command in shown, command


# --- faults


DEPLOYER = """
import sys
from pathlib import Path
from env.settings import Limits, Provider
from remote.ssh.connection import BoxConnection
from remote.deploy.deployment import deploy
from remote.inventory import Box
state, checkout, config, fields = sys.argv[1:]
box = Box.model_validate_json(fields)
limits = Limits.load()
limits = limits.model_copy(update={"environment": limits.environment.model_copy(update={"bytes_cpu": 1})})
with BoxConnection(box, Path(state), ssh_config=Path(config)) as line:
    deploy(line, Path(checkout), box, limits=limits, providers=Provider.load_all(), state=Path(state),
           say=lambda text: print(text, flush=True))
"""


def deployer(scene: Scene) -> subprocess.Popen[str]:
    """A deploy as a process of its own, which can be killed."""
    argv = [
        sys.executable,
        "-c",
        DEPLOYER,
        str(scene.state),
        str(scene.checkout),
        str(scene.sshd.folder / "config"),
        scene.box.model_dump_json(),
    ]
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        argv,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_killed_in_the_middle_of_sync_and_called_again(scene: Scene) -> None:
    """KILL runs no handler: the lock stays, and the next call sees that its process is gone."""
    scene.environment_is_there()
    scene.deploy()
    before = scene.deployed()
    for number in range(40):
        (scene.checkout / f"large{number}").write_bytes(os.urandom(1_000_000))
    process = deployer(scene)
    wait_for(lambda: list((scene.root / "code").glob("*.partial/large*")))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert scene.deployed() == before and (scene.root / "lock").exists()
    assert not [name for name in scene.whole_code() if name not in (before["code"],) and "." not in name]
    done = scene.deploy()
    assert any("its deploy was killed" in note for note in done.notes)
    assert scene.deployed()["code"] == done.plan.code != before["code"]
    assert sorted(scene.whole_code()) == sorted([before["code"], done.plan.code])


def test_killed_while_the_environment_is_made_and_called_again(scene: Scene) -> None:
    slow = (
        f"touch '{scene.disk}/begun'; [ -e '{scene.disk}/quick' ] || sleep 63; mkdir -p \"$3/bin\"; cp \"$0\" "
        f'"$3/bin/python"'
    )
    write(scene.disk / "python", f'#!/bin/sh\ncase "$2" in venv) {slow} ;; *) echo all as locked ;; esac\n', 0o755)
    scene.knows(probed(scene.disk, python=f"{scene.disk}/python"))
    process = deployer(scene)
    wait_for((scene.disk / "begun").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert not (scene.root / "deployed").exists()
    write(scene.disk / "quick", "")
    done = scene.deploy()
    assert [part.name for part in done.parts] == ["look", "lock", "environment", "settle"]  # the code was whole
    assert (scene.root / f"env/{done.plan.environment}/complete").exists() and scene.deployed()[
        "code"
    ] == done.plan.code
    assert subprocess.run(["pgrep", "-f", "sleep 63"], capture_output=True, check=False).stdout == b""


def test_two_deployers_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is refused and says by whom; what is deployed is whole."""
    scene.environment_is_there()
    for number in range(20):
        (scene.checkout / f"large{number}").write_bytes(os.urandom(1_000_000))
    process = deployer(scene)
    wait_for((scene.root / "lock/owner").exists)
    old_driver = probed(
        scene.disk, GPU.replace("535", "400"), python=sys.executable
    )  # to be noted, if there were no error instead
    answer = CachedProbe(arguments(scene.box, PROVIDERS), old_driver, 0.0, 0.0)
    monkeypatch.setattr(deploying, "probe", lambda *words: answer)
    with pytest.raises(ToolkitError) as busy:
        scene.deploy(fresh=True)
    assert busy.value.exit_code == ExitCode.BUSY and "(fab deploy)" in busy.value.why
    assert [text for text in scene.said if text.startswith("note: ")] == []
    assert process.wait(60) == 0
    process.communicate()
    assert scene.deploy().changed is False


def test_the_line_is_cut_in_sync(own_scene: Scene) -> None:
    scene = own_scene
    scene.environment_is_there()
    scene.deploy()
    before = scene.deployed()
    for number in range(30):
        (scene.checkout / f"large{number}").write_bytes(os.urandom(1_000_000))

    def cut() -> None:
        wait_for(lambda: list((scene.root / "code").glob("*.partial/large*")))
        scene.sshd.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(ToolkitError) as broke:
        scene.deploy()
    cutter.join()
    assert broke.value.exit_code == ExitCode.UNREACHABLE and "broke while" in broke.value.what
    assert scene.deployed() == before
    done = scene.deploy()
    assert done.changed and scene.deployed()["code"] == done.plan.code


def test_one_who_lost_the_lock_changes_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for so long that another took over: found out before anything is renamed."""
    scene.environment_is_there()
    real = deploying.sync.send

    def while_another_takes_over(*words: Any, **options: Any) -> Any:
        sent = real(*words, **options)
        write(scene.root / "lock/owner", "who lin@desk\nwhy run ppo\ntoken another\nexpires 99999999999\n")
        return sent

    monkeypatch.setattr(deploying.sync, "send", while_another_takes_over)
    with pytest.raises(ToolkitError, match="this deploy lost the lock") as lost:
        scene.deploy()
    assert lost.value.exit_code == ExitCode.BUSY and "lin@desk" in lost.value.why
    assert not (scene.root / "deployed").exists()
    assert [name for name in scene.whole_code() if "." not in name] == []
    with scene.sshd.connection(scene.state) as connection:
        owner = holder(connection, str(scene.root))
    assert owner is not None and owner.token == "another"


def test_an_environment_that_fails_leaves_what_was_there(scene: Scene) -> None:
    scene.environment_is_there()
    scene.deploy()
    before = scene.deployed()
    write(scene.checkout / "env/pins/cu118.txt", "alpha==3.0 --hash=sha256:00\n")
    scene.knows(probed(scene.disk, python="/no/such/python"))
    with pytest.raises(ToolkitError) as failed:
        scene.deploy()
    assert (
        failed.value.exit_code == ExitCode.UNFIT
        and "cannot make the environment: a virtual environment" in failed.value.what
    )
    assert "/no/such/python" in failed.value.why
    assert scene.deployed() == before and not (scene.root / "lock").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a disk of its own")
def test_a_disk_that_fills_up(scene: Scene) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", scene.disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        scene.environment_is_there()
        scene.deploy(limits=ROOMY.model_copy(update={"disk": LIMITS.disk.model_copy(update={"bytes_min": 1})}))
        before = scene.deployed()
        (scene.checkout / "large").write_bytes(os.urandom(6_000_000))
        with pytest.raises(ToolkitError, match="is full") as full:
            scene.deploy(limits=ROOMY.model_copy(update={"disk": LIMITS.disk.model_copy(update={"bytes_min": 1})}))
        assert full.value.exit_code == ExitCode.UNFIT
        assert scene.deployed() == before and not (scene.root / "lock").exists()
        with pytest.raises(ToolkitError, match="cannot deploy to") as unfit:
            scene.deploy()
        assert "are free at" in unfit.value.why and "500 MB are needed" in unfit.value.why
    finally:
        unmount(scene.disk)


def test_another_boot_is_asked_anew(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.environment_is_there()
    scene.knows(probed(scene.disk, GPU, python=sys.executable), identity="another boot")
    asked = []

    def ask(*words: Any) -> CachedProbe:
        asked.append(1)
        return CachedProbe(arguments(scene.box, PROVIDERS), probed(scene.disk, python=sys.executable), 0.0, 0.0)

    monkeypatch.setattr(deploying, "probe", ask)
    assert scene.deploy().plan.device == "cpu"  # the card that is remembered is gone
    assert asked == [1]
    assert scene.deploy().changed is False and asked == [1]
    elsewhere = scene.box.model_copy(
        update={"data_folder": "/another/disk"}
    )  # boxes.yaml changed, and this answer says nothing of it
    with pytest.raises(ToolkitError, match="cannot deploy to"):
        scene.deploy(box=elsewhere)
    assert asked == [1, 1]


# --- pure


def known(text: str) -> CachedProbe:
    return CachedProbe((), text, 0.0, 0.0)


@pytest.fixture
def planned(tmp_path: Path, index: Path, sshd: Any) -> Any:
    checkout = make_checkout(tmp_path / "c", index, with_git=False)

    def plan(
        *more: str,
        box: dict[str, Any] | None = None,
        provider: str = "generic",
        job: Job | None = None,
        flavour: str = "",
        **options: Any,
    ) -> Any:
        made = sshd.box(**{"data_folder": "/data", **(box or {})})
        found = known(probed(Path("/data"), *more, **options))
        return plan_for(found, made, LIMITS, PROVIDERS[provider], checkout, "c" * 16, job=job, flavour=flavour)

    return plan


def test_cards_decide_which_pytorch(planned: Any) -> None:
    cpu, cuda, hangs = planned(), planned(GPU), planned("card_file\tnvidia0")
    assert (cpu.torch, cpu.device) == ("torch-cu118-cpu", "cpu")
    assert (cuda.torch, cuda.device) == (hangs.torch, hangs.device) == ("torch-cu118", "cuda")
    assert planned(GPU, box={"build": {"TORCH": "torch-cu118-cpu"}}).torch == "torch-cu118-cpu"
    assert cpu.environment != cuda.environment


def test_cards_decide_which_flavour(planned: Any) -> None:
    newer_driver = GPU.replace("535.129.03", "580.95.05")
    blackwell = (newer_driver.replace("RTX 4090", "RTX 5090"), "capability\t0|GPU-0|12.0")
    old, new = planned(GPU), planned(*blackwell)
    wished = planned(newer_driver, box={"build": {"FLAVOUR": "cu130"}})
    assert old.flavour == "cu118" and not any("flavour" in note for note in old.notes)
    assert (new.flavour, new.torch) == (wished.flavour, wished.torch) == ("cu130", "torch-cu130")
    assert [note for note in new.notes if note.startswith("flavour cu130: cu118 does not run here, since")]
    assert planned(flavour="cu130").torch == "torch-cu130-cpu"
    assert planned(newer_driver, box={"build": {"FLAVOUR": "cu130"}}, flavour="cu118").environment == old.environment
    assert len({old.environment, new.environment}) == 2
    assert "flavour cu130" in new.lines() and new.settings("t")["flavour"] == "cu130"
    with pytest.raises(ToolkitError, match="flavour cu118 does not run here") as refused:
        planned(*blackwell, flavour="cu118")
    assert (refused.value.exit_code, refused.value.hint) == (ExitCode.UNFIT, "--flavour cu130 does")
    named = load_job("opt-1.3b", ["flavours=[cu130]"])
    assert planned(newer_driver, job=named).flavour == planned(job=named).flavour == "cu130"
    with pytest.raises(ToolkitError, match="no flavour runs here"):  # the driver of this box is too old for it
        planned(GPU, job=named)


def test_a_job_that_needs_a_gpu_gets_cuda_before_the_box_has_one(planned: Any) -> None:
    """A mode without a card: what is made there must be what trains there with a card."""
    without, later = planned(job=load_job("opt-1.3b")), planned(GPU, job=load_job("opt-1.3b"))
    assert (without.torch, without.device) == ("torch-cu118", "cuda")
    assert without.environment == later.environment and any("has no GPU now" in note for note in without.notes)
    assert planned(job=load_job("demo", ["hardware.device=cuda"])).torch == "torch-cu118"
    for job in (load_job("demo"), load_job("opt-1.3b", ["hardware.device=cpu"])):
        assert (planned(job=job).torch, planned(job=job).device) == ("torch-cu118-cpu", "cpu")
    own = planned(job=load_job("opt-1.3b"), box={"build": {"TORCH": "torch-cu118-cpu"}})
    assert (own.torch, own.device) == ("torch-cu118-cpu", "cpu")


def test_what_is_measured_decides_the_way(planned: Any) -> None:
    quick, slow = "hub\tdirect|200|0.1|0.4|600|", "hub\tdirect|200|2|9.0|600|"
    mirror, proxy = "hub\tmirror|200|0.1|0.2|600|", "hub\tproxy|200|0.1|0.3|600|"
    ways = {
        (quick, mirror): ("direct", "default"),
        (slow, mirror, proxy): ("mirror", "cn"),
        (slow, proxy): ("proxy", "default"),
        (): ("direct", "default"),
    }
    for routes, expected in ways.items():
        plan = planned(*routes)
        assert (plan.route, plan.mirror) == expected
    assert planned().notes == ("the box cannot reach the model hub: send models and data as local folders",)
    assert (planned(quick, mirror, box={"mirror": "cn"}).route, planned(quick, provider="autodl").mirror) == (
        "mirror",
        "cn",
    )
    plan = planned(slow, proxy, provider="autodl")
    assert plan.settings("t")["proxy"] == "/etc/network_turbo" and "proxy_file /etc/network_turbo" in plan.lines()


def test_cards_that_copy_wrong_do_not_copy_to_each_other(planned: Any) -> None:
    wrong = planned(GPU, GPU.replace("0|GPU-0", "1|GPU-1"), "peer\t0|1|1|wrong", "peer\t1|0|1|right")
    assert "p2p 1" in wrong.lines() and any("NCCL_P2P_DISABLE=1" in note for note in wrong.notes)
    assert "p2p 0" in planned(GPU.replace("RTX 4090", "A100")).lines()


def test_which_python(planned: Any) -> None:
    found = "python\t3.10.4|1|/root/miniconda3/bin/python"
    assert (planned(found, python="/usr/bin/python3.10").python, planned(found).python) == (
        "/usr/bin/python3.10",
        "/root/miniconda3/bin/python",
    )
    assert (planned("python\t3.12.1|1|/usr/bin/python3", conda="/opt/conda/bin/conda").maker) == "/opt/conda/bin/conda"
    assert planned("python\t3.10.4|0|/usr/bin/python3.10").settings("t").keys() & {"python", "maker"} == set()


def test_docker_where_it_is(planned: Any) -> None:
    docker = (
        "docker\tDocker version 27.3.1",
        "docker_daemon\t27.3.1|runc|runc nvidia|/var/lib/docker",
        "docker_compose\t2.29.7",
    )
    plan = planned(*docker, box={"build": {"BASE_IMAGE": "ubuntu:22.04", "CA_BUNDLE": "/x.pem"}})
    assert (plan.runtime, plan.image, plan.python_there) == ("docker", f"rlhf-box:{plan.environment}", "")
    assert plan.build == (("BASE_IMAGE", "ubuntu:22.04"), ("CUDA_ARCHS", ""))
    assert planned(*docker, GPU).build == () and planned(*docker, GPU).runtime == "docker"
    assert planned(*docker, box={"runtime": "bare"}).runtime == "bare"
    with pytest.raises(ToolkitError, match="cannot run Docker: no Docker") as unfit:
        planned(box={"runtime": "docker"})
    assert unfit.value.exit_code == ExitCode.UNFIT


def test_an_environment_is_named_by_what_it_is_made_of(tmp_path: Path, index: Path) -> None:
    checkout = make_checkout(tmp_path / "c", index, with_git=False)

    def key(runtime: str = "bare", mirror: str = "default", **build: str) -> str:
        return environment_key(checkout, runtime, "cu118", "torch-cu118-cpu", mirror, build, "cpu")

    bare, image = key(), key("docker")
    assert bare == key(mirror="here") and image != key(
        "docker", "here"
    )  # the image keeps the mirror's settings, an environment nothing of it
    assert bare == key(BASE_IMAGE="x") and image != key("docker", BASE_IMAGE="x")
    write(checkout / "jobs/spec.py", "another")
    assert (key(), key("docker")) == (bare, image)
    lock = checkout / "env/pins/cu118.txt"
    lock.write_text(lock.read_text() + "\n")
    assert key() != bare and key("docker") != image


@pytest.mark.parametrize(
    ("more", "options", "there", "why"),
    [
        ((), {"machine": "aarch64"}, {}, "its processor is aarch64"),
        ((), {}, {"root": "strange"}, "/data/rlhf-box exists, and is not ours"),
        ((), {}, {"tools": frozenset()}, "neither rsync nor tar"),
        ((), {"free_kb": 100}, {}, "102 kB are free at /data/rlhf-box, and 3 GB are needed"),
        ((), {}, {"root": "ours", "free_kb": 100}, "102 kB are free"),
        ((GPU,), {"free_kb": 5_000_000}, {}, "5.12 GB are free at /data/rlhf-box, and 10 GB are needed"),
        (
            ("python\t3.12.1|1|/usr/bin/python3",), {"python": ""}, {},
            "no Python 3.10 with venv, and no conda or uv to make it with",
        ),
    ],
)  # fmt: skip
def test_what_deploy_itself_needs(
    planned: Any, sshd: Any, more: tuple[str, ...], options: dict[str, Any], there: dict[str, Any], why: str
) -> None:
    options = {"python": "/usr/bin/python3.10", **options}
    plan, facts = planned(*more, **options), known(probed(Path("/data"), *more, **options))
    found = replace(BoxContents(root="none", tools=frozenset({"rsync", "tar"})), **there)
    with pytest.raises(ToolkitError) as unfit:
        check_fit(facts, plan, found, sshd.box(data_folder="/data"), LIMITS, PROVIDERS["generic"])
    assert unfit.value.exit_code == ExitCode.UNFIT and why in unfit.value.why and unfit.value.hint


def test_what_only_a_job_needs_does_not_stop_a_deploy(planned: Any, sshd: Any) -> None:
    """A card that is too new, a hub that is shut: said, not refused."""
    blackwell = GPU.replace("RTX 4090", "RTX 5090")
    facts = known(probed(Path("/data"), blackwell, "capability\t0|GPU-0|12.0", python="/p"))
    check_fit(
        facts,
        planned(blackwell, python="/p"),
        BoxContents(root="none", tools=frozenset({"tar"})),
        sshd.box(data_folder="/data"),
        LIMITS,
        PROVIDERS["generic"],
    )


def test_what_is_remembered_comes_back_or_not_at_all(tmp_path: Path) -> None:
    kept = CachedProbe(("a", "b"), probed(tmp_path), 1.0, 2.0, "boot", "/root")
    for name in ("gpu-box", "user@[::1]:22/../x", "a b"):
        remember(tmp_path, name, kept)
        assert recall(tmp_path, name) == kept
    assert recall(tmp_path, "gpu-box").facts.machine == "x86_64"  # type: ignore[union-attr]
    assert recall(tmp_path, "another") is None
    for broken in ("", "{", "[]", '{"schema": 1}', '{"schema": 9}'):
        write(tmp_path / "boxes/gpu-box.json", broken)
        assert recall(tmp_path, "gpu-box") is None


def test_mirrors_as_the_laptop_reads_them(sshd: Any) -> None:
    assert mirror_values("default")["HF_ENDPOINT"] == "https://huggingface.co"
    assert mirror_values("cn")["HF_ENDPOINT"] == "https://hf-mirror.com"
    assert (hub_mirror(sshd.box()), hub_mirror(sshd.box(mirror="default"))) == ("cn", "cn")
    with pytest.raises(ToolkitError, match="no mirror `nowhere`"):
        mirror_values("nowhere")


def test_an_answer_that_broke_off_is_no_answer() -> None:
    assert parse_look("root ours\ncode here\nend\n").code
    with pytest.raises(ToolkitError) as broke:
        parse_look("root ours\ncode here\n")
    assert broke.value.exit_code == ExitCode.UNREACHABLE
    assert parse_look("root what\nend\n") == BoxContents() and BoxFacts()
