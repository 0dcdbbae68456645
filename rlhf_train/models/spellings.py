"""Write what transformers 4 and 5 spell differently in a model's folder in both spellings.

A folder that only one of them wrote is refused by the other, or is silently another model there:
transformers 4 takes rope_theta 10,000 where it finds `rope_parameters` alone, and no chat template
where that is a file of its own. vLLM reads with the transformers that it was released with.

Where a file has both spellings, the old one is the truth: transformers 5 never writes it, and
transformers 4 carries the new one along unread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_train.disk import read_json, write_json

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
TEMPLATE, OTHER_TEMPLATES = "chat_template.jinja", "additional_chat_templates"

# Both read tokenizer.json with it as it is. A model's own class builds parts of it again from rules
# of its own, which are not those of the other version. transformers 5 writes `TokenizersBackend`.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Families whose config, in transformers 4, has names of its own for what `rope_parameters` holds.
OWN_ROPE_NAMES = {"gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}}
# Families whose config, in transformers 4, refuses a `rope_scaling` of more fields than these.
ROPE_SCALING_FIELDS = {"olmo": ("type", "factor"), "phi3": ("type", "short_factor", "long_factor")}
OLD_NAMES = {"dtype": "torch_dtype", "rope_parameters": "rope_theta"}  # by the new ones
ROPE_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json in both spellings: of its dtype, and of its RoPE."""
    found = {**fields, **_dtype(fields), **_rope(fields)}
    if isinstance(text := fields.get("text_config"), dict):
        found["text_config"] = config(text)
    return found


def with_dtype(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config's fields with the dtype of its weights: `float32`, `bfloat16`."""
    return {**fields, "torch_dtype": dtype, "dtype": dtype}


def _dtype(fields: Mapping[str, Any]) -> dict[str, Any]:
    dtype = fields.get("torch_dtype") or fields.get("dtype")
    return {"torch_dtype": dtype, "dtype": dtype} if isinstance(dtype, str) else {}


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = OWN_ROPE_NAMES.get(str(fields.get("model_type")), {})
    if fields.get("rope_theta") is not None:
        return _new_rope(fields)
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    by_layer_type = rope.get("full_attention")
    old = _old_rope(by_layer_type if isinstance(by_layer_type, dict) else rope, str(fields.get("model_type")))
    sliding = rope.get("sliding_attention")
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        old["rope_local_base_freq"] = sliding["rope_theta"]  # Gemma 3's
    return old | {name: old[meaning] for name, meaning in names.items() if meaning in old}


def _old_rope(rope: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    old = {name: rope[name] for name in ROPE_NOT_SCALING if rope.get(name) is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        scaling = {**rope, "rope_type": kind, "type": kind}
        wanted = ROPE_SCALING_FIELDS.get(model_type, [name for name in scaling if name not in ROPE_NOT_SCALING])
        old["rope_scaling"] = {name: scaling[name] for name in wanted if name in scaling}
    return old


def _new_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_local_base_freq" in fields:
        return {}  # Gemma 3's are those of two kinds of layers
    scaling = fields.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rope = {name: value for name, value in scaling.items() if name != "type"} | {"rope_type": kind}
    rope |= {name: fields[name] for name in ROPE_NOT_SCALING if fields.get(name) is not None}
    found: dict[str, Any] = {"rope_parameters": rope}
    if scaling and str(fields.get("model_type")) not in ROPE_SCALING_FIELDS:
        found["rope_scaling"] = {**scaling, "rope_type": kind, "type": kind}
    return found


def misread_by_4(fields: Mapping[str, Any]) -> str:
    """Say what in a config transformers 4.46 reads, and computes otherwise; empty: nothing.

    It takes YaRN's first length from max_position_embeddings, and, with PyTorch's attention,
    Qwen2's window for all layers.
    """
    both = config(fields)
    positions, scaling = both.get("max_position_embeddings"), both.get("rope_scaling") or {}
    first = scaling.get("original_max_position_embeddings", positions)
    if scaling.get("rope_type", scaling.get("type")) == "yarn" and first != positions:
        return f"its rope_scaling is YaRN from {first} positions to {positions}"
    window = both.get("sliding_window")
    if both.get("model_type") == "qwen2" and both.get("use_sliding_window") and window and window < (positions or 0):
        return f"some of its layers look at {window} tokens only"
    return ""


def tokenizer_config(
    fields: Mapping[str, Any], templates: Mapping[str, str], *, has_tokenizer_json: bool = True
) -> dict[str, Any]:
    """Return the fields of a tokenizer_config.json as both read them.

    templates: chat templates that are files of their own, by name. Without tokenizer.json the
    tokenizer's own class stays. What the two have other defaults for is written out.
    """
    found = {"clean_up_tokenization_spaces": False, "padding_side": "right", **fields}
    # No model here takes token_type_ids, which transformers 4 has by default.
    found["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(extra := fields.get("extra_special_tokens"), list):
        # Under this name, transformers 4.51 and 4.57 fail at a list.
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = [*fields.get("additional_special_tokens", []), *extra]
    if templates:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        found["chat_template"] = templates["default"] if set(templates) == {"default"} else named
    if has_tokenizer_json:
        found["tokenizer_class"] = TOKENIZER_CLASS
    return found


def _templates(folder: Path) -> dict[str, str]:
    """Read the chat templates that are files of their own, by name."""
    others = {path.stem: path for path in sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))}
    named = {"default": folder / TEMPLATE, **others}
    return {name: path.read_text(encoding="utf-8") for name, path in named.items() if path.is_file()}


def write_both(folder: Path, *, dtype: str | None = None, padding_side: str | None = None) -> None:
    """Rewrite the config of a model and of its tokenizer in a folder, in both spellings.

    dtype: of the saved weights, e.g. `bfloat16`. padding_side: of the tokenizer, whose class has a
    default of its own.
    """
    if (fields := read_json(folder / CONFIG)) is not None:
        write_json(folder / CONFIG, config(fields if dtype is None else with_dtype(fields, dtype)))
    if (fields := read_json(folder / TOKENIZER_CONFIG)) is not None:
        side = {} if padding_side is None else {"padding_side": padding_side}
        both = _tokenizer_config_of(folder, fields | side)
        write_json(folder / TOKENIZER_CONFIG, both)
        if isinstance(template := both.get("chat_template"), str):
            (folder / TEMPLATE).write_text(template, encoding="utf-8")


def _tokenizer_config_of(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    return tokenizer_config(fields, _templates(folder), has_tokenizer_json=(folder / "tokenizer.json").is_file())


@contextmanager
def readable(folder: Path) -> Iterator[Path]:
    """Yield a folder that transformers 4 reads as what it is, also if transformers 5 wrote it.

    It is `folder` itself, or one of links to its files, but for those that transformers 5 spelled
    in its own way only.
    """
    rewritten = _old_spellings(folder)
    if not rewritten:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        for file in folder.iterdir():
            if file.name not in rewritten:
                Path(name, file.name).symlink_to(file.resolve())
        for file_name, fields in rewritten.items():
            write_json(Path(name, file_name), fields)
        yield Path(name)


def _old_spellings(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the files of a folder that transformers 5 wrote and 4 would misread, rewritten."""
    found: dict[str, dict[str, Any]] = {}
    fields = read_json(folder / CONFIG) or {}
    if any(new in fields and old not in fields for new, old in OLD_NAMES.items()):
        found[CONFIG] = config(fields)
    fields = read_json(folder / TOKENIZER_CONFIG) or {}
    lacks_template = "chat_template" not in fields and bool(_templates(folder))
    # `backend` is a field that transformers 5 writes for each of its classes.
    if lacks_template or "backend" in fields or fields.get("tokenizer_class") == "TokenizersBackend":
        found[TOKENIZER_CONFIG] = _tokenizer_config_of(folder, fields)
    return found
