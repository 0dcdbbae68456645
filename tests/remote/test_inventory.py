"""boxes.yaml: what it holds, every mistake in it at once, and how `fab add` writes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box, add_box, find, load_boxes, parse_ssh_command

WHOLE = """
# mine
gpu-box:
  address: connect.example.com
  port: 41022
  user: root
  key: keys/one   # beside this file
  provider: autodl
  price_per_hour: 1.98
  currency: ¥
  data_folder: $HOME/data
  mirror: cn
  runtime: bare
  build: {TORCH: torch-cu118, CUDA_ARCHS: "80;90"}
  secrets: [HF_TOKEN, WANDB_API_KEY]
2nd: {address: "::1"}
"""


def boxes(folder: Path, text: str) -> dict[str, Box]:
    file = folder / "boxes.yaml"
    file.write_text(text, encoding="utf-8")
    return load_boxes(file)


def mistakes(folder: Path, text: str) -> list[str]:
    with pytest.raises(ToolkitError) as raised:
        boxes(folder, text)
    assert raised.value.exit_code == ExitCode.USAGE
    return raised.value.why.splitlines()


def test_every_field(tmp_path: Path) -> None:
    known = boxes(tmp_path, WHOLE)
    box = known["gpu-box"]
    assert (box.address, box.port, box.user, box.provider, box.price_per_hour) == (
        "connect.example.com",
        41022,
        "root",
        "autodl",
        1.98,
    )
    assert (box.currency, box.data_folder, box.mirror, box.runtime) == ("¥", "$HOME/data", "cn", "bare")
    assert (box.build["CUDA_ARCHS"], box.secrets, box.key) == (
        "80;90",
        ("HF_TOKEN", "WANDB_API_KEY"),
        str(tmp_path / "keys/one"),
    )
    assert known["2nd"] == Box(name="2nd", address="::1")
    assert (known["2nd"].secrets, known["2nd"].runtime, known["2nd"].port) == (("HF_TOKEN",), "auto", None)


def test_the_keys_of_a_home(tmp_path: Path) -> None:
    assert boxes(tmp_path, "a: {address: h, key: ~/.ssh/k}")["a"].key == str(Path.home() / ".ssh/k")


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert load_boxes(tmp_path / "boxes.yaml") == {}
    assert boxes(tmp_path, "# nothing yet\n") == {}


def test_all_mistakes_together(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        """
Big: {address: h}
-x: {address: h}
a:
  adress: h
  port: 70000
  user: -oProxyCommand=x
  price_per_hour: "1.98"
  provider: autodel
  mirror: us
  runtime: podman
  build: {TORCHES: x, TORCH: 2}
  secrets: [A-B, 3]
  data_folder: data
b: 3
c: {address: h, port: on, key: "", price_per_hour: -1, secrets: HF_TOKEN, build: x}
d: {address: "a b"}
e: {address: h, name: e}
""",
    )
    name_rule = "a box's name is small letters, digits and dashes, beginning with a letter or a digit"
    word = "a word without spaces that does not begin with a dash"
    assert found[:2] == [f"Big: {name_rule}", f"-x: {name_rule}"]
    assert sorted(found[2:]) == sorted(
        [
            "a.address: this field is required",
            "a.port: below 65536, not 70000",
            f"a.user: {word}, not '-oProxyCommand=x'",
            "a.price_per_hour: a number, not '1.98'",
            "a.provider: one of autodl, generic, lambda, runpod, vast, not 'autodel'",
            "a.data_folder: an absolute path on the box, or one that begins with $HOME, not 'data'",
            "a.mirror: one of cn, default, not 'us'",
            "a.runtime: 'auto', 'docker' or 'bare', not 'podman'",
            "a.build.TORCHES: 'FLAVOUR', 'BASE_IMAGE', 'BUILD_IMAGE', 'TORCH', 'CUDA_ARCHS' or 'CA_BUNDLE', not "
            "'TORCHES'",
            "a.build.TORCH: text, not 2",
            "a.secrets.0: a variable's name, not 'A-B'",
            "a.secrets.1: text, not 3",
            "a.adress: unknown field; did you mean address? valid here: address, port, user, key, provider, "
            "price_per_hour, currency, "
            "data_folder, mirror, runtime, build, secrets",
            "b: fields, not 3",
            "c.port: an integer, not 'on'",
            "c.key: text that is not empty, not ''",
            "c.price_per_hour: 0 or above, not -1",
            "c.secrets: a list, not 'HF_TOKEN'",
            "c.build: fields, not 'x'",
            f"d.address: {word}, not 'a b'",
            "e.name: unknown field; a box's name is the key above its fields",
        ]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [("[a, b]", "is not a list of boxes"), ("a: {", "is not valid YAML"), ("a: {}\na: {}", "not valid YAML")],
)
def test_what_is_no_mapping(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ToolkitError, match=words):
        boxes(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "boxes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ToolkitError, match="cannot read"):
        load_boxes(tmp_path / "boxes.yaml")
    with pytest.raises(ToolkitError, match="cannot read"):
        load_boxes(tmp_path)


def test_find(tmp_path: Path) -> None:
    known = boxes(tmp_path, WHOLE)
    assert find("gpu-box", known) is known["gpu-box"]
    assert find("me@host.example", known) == Box(name="me@host.example", address="me@host.example")
    url = "ssh://me@[::1]:8022"
    assert find(url, known) == Box(name=url, address="::1", user="me", port=8022)
    for wrong in ("ssh://h:70000", "ssh://-oProxyCommand=x"):  # ssh says why it does not take them
        assert find(wrong, known).address == wrong
    for name in ("", "-oProxyCommand=x", "a b", "a\nb", "..", "a\x00"):
        with pytest.raises(ToolkitError, match="cannot name a box") as raised:
            find(name, known)
        assert "gpu-box" in raised.value.hint


# --- fab add

PASTED: list[tuple[str, dict[str, Any]]] = [
    ("ssh -p 41022 root@connect.example.com", {"address": "connect.example.com", "port": 41022, "user": "root"}),
    ("  $ ssh -p41022 root@h  ", {"address": "h", "port": 41022, "user": "root"}),
    (
        "ssh root@1.2.3.4 -p 12345 -i ~/.ssh/id_ed25519",
        {"address": "1.2.3.4", "port": 12345, "user": "root", "key": "~/.ssh/id_ed25519"},
    ),
    ("ssh -p 12345 root@1.2.3.4 -L 8080:localhost:8080", {"address": "1.2.3.4", "port": 12345, "user": "root"}),
    ("ssh -o StrictHostKeyChecking=no -o 'Port 7' -A -tt h", {"address": "h", "port": 7}),
    ("ssh -i '/a b/k' -l me h", {"address": "h", "user": "me", "key": "/a b/k"}),
    ("ssh://root@h:22", {"address": "h", "port": 22, "user": "root"}),
    ("ssh root@[2001:db8::1] -p 9", {"address": "2001:db8::1", "port": 9, "user": "root"}),
    ("ssh ssh://u@[::1]:8/", {"address": "::1", "port": 8, "user": "u"}),
    ("u@corp@h", {"address": "h", "user": "u@corp"}),
    ("my-alias", {"address": "my-alias"}),
]


@pytest.mark.parametrize(("text", "fields"), PASTED)
def test_a_pasted_command(text: str, fields: dict[str, Any]) -> None:
    assert parse_ssh_command(text) == fields


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no address"),
        ("ssh", "no address"),
        ("ssh -p 22", "no address"),
        ("ssh root@", "no address"),
        ("ssh h -p", "lacks its value"),
        ("ssh -p x h", "not a port"),
        ("ssh h ls", "a command for the box"),
        ("ssh -J b h", "no field for `-J b`"),
        ("ssh -o ProxyCommand=x h", "no field for `-o ProxyCommand=x`"),
        ("ssh --help h", "no option"),
        ("ssh 'h", "cannot read"),
    ],
)
def test_a_command_that_cannot_be_taken(text: str, words: str) -> None:
    with pytest.raises(ToolkitError, match=words):
        parse_ssh_command(text)


def test_a_relative_key_means_the_same_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_ssh_command("ssh -i k h")["key"] == str(tmp_path / "k")


def test_add_keeps_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "boxes.yaml"
    file.write_text(WHOLE.rstrip("\n"), encoding="utf-8")
    file.chmod(0o640)
    added = add_box(file, "new-box", "ssh -p 7 root@h", price_per_hour=2.5, provider=None, currency="EUR")
    assert added.box == Box(name="new-box", address="h", port=7, user="root", price_per_hour=2.5, currency="EUR")
    assert file.read_text(encoding="utf-8") == f"{WHOLE}\n{added.text}"
    assert added.text == "new-box:\n  address: h\n  port: 7\n  user: root\n  price_per_hour: 2.5\n  currency: EUR\n"
    assert load_boxes(file)["new-box"] == added.box
    assert (file.stat().st_mode & 0o777, [path.name for path in tmp_path.iterdir()]) == (0o640, ["boxes.yaml"])


def test_add_makes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "folder/boxes.yaml"
    shown = add_box(file, "a", "ssh h", dry_run=True)
    assert not file.exists()
    assert add_box(file, "a", "ssh h") == shown
    assert file.read_text().startswith("# ")
    add_box(file, "on", "ssh 123")  # words that YAML might take for something else
    assert load_boxes(file) == {"a": Box(name="a", address="h"), "on": Box(name="on", address="123")}


def test_add_refuses(tmp_path: Path) -> None:
    file = tmp_path / "boxes.yaml"
    add_box(file, "taken", "ssh -p 5 u@h")
    before = file.read_text()
    with pytest.raises(ToolkitError, match="`taken` is in") as raised:
        add_box(file, "taken", "ssh other")
    assert raised.value.why == "it is u@h port 5"
    for name in ("", "-a", "A", "a b", "a_b", "a.b", "ä", "a\n", "$(x)", "x" * 64):
        with pytest.raises(ToolkitError, match="cannot be a box's name"):
            add_box(file, name, "ssh h")
    with pytest.raises(ToolkitError, match="one mistake") as wrong:
        add_box(file, "new", "ssh h", provider="nobody")
    assert wrong.value.why.startswith("new.provider: one of")
    assert file.read_text() == before


@pytest.mark.parametrize(
    "text", ["{a: {address: h}}\n", "a: {address: h}\n...\n", "a:\n  address: h\n  currency: |+\n    x\n\n"]
)
def test_add_leaves_a_file_that_it_cannot_add_to(tmp_path: Path, text: str) -> None:
    file = tmp_path / "boxes.yaml"
    file.write_text(text)
    with pytest.raises(ToolkitError, match="cannot add an entry") as raised:
        add_box(file, "new", "ssh h")
    assert "new:\n  address: h" in raised.value.hint.replace("      ", "")
    assert file.read_text() == text


def test_add_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("a: {address: h}\n")
    (tmp_path / "boxes.yaml").symlink_to("real.yaml")
    add_box(tmp_path / "boxes.yaml", "b", "ssh h")
    assert (tmp_path / "boxes.yaml").is_symlink() and "b:" in (tmp_path / "real.yaml").read_text()
