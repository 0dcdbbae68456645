"""The boxes that `fab` knows, in boxes.yaml: a mapping from a box's name to its fields.

    gpu-box:
      address: connect.example.com
      port: 41022
      user: root
      price_per_hour: 1.98

A name that is not in it is given to ssh as it stands, and the user's own ssh configuration applies.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from env.settings import PROVIDERS
from jobs.errors import ToolkitError
from jobs.yaml12 import dump_yaml, load_yaml

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
URL = re.compile(r"ssh://(?:([^@/]+)@)?(\[[^\]]+\]|[^:/@]+)(?::([0-9]{1,5}))?/?")
NAME_RULE = "small letters, digits and dashes, beginning with a letter or a digit"
MIRRORS = PROVIDERS.with_name("mirrors")
HEAD = "# The boxes that `fab` knows. Every field stands with its meaning in remote/inventory.py.\n"


def _word(value: str) -> str:
    """Check a value that ssh gets as one word: it must not look like an option."""
    if not value.strip(".") or value.startswith("-") or re.search(r"[\s\x00-\x1f\x7f]", value):
        raise ValueError("a word without spaces that does not begin with a dash")
    return value


def _one_of(folder: Path, suffix: str) -> AfterValidator:
    """Make a check for the name of a file in a folder; no name is allowed, too."""

    def check(value: str) -> str:
        known = sorted(file.stem for file in folder.glob(f"*{suffix}"))
        if value and value not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return value

    return AfterValidator(check)


def _absolute(value: str) -> str:
    if value and not re.match(r"(/|\$HOME(/|$))", value):
        raise ValueError("an absolute path on the box, or one that begins with $HOME")
    return value


Word = Annotated[str, AfterValidator(_word)]
BuildArgument = Literal["FLAVOUR", "BASE_IMAGE", "BUILD_IMAGE", "TORCH", "CUDA_ARCHS", "CA_BUNDLE"]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Box(BaseModel):
    """An entry of boxes.yaml."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: str
    address: Word  # a host name, an IP address, or a name of the user's ssh configuration
    port: Annotated[int, Field(gt=0, lt=65536)] | None = None  # None here and below: ssh's default
    user: Word | None = None
    key: Annotated[str, Field(min_length=1)] | None = None  # the private key's file; `~` is the laptop's
    provider: Annotated[str, _one_of(PROVIDERS, ".toml")] = ""  # a file of env/providers; "": detected by the probe
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    currency: str = ""  # `¥`, or `EUR`
    data_folder: Annotated[str, AfterValidator(_absolute)] = ""  # holds our folder on the box; "": the provider's
    mirror: Annotated[str, _one_of(MIRRORS, ".env")] = ""  # a file of env/mirrors; "": measured
    runtime: Literal["auto", "docker", "bare"] = "auto"
    # Arguments for the build of the image, or of the bare environment.
    build: Mapping[BuildArgument, str] = Field(default_factory=dict)
    secrets: Annotated[tuple[Variable, ...], Field(strict=False)] = ("HF_TOKEN",)  # names of secrets that a job gets


# --- reading --------------------------------------------------------------------------------------


def load_boxes(path: Path) -> dict[str, Box]:
    """Read boxes.yaml, by name; no boxes if there is no file.

    Raises ToolkitError with all mistakes together.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ToolkitError(f"cannot read {path}", why=str(error)) from None
    return parse_boxes(text, path)


def parse_boxes(text: str, path: Path) -> dict[str, Box]:
    """Parse the text of boxes.yaml. path: its file; a relative key is looked up next to it."""
    tree = load_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ToolkitError(
            f"{path} is not a list of boxes",
            why=f"it holds {type(tree).__name__}, not names with fields",
            hint="see remote/inventory.py",
        )
    boxes, mistakes = {}, []
    for name, fields in tree.items():
        if not NAME.fullmatch(name):
            mistakes.append(f"{name}: a box's name is {NAME_RULE}")
        elif not isinstance(fields, dict):
            mistakes.append(f"{name}: fields, not {_shown(fields)}")
        elif "name" in fields:
            mistakes.append(f"{name}.name: unknown field; a box's name is the key above its fields")
        else:
            try:
                boxes[name] = _box(name, fields, path.parent)
            except ValidationError as error:
                mistakes += [f"{name}.{_explain(mistake)}" for mistake in error.errors()]
    if mistakes:
        count = "one mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ToolkitError(
            f"{count} in {path}",
            why="\n".join(mistakes),
            hint="remote/inventory.py explains every field",
        )
    return boxes


def _box(name: str, fields: Mapping[str, Any], folder: Path) -> Box:
    box = Box.model_validate({**fields, "name": name})
    if box.key is None:
        return box
    return box.model_copy(update={"key": str(folder.absolute() / Path(box.key).expanduser())})


# pydantic's kinds of mistake -> what is wanted instead, in our words.
WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "dict_type": "fields",
    "mapping_type": "fields",
    "tuple_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or above",
    "less_than": "below {lt}",
    "string_pattern_mismatch": "a variable's name",
    "value_error": "{error}",
}


def _explain(mistake: ErrorDetails) -> str:
    """Describe a mistake on one line: path, what is wrong, the valid choices, the value seen."""
    location = [str(part) for part in mistake["loc"] if part != "[key]"]
    path, kind = ".".join(location), mistake["type"]
    if kind == "extra_forbidden":
        valid = [field for field in Box.model_fields if field != "name"]
        near = difflib.get_close_matches(location[-1], valid, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"{path}: unknown field; {guess}valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"{path}: this field is required"
    if kind not in WANTED:
        return f"{path}: {mistake['msg']}"
    context = mistake.get("ctx", {})
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    return f"{path}: {WANTED[kind].format(**limits)}, not {_shown(mistake['input'])}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def find(name: str, boxes: Mapping[str, Box]) -> Box:
    """Return the entry of that name, else a box whose address is the name, for ssh to resolve.

    Raises ToolkitError: ssh would take the name for an option.
    """
    if name in boxes:
        return boxes[name]
    try:
        _word(name)
    except ValueError as error:
        raise ToolkitError(f"{name!r} cannot name a box", why=f"it must be {error}", hint=_known(boxes)) from None
    if URL.fullmatch(name):  # which rsync does not take
        with suppress(ValidationError):  # no port, or an option: ssh refuses it
            return Box(name=name, **_address(name, name))
    return Box(name=name, address=name)


def meant(name: str, boxes: Mapping[str, Box]) -> str:
    """Say which boxes are known, for a name that is none of them and leads nowhere; else ""."""
    if name in boxes or not boxes:
        return ""
    near = difflib.get_close_matches(name, boxes, n=1)
    return (f"did you mean {near[0]}? " if near else f"`{name}` is not in boxes.yaml; ") + _known(boxes)


def _known(boxes: Mapping[str, Box]) -> str:
    if boxes:
        return f"boxes.yaml knows: {', '.join(sorted(boxes))}"
    return "fab add NAME 'ssh -p PORT USER@HOST', as the rental page shows it"


# --- adding ---------------------------------------------------------------------------------------


def parse_ssh_command(text: str) -> dict[str, Any]:
    """Parse `ssh -p 41022 -i k root@h`, as a rental page shows it, into address, port, user, key.

    `ssh` itself may be missing. Options that only forward ports or ask for less safety
    (`-o StrictHostKeyChecking=no`) are left out. Raises ToolkitError: there is no address, or an
    option for which boxes.yaml has no field.
    """
    try:
        words = shlex.split(text.strip().removeprefix("$ "))
    except ValueError as error:
        raise ToolkitError(f"cannot read `{text.strip()}`", why=str(error), hint=PASTE) from None
    fields: dict[str, Any] = {}
    for option, value in _options(words[1:] if words[:1] == ["ssh"] else words):
        if option == "address":
            if "address" in fields:
                raise ToolkitError(f"the command ends with a command for the box: `{value}`", hint=PASTE)
            fields |= _address(value, text)
        elif option == "key":
            fields["key"] = _kept_path(value)
        elif option == "port":
            fields["port"] = _port(value, text)
        else:
            fields[option] = value
    if not fields.get("address"):
        raise ToolkitError(f"there is no address in `{text.strip()}`", hint=PASTE)
    order = ("address", "port", "user", "key")
    return {name: fields[name] for name in order if fields.get(name) is not None}


PASTE = "paste what the rental page shows, e.g. fab add gpu-box 'ssh -p 41022 root@host'"
TAKEN = {"-p": "port", "-i": "key", "-l": "user"}
TAKEN_WORDS = {"port": "port", "identityfile": "key", "user": "user", "hostname": "hostname"}
LEFT_OUT = {"-L", "-R", "-D", "-W", "-b", "-B", "-c", "-e", "-E", "-m", "-O", "-Q", "-S", "-w"}  # with a value
LEFT_OUT_WORDS = {
    "stricthostkeychecking", "userknownhostsfile", "globalknownhostsfile", "loglevel", "serveraliveinterval",
    "serveralivecountmax", "identitiesonly", "connecttimeout", "forwardagent", "checkhostip", "updatehostkeys",
    "batchmode", "tcpkeepalive", "compression", "preferredauthentications", "passwordauthentication",
    "pubkeyauthentication", "requesttty", "localforward", "exitonforwardfailure",
}  # fmt: skip
TO_CONFIG = (
    "give the box a Host entry in ~/.ssh/config, and use that name: "
    "fab add NAME 'ssh THAT-HOST', or --host THAT-HOST alone"
)


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (field, value) of each option, without those that may be left out."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            continue
        if not word.startswith("-") or word == "-":
            yield "address", word
            continue
        flag = word[:2]
        if flag not in TAKEN and flag not in LEFT_OUT and flag not in ("-o", "-J", "-F"):
            if re.fullmatch(r"-[46AaCfGgKkMNnqsTtVvXxYy]+", word):
                continue
            raise ToolkitError(f"ssh has no option `{word}`", hint=PASTE)
        if len(word) == 2 and not rest:
            raise ToolkitError(f"`{word}` lacks its value", hint=PASTE)
        value = word[2:] or rest.pop(0)
        if flag in TAKEN:
            yield TAKEN[flag], value
        elif flag == "-o":
            key, _, setting = re.sub(r"\s*=\s*|\s+", "=", value.strip(), count=1).partition("=")
            if key.lower() == "hostname" or (key.lower() not in TAKEN_WORDS and key.lower() not in LEFT_OUT_WORDS):
                raise ToolkitError(f"boxes.yaml has no field for `-o {value}`", hint=TO_CONFIG)
            if key.lower() in TAKEN_WORDS:
                yield TAKEN_WORDS[key.lower()], setting
        elif flag in ("-J", "-F"):
            raise ToolkitError(f"boxes.yaml has no field for `{flag} {value}`", hint=TO_CONFIG)


def _address(text: str, command: str) -> dict[str, Any]:
    """Parse user@host, or ssh://user@host:port."""
    url = URL.fullmatch(text)
    user, host, port = url.groups() if url else (*(text.rpartition("@")[::2]), None)
    fields = {"user": user or None, "address": host.strip("[]"), "port": _port(port, command) if port else None}
    return {name: value for name, value in fields.items() if value is not None}


def _port(text: str, command: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text):
        raise ToolkitError(f"`{text}` is not a port, in `{command.strip()}`", hint=PASTE)
    return int(text)


def _kept_path(text: str) -> str:
    """Return a path that means the same in any folder: `~` stays, a relative path gets absolute."""
    return text if text.startswith("~") else str(Path(text).absolute())


@dataclass(frozen=True)
class Added:
    box: Box
    text: str  # what was written


def add_box(path: Path, name: str, command: str, *, dry_run: bool = False, **more: Any) -> Added:
    """Add an entry to the end of boxes.yaml, which keeps its comments.

    more: fields of Box that the user gave; None means not given. Raises ToolkitError: the name is
    taken or not valid, or there is a mistake in the file or in the new entry.
    """
    if not NAME.fullmatch(name):
        why = f"a name is {NAME_RULE}, 63 characters at most"
        raise ToolkitError(f"{name!r} cannot be a box's name", why=why, hint=PASTE)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    known = parse_boxes(old, path)
    if name in known:
        entry = known[name]
        user, port = f"{entry.user}@" if entry.user else "", f" port {entry.port}" if entry.port else ""
        raise ToolkitError(
            f"`{name}` is in {path} already",
            why=f"it is {user}{entry.address}{port}",
            hint="take another name, or change the entry there",
        )
    fields = parse_ssh_command(command) | {field: value for field, value in more.items() if value is not None}
    text = dump_yaml({name: fields})
    before = old if old.endswith("\n") or not old else f"{old}\n"
    new = f"{before or HEAD}\n{text}"
    box = _of_text(new, text, path, known, name)
    if not dry_run:
        _write(path, new)
    return Added(box, text)


def _of_text(new: str, text: str, path: Path, known: Mapping[str, Box], name: str) -> Box:
    """Return the box as the new file has it, and check that all other entries read as before."""
    alone = parse_boxes(text, path)  # first, so that a mistake in the new entry is reported as such
    try:
        boxes = parse_boxes(new, path)
    except ToolkitError:
        boxes = {}
    if boxes != {**known, **alone}:
        raise ToolkitError(
            f"cannot add an entry at the end of {path}",
            why="the file does not end like a plain mapping",
            hint=f"add it by hand:\n{text}",
        )
    return boxes[name]


def _write(path: Path, text: str) -> None:
    """Write the file as a whole or not at all; a link stays a link."""
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    if target.exists():
        partial.chmod(target.stat().st_mode & 0o777)
    partial.replace(target)
