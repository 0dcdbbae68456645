from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from env.settings import PROVIDERS, Provider

KNOWN = Provider.load_all()


def test_those_that_are_known() -> None:
    assert set(KNOWN) == {"autodl", "vast", "runpod", "lambda", "generic"}
    assert {name: provider.name for name, provider in KNOWN.items()} == {name: name for name in KNOWN}


def test_nothing_is_promised_of_an_unknown_box() -> None:
    generic = KNOWN["generic"]
    assert generic.data_folders == ("$HOME",) and generic.stop.command == ()
    assert (generic.stop.meter, generic.stop.disk, generic.stop.deadline_days) == ("unknown", "unknown", None)
    assert {(folder.on_stop, folder.on_release) for folder in generic.folders} == {("unknown", "unknown")}
    assert (generic.signs.hostnames, generic.signs.variables, generic.signs.files) == ((), (), ())


@pytest.mark.parametrize(
    ("name", "meter", "disk", "days", "has_command"),
    [
        ("autodl", "off", "free", 15, True),
        ("vast", "off", "paid", None, True),
        ("runpod", "off", "paid", None, True),
        ("lambda", "on", "paid", None, False),  # `shutdown` would only seem to stop the meter
    ],
)
def test_what_stopping_means(name: str, meter: str, disk: str, days: int | None, has_command: bool) -> None:
    stop = KNOWN[name].stop
    assert (stop.meter, stop.disk, stop.deadline_days, bool(stop.command)) == (meter, disk, days, has_command)


def test_a_command_is_named_only_where_it_stops_the_meter() -> None:
    assert [name for name, provider in KNOWN.items() if provider.stop.command and provider.stop.meter != "off"] == []
    for provider in KNOWN.values():
        named = set(re.findall(r"\$\{?([A-Z_]+)", " ".join(provider.stop.command)))
        assert named <= set(provider.stop.variables), provider.name


def test_where_our_folder_lies_is_said_to_outlive_a_stop_or_not() -> None:
    """The card of `fab stop` finds the folder by the longest path that holds it."""
    for provider in KNOWN.values():
        for data_folder in provider.data_folders:
            row_counts = {folder.path: folder.on_stop for folder in provider.folders}
            assert any(data_folder == path or path == "/" for path in row_counts), (provider.name, data_folder)
    assert {folder.path: folder.on_stop for folder in KNOWN["runpod"].folders} == {"/workspace": "kept", "/": "lost"}


def test_a_proxy_is_never_among_the_files_that_each_job_reads() -> None:
    for provider in KNOWN.values():
        assert set(provider.proxy_files).isdisjoint(provider.env_files)
    assert KNOWN["autodl"].proxy_files == ("/etc/network_turbo",) and KNOWN["runpod"].env_files == (
        "/etc/rp_environment",
    )


def test_mirrors_are_those_that_are_there() -> None:
    mirrors = {file.stem for file in (PROVIDERS.parent / "mirrors").glob("*.env")}
    assert {provider.mirror for provider in KNOWN.values()} <= mirrors


def test_hostname_patterns_compile() -> None:
    for provider in KNOWN.values():
        for pattern in provider.signs.hostnames:
            re.compile(pattern)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('meter = "off"', 'meter = "maybe"', "stop.meter\n  Input should be 'off', 'on' or 'unknown'"),
        ('meter = "off"', "", "stop.meter\n  Field required"),
        ('meter = "off"', 'meter = "off"\nmetre = "off"', "stop.metre\n  Extra inputs are not permitted"),
        ("deadline_days = 15", 'deadline_days = "15"', "stop.deadline_days\n  Input should be a valid integer"),
        ('title = "AutoDL"', "", "title\n  Field required"),
        (
            'data_folders = ["/root/autodl-tmp"]',
            'data_folders = ["autodl-tmp"]',
            "data_folders.0\n  String should match pattern",
        ),
        (
            'data_folders = ["/root/autodl-tmp"]',
            'data_folders = ["$HOMER/x"]',
            "data_folders.0\n  String should match pattern",
        ),
        (
            'variables = [["AutoDLContainerUUID"]]',
            "variables = [[]]",
            "signs.variables.0\n  Tuple should have at least 1 item",
        ),
        (
            'command = ["/usr/bin/shutdown"]',
            'command = "/usr/bin/shutdown"',
            "stop.command\n  Input should be a valid tuple",
        ),
    ],
)
def test_a_mistake_is_not_passed_over(tmp_path: Path, old: str, new: str, where: str) -> None:
    text = (PROVIDERS / "autodl.toml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    file = tmp_path / "autodl.toml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValidationError) as caught:
        Provider.load(file)
    assert where in str(caught.value)


def test_each_file_says_that_nothing_was_tried_there() -> None:
    for file in PROVIDERS.glob("*.toml"):
        head = file.read_text(encoding="utf-8").splitlines()[0]
        assert "nothing here was tried" in head or file.stem == "generic"
