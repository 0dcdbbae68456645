"""The last answer of a box's probe, kept on the laptop, so that a deploy need not probe again."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from env.settings import PROVIDERS, Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import size
from remote.output import ticking
from remote.scripts import script
from remote.ssh import commands
from remote.survey.facts import PROBE_S, BoxFacts, parse, probe_args

if TYPE_CHECKING:
    from remote.inventory import Box
    from remote.ssh.connection import BoxConnection

Say = Callable[[str], None]
MIRRORS = PROVIDERS.with_name("mirrors")
OTHER_MIRROR = "cn"  # the mirror that is tried if boxes.yaml names none
SCHEMA = 1


@dataclass(frozen=True)
class CachedProbe:
    asked: tuple[str, ...]  # the probe's arguments: if they differ, boxes.yaml or the providers changed
    probe: str  # its answer, as it came
    sent: float  # by the laptop's clock, as is `received`
    received: float
    identity: str = ""  # land.sh's: if it differs, the box was restarted or is another one
    root: str = ""

    @cached_property
    def facts(self) -> BoxFacts:
        return parse(self.probe)


def file_of(state: Path, name: str) -> Path:
    return state / "boxes" / f"{quote(name, safe='')}.json"


def recall(state: Path, name: str) -> CachedProbe | None:
    """Return what is remembered; None if nothing is, or if another version has written it."""
    try:
        fields = json.loads(file_of(state, name).read_text(encoding="utf-8"))
        if fields.pop("schema") != SCHEMA:
            return None
        return CachedProbe(**{**fields, "asked": tuple(fields["asked"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def remember(state: Path, name: str, known: CachedProbe) -> None:
    file = file_of(state, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.new")
    partial.write_text(json.dumps({"schema": SCHEMA, **asdict(known)}), encoding="utf-8")
    os.replace(partial, file)


def probe(
    connection: BoxConnection, box: Box, providers: Mapping[str, Provider], now: Say = lambda text: None
) -> CachedProbe:
    """Probe the box, in one round trip of some seconds.

    now: gets the passing state, and "" at the end. Raises ToolkitError: the box cannot be reached,
    or its answer broke off.
    """
    asked, sent = arguments(box, providers), time.time()
    come: list[int] = []
    with ticking(now, f"probing {box.name}", lambda: f"{size(sum(come))} of its answer have come"):
        argv, stdin, limit_s = commands.sh_script(*asked), script("probe.sh"), PROBE_S + 24
        answer = connection.query(argv, stdin=stdin, timeout_s=limit_s, heard=lambda part: come.append(len(part)))
    known = CachedProbe(asked, answer.out, sent, time.time())
    if not known.facts.complete:
        raise ToolkitError(
            f"the answer of `{box.name}` broke off",
            why=answer.err.strip()[-300:],
            hint="try again",
            exit_code=ExitCode.UNREACHABLE,
        )
    return known


def probe_again(
    connection: BoxConnection, box: Box, providers: Mapping[str, Provider], state: Path, now: Say
) -> CachedProbe:
    """Probe the box now, and remember the answer; what is remembered of its folder stays."""
    before, known = recall(state, box.name), probe(connection, box, providers, now)
    if before is not None and not connection.dry_run:
        remember(state, box.name, replace(known, identity=before.identity, root=before.root))
    return known


def arguments(box: Box, providers: Mapping[str, Provider]) -> tuple[str, ...]:
    mirror = mirror_values(hub_mirror(box)).get("HF_ENDPOINT", "")
    direct = mirror_values("default").get("HF_ENDPOINT", "")
    return tuple(
        probe_args(providers, data_folder=box.data_folder, hub=direct, mirror="" if mirror == direct else mirror)
    )


def hub_mirror(box: Box) -> str:
    """Return the name of the mirror over which the hub is tried."""
    return box.mirror if box.mirror not in ("", "default") else OTHER_MIRROR


def mirror_values(name: str, folder: Path = MIRRORS) -> dict[str, str]:
    """Read env/mirrors/NAME.env; of `${NAME:-VALUE}` the default is taken.

    Raises ToolkitError: there is no such file.
    """
    try:
        text = (folder / f"{name}.env").read_text(encoding="utf-8")
    except OSError:
        known = ", ".join(sorted(file.stem for file in folder.glob("*.env")))
        raise ToolkitError(
            f"there is no mirror `{name}`", why=f"env/mirrors has {known}", hint="mend `mirror` in boxes.yaml"
        ) from None
    pairs = re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)
    return {key: re.sub(r"^\$\{[A-Z_]+:-(.*)\}$", r"\1", value) for key, value in pairs}
