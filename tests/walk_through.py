"""docs/walk-through.md as it is typed: its commands in their order, for a box of the tests.

A hub on loopback, or on a network of the tests, has tiny models and rows under the names of the
recipes. Three things differ from what a reader types: the address in `fab add`, the first two
lines, which set this machine up, and the device, since a box of the tests has no GPU.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests import tiny
from tests.pages import commands_of

PAGE = Path(__file__).resolve().parents[1] / "docs/walk-through.md"
SET_UP = [["make", "venv"], ["alias", "fab=.venv/bin/fab"]]
HERE = ".venv/bin/rlhf-train"
BOX = "gpu-box"
FAMILY = {**tiny.OPT, "max_position_embeddings": 512}  # the recipes' rows have up to 512 tokens


def commands(entry: Mapping[str, Any]) -> Iterator[list[str]]:
    """The page's commands after the set-up. entry: the box's, as in boxes.yaml."""
    words_of_page = list(commands_of(PAGE.read_text(encoding="utf-8")))
    assert words_of_page[:2] == SET_UP
    for words in words_of_page[2:]:
        if words[:2] == ["fab", "add"]:
            assert words[2:4] == [BOX, "ssh -p 41022 root@connect.example.com"]
            ssh = ["ssh", "-i", entry["key"], "-p", str(entry["port"]), f"{entry['user']}@{entry['address']}"]
            yield [*words[:3], shlex.join(ssh), *words[4:], "--data-folder", entry["data_folder"]]
        else:
            yield [*words, *(["--set", "hardware.device=cpu"] if "--job" in words else [])]


def fill_hub(root: Path) -> None:
    """Put a tiny model and rows where the recipes look for theirs.

    As transformers 4 writes a tokenizer, which a bare box has.
    """
    from transformers import OPTConfig, OPTForCausalLM

    from rlhf_train.models.networks import train_tokenizer

    tokenizer = train_tokenizer([" ".join(tiny.WORDS)], 320)
    config = {key: value for key, value in FAMILY.items() if key != "model_type"}
    for name in ("opt-1.3b", "opt-350m"):
        folder = root / "models/facebook" / name
        OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **config)).save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (root / "datasets/Dahoas").mkdir(parents=True)
    tiny.write_rows(root / "datasets/Dahoas/rm-static", train=60, held_out=8)
