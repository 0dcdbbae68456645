"""The printer of docs/job-file.md, made from the fields of jobs/spec.py.

`make docs` writes the page, and a test keeps the two equal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jobs.spec import Job, models_in

HEAD = """\
# What a job file may say

<!-- Made by `make docs` from jobs/spec.py. Edit the meanings there. -->

A job is one YAML file for all three steps. It is checked as a whole before anything runs: unknown
fields and wrong values are refused, all of them together. `jobs/opt-1.3b.yaml`,
`jobs/opt-1.3b-lora.yaml`, `jobs/demo.yaml` and `examples/job.yaml` are job files to start from.

`--set a.b=value` on the command line changes a field before the check; the value is YAML. `1e-6` is
a number and `on` is a word, as in YAML 1.2.

Batches are global: the same job gives the same learning on 1, 2 or 8 GPUs. `auto` chooses only what
does not change learning.

*Must be there*: if the file has the section, it must have this field. *Steps*: those that read the
field.

If a field that decides what a step learns has changed since that step began, the same command
refuses to resume and shows the difference. `name`, `flavours`, `track`, `checkpoint` and all of
`hardware` but `precision` may change at any time.
"""


@dataclass(frozen=True)
class FieldRow:
    """One field, as the page shows it."""

    path: str
    unit: str
    default: str  # "": the job file must have it
    meaning: str
    steps: Sequence[int]


def rows_of(model: type[BaseModel], path: str = "", steps: Sequence[int] = ()) -> Iterator[FieldRow]:
    """Yield the fields of a section and of the sections inside it. steps: the section's own."""
    for name, field in model.model_fields.items():
        extra = _unit_and_steps(field)
        own = extra["steps"] or steps
        inner = models_in(field.annotation)
        meaning = field.description or "".join(_first_line(each) for each in inner)
        yield FieldRow(f"{path}{name}", extra["unit"], _default(field), meaning, own)
        for each in inner:
            yield from rows_of(each, f"{path}{name}.", own)


def _unit_and_steps(field: FieldInfo) -> Mapping[str, Any]:
    """Return what `_field` in spec.py has stored with the field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {"unit": "", "steps": []}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if isinstance(field.default, BaseModel):
        return "as below"
    return "not set" if field.default is None else f"`{_as_yaml(field.default)}`"


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def page() -> str:
    parts, alone = [], []
    for name, field in Job.model_fields.items():
        rows = [row for row in rows_of(Job) if row.path.split(".")[0] == name]
        if models := models_in(field.annotation):
            parts.append(f"## `{name}`\n\n{_first_line(models[0])}\n\n{_table(rows[1:])}")
        else:
            alone += rows
    return "\n".join([HEAD, _table(alone), *parts])


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _table(rows: Sequence[FieldRow]) -> str:
    lines = ["| field | unit | default | meaning | steps |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (f"`{row.path}`", row.unit, row.default or "must be there", row.meaning, ", ".join(map(str, row.steps)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
