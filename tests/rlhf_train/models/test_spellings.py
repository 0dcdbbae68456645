"""Both spellings of a model's files, by hand; tests/integration/test_stacks.py loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_train.disk import read_json
from rlhf_train.models import spellings

pytestmark = pytest.mark.pinned

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"short_factor": [1.0], "long_factor": [2.0]}
# What transformers 5 writes, what transformers 4 reads of it.
NEW_AND_OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta": (
        {"model_type": "llama", "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}},
        {"rope_theta": 1e5},
    ),
    "llama 3.1": (
        {"model_type": "llama", "rope_parameters": {**LLAMA_3, "rope_theta": 5e5, "rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA_3, "rope_type": "llama3", "type": "llama3"}},
    ),
    "a part of each head": (
        {
            "model_type": "phi",
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
        },
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "names of its own": (
        {
            "model_type": "gpt_neox",
            "rope_parameters": {"rope_theta": 5e4, "rope_type": "default", "partial_rotary_factor": 0.25},
        },
        {"rope_theta": 5e4, "partial_rotary_factor": 0.25, "rotary_emb_base": 5e4, "rotary_pct": 0.25},
    ),
    "three fields, no more": (
        {
            "model_type": "phi3",
            "rope_parameters": {
                **LONG,
                "rope_theta": 1e4,
                "rope_type": "longrope",
                "original_max_position_embeddings": 9,
            },
        },
        {"rope_theta": 1e4, "rope_scaling": {**LONG, "type": "longrope"}},
    ),
    "two kinds of layers": (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
        },
    ),
    "dtype": ({"model_type": "opt", "dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
    "neither": ({"model_type": "gpt2", "n_embd": 8}, {}),
}


@pytest.mark.parametrize("name", NEW_AND_OLD)
def test_what_transformers_5_wrote_gets_the_old_spelling(name: str) -> None:
    new, old = NEW_AND_OLD[name]
    assert spellings.config(new) == new | old


@pytest.mark.parametrize("name", [name for name in NEW_AND_OLD if name != "two kinds of layers"])
def test_what_transformers_4_wrote_gets_the_new_spelling(name: str) -> None:
    new, old = NEW_AND_OLD[name]
    rope = {key: value for key, value in new.get("rope_parameters", {}).items() if not key.startswith("original")}
    both = spellings.config({"model_type": new["model_type"], **old})
    expected = {key: value for key, value in new.items() if key not in ("rope_parameters", "n_embd")} | old
    if rope:
        expected["rope_parameters"] = rope if name != "llama 3.1" else new["rope_parameters"]
    assert both == expected


def test_the_old_spelling_is_the_truth_where_both_are_there() -> None:
    """transformers 4 loads both, changes what it knows, and saves the other as it was."""
    stale = {
        "torch_dtype": "float32",
        "dtype": "bfloat16",
        "rope_theta": 1e5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    both = spellings.config(stale)
    assert (both["torch_dtype"], both["dtype"]) == ("float32", "float32")
    assert both["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e5}


def test_the_text_part_of_a_model_that_also_sees() -> None:
    both = spellings.config({"text_config": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}})
    assert both["text_config"]["rope_theta"] == 1e6


def test_special_tokens_have_the_name_that_both_know() -> None:
    both = spellings.tokenizer_config({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}, {})
    assert both == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    named = {"extra_special_tokens": {"image_token": "<i>"}, "padding_side": "left"}
    both = spellings.tokenizer_config(named, {}, has_tokenizer_json=False)
    assert both["extra_special_tokens"] == {"image_token": "<i>"} and both["padding_side"] == "left"
    assert "tokenizer_class" not in both


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_a_template_of_its_own_file_stands_in_the_tokenizers_config_too(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer_config.json": {}, "tokenizer.json": {}, "chat_template.jinja": "{{ a }}\n"})
    spellings.write_both(tmp_path, padding_side="left")
    fields = read_json(tmp_path / "tokenizer_config.json")
    assert (fields["chat_template"], fields["padding_side"]) == ("{{ a }}\n", "left")
    write(tmp_path, {"additional_chat_templates/tool_use.jinja": "{{ b }}"})
    spellings.write_both(tmp_path)
    assert read_json(tmp_path / "tokenizer_config.json")["chat_template"] == [
        {"name": "default", "template": "{{ a }}\n"},
        {"name": "tool_use", "template": "{{ b }}"},
    ]


def test_a_template_in_the_tokenizers_config_gets_a_file_too(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer_config.json": {"chat_template": "{{ a }}"}})
    spellings.write_both(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ a }}"


def test_the_dtype_is_that_of_the_weights(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {"dtype": "bfloat16", "torch_dtype": "bfloat16"}})
    spellings.write_both(tmp_path, dtype="float32")
    assert read_json(tmp_path / "config.json") == {"dtype": "float32", "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("files", "rewritten"),
    [
        ({"config.json": {"rope_theta": 1e5, "torch_dtype": "float16"}}, []),
        ({"config.json": {"rope_theta": 1e5, "dtype": "float16"}}, ["config.json"]),
        ({"config.json": {"rope_parameters": {"rope_theta": 1e5}, "torch_dtype": "float16"}}, ["config.json"]),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, []),
        ({"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "backend": "x"}}, ["tokenizer_config.json"]),
        ({"tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"}}, ["tokenizer_config.json"]),
        ({"tokenizer_config.json": {}, "chat_template.jinja": "{{ a }}"}, ["tokenizer_config.json"]),
        ({"tokenizer_config.json": {"chat_template": "{{ a }}"}, "chat_template.jinja": "{{ a }}"}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_transformers_4_is_shown_a_folder_that_it_reads(
    tmp_path: Path, files: dict[str, Any], rewritten: list[str]
) -> None:
    write(tmp_path, {**files, "tokenizer.json": "{}", "model.safetensors": "weights"})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with spellings.readable(tmp_path) as folder:
        shown = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert (folder == tmp_path) == (not rewritten)
    assert [name for name in shown if shown[name] != before[name]] == rewritten
    assert shown.keys() == before.keys()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    if folder != tmp_path:
        assert not folder.exists()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_position_embeddings": 131072, "rope_scaling": YARN}, "YaRN from 32768 positions to 131072"),
        ({"max_position_embeddings": 131072, "rope_parameters": YARN}, "YaRN from 32768 positions to 131072"),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, ""),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_position_embeddings": 9}, "8 t"),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8, "max_position_embeddings": 9}, ""),
        ({"model_type": "mistral", "sliding_window": 8, "max_position_embeddings": 9}, ""),
    ],
)
def test_what_transformers_4_computes_otherwise(fields: dict[str, Any], words: str) -> None:
    found = spellings.misread_by_4(fields)
    assert words in found and bool(words) == bool(found)
