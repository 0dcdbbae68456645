"""Nothing of ours is left, and nothing of anybody else's is touched.

Docker is a script: what it is asked to do is what is tested.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jobs.errors import ExitCode, ToolkitError
from remote import output
from remote.results.purge import Purged, _Freed, parse, purge
from remote.results.run_contents import read_results
from remote.scripts import script
from tests.disks import unmount
from tests.remote.box_folder import HOSTILE, BoxFolder
from tests.remote.results.test_run_contents import SHELLS, ask

if TYPE_CHECKING:
    from tests.remote.conftest import Sshd

NO_DOCKER = "#!/bin/sh\nexit 1\n"
# Containers, images and so on are files in folders.
DOCKER = """#!/bin/sh
cd @STATE@ || exit 1
echo "$*" >>log
case "$1 $2" in
    version*) exit 0 ;;
    'ps --all') for each in containers/*; do [ ! -e "$each" ] || echo "${each#*/}|$(cat "$each")"; done ;;
    'ps --filter') for each in running/*; do [ ! -e "$each" ] || echo "${each#*/}"; done ;;
    'image ls') for each in images/*; do [ ! -e "$each" ] || echo "rlhf-box:${each#*/}"; done ;;
    'volume ls') ls volumes ;;
    'network ls') ls networks ;;
    'rm -f') [ ! -e slow ] || sleep 1.3; rm "containers/$3" ;;
    'rmi '*) [ ! -e stuck ] && rm "images/${2#rlhf-box:}" ;;
    'volume rm') rm "volumes/$3" ;;
    'network rm') rm "networks/$3" ;;
esac
"""


@pytest.fixture
def box(tmp_path: Path) -> BoxFolder:
    return BoxFolder(tmp_path / "box" / "rlhf-box")


def make_docker(state: Path) -> Path:
    for name in ("containers", "running", "images", "volumes", "networks", "bin"):
        (state / name).mkdir(parents=True)
    file = state / "bin" / "docker"
    file.write_text(DOCKER.replace("@STATE@", f"'{state}'"))
    file.chmod(0o755)
    return state


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """Return the state of a stand-in for Docker, whose folder of commands is in it."""
    return make_docker(tmp_path / "docker")


@pytest.fixture
def far(make_sshd: Callable[..., Sshd], docker: Path, tmp_path: Path) -> Sshd:
    """A box with that Docker, and a home of its own."""
    return make_sshd(f'SetEnv "PATH={docker}/bin:/usr/bin:/bin" "HOME={tmp_path}/home"')


def refused(far: Sshd, folder: Path, root: object, **options: bool) -> ToolkitError:
    with far.connection(folder / "state") as connection, pytest.raises(ToolkitError) as caught:
        purge(connection, str(root), {}, **options)
    return caught.value


def purged(far: Sshd, folder: Path, root: object) -> Purged:
    with far.connection(folder / "state") as connection:
        return purge(connection, str(root), {}, yes=True)


def test_all_of_it_goes_and_that_is_proven(far: Sshd, docker: Path, box: BoxFolder, tmp_path: Path) -> None:
    box.step(box.run(), 1)
    locked = box.root / "env" / "locked"
    locked.mkdir()
    (locked / "file").touch()
    locked.chmod(0o500)
    (box.root / "env" / "link").symlink_to(tmp_path)
    (tmp_path / "box" / "mine").write_text("mine")
    for folder, name, text in (
        ("containers", "rlhf-box-1", "rlhf-box:x|Exited (0) 3 hours ago"), ("containers", "odd", "rlhf-box:x|Created"),
        ("containers", "mine", "rlhf-boxes:x|Exited (0) 3 hours ago"), ("images", "x", ""), ("volumes", "v", ""),
        ("networks", "n", ""),
    ):  # fmt: skip
        (docker / folder / name).write_text(text)
    error = refused(far, tmp_path, box.root)
    assert (
        error.exit_code == ExitCode.UNFIT
        and "the models of step 1" in error.why
        and "fab fetch" in error.hint
        and box.root.exists()
    )
    found = purged(far, tmp_path, box.root)
    assert found.is_clean and [proof.name for proof in found.proofs] == ["folder", "processes", "docker"]
    assert found.removed == (
        "container odd",
        "container rlhf-box-1",
        str(box.root),
        "image rlhf-box:x",
        "volume v",
        "network n",
    )
    assert not box.root.exists() and (tmp_path / "box" / "mine").read_text() == "mine"
    assert [
        path.name for path in docker.rglob("*") if path.parent.name in ("containers", "images", "volumes", "networks")
    ] == ["mine"]
    assert [note for note in found.notes if "authorized_keys" in note] == [] and "docker builder prune" in "".join(
        found.notes
    )
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "home" / ".ssh" / "authorized_keys").write_text("ssh-ed25519 AAAA me\n")
    assert "your key stays" in "".join(purged(far, tmp_path, box.root).notes)
    assert purged(far, tmp_path, box.root).is_clean  # once more does no harm


def test_it_shows_a_clock_and_how_much_room_there_is(
    far: Sshd, docker: Path, box: BoxFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "EACH_S", 0.1)
    (docker / "slow").touch()
    (docker / "containers" / "rlhf-box-1").write_text("rlhf-box:x|Exited (0) 3 hours ago")
    shown = list[str]()
    with far.connection(tmp_path / "state") as connection:
        assert purge(connection, str(box.root), {}, now=shown.append).is_clean
    removing = rf"removing {re.escape(str(box.root))} from gpu-box \(\ds\): .* freed"
    assert any(re.fullmatch(removing, text) for text in shown) and shown[-1] == ""


def test_the_room_is_what_the_box_said_last() -> None:
    freed = _Freed()
    texts = [str(freed)]
    for part in (b"greeting\nfreed 20", b"00\nremoved container x\nfreed 50000", b"00\n"):
        freed(part)
        texts.append(str(freed))
    assert texts == ["", "", "2.05 MB freed", "5.12 GB freed"]  # 2000 and 5,000,000 times 1024 bytes


def test_what_is_left_is_said(far: Sshd, docker: Path, box: BoxFolder, tmp_path: Path) -> None:
    (docker / "images" / "x").touch()
    (docker / "stuck").touch()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"--cache={box.root}/cache"])
    try:
        error = refused(far, tmp_path, box.root, yes=True)
    finally:
        process.kill()
        process.wait()
    assert (
        error.exit_code == ExitCode.UNFIT
        and "rlhf-box:x" in error.why
        and f"{process.pid} " in error.why
        and not box.root.exists()
    )
    (docker / "stuck").unlink()
    assert purged(far, tmp_path, box.root).is_clean


def test_a_job_of_another_folder_goes_on(far: Sshd, docker: Path, box: BoxFolder, tmp_path: Path) -> None:
    """On a host that several use: it is left alone, and that something is left is said."""
    for name in ("rlhf-box-request-1", "rlhf-box-request-2"):
        (docker / "containers" / name).write_text("rlhf-box:x|Up 3 hours")
    (box.root / "requests" / "request-1").mkdir()
    error = refused(far, tmp_path, box.root, yes=True)
    assert error.exit_code == ExitCode.UNFIT and error.why == "rlhf-box-request-2"
    assert [path.name for path in (docker / "containers").iterdir()] == ["rlhf-box-request-2"]


def test_not_while_a_job_runs_or_a_deploy(far: Sshd, docker: Path, box: BoxFolder, tmp_path: Path) -> None:
    box.run()
    box.job("tiny", "request-1", os.getpid())
    assert refused(far, tmp_path, box.root, yes=True).exit_code == ExitCode.BUSY
    assert b"refused busy tiny request-1" in ask("purge", str(box.root))  # the box itself refuses, too
    shutil.rmtree(box.root / "slot")
    (docker / "running" / "rlhf-box-request-1").touch()
    assert refused(far, tmp_path, box.root, yes=True).exit_code == ExitCode.BUSY
    (docker / "running" / "rlhf-box-request-1").rename(docker / "running" / "rlhf-box-request-2")  # of another folder
    (box.root / "lock").mkdir()
    (box.root / "lock" / "owner").write_text(f"who lin@laptop\nexpires {int(time.time()) + 60}\n")
    error = refused(far, tmp_path, box.root, yes=True)
    assert error.exit_code == ExitCode.BUSY and "lin@laptop" in error.why and box.root.exists()
    (box.root / "lock" / "owner").write_text(f"who lin@laptop\nexpires {int(time.time()) - 60}\n")
    assert purged(far, tmp_path, box.root).is_clean


@pytest.fixture
def no_docker(tmp_path: Path) -> dict[str, str]:
    """This machine's own is left alone."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text(NO_DOCKER)
    (tmp_path / "bin" / "docker").chmod(0o755)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0])
def test_a_folder_that_is_not_ours_stays(
    shell: list[str], box: BoxFolder, tmp_path: Path, no_docker: dict[str, str]
) -> None:
    (tmp_path / "link").symlink_to(box.root)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    roots = [tmp_path / "link", tmp_path / "other", f"{box.root}/runs/..", "/", "rlhf-box", f"{box.root}/.", ""]
    for root in roots:
        assert ask("purge", str(root), shell=shell, env=no_docker).startswith(b"refused not_ours "), root
    assert (tmp_path / "other" / "file").exists() and (box.root / "runs").exists()
    said = ask("purge", f"{box.root}/", shell=shell, env=no_docker).decode()
    assert parse(said, "box", str(box.root)).is_clean and not box.root.exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_go_through(name: str, tmp_path: Path, no_docker: dict[str, str]) -> None:
    box = BoxFolder(tmp_path / name / "rlhf-box")
    (box.root / "runs" / name).mkdir()
    (tmp_path / name / "mine").touch()
    process = subprocess.Popen(["sh", "-c", "sleep 60; :", f"{box.root}/x"])
    try:
        said = parse(ask("purge", str(box.root), env=no_docker).decode(), "box", "")
        assert [proof.name for proof in said.proofs if not proof.ok] == ["processes"]
    finally:
        process.kill()
        process.wait()
    assert not box.root.exists() and (tmp_path / name / "mine").exists() and not list(tmp_path.rglob("pwned"))


def test_another_file_system_is_never_entered(box: BoxFolder, tmp_path: Path, no_docker: dict[str, str]) -> None:
    disk = box.root / "runs" / "a disk"
    disk.mkdir()
    said = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, text=True, check=False)
    if said.returncode:
        pytest.skip(f"needs to mount a tmpfs: {said.stderr.strip()}")
    try:
        (disk / "file").touch()
        assert ask("purge", str(box.root), env=no_docker) == f"refused mounted {disk}\n".encode()
        assert (disk / "file").exists() and (box.root / "env").exists()
    finally:
        unmount(disk)
    assert parse(ask("purge", str(box.root), env=no_docker).decode(), "box", "").is_clean


def test_files_of_another_user() -> None:
    """A container of our image may remove them; while they are there, the folder keeps its mark."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    folder = Path(tempfile.mkdtemp(prefix="rlhf-box-test-"))
    try:
        folder.chmod(0o755)
        docker = make_docker(folder / "docker")
        box = BoxFolder(folder / "rlhf-box")
        (docker / "images" / "x").touch()
        (docker / "stuck").touch()
        (docker / "log").touch()
        (docker / "log").chmod(0o666)
        for each in (box.root, *box.root.rglob("*")):
            os.chown(each, 65534, 65534)
        theirs = box.root / "runs" / "tiny" / "step1"
        theirs.mkdir(parents=True)
        (theirs / "file").touch()
        words = ["sh", "-s", "--", "purge", str(box.root)]
        env = {"PATH": f"{docker}/bin:/usr/bin:/bin"}
        answer = subprocess.run(
            words,
            input=script("results.sh"),
            capture_output=True,
            user=65534,
            group=65534,
            extra_groups=[],
            env=env,
            check=True,
        )
        proofs = {proof.name: proof for proof in parse(answer.stdout.decode(), "box", "").proofs}
        assert not proofs["folder"].ok and str(box.root) in proofs["folder"].text and (box.root / ".rlhf-box").exists()
        assert not (box.root / "code").exists() and (theirs / "file").exists()
        mount = f"--entrypoint find --mount type=bind,source={box.root},target=/purge rlhf-box:x /purge -xdev"
        assert mount in (docker / "log").read_text()
    finally:
        shutil.rmtree(folder)


def test_a_process_whose_folder_only_begins_alike(box: BoxFolder, no_docker: dict[str, str]) -> None:
    process = subprocess.Popen(["sh", "-c", "sleep 60; :", f"{box.root}-2/x"])
    try:
        assert parse(ask("purge", str(box.root), env=no_docker).decode(), "box", "").is_clean
    finally:
        process.kill()
        process.wait()


def test_an_answer_that_is_cut_short_proves_nothing() -> None:
    for text in ("", "proof folder ok gone\n", "end\n"):
        with pytest.raises(ToolkitError) as caught:
            parse(text, "box", "/r")
        assert caught.value.exit_code == ExitCode.UNCERTAIN


def test_a_dry_run_lists_what_would_go_and_removes_nothing(
    far: Sshd, docker: Path, box: BoxFolder, tmp_path: Path
) -> None:
    box.step(box.run(), 1, size=3_000_000)
    for folder, name, text in (
        ("containers", "rlhf-box-1", "rlhf-box:x|Exited (0) 3 hours ago"),
        ("images", "x", ""),
        ("volumes", "v", ""),
    ):
        (docker / folder / name).write_text(text)
    with far.connection(tmp_path / "state", dry_run=True) as connection:
        found = purge(connection, str(box.root), {}, yes=True)
        assert found == Purged(notes=found.notes, would=found.would) and read_results(connection, str(box.root)).marked
        assert found.would[0] == "container rlhf-box-1" and found.would[2:] == ("image rlhf-box:x", "volume v")
        assert (
            found.would[1].startswith(f"{box.root}, 3.")
            and found.would[1].endswith(" MB")
            and "builder prune" in found.notes[-1]
        )
        assert (
            "only --yes removes it: run `tiny`: the models of step 1" in purge(connection, str(box.root), {}).notes[0]
        )
        assert (docker / "images" / "x").exists() and box.root.exists()
        shutil.rmtree(box.root)
        assert str(box.root) not in "".join(purge(connection, str(box.root), {}).would)
        box.root.mkdir()
        with pytest.raises(ToolkitError, match="not a folder of ours"):
            purge(connection, str(box.root), {})
