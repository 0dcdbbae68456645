"""Download models and data sets from a hub: the files are complete and verified, or it raises.

huggingface_hub writes a file under another name and then renames it, so it never takes a partial
file for a complete one. A body that stalls for HF_HUB_DOWNLOAD_TIMEOUT seconds is resumed by
huggingface_hub, five times without a new byte. Added here, since huggingface_hub does not do it:

- 5xx and 429 answers, broken connections and short bodies are tried again: after the time that the
  hub asks for, or with growing waits;
- every file is hashed before it is used; a wrong one is removed and fetched again;
- the list of files is saved before the first file is fetched, so a start without the hub does not
  take some files for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import huggingface_hub
import yaml
from huggingface_hub import HfApi, constants, hf_hub_download, metadata_load
from huggingface_hub.utils import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    WeakFileLock,
)

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import plural

WAITS_S: tuple[float, ...] = (1, 2, 4, 8)  # before each new try; from the first again after progress
MOST_ASKED_S = 60.0  # the longest wait that a hub may ask for
DOWNLOADS = 8  # concurrent ones, as in snapshot_download
READABLE = re.compile(r".*\.(parquet|arrow|csv|tsv|json|jsonl|ndjson|txt|zip)(\.(gz|zst|bz2|xz|lz4))?")

# The HTTP library's own errors, requests' or httpx's: timeouts, resets, short bodies.
NETWORK: tuple[type[Exception], ...] = tuple(
    kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__module__ != "builtins"
)
TROUBLES: tuple[type[Exception], ...] = (*NETWORK, OSError, HFValidationError)
# From 1.0 on huggingface_hub tries the HEAD before a download six times by itself, and then raises
# LocalEntryNotFoundError.
HEAD_IS_TRIED_AGAIN = int(huggingface_hub.__version__.split(".")[0]) >= 1
# No server answers, which seconds of waiting will not change.
ABSENT = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)

Kind = Literal["model", "dataset"]
Wanted = Callable[[Sequence[str]], list[str]]  # all file names of a repository -> those to fetch
T = TypeVar("T")


@dataclass
class Memory:
    """What we keep in the cache next to a repository's files."""

    commit: str = ""
    files: list[str] = field(default_factory=list)  # all files of the commit, downloaded or not
    # True: `files` are only those that another program put into the cache; no hub could name all.
    adopted: bool = False
    verified: dict[str, list[int]] = field(default_factory=dict)  # blob -> size and mtime_ns when its hash was right


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it."""

    name: str
    size_bytes: int
    blob: str  # its hash, by which the cache names it


@dataclass(frozen=True)
class Repository:
    """The files of a repository at its present commit, as the hub lists them."""

    commit: str = ""
    files: tuple[HubFile, ...] = ()

    def of(self, wanted: Wanted) -> Repository:
        names = {*wanted([file.name for file in self.files])}
        return Repository(self.commit, tuple(file for file in self.files if file.name in names))

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class _Damaged(OSError):
    """A downloaded file has another hash than the hub says."""


# --- what to fetch ------------------------------------------------------------------------------


def config_files(files: Sequence[str]) -> list[str]:
    return [file for file in files if file == "config.json"]


def tokenizer_files(files: Sequence[str]) -> list[str]:
    """Return the small files of a model, its config among them."""
    endings = (".json", ".txt", ".model", ".jinja", ".tiktoken")
    return [file for file in files if "/" not in file and file.endswith(endings)]


def model_files(files: Sequence[str]) -> list[str]:
    """Return a model's small files and one set of weights: safetensors if there are any.

    Not TensorFlow's, Flax's, nor a second set in a folder.
    """
    return tokenizer_files(files) + weight_files(files)


def weight_files(files: Sequence[str]) -> list[str]:
    safe, pickled = (
        [file for file in files if "/" not in file and fnmatch(file, form)]
        for form in ("model*.safetensors", "pytorch_model*.bin")
    )
    return safe or pickled


def card_files(files: Sequence[str]) -> list[str]:
    return [file for file in files if file in ("README.md", "dataset_infos.json")]


def data_files(files: Sequence[str], patterns: Sequence[str] = ()) -> list[str]:
    """Return the files that `datasets` can read as rows, and the card.

    Only what `patterns` match, if each of them matches a file.
    """
    named = [[file for file in files if fnmatch(file, pattern)] for pattern in patterns]
    if named and all(named):
        data = {file for group in named for file in group}
    else:
        data = {file for file in files if READABLE.fullmatch(file)}
    return sorted(data | set(card_files(files)))


def _configurations(card: Path) -> list[dict[str, Any]]:
    """Read the configurations that the data set's card names; none if it names none."""
    return ((metadata_load(card) or {}).get("configs") if card.is_file() else None) or []


def _chosen(name: str, configs: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    """Return the configuration that is wanted; None: the default. Raises ToolkitError."""
    if wanted is None:
        named = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
    else:
        named = [config for config in configs if config.get("config_name") == wanted]
    if not named and (wanted is not None or len(configs) > 1):
        raise no_configuration(name, wanted, [str(config.get("config_name")) for config in configs])
    return (named or configs or [{}])[0]


def no_configuration(name: str, wanted: str | None, known: Sequence[str]) -> ToolkitError:
    """Make the error for a configuration that a data set lacks. wanted: None if none was named."""
    if wanted is None:
        what = f"data set `{name}` has several configurations, and none is the default"
    else:
        what = f"data set `{name}` has no configuration `{wanted}`"
    why = f"they are {', '.join(known)}" if known else "it has no configurations"
    entry = f"{{name: {name}, config: {known[0]}}}" if known else f"{{name: {name}}}"
    return ToolkitError(what, why=why, hint=f"name one in data.datasets: {entry}" if known else "leave `config` out")


def _patterns(config: dict[str, Any]) -> list[str]:
    """Return the file patterns of a configuration; none if it has a `data_dir`.

    `data_files` is a pattern, a list of them, or a list of {split, path}.
    """
    named = [] if config.get("data_dir") else config.get("data_files") or []
    entries = named if isinstance(named, list) else [named]
    paths = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
    return [path for entry in paths for path in (entry if isinstance(entry, list) else [entry])]


# --- what there is ------------------------------------------------------------------------------


def listing(name: str, kind: Kind) -> Repository:
    """Ask the hub once for a repository's files and their sizes.

    The list is empty if the hub does not answer. Raises ToolkitError as `fetch` does if the hub
    knows no repository of this name.
    """
    try:
        info: Any = HfApi().repo_info(name, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT, files_metadata=True)
    except TROUBLES as error:
        status = _status(error)
        if isinstance(error, HFValidationError) or (status is not None and not _may_pass(error)):
            raise _refusal(name, kind, _cause(error)) from error
        return Repository()
    return Repository(str(info.sha), tuple(map(_hub_file, info.siblings or [])))


def _hub_file(sibling: Any) -> HubFile:
    lfs = getattr(sibling, "lfs", None)
    return HubFile(sibling.rfilename, sibling.size or 0, lfs.sha256 if lfs else sibling.blob_id or "")


def received_bytes(name: str, kind: Kind, listed: Repository) -> int:
    """Count the bytes of listed files that are in the cache, those of partial files too."""
    store = _store(name, kind)
    return sum(_received(store, listed.commit, file) for file in listed.files)


def _received(store: Path, commit: str, file: HubFile) -> int:
    whole = store / "snapshots" / commit / file.name
    parts = [whole] if whole.exists() else (store / "blobs").glob(f"{file.blob}*") if file.blob else []
    most = 0
    for part in parts:
        with suppress(FileNotFoundError):  # it became whole just now
            most = max(most, part.stat().st_size)
    return min(most, file.size_bytes)


# --- fetching -----------------------------------------------------------------------------------


def local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).exists()


def model(source: str, wanted: Wanted) -> str:
    """Return a folder with the wanted files of a model: `source` itself if it is a local one.

    Raises ToolkitError.
    """
    if not local(source):
        return str(fetch(source, wanted, kind="model"))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ToolkitError(
            f"there is no folder {source}",
            why=f"{folder.absolute()} is {'a file' if folder.exists() else 'not there'}",
            hint="name a model's folder, or a model of the hub, such as facebook/opt-1.3b",
        )
    return str(folder)


def is_here(source: str) -> bool:
    """Return whether a model's files are here; a start then fetches only what has changed since."""
    if local(source):
        return True
    snapshot, memory = _known(source)
    files = [*tokenizer_files(memory.files), *(weights := weight_files(memory.files))]
    return bool(weights) and all((snapshot / file).exists() for file in files)


def folder_here(source: str) -> Path | None:
    """Return the folder that has a model's files on this machine, without asking a hub."""
    folder = Path(source).expanduser() if local(source) else _known(source)[0]
    return folder if folder.is_dir() else None


def _known(name: str) -> tuple[Path, Memory]:
    """Return the snapshot of a model that is in the cache, and what is remembered of it."""
    store = _store(name, "model")
    memory = _recall(store)
    if not memory.commit:
        _adopt(store, memory)
    return store / "snapshots" / memory.commit, memory


def front_matter(card: Path) -> dict[str, Any]:
    """Read the fields at the top of a README.md; none if it has none that can be read."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        fields = metadata_load(card)
        return fields if isinstance(fields, dict) else {}
    return {}


def data_set(name: str, config: str | None = None) -> Path:
    """Return a folder that `datasets.load_dataset` reads as it reads the hub name.

    Raises ToolkitError. Not load_dataset(name): it does not check hashes, keeps downloads under
    names that say nothing about the content, and each of its versions retries in another way. Only
    one configuration's files are fetched, as the card names them (config: None for the default); if
    the card names none, all files that can be read as rows: no pictures, models or scripts.
    """
    configs = _configurations_of(name)
    chosen = _chosen(name, configs, config)
    wanted = partial(data_files, patterns=_patterns(chosen))
    snapshot = fetch(name, wanted, kind="dataset")
    files = wanted(_recall(snapshot.parents[1]).files)
    # A folder for each configuration that is named: the cards in them differ.
    plain = snapshot.parents[1] / "rlhf-box" / (snapshot.name if config is None else f"{snapshot.name}-{config}")
    # If a card has several configurations, datasets wants the files of all: it gets another card.
    own_card = len(configs) > 1
    _link(snapshot, plain, [file for file in files if not (own_card and file in card_files(files))])
    if own_card:
        _replace(plain / "README.md", f"---\nconfigs: {json.dumps([chosen])}\n---\n")
    return plain


def rows_wanted(name: str, config: str | None = None) -> Wanted:
    """Return which files of a data set `data_set` fetches; its card, which says so, is fetched."""
    return partial(data_files, patterns=_patterns(_chosen(name, _configurations_of(name), config)))


def _configurations_of(name: str) -> list[dict[str, Any]]:
    return _configurations(fetch(name, card_files, kind="dataset") / "README.md")


def _link(snapshot: Path, plain: Path, files: Sequence[str]) -> None:
    """Make hard links to files of a snapshot: datasets 2.21 does not see the cache's symbolic ones.

    On a file system without links they are copies.
    """
    for file in files:
        place, blob = plain / file, (snapshot / file).resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.samefile(blob) and not _is_copy(place, blob):
            place.unlink(missing_ok=True)  # it links to a damaged blob
        try:
            os.link(blob, place)
        except FileExistsError:  # other ranks do the same
            pass
        except OSError:
            if not place.exists():
                partial_copy = plain.with_name(f"{os.getpid()}.tmp")  # not in `plain`, where it would be read as data
                shutil.copy2(blob, partial_copy)
                os.replace(partial_copy, place)


def _is_copy(place: Path, blob: Path) -> bool:
    place_stat, blob_stat = place.stat(), blob.stat()
    return (place_stat.st_size, place_stat.st_mtime_ns) == (blob_stat.st_size, blob_stat.st_mtime_ns)


def fetch(name: str, wanted: Wanted, *, kind: Kind) -> Path:
    """Return the snapshot folder of a repository, with the wanted files complete and verified.

    Raises ToolkitError. Every rank may call it: the first downloads, the others wait for it and
    find all files there.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
        store = _store(name, kind)
        lock = store.parent / ".locks" / store.name / "rlhf-box.lock"
        if store.is_dir() and not os.access(store, os.W_OK):
            return _fetch(name, wanted, kind, store)
        for each in (store, lock.parent):
            each.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            return _fetch(name, wanted, kind, store)
    except TROUBLES as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, NETWORK):
            raise  # an error of the disk
        raise _refusal(name, kind, _cause(error)) from error


def _store(name: str, kind: Kind) -> Path:
    return Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")


def _fetch(name: str, wanted: Wanted, kind: Kind, store: Path) -> Path:
    memory = _recall(store)
    has_answered = _ask(name, kind, store, memory)
    files = wanted(memory.files)
    try:
        _tried(name, partial(_download, name, kind, store, memory, files), come=partial(_bytes_here, store))
        if has_answered and wanted is model_files:
            with suppress(*TROUBLES):  # nobody needs the card: it says licence and base model
                _download(name, kind, store, memory, [file for file in memory.files if file == "README.md"])
    finally:
        _keep(store, memory)
    return store / "snapshots" / memory.commit


def _ask(name: str, kind: Kind, store: Path, memory: Memory) -> bool:
    """Write the repository's present commit and files into `memory`.

    They stay as they were if the hub does not answer. Returns whether it did.
    """
    has_answered = False
    try:
        info: Any = _tried(name, lambda: HfApi().repo_info(name, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT))
        memory.commit, memory.adopted = str(info.sha), False
        memory.files = [file.rfilename for file in info.siblings or []]
        has_answered = True
    except TROUBLES as error:
        if memory.adopted or not memory.commit:
            _adopt(store, memory)
        status = _status(error)
        if (status is not None and not _may_pass(error)) or not memory.commit:
            raise
        if not isinstance(error, OfflineModeIsEnabled):
            _say(
                f"{constants.ENDPOINT} does not answer ({_line(error)}); "
                f"{name} is taken from the cache, commit {memory.commit[:12]}"
            )
        if memory.adopted:
            _say(
                f"{name} was put into the cache by another program: "
                f"using what is there ({plural(len(memory.files), 'files')}); files may be missing"
            )
    _keep(store, memory)
    return has_answered


def _adopt(store: Path, memory: Memory) -> None:
    """Write into `memory` the snapshot that another program put into the cache, if there is one.

    huggingface_hub keeps no list of a snapshot's files, so the list is what is there.
    """
    with suppress(FileNotFoundError):
        commit = (store / "refs/main").read_text().strip()
        snapshot = store / "snapshots" / commit
        if files := sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()):
            memory.commit, memory.files, memory.adopted = commit, files, True


def _download(name: str, kind: Kind, store: Path, memory: Memory, files: Sequence[str]) -> None:
    def download_one(file: str) -> None:
        _verify(file, Path(hf_hub_download(name, file, repo_type=kind, revision=memory.commit)), memory)

    try:
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(download_one, files))
    except TROUBLES as error:
        # huggingface_hub 0.26 resumes a partial file forever, even one that is already too long.
        if _status(error) == 416 or type(error) is OSError:
            for partial_file in (store / "blobs").glob("*.incomplete"):
                partial_file.unlink(missing_ok=True)
        raise


def _verify(file: str, path: Path, memory: Memory) -> None:
    """Check a file's hash; remove the file and raise _Damaged if it is wrong.

    The cache names each blob by the hub's hash: sha256 for LFS files, else git's sha1.
    """
    if not path.is_symlink():
        return  # a file system without links: the name, and with it the hash, is lost
    # Follow one link only: the blob may itself be a link into a store with other names.
    blob = path.parent / path.readlink()
    state = [blob.stat().st_size, blob.stat().st_mtime_ns]
    if memory.verified.get(blob.name) == state or not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name):
        return
    found = _hash(blob, state[0])
    if found != blob.name:
        for each in (path, blob.resolve(), blob):
            each.unlink(missing_ok=True)
        raise _Damaged(f"{file} has the hash {found}, and the hub says {blob.name}")
    memory.verified[blob.name] = state


def _hash(blob: Path, size: int) -> str:
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with blob.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _recall(store: Path) -> Memory:
    try:
        return Memory(**json.loads((store / "rlhf-box.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return Memory()


def _keep(store: Path, memory: Memory) -> None:
    if os.access(store, os.W_OK):
        _replace(store / "rlhf-box.json", json.dumps(asdict(memory)))


def _replace(path: Path, text: str) -> None:
    partial_file = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial_file.write_text(text)
    os.replace(partial_file, path)


# --- failures -----------------------------------------------------------------------------------


def _tried(name: str, call: Callable[[], T], *, come: Callable[[], int] = lambda: 0) -> T:
    """Try `call` again after failures that may pass; give up after WAITS_S without progress.

    Progress is one chunk (10 MB) more than ever before, by what `come` returns. So a connection
    that breaks again and again, each time further on, is not given up.
    """
    most, waits = come(), iter(WAITS_S)
    while True:
        try:
            return call()
        except TROUBLES as error:
            if not _may_pass(error):
                raise
            if (received := come()) >= most + constants.DOWNLOAD_CHUNK_SIZE:
                most, waits = received, iter(WAITS_S)
            if (wait_s := next(waits, None)) is None:
                raise
            wait_s = max(wait_s, _asked_to_wait_s(_cause(error)))
            _say(f"{name}: {_line(_cause(error))}; trying again in {wait_s:g} s")
        time.sleep(wait_s)


def _bytes_here(store: Path) -> int:
    """Count the bytes of complete and partial files."""
    return sum(blob.stat().st_size for blob in (store / "blobs").glob("*") if blob.is_file())


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, LocalEntryNotFoundError) and HEAD_IS_TRIED_AGAIN:
        return False
    error = _cause(error)
    status = _status(error)
    if status is not None:
        return status in (408, 416, 429) or status >= 500
    if any(isinstance(each, ABSENT) for each in _chain(error)):
        return False
    short = type(error) is OSError and error.errno is None  # a file of another size than promised
    return short or isinstance(error, (_Damaged, NETWORK))


def _cause(error: BaseException) -> BaseException:
    """Return the error behind a LocalEntryNotFoundError, which only says that a HEAD failed."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _asked_to_wait_s(error: BaseException) -> float:
    """Return the answer's Retry-After in seconds; 0.0 if it has none, or a date."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), MOST_ASKED_S) if re.fullmatch("[0-9]+", asked) else 0.0


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _refusal(name: str, kind: Kind, error: BaseException) -> ToolkitError:
    what = f"cannot load {name} from the hub" if kind == "model" else f"cannot load the data set `{name}` from the hub"
    code, status = ExitCode.UNFIT, _status(error)
    why = f"{type(error).__name__}: {error}\nasked: {constants.ENDPOINT}"
    if isinstance(error, OfflineModeIsEnabled):
        hint = "unset HF_HUB_OFFLINE, or fill the cache (HF_HOME) while the hub can be reached"
    elif isinstance(error, HFValidationError) or status in (401, 403, 404):
        code, thing = ExitCode.USAGE, "model" if kind == "model" else "data set"
        hint = f"check the name; HF_TOKEN opens a gated or private {thing}"
    elif isinstance(error, _Damaged):
        hint = "the hub or a proxy on the way sends wrong bytes: set HF_ENDPOINT to another mirror"
    else:
        hint = "set HF_ENDPOINT to a mirror that can be reached from here; the same command resumes from what has come"
    return ToolkitError(what, why=why, hint=hint, exit_code=code)


def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
