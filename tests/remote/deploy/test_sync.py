"""Files that are sent are those that git lists, and they arrive as a whole or not at all.

With real git, rsync, tar and sshd, and the shells that boxes have.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ExitCode, ToolkitError
from remote import output
from remote.deploy import sync
from remote.deploy.sync import Tree, UploadDiffers, checkout_tree, land, send, send_whole, tree_of
from remote.scripts import script
from tests.disks import unmount
from tests.remote.small_checkout import HOSTILE, git, make_checkout, make_index, write

SHELLS = [shell for shell in (["dash"], ["bash", "--posix"], ["busybox", "sh"]) if shutil.which(shell[0])] or [["sh"]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("index") / "simple")


@pytest.fixture
def checkout(tmp_path: Path, index: Path) -> Path:
    return make_checkout(tmp_path / "my checkout", index)


@pytest.fixture
def connection(sshd: Any, tmp_path: Path) -> Iterator[Any]:
    with sshd.connection(tmp_path / "state") as connection:
        yield connection


def names(tree: Tree) -> set[str]:
    return {file.name for file in tree.files}


def seen(folder: Path) -> dict[str, object]:
    """What lies in a folder: content and whether it is executable, or where a link leads."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)  # noqa: PTH115
        elif path.is_file():
            found[name] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


# --- what is sent


def test_what_git_ignores_stays_here_and_what_it_would_take_goes(checkout: Path) -> None:
    write(checkout / "new.py", "")
    write(checkout / "runs/demo/model.bin", "large")
    write(checkout / "secrets/HF_TOKEN", "hf_x")
    write(checkout / "logs/keep.log", "")
    write(checkout / "logs/other.log", "")
    (checkout / ".gitignore").write_text((checkout / ".gitignore").read_text() + "*.log\n!keep.log\n")
    found = names(checkout_tree(checkout))
    assert {"new.py", "logs/keep.log", "tool.sh", ".gitignore", "env/pins/cu118.txt"} <= found
    assert not found & {"runs/demo/model.bin", "secrets/HF_TOKEN", "logs/other.log"}
    assert not [name for name in found if name.startswith(".git/")]


def test_our_packages_go_whatever_somebody_ignores(checkout: Path) -> None:
    git(checkout, "rm", "-rq", "--cached", "env")
    write(checkout / ".git/info/exclude", "env\njobs/own.yaml\n__pycache__\n")
    write(checkout / "jobs/own.yaml", "name: own\n")
    write(checkout / "jobs/__pycache__/spec.cpython-310.pyc", "")
    git(checkout, "config", "core.excludesFile", str(write(checkout.parent / "ignore", "/env/\n")))
    (checkout / ".gitignore").write_text("")
    found = names(checkout_tree(checkout))
    assert {"env/pins/cu118.txt", "jobs/own.yaml"} <= found
    assert not [name for name in found if "__pycache__" in name]


def test_what_is_gone_renamed_or_hidden_by_a_link_is_not_sent(checkout: Path) -> None:
    (checkout / "tool.sh").unlink()
    (checkout / "jobs/spec.py").rename(checkout / "jobs/other.py")
    elsewhere = checkout.parent / "elsewhere"
    shutil.move(checkout / "docker", elsewhere)
    (checkout / "docker").symlink_to(elsewhere)
    (checkout / "gone").symlink_to("no/such")
    tree = checkout_tree(checkout)
    assert not names(tree) & {"tool.sh", "jobs/spec.py", "docker/Dockerfile"}
    targets = {file.name: file.target for file in tree.files if file.target is not None}
    assert targets == {"docker": str(elsewhere), "gone": "no/such"}


def test_another_repository_inside_is_left_out_and_said(checkout: Path) -> None:
    write(checkout / "vendor/x/file", "")
    git(checkout / "vendor/x", "init", "-q")
    git(checkout / "vendor/x", "add", "-A")
    git(checkout / "vendor/x", "commit", "-qm", "x")
    tree = checkout_tree(checkout)
    assert tree.left_out == ("vendor/x/",)
    assert not [name for name in names(tree) if name.startswith("vendor")]


def test_without_git_all_but_the_obvious(tmp_path: Path, index: Path) -> None:
    checkout = make_checkout(tmp_path / "plain", index, with_git=False)
    for junk in (
        ".venv/bin/python",
        "jobs/__pycache__/a.pyc",
        "runs/demo/events.jsonl",
        "secrets/HF_TOKEN",
        "data/d.jsonl",
        "cache/x",
        ".env",
        "boxes.yaml",
    ):
        write(checkout / junk, "")
    for kept in ("runs/.gitkeep", "secrets/.gitkeep", "README.md", "tests/runs/x"):
        write(checkout / kept, "")
    with_git = make_checkout(tmp_path / "git", index)
    assert names(checkout_tree(checkout)) == names(checkout_tree(with_git)) | {
        "runs/.gitkeep",
        "secrets/.gitkeep",
        "README.md",
        "tests/runs/x",
    }


def test_a_git_that_refuses_is_not_passed_over(checkout: Path) -> None:
    (checkout / ".git/index").write_bytes(b"no index")
    with pytest.raises(ToolkitError, match="git cannot list"):
        checkout_tree(checkout)


def test_half_a_checkout_is_refused(checkout: Path) -> None:
    shutil.rmtree(checkout / "rlhf_train")
    with pytest.raises(ToolkitError, match="no file in rlhf_train"):
        checkout_tree(checkout)


def test_what_is_too_large_is_refused_with_its_largest_folders(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "ADVISED_BYTES", 2_000_000)
    monkeypatch.setattr(sync, "MOST_BYTES", 5_000_000)
    write(checkout / "models/opt/a", "x" * 2_000_000)
    assert sync.check_size(checkout_tree(checkout)).startswith(
        "the checkout is large"
    ) and "models/opt: 1 file, 2 MB" in sync.check_size(checkout_tree(checkout))
    write(checkout / "models/opt/b", "x" * 3_100_000)
    with pytest.raises(ToolkitError) as refused:
        checkout_tree(checkout)
    assert refused.value.why.splitlines()[1] == "models/opt: 2 files, 5.1 MB"
    assert ".gitignore" in refused.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda base: (base / "a").write_text("y"),
        lambda base: (base / "a").chmod(0o755),
        lambda base: (base / "a").rename(base / "c"),
        lambda base: (base / "a").unlink(),
        lambda base: (base / "b").write_text("xx") and (base / "a").write_text(""),  # the same contents in a row
        lambda base: (base / "link").unlink() or (base / "link").symlink_to("b"),
        lambda base: (base / "link").unlink() or (base / "link").write_text("a\n"),
    ],
)
def test_any_change_changes_the_fingerprint(tmp_path: Path, change: Callable[[Path], object]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, "x")
    (tmp_path / "link").symlink_to("a")
    before = tree_of(tmp_path, ["a", "b", "c", "link"]).fingerprint
    change(tmp_path)
    assert tree_of(tmp_path, ["a", "b", "c", "link"]).fingerprint != before


def test_an_old_rsync_and_macos_are_known(tmp_path: Path) -> None:
    def program(said: str) -> str:
        return str(write(tmp_path / "rsync", f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n", 0o755))

    assert sync.rsync_version(program("rsync  version 2.6.9  protocol version 29")) == (2, 6)
    assert sync.rsync_version(program("openrsync: protocol version 29\nrsync version 2.6.9 compatible")) == (2, 6)
    assert sync.rsync_version(program("rsync  version v3.2.7  protocol version 31")) == (3, 2)
    assert sync.rsync_version("/no/such/program") == (0, 0)


# --- how it arrives


def hostile_tree(folder: Path) -> Tree:
    made = []
    for number, name in enumerate(HOSTILE):
        write(folder / name, f"content {number}", 0o755 if number % 3 == 0 else 0o600)
        write(folder / f"{name} folder" / name, name)
        made += [name, f"{name} folder/{name}"]
    (folder / "link to\nit").symlink_to("-rf")
    (folder / "dangling").symlink_to("/no such/$(x)")
    (folder / os.fsdecode(b"bytes\xff")).write_text("z")
    write(folder / "empty", "")
    write(folder / ("long" * 40) / ("name" * 50), "long")
    return tree_of(
        folder, [*made, "link to\nit", "dangling", os.fsdecode(b"bytes\xff"), "empty", f"{'long' * 40}/{'name' * 50}"]
    )


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0])
def test_the_box_computes_the_same_fingerprint(tmp_path: Path, shell: list[str]) -> None:
    tree = hostile_tree(tmp_path / "there.partial")
    folder = tmp_path / "there"
    said = subprocess.run(
        [*shell, "-s", "--", "land", folder, tree.fingerprint],
        input=script("land.sh"),
        capture_output=True,
        check=False,
    )
    assert (said.returncode, said.stdout.decode().split()) == (0, ["landed"]), said.stderr
    assert len(seen(folder)) == len(tree.files)
    shutil.move(folder, tmp_path / "there.partial")
    write(tmp_path / "there.partial/stray", "")
    said = subprocess.run(
        [*shell, "-s", "--", "land", folder, tree.fingerprint],
        input=script("land.sh"),
        capture_output=True,
        check=False,
    )
    assert (said.returncode, said.stdout.split()[0], folder.exists()) == (4, b"differs", False)


@pytest.mark.parametrize("how", ["rsync", "tar", "no rsync there"])
def test_hostile_names_arrive_as_they_are(tmp_path: Path, connection: Any, how: str) -> None:
    tree = hostile_tree(tmp_path / "it's here")
    folder = tmp_path / "on the $(box)" / "what's there"
    sent = send_whole(
        connection, tree, str(folder), rsync_there=how != "no rsync there", rsync="" if how == "tar" else "rsync"
    )
    assert sent.how == ("rsync" if how == "rsync" else "tar")
    expected = seen(tmp_path / "it's here")
    assert seen(folder) == expected and len(expected) == len(tree.files)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["what's there"]  # nothing half beside it
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert modes == {0o644, 0o755}


def test_equal_files_are_linked_and_the_old_folder_stays_as_it_is(
    checkout: Path, tmp_path: Path, connection: Any
) -> None:
    old = tmp_path / "old"
    send_whole(connection, checkout_tree(checkout), str(old))
    before = seen(old)
    (checkout / "jobs/spec.py").write_text("x = 22\n")
    (checkout / "tool.sh").chmod(0o644)
    (checkout / "rlhf_train/main.py").rename(checkout / "rlhf_train/renamed.py")
    tree = checkout_tree(checkout)
    for each in ("new.partial", "new.temp"):
        (tmp_path / each).mkdir()
    assert send(connection, tree, str(tmp_path / "new"), like=str(old), rsync_there=True).how == "rsync"
    land(connection, tree, str(tmp_path / "new"))
    assert seen(old) == before
    changed = {name for name, what in seen(tmp_path / "new").items() if before.get(name) != what}
    assert changed == {"jobs/spec.py", "tool.sh", "rlhf_train/renamed.py"}
    assert (tmp_path / "new/.gitignore").samefile(old / ".gitignore")
    assert not (tmp_path / "new/tool.sh").samefile(old / "tool.sh")


def test_a_change_that_size_and_time_hide_is_found_and_mended(checkout: Path, tmp_path: Path, connection: Any) -> None:
    """Nothing wrong is ever landed, and a comparison by content mends it.

    The folder from which files were linked stays untouched.
    """
    old, new = tmp_path / "old", tmp_path / "new"
    send_whole(connection, checkout_tree(checkout), str(old))
    spec = checkout / "jobs/spec.py"
    status = spec.stat()
    spec.write_text("x = 2\n")
    os.utime(spec, ns=(status.st_atime_ns, status.st_mtime_ns))
    tree = checkout_tree(checkout)
    for each in ("new.partial", "new.temp"):
        (tmp_path / each).mkdir()
    send(connection, tree, str(new), like=str(old), rsync_there=True)
    with pytest.raises(UploadDiffers):
        land(connection, tree, str(new))
    assert not new.exists()
    send(connection, tree, str(new), like=str(old), rsync_there=True, compare=True)
    land(connection, tree, str(new))
    assert ((new / "jobs/spec.py").read_text(), (old / "jobs/spec.py").read_text()) == ("x = 2\n", "x = 1\n")


def test_a_file_that_shrinks_while_it_is_packed_is_not_sent(tmp_path: Path) -> None:
    write(tmp_path / "a", "xxxx")
    tree = tree_of(tmp_path, ["a"])
    write(tmp_path / "a", "x")
    with pytest.raises(UploadDiffers, match="a changed while it was sent"):
        sync.pack(tree, tmp_path / "packed")


def cut_once_files_travel(folder: Path, sshd: Any) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and not list(folder.glob("[0-9]*")):
        time.sleep(0.005)
    sshd.cut()


def test_a_line_that_breaks_leaves_nothing_whole_and_the_next_call_goes_on(own_sshd: Any, tmp_path: Path) -> None:
    """The server side is killed while files travel; rsync and tar alike."""
    for number in range(16):
        (tmp_path / f"here/{number}").parent.mkdir(exist_ok=True)
        (tmp_path / f"here/{number}").write_bytes(os.urandom(1_000_000))
    tree = tree_of(tmp_path / "here", [str(number) for number in range(16)])
    for rsync in ("rsync", ""):
        folder = tmp_path / f"there{rsync}"
        with own_sshd.connection(tmp_path / "state") as connection:
            threading.Thread(
                target=cut_once_files_travel, args=(Path(f"{folder}.partial"), own_sshd), daemon=True
            ).start()
            with pytest.raises(ToolkitError) as broke:
                send_whole(connection, tree, str(folder), rsync=rsync)
        assert broke.value.exit_code == ExitCode.UNREACHABLE, broke.value
        assert not folder.exists()
        with own_sshd.connection(tmp_path / "state") as connection:
            send_whole(connection, tree, str(folder), rsync=rsync)
        assert seen(folder) == seen(tmp_path / "here")


def test_bytes_and_a_clock_are_shown_while_files_travel(
    tmp_path: Path, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of 3 MB; rsync, at 4 MB/s, speaks each second."""
    monkeypatch.setattr(output, "FIRST_S", 0.01)
    monkeypatch.setattr(output, "EACH_S", 0.01)
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(os.urandom(3_000_000))
    slow, tree = (
        write(tmp_path / "slow rsync", '#!/bin/sh\nexec rsync --bwlimit=4000 "$@"\n', 0o755),
        tree_of(tmp_path, ["one", "two"]),
    )
    shown = list[str]()
    send_whole(connection, tree, str(tmp_path / "there"), rsync=str(slow), what="sending `it`", now=shown.append)
    form = r"sending `it` \(\d+s\): (\S+) (bytes|kB|MB) of 6 MB"
    found = [match for text in shown if (match := re.fullmatch(form, text))]
    done = [float(match[1]) * {"bytes": 1, "kB": 1e3, "MB": 1e6}[match[2]] for match in found]
    assert done == sorted(done) and done[0] < 3e6 < done[-1] <= 6e6
    assert "the box verifies 2 files, 6 MB (0s)" in shown and shown[-1] == ""


def test_an_archive_shows_what_is_packed_and_what_its_reader_has_taken(tmp_path: Path) -> None:
    progress = sync._Progress(20_000_000)
    with (tmp_path / "archive").open("w+b") as archive:
        progress.pack(archive)
        archive.truncate(3_000_000)
        texts = [str(progress)]
        progress.send_archive()
        texts.append(str(progress))
        subprocess.run(["dd", "bs=1000000", "count=2"], stdin=archive, capture_output=True, check=True)
        texts.append(str(progress))
    assert texts == ["packing, 3 MB by now", "0 bytes of 3 MB, packed", "2 MB of 3 MB, packed"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a disk of its own")
@pytest.mark.parametrize("rsync", ["rsync", ""])
def test_a_full_disk_is_named(tmp_path: Path, connection: Any, rsync: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        (tmp_path / "large").write_bytes(os.urandom(6_000_000))
        with pytest.raises(ToolkitError) as full:
            send_whole(connection, tree_of(tmp_path, ["large"]), f"{disk}/x", rsync=rsync)
        assert full.value.exit_code == ExitCode.UNFIT
        assert "is full" in full.value.what and str(disk) in full.value.why
        assert not (disk / "x").exists()
    finally:
        unmount(disk)
