"""Which flavour of the stack a machine gets: from its cards, its driver, and the job.

A flavour is a file of env/flavours, with its locks in env/pins: the image or the bare environment
is made of it. What cards and drivers its CUDA supports stands in env/limits.toml.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env.settings import DEFAULT_FLAVOUR, Flavour, Limits, load_families
from jobs.errors import ExitCode, ToolkitError
from jobs.fitness import Gpu, version
from jobs.spec import Job, Scratch

CHANGE_JOB = "choose another model, or change `flavours` in the job file"


@dataclass(frozen=True)
class FlavourChoice:
    flavour: Flavour
    why: str  # for a person

    def __str__(self) -> str:
        return f"{self.flavour.name}: {self.why}"


def choose_flavour(
    limits: Limits,
    cards: Sequence[Gpu],
    driver: str | None,
    *,
    cannot: Mapping[str, str] | None = None,
    wish: str = "",
) -> FlavourChoice:
    """Choose the flavour that was wished for, else the first that runs, the default before others.

    cards: () for a job on the CPU. driver: None if it is not known. cannot: flavours that do not
    run the job, with the reason. wish: a flavour's name, or "".

    Raises ToolkitError: there is no such flavour; UNFIT, with what speaks against each.
    """
    flavours = limits.flavours
    if wish and wish not in flavours:
        raise ToolkitError(f"there is no flavour `{wish}`", hint=f"one of: {', '.join(flavours)}")
    cannot = cannot or {}
    order = sorted(flavours, key=lambda name: name != DEFAULT_FLAVOUR)
    against = {
        name: [*filter(None, [cannot.get(name)]), *_against(flavours[name], limits, cards, driver)] for name in order
    }
    fit = [name for name in order if not against[name]]
    if wish and against[wish]:
        raise ToolkitError(
            f"flavour {wish} does not run here",
            why="; ".join(against[wish]),
            hint=f"--flavour {fit[0]} does" if fit else _way_out(against, cannot),
            exit_code=ExitCode.UNFIT,
        )
    if wish:
        return FlavourChoice(flavours[wish], "as wished")
    if not fit:
        raise ToolkitError(
            "no flavour runs here",
            why="; ".join(f"{name}: {', '.join(against[name])}" for name in order),
            hint=_way_out(against, cannot),
            exit_code=ExitCode.UNFIT,
        )
    refused = [f"{name} does not run here, since {against[name][0]}" for name in order[: order.index(fit[0])]]
    return FlavourChoice(flavours[fit[0]], "; ".join(refused) or "the default")


def flavours_without(job: Job) -> dict[str, str]:
    """Name the flavours that do not run the job, with the reason.

    They lack one of its models, or its file does not name them. Whether a flavour has a model of
    the hub whose name tells no family is seen when its config.json is read.
    """
    families, known = load_families(), Flavour.load_all()
    lacking = {name: f"the job names {' and '.join(job.flavours)} alone" for name in known if name not in job.flavours}
    without = lacking if job.flavours else {}
    for source in job.sources:
        family = families.get(model_type_of(source))
        if family is not None:
            without |= {
                name: f"its transformers has no {family.title}" for name in known if name not in family.flavours
            }
    return without


def model_type_of(source: str | Scratch) -> str:
    """Return the `model_type` of a model, "" if it is not known without the hub.

    It stands in `config` of the job file, or in the config.json of a local folder. A name of the
    hub tells it by how it begins.
    """
    config = source.config if isinstance(source, Scratch) else _local_config(source)
    if isinstance(source, Scratch) or config:
        return str(config.get("model_type"))
    begins = {begin: name for name, family in load_families().items() for begin in family.hub}
    fit = [begin for begin in begins if source.lower().startswith(begin.lower())]
    return begins[max(fit, key=len)] if fit else ""


def refuse_flavour(job: Job, there: str, place: str, way: Callable[[str], str]) -> None:
    """Raise ToolkitError (UNFIT) if the flavour that is there does not run the job.

    there: "" if it is not known. place: what has it. way: the command for another flavour.
    """
    without = flavours_without(job)
    if there not in without:
        return
    others = [name for name in Flavour.load_all() if name not in without]
    raise ToolkitError(
        f"`{job.name}` does not run in flavour {there}, which {place} has",
        why=without[there],
        hint=way(others[0]) if others else CHANGE_JOB,
        exit_code=ExitCode.UNFIT,
    )


def refuse_family(model: str, config: Mapping[str, Any], there: str) -> None:
    """Raise ToolkitError (UNFIT) if the flavour of this stack has no models of this type.

    config: the content of its config.json. there: "" if it is not known.
    """
    family = load_families().get(str(config.get("model_type")))
    if family is not None and there and there not in family.flavours:
        raise ToolkitError(
            f"{model} does not run in flavour {there}, which this stack has",
            why=f"its transformers has no {family.title}",
            hint=f"{way_to(family.flavours[0])}; or choose another model",
            exit_code=ExitCode.UNFIT,
        )


def way_to(flavour: str) -> str:
    """Say how to get a flavour, where it is not known who runs this."""
    return f"`FLAVOUR={flavour} docker compose run --rm train ...`; on a rented box `fab deploy --flavour {flavour}`"


def _local_config(folder: str) -> dict[str, Any]:
    try:
        fields = json.loads((Path(folder).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _against(flavour: Flavour, limits: Limits, cards: Sequence[Gpu], driver: str | None) -> Iterator[str]:
    wanted = limits.cuda[flavour.cuda]
    if cards and driver and version(driver) < version(wanted.driver_min):
        yield f"its driver {driver} is older than the {wanted.driver_min} that CUDA {flavour.cuda} needs"
    for card in dict.fromkeys(cards):
        if card.capability is None:
            continue
        named = f"{card.name} (compute capability {card.capability})"
        if wanted.capability_max and version(card.capability) > version(wanted.capability_max):
            yield f"{named} is newer than the {wanted.capability_max} that this build for CUDA {flavour.cuda} knows"
        if wanted.capability_min and version(card.capability) < version(wanted.capability_min):
            yield f"{named} is older than the {wanted.capability_min} that this build for CUDA {flavour.cuda} knows"


def _way_out(against: Mapping[str, Sequence[str]], cannot: Mapping[str, str]) -> str:
    """Say what to change: driver or job, if a flavour lacks nothing else; else the box."""
    if all(name in cannot for name in against):
        return CHANGE_JOB
    if any(len(reasons) == 1 and "driver" in reasons[0] for reasons in against.values()):
        return "install a newer driver on the host, or take another box"
    if any(reasons == [cannot.get(name)] for name, reasons in against.items()):
        return f"take another box; or {CHANGE_JOB}"
    return "take another box"
