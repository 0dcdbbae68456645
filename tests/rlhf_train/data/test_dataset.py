"""Expected tokens and positions are counted by hand: the tests' tokenizer has one token a byte."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import Data, DataSet
from rlhf_train.data import dataset, encoder, reading, tokens
from rlhf_train.data.forms import Row
from rlhf_train.data.ragged import Ragged
from tests.hub import TOKEN, Hub

pytestmark = pytest.mark.pinned

ROOT = Path(__file__).parents[3]
HH_RM_MINI = ROOT.parent / "shared/data/hh-rm-mini"
PAD, EOS = 0, 1
KINDS = ".jsonl, .json, .csv or .parquet file (.gz, too)"
ONE_ROW = [{"prompt": "p", "chosen": "c", "rejected": "r"}]


def bytes_tokenizer() -> Tokenizer:
    """`<pad>` 0, `</s>` 1, then one token a byte: no room in the vocabulary for a merge.

    `</s>` goes in front, as OPT's BOS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["some words"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", EOS)]
    )
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return wrapped(bytes_tokenizer())


def letters(text: str) -> list[int]:
    """Look up the ids of printable ASCII one by one.

    Byte-level BPE writes a byte of ASCII as itself, a space as Ġ and a line break as Ċ.
    """
    vocabulary = bytes_tokenizer().get_vocab()
    return [vocabulary[{" ": "Ġ", "\n": "Ċ"}.get(letter, letter)] for letter in text]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"q{i}", "chosen": f"yes{i}", "rejected": f"no{i}"} for i in range(start, start + n)]


def folder_of(path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
    write(path / "train.jsonl", train)
    write(path / "test.jsonl", test)
    return path


def spec_for(*datasets: Path | str, **fields: Any) -> Data:
    return Data(datasets=tuple(map(str, datasets)), **{"split": (1.0, 1.0, 1.0), **fields})


def prepared(
    spec: Data, tokenizer: Any, tmp_path: Path, say: Callable[[str], None] = lambda line: None
) -> dataset.Corpus:
    return dataset.prepare(spec, tokenizer, cache=tmp_path / "cache", say=say)


def read_rows(name: str, search: list[Path], **entry: Any) -> tuple[list[Row], list[Row]]:
    train, held_out = reading.read(DataSet(name=name, **entry), search)
    return [*train.rows], [*held_out.rows] if held_out else []


def rows(ragged: Ragged) -> list[list[int]]:
    return [ragged[i].tolist() for i in range(len(ragged))]


def chunk_files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache/tokens").rglob("*") if path.is_file())


# --- Ragged -------------------------------------------------------------------------------------


def test_ragged_is_a_list_of_lists() -> None:
    ragged = Ragged.of([[1, 2], [], [3, 4, 5]])
    assert (str(ragged.values.dtype), str(ragged.offsets.dtype)) == ("int32", "int64")
    assert (len(ragged), ragged.offsets.tolist(), ragged.lengths.tolist()) == (3, [0, 2, 2, 5], [2, 0, 3])
    assert ragged[-1].tolist() == [3, 4, 5]
    with pytest.raises(IndexError):
        ragged[3]
    assert rows(ragged.pick(np.array([2, 0, 1, 2]), 2)) == [[3, 4], [1, 2], [], [3, 4]]
    assert rows(Ragged.join([ragged, ragged])) == 2 * rows(ragged)


# --- reading ------------------------------------------------------------------------------------


def test_response_defaults_to_chosen_and_other_columns_are_ignored(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl", [*ONE_ROW, {"prompt": "p", "response": "s", "chosen": "c", "rejected": "r", "score": 1}]
    )
    assert read_rows("a.jsonl", [tmp_path]) == ([("p", "c", "c", "r"), ("p", "s", "c", "r")], [])


def test_lines_end_at_newlines_only_and_may_be_blank_at_the_end(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a\u2028b\u0085c", "chosen": "c", "rejected": "r"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"{line}\r\n\r{line}\n\n \n".encode())
    train, _ = read_rows("a.jsonl", [tmp_path])
    assert [row.prompt for row in train] == ["a\u2028b\u0085c"] * 2


GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}'


@pytest.mark.parametrize(
    ("line", "mistakes"),
    [
        # Bytes 1-12 are `{"prompt": "`, then two of the é.
        (b'{"prompt": "\xc3\xa9\xff"}', ["column 15 (in bytes): not UTF-8: byte 0xff"]),
        # Characters 1-12 the same, é is 13, `"` 14, a space 15.
        ('{"prompt": "é" 7}'.encode(), ["column 16: not JSON: Expecting ',' delimiter"]),
        (
            b"[" * 100_000,
            [
                "column 1: no JSON that can be read: "
                "maximum recursion depth exceeded while decoding a JSON array from a unicode string"
            ],
        ),
        (b'["p", "c"]', ['column 1: a row is an object with prompt, chosen, rejected, not ["p", "c"]']),
        (b'{"prompt": "p", "chosen": "c"}', ["column `rejected`: missing; the row has prompt, chosen"]),
        (
            b'{"prompt": null, "chosen": 5, "rejected": "r"}',
            ["column `prompt`: text is wanted, not null", "column `chosen`: text is wanted, not 5"],
        ),
        (GOOD[:-1] + b', "response": ["a"]}', ['column `response`: text is wanted, not ["a"]']),
        (
            GOOD[:-1] + b', "response": "a\\udc80"}',
            ['column `response`: "\\udc80" is half a character (a lone surrogate)'],
        ),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_column(tmp_path: Path, line: bytes, mistakes: list[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD]))
    with pytest.raises(ToolkitError) as caught:
        read_rows("a.jsonl", [tmp_path])
    assert (caught.value.what, caught.value.exit_code) == (f"bad rows in {file}", ExitCode.USAGE)
    assert [_without_recursion(line) for line in caught.value.why.splitlines()] == [
        f"line 3, {_without_recursion(mistake)}" for mistake in mistakes
    ]


def _without_recursion(line: str) -> str:
    return line.partition("maximum recursion")[0]  # the words after it differ between Pythons


def test_an_error_as_it_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "p", "chosen": null, "rejected": 7}\n{"prompt"}\n')
    with pytest.raises(ToolkitError) as caught:
        read_rows("a.jsonl", [tmp_path])
    assert str(caught.value).splitlines() == [
        f"error: bad rows in {file}",
        "  why: line 1, column `chosen`: text is wanted, not null",
        "       line 1, column `rejected`: text is wanted, not 7",
        "       line 2, column 10: not JSON: Expecting ':' delimiter",
        "",
        "hint: pairs of text: every row needs prompt, chosen, rejected; docs/models-and-data.md shows each form",
    ]


def test_ten_mistakes_of_a_file_are_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(str(number).encode() for number in range(12)))
    with pytest.raises(ToolkitError) as caught:
        read_rows("a.jsonl", [tmp_path])
    shown = caught.value.why.splitlines()
    assert len(shown) == 11
    assert shown[0].startswith("line 1, column 1: a row is an object") and shown[0].endswith("not 0")
    assert shown[9].endswith("not 9") and shown[10] == "(no more than 10 are shown)"


@pytest.mark.parametrize(
    ("count", "places"),
    [(1, "line 2"), (2, "lines 2 and 3"), (3, "lines 2, 3 and 4"), (40, "lines 2, 3, 4 and 37 more")],
)
def test_the_same_mistake_of_many_lines_is_one_line(tmp_path: Path, count: int, places: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, *[b'{"prompt": "p", "chosen": "c"}'] * count]))
    with pytest.raises(ToolkitError) as caught:
        read_rows("a.jsonl", [tmp_path])
    assert caught.value.why == f"{places}, column `rejected`: missing; the row has prompt, chosen"


def test_a_mark_of_byte_order_blank_lines_and_gz_are_read(tmp_path: Path) -> None:
    """pandas, datasets and jq read all of them."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n\n  \r\n" + GOOD + b"\r\n\n")
    expected, _ = read_rows("a.jsonl", [tmp_path])
    assert len(expected) == 2
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert read_rows("b.jsonl.gz", [tmp_path]) == (expected, [])
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ToolkitError, match="cannot read "):
        read_rows("c.jsonl.gz", [tmp_path])


def test_single_files_of_other_kinds_hold_the_same_rows(tmp_path: Path) -> None:
    import pandas

    rows = [{"prompt": "p", "chosen": "None", "rejected": "N/A"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    table = pandas.DataFrame(rows)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    expected = [Row("p", "None", "None", "N/A"), Row("q", "c", "c", "d")]
    for name in ("a.csv", "a.csv.gz", "a.parquet", "a.json"):
        assert read_rows(name, [tmp_path]) == (expected, []), name


def test_a_folder_gives_train_files_in_order_and_the_first_kind_of_held_out_files(tmp_path: Path) -> None:
    for i, name in enumerate(["train-1", "train-0", "validation", "eval", "other"]):
        write(tmp_path / "d" / f"{name}.jsonl", numbered(1, start=i))
    train, held_out = read_rows("d", [tmp_path])
    assert ([row.prompt for row in train], [row.prompt for row in held_out]) == (["q1", "q0"], ["q2"])
    write(tmp_path / "d/test.jsonl", numbered(1, start=9))
    assert [row.prompt for row in read_rows("d", [tmp_path])[1]] == ["q9"]


def test_a_path_is_looked_for_in_each_folder_in_order(tmp_path: Path) -> None:
    write(tmp_path / "2/a.jsonl", numbered(1, start=2))
    search = [tmp_path / "1", tmp_path / "2"]
    assert read_rows("a.jsonl", search)[0][0].prompt == "q2"
    write(tmp_path / "1/a.jsonl", numbered(1, start=1))
    assert read_rows("a.jsonl", search)[0][0].prompt == "q1"
    assert read_rows(str(tmp_path / "2/a.jsonl"), search)[0][0].prompt == "q2"


@pytest.mark.parametrize("name", ["./here", "../here", "/here/and/there", "a/b/c", "a/b.jsonl", "~/rows"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolkitError) as caught:
        next(dataset.texts(spec_for(name)))
    assert caught.value.what == f"there is no data set `{name}`"
    path = Path(name).expanduser()
    assert caught.value.why.splitlines() == list(dict.fromkeys([f"no {tmp_path / path}", f"no {ROOT / path}"]))


def test_files_that_give_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    write(tmp_path / "folder/rows.jsonl", ONE_ROW)
    write(tmp_path / "rows.txt", ONE_ROW)
    expected = {
        "empty.jsonl": (f"no rows in {tmp_path}/empty.jsonl", ""),
        "folder": ("no training rows in `folder`", f"there is no train*.jsonl in {tmp_path}/folder"),
        "rows.txt": ("no training rows in `rows.txt`", f"{tmp_path}/rows.txt is no {KINDS}"),
    }
    for name, what_and_why in expected.items():
        with pytest.raises(ToolkitError) as caught:
            read_rows(name, [tmp_path])
        assert (caught.value.what, caught.value.why) == what_and_why


def test_texts_are_those_of_the_training_rows_once_each(tmp_path: Path) -> None:
    first = folder_of(
        tmp_path / "a",
        [{"prompt": "p", "response": "s", "chosen": "c", "rejected": "r"}, *ONE_ROW],
        [{**ONE_ROW[0], "prompt": "held"}],
    )
    assert list(dataset.texts(spec_for(first))) == ["p", "s", "c", "r", "p", "c", "r"]


# --- held-out rows ------------------------------------------------------------------------------


def test_without_a_held_out_split_five_percent_of_the_rows_are_held_out_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", numbered(60))

    def split(seed: int) -> tuple[list[str], list[str]]:
        train, held_out = dataset._read(DataSet(name=str(tmp_path / "a.jsonl")), seed)
        return [str(row.prompt) for row in train.rows], [str(row.prompt) for row in held_out.rows]

    train, held_out = split(1)
    assert len(held_out) == 3
    assert sorted(train + held_out) == sorted(f"q{i}" for i in range(60))
    assert split(1) == (train, held_out)
    assert split(2)[1] != held_out
    write(tmp_path / "a.jsonl", numbered(3))
    assert len(split(1)[1]) == 1
    write(tmp_path / "a.jsonl", ONE_ROW)
    with pytest.raises(ToolkitError, match="is too small"):
        split(1)


def test_held_out_rows_serve_each_step_and_identical_answers_are_not_pairs(tmp_path: Path, tokenizer: Any) -> None:
    test = [*numbered(1), {"prompt": "p", "chosen": "same", "rejected": "same"}, *numbered(4, start=2)]
    folder = folder_of(tmp_path / "d", numbered(9), test)
    shuffled = [2, 1, 4, 0, 3, 5]  # numpy: RandomState(1).shuffle of arange(6)
    found = prepared(spec_for(folder, seed=1), tokenizer, tmp_path).held_out.step_rows
    assert {step: order.tolist() for step, order in found.items()} == {1: shuffled, 2: [2, 4, 0, 3, 5], 3: shuffled}
    found = prepared(spec_for(folder, seed=1, eval_rows=3), tokenizer, tmp_path).held_out.step_rows
    assert {step: order.tolist() for step, order in found.items()} == {1: [2, 1, 4], 2: [2, 4, 0], 3: [2, 1, 4]}


# --- the split of the steps ---------------------------------------------------------------------


def deepspeed_chat_split(n: int, shares: str, seed: int) -> list[list[int]]:
    """Split rows as DeepSpeed-Chat's data_utils.py does, but without files.

    See get_raw_dataset_split_index and get_shuffle_idx there.
    """
    splits = [float(s) for s in shares.split(",")]
    splits = [split / sum(splits) for split in splits]
    splits_index = [0]
    for index, split in enumerate(splits):
        splits_index.append(splits_index[index] + round(split * float(n)))
    diff = splits_index[-1] - n
    for index in range(1, len(splits_index)):
        splits_index[index] -= diff
    shuffle_idx = np.arange(n, dtype=np.uint32)
    np.random.RandomState(seed=seed).shuffle(shuffle_idx)
    return [shuffle_idx[splits_index[i] : splits_index[i + 1]].tolist() for i in range(len(splits))]


def test_ten_rows_are_split_as_by_hand() -> None:
    # RandomState(1234).shuffle of arange(10) is 7 2 9 1 0 8 4 5 6 3; cut after 2 and 2 + 4.
    assert [part.tolist() for part in dataset._shares(10, (2, 4, 4), 1234)] == [[7, 2], [9, 1, 0, 8], [4, 5, 6, 3]]


@pytest.mark.parametrize(
    ("n", "split", "sizes"),
    [
        (76256, (2, 4, 4), [15252, 30502, 30502]),  # rm-static: 15251 + 30502 + 30502 lacks 1, which goes to the first
        (5, (1, 1, 1), [1, 2, 2]),  # 2 + 2 + 2 has 1 too many
        (8, (1, 0, 0), [8, 0, 0]),
        (3, (0, 5, 5), [0, 1, 2]),  # a cut point of -1 there: see _shares
    ],
)
def test_sizes_of_the_parts(n: int, split: tuple[float, ...], sizes: list[int]) -> None:
    parts = dataset._shares(n, split, seed=1234)
    assert [len(part) for part in parts] == sizes
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))


def test_the_split_is_deepspeed_chats() -> None:
    for n in [1, 2, 7, 100, 1001, 76256]:
        for shares in ["2,4,4", "1,1,1", "6,2,2", "10,0,0"]:
            ours = dataset._shares(n, tuple(map(float, shares.split(","))), seed=42)
            assert [part.tolist() for part in ours] == deepspeed_chat_split(n, shares, seed=42)


def test_several_data_sets_are_split_each_and_mixed(tmp_path: Path, tokenizer: Any) -> None:
    first, second = (
        folder_of(tmp_path / "1", numbered(10), ONE_ROW),
        folder_of(tmp_path / "2", numbered(5, start=10), ONE_ROW),
    )
    alone = prepared(spec_for(first, split=(2.0, 4.0, 4.0), seed=7), tokenizer, tmp_path).train
    assert [order.tolist() for order in alone.step_rows.values()] == deepspeed_chat_split(10, "2,4,4", 7)
    found = prepared(spec_for(first, second, split=(2.0, 4.0, 4.0), seed=7), tokenizer, tmp_path).train
    for step in (1, 2, 3):
        joined = deepspeed_chat_split(10, "2,4,4", 7)[step - 1] + [
            10 + row for row in deepspeed_chat_split(5, "2,4,4", 7)[step - 1]
        ]
        again = np.arange(len(joined), dtype=np.uint32)
        np.random.RandomState(7).shuffle(again)
        assert found.step_rows[step].tolist() == [joined[i] for i in again]
    assert found.prompt[12].tolist() == [EOS, *letters("q12")]


def test_a_share_of_zero_is_no_error_but_a_step_without_rows_is(tmp_path: Path, tokenizer: Any) -> None:
    same = [{"prompt": f"p{number}", "chosen": "c", "rejected": "c"} for number in range(4)]
    folder = folder_of(tmp_path / "d", same, [row | {"prompt": "held out"} for row in same])
    assert [
        len(order)
        for order in prepared(spec_for(folder, split=(1.0, 0.0, 1.0)), tokenizer, tmp_path).train.step_rows.values()
    ] == [2, 0, 2]
    with pytest.raises(ToolkitError) as caught:
        prepared(spec_for(folder, split=(1.0, 2.0, 1.0)), tokenizer, tmp_path)
    assert caught.value.what == "step 2 has no training rows left"
    row_counts = (
        "rows 4, empty_prompt 0, empty_answer 0, prompt_too_long 0, identical_answers 4, answer_cut 0, "
        "duplicate 0, prompt_held_out 0, control_token 0"
    )
    assert caught.value.why == f"its share of the training data: 2 rows; all training data: {row_counts}"
    with pytest.raises(ToolkitError, match="step 1 has no held-out rows left"):
        prepared(
            spec_for(folder_of(tmp_path / "e", numbered(4), [{"prompt": " ", "chosen": "a", "rejected": "b"}])),
            tokenizer,
            tmp_path,
        )


def test_a_digest_is_of_the_rows_that_a_step_learns(tmp_path: Path, tokenizer: Any) -> None:
    """Each step's own rows and columns, in its order."""
    plain = numbered(12)
    table = prepared(spec_for(write(tmp_path / "plain.jsonl", plain)), tokenizer, tmp_path).train
    # By prompt: the rows that are held out may come before.
    first, second, third = (tokenizer.decode(table.prompt[int(table.step_rows[step][0])][1:]) for step in (1, 2, 3))

    def digests(changed: str = "", column: str = "", **fields: Any) -> list[str]:
        rows = [{**row, column: "other"} if row["prompt"] == changed else row for row in plain]
        table = prepared(spec_for(write(tmp_path / "rows.jsonl", rows), **fields), tokenizer, tmp_path).train
        return [table.digest(step) for step in (1, 2, 3)]

    def differ(*arguments: str, **fields: Any) -> list[int]:
        return [
            step
            for step, (old, new) in enumerate(zip(digests(), digests(*arguments, **fields), strict=True), 1)
            if old != new
        ]

    assert differ() == []
    assert (differ(first, "chosen"), differ(first, "rejected")) == ([1], [])
    assert (differ(second, "chosen"), differ(second, "rejected")) == ([2], [2])
    assert (differ(third, "chosen"), differ(third, "prompt")) == ([], [3])
    assert differ(seed=99) == [1, 2, 3]


# --- row_counts ---------------------------------------------------------------------------------

A, B = "a" * 9, "b" * 9
# In tokens, a prompt has BOS and its bytes, an answer its bytes and EOS. The test's limits: 6, 10.
FATES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "12345", "chosen": A, "rejected": B}, "fits"),
    ({"prompt": "12345", "chosen": A, "rejected": B}, "fits"),  # an exact duplicate is fine
    ({"prompt": "123456", "chosen": A, "rejected": B}, "prompt_too_long"),
    ({"prompt": "", "chosen": A, "rejected": B}, "empty_prompt"),
    ({"prompt": " \n", "chosen": "", "rejected": B}, "empty_prompt"),
    ({"prompt": "p", "chosen": "", "rejected": B}, "empty_answer"),
    ({"prompt": "123456", "chosen": A, "rejected": "\t "}, "empty_answer"),
    ({"prompt": "p", "response": " ", "chosen": A, "rejected": B}, "empty_answer"),
    ({"prompt": "p", "chosen": A + "c", "rejected": B}, "answer_cut"),
    ({"prompt": "p", "chosen": A, "rejected": B + "c"}, "answer_cut"),
    ({"prompt": "p", "response": A + "c", "chosen": A, "rejected": B}, "answer_cut"),
    ({"prompt": "p", "chosen": A, "rejected": A}, "identical_answers"),
    # Alike after cutting: 9 + c.
    ({"prompt": "p", "chosen": A + "cd", "rejected": A + "ce"}, "identical_answers and answer_cut"),
    ({"prompt": "p", "chosen": A + "c", "rejected": A + "d"}, "answer_cut"),
    # A row that is left out counts once.
    ({"prompt": "123456", "chosen": A + "c", "rejected": A + "c"}, "prompt_too_long"),
]


def test_the_fate_of_each_row(tmp_path: Path, tokenizer: Any) -> None:
    folder = folder_of(tmp_path / "d", [row for row, _ in FATES], numbered(3))
    table = prepared(
        spec_for(folder, split=(1.0, 0.0, 0.0), max_prompt_tokens=6, max_response_tokens=10), tokenizer, tmp_path
    ).train
    counted = Counter(fate for _, row_counts in FATES for fate in row_counts.split(" and ") if fate != "fits")
    more = {"duplicate": 1, "prompt_held_out": 0, "control_token": 0}
    assert table.row_counts == {"rows": 15, **counted, **more}
    left_out = {i for i, (_, fate) in enumerate(FATES) if fate in ("empty_prompt", "empty_answer", "prompt_too_long")}
    assert sorted(table.step_rows[1].tolist()) == [i for i in range(15) if i not in left_out]
    pairs = prepared(
        spec_for(folder, split=(0.0, 1.0, 0.0), max_prompt_tokens=6, max_response_tokens=10), tokenizer, tmp_path
    ).train
    assert sorted(pairs.step_rows[2].tolist()) == [i for i in range(15) if i not in left_out | {11, 12}]
    third = prepared(
        spec_for(folder, split=(0.0, 0.0, 1.0), max_prompt_tokens=6, max_response_tokens=10), tokenizer, tmp_path
    ).train
    assert sorted(third.step_rows[3].tolist()) == [i for i in range(15) if i not in left_out]

    a, b, c = letters("abc")
    assert table.chosen[0].tolist() == [*[a] * 9, EOS]
    assert table.chosen[8].tolist() == [*[a] * 9, c]  # cut, and without EOS
    assert table.response[8].tolist() == [*[a] * 9, c]  # no response column: the chosen answer
    assert (table.response[10].tolist(), table.chosen[10].tolist()) == ([*[a] * 9, c], [*[a] * 9, EOS])
    assert table.rejected[9].tolist() == [*[b] * 9, c]


# --- by prompt ----------------------------------------------------------------------------------


def of_prompts(counts: list[int]) -> list[dict[str, str]]:
    """Rows of several prompts, so many of each, dealt in turn."""
    rows = [
        {"prompt": f"q{prompt}", "chosen": f"c{number}", "rejected": f"r{number}"}
        for number in range(max(counts))
        for prompt, count in enumerate(counts)
        if number < count
    ]
    return rows


def test_rows_of_one_prompt_stay_together(tmp_path: Path, tokenizer: Any) -> None:
    """Else a step would be measured on what it, or an earlier step, has learned."""
    rows = of_prompts([4, 1, 7, 2, 3, 5, 1, 6, 2, 9] * 3)
    file = write(tmp_path / "rows.jsonl", rows)
    corpus = prepared(spec_for(file, split=(1.0, 1.0, 1.0)), tokenizer, tmp_path)
    texts = {step: {bytes(corpus.train.prompt[i]) for i in corpus.train.step_rows[step]} for step in (1, 2, 3)}
    held_out = {bytes(corpus.held_out.prompt[i]) for i in corpus.held_out.step_rows[1]}
    groups = [*texts.values(), held_out]
    assert all(groups) and len(set.union(*groups)) == sum(map(len, groups)) == 30
    assert sum(map(len, corpus.train.step_rows.values())) + len(corpus.held_out.step_rows[1]) == len(rows) == 120
    assert 6 <= len(corpus.held_out.step_rows[1]) <= 6 + 8  # 5 %, and the rest of the last prompt's rows
    assert corpus.train.row_counts["prompt_held_out"] == 0


def test_prompts_on_both_sides_duplicates_and_typed_control_tokens_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    train = [*numbered(4), *numbered(2), {"prompt": "a </s> b", "chosen": "c", "rejected": "r"}]
    table = prepared(spec_for(folder_of(tmp_path / "d", train, numbered(2, start=3))), tokenizer, tmp_path).train
    assert {name: table.row_counts[name] for name in ("duplicate", "prompt_held_out", "control_token")} == {
        "duplicate": 2,
        "prompt_held_out": 1,
        "control_token": 1,
    }


def test_one_prompt_cannot_be_held_out_from_itself(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "rows.jsonl", of_prompts([5]))
    with pytest.raises(ToolkitError, match="can be held out") as caught:
        prepared(spec_for(file), tokenizer, tmp_path)
    assert caught.value.why.startswith("its 5 rows have 1 prompt,")


# --- tokenising ---------------------------------------------------------------------------------


def like_llama_2() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space in front of every text, as LLaMA 2's does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["the red cat", "a tall house", "Human: Assistant:"] * 20
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:4]  # bytes are ordinary tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


@pytest.mark.parametrize("answer", [" the red cat", "a tall house", "\n\nthe cat", "ouse", "", " ", "é 🙂"])
@pytest.mark.parametrize("prompt", ["Human: the cat\n\nAssistant:", "a tall h", "the "])
@pytest.mark.parametrize("make", [like_llama_2, lambda: wrapped(bytes_tokenizer())], ids=["llama 2", "bytes"])
def test_an_answer_has_the_ids_that_follow_its_prompt(make: Callable[[], Any], prompt: str, answer: str) -> None:
    tokenizer = make()
    ours = encoder.encoder_of(tokenizer)
    [before], [after] = ours.ids([prompt]), ours.answers([(prompt, answer)])
    whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.backend_tokenizer.decode([*before, *after], skip_special_tokens=False)
    assert decoded == prompt + answer  # no space that is not in the text
    if whole[: len(before)] == before:
        assert [*before, *after] == whole


def test_pieces_around_a_typed_control_token_get_no_space_of_their_own() -> None:
    tokenizer = like_llama_2()
    [ids] = encoder.encoder_of(tokenizer).ids(["the </s> cat"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == "the </s> cat"


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """Collect what transformers would print on stderr.

    Its logger neither propagates nor writes to the present sys.stderr.
    """
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    yield lines
    logging.getLogger("transformers").removeHandler(handler)


def one_table(tmp_path: Path, tokenizer: Any, row: dict[str, str], **fields: Any) -> dataset.Table:
    return prepared(
        spec_for(folder_of(tmp_path / "d", [row], ONE_ROW), split=(1.0, 0.0, 0.0), **fields), tokenizer, tmp_path
    ).train


def test_a_prompt_begins_with_bos_and_an_answer_ends_with_eos(tmp_path: Path, tokenizer: Any) -> None:
    table = one_table(tmp_path, tokenizer, {"prompt": "ab", "response": "x", "chosen": " c", "rejected": "no"})
    assert [rows(column) for column in (table.prompt, table.response, table.chosen, table.rejected)] == [
        [[EOS, *letters("ab")]],
        [[*letters("x"), EOS]],
        [[*letters(" c"), EOS]],
        [[*letters("no"), EOS]],
    ]


def test_an_eos_that_the_tokenizer_adds_behind_is_left_away(tmp_path: Path) -> None:
    inner = bytes_tokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("</s>", EOS), ("<pad>", PAD)]
    )
    table = one_table(tmp_path, wrapped(inner), {"prompt": "ab", "chosen": "c", "rejected": "d"})
    assert (rows(table.prompt), rows(table.chosen)) == ([[PAD, *letters("ab")]], [[*letters("c"), EOS]])


def test_typed_control_tokens_stay_text(tmp_path: Path, tokenizer: Any) -> None:
    table = one_table(tmp_path, tokenizer, {"prompt": "a<pad></s>", "chosen": "</s> b</s>", "rejected": "</s></s>"})
    assert rows(table.prompt) == [[EOS, *letters("a<pad></s>")]]
    assert rows(table.chosen) == [[*letters("</s> b</s>"), EOS]]
    assert rows(table.rejected) == [[*letters("</s></s>"), EOS]]


def test_typed_control_tokens_stay_text_where_the_model_itself_knows_them(tmp_path: Path) -> None:
    # Unigram would take `</s>` as one piece.
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "abcd</>s")]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.add_special_tokens(["</s>"])
    known = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    table = one_table(tmp_path, known, {"prompt": "a", "chosen": "a</s>b", "rejected": "cz"})
    assert [pieces[i][0] for i in table.rejected[0]] == ["c", "<unk>", "</s>"]  # unknown text is no control token
    assert [pieces[i][0] for i in table.chosen[0]] == ["a", "<", "/", "s", ">", "b", "</s>"]


def test_a_slow_tokenizer_does_the_same(tmp_path: Path, transformers_log: list[str]) -> None:
    slow = ByT5Tokenizer(model_max_length=4)  # ids are 3 + byte; EOS behind
    table = one_table(tmp_path, slow, {"prompt": "a</s>", "chosen": "a</s>b", "rejected": "longer"})
    assert rows(table.prompt) == [[3 + byte for byte in b"a</s>"]]
    assert rows(table.chosen) == [[*(3 + byte for byte in b"a</s>b"), EOS]]
    assert [path.name for path in chunk_files(tmp_path)] == ["chunk-00000", "chunk-00000"]
    assert transformers_log == []


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="the tokenizer has no EOS token"):
        one_table(tmp_path, PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer()), ONE_ROW[0])


def test_nothing_is_printed_and_the_callers_tokenizer_is_left_alone(
    tmp_path: Path, tokenizer: Any, transformers_log: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer.model_max_length = 4
    tokenizer(["abc", "d"], truncation=True, max_length=2, padding=True)
    before = tokenizer.backend_tokenizer.to_str()
    table = one_table(tmp_path, tokenizer, {"prompt": "abcdef", "chosen": "c" * 20, "rejected": "d"})
    assert (table.prompt.lengths.tolist(), table.chosen.lengths.tolist(), table.rejected.lengths.tolist()) == (
        [7],
        [21],
        [2],
    )
    assert tokenizer.backend_tokenizer.to_str() == before
    assert (transformers_log, capfd.readouterr()) == ([], ("", ""))


# --- messages -----------------------------------------------------------------------------------


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [turn("user", "Hi"), turn("assistant", "Yes."), turn("user", "Why?")]
FIRST, SECOND = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Why?\n\nAssistant:"


def test_messages_are_learned_in_each_step(tmp_path: Path, tokenizer: Any) -> None:
    """By the Human/Assistant template of a tokenizer without one: EOS in front, EOS ends a turn."""
    row = {"prompt": CHAT, "chosen": [turn("assistant", "So.")], "rejected": [turn("assistant", "No")]}
    other = {**row, "prompt": [turn("user", "Ho")]}
    folder = folder_of(tmp_path / "d", [row, other], [other])
    table = prepared(spec_for(folder, split=(1.0, 0.0, 0.0)), tokenizer, tmp_path).train
    assert tokenizer.chat_template  # it is saved with the model, which is asked by it
    asked = [EOS, *letters(FIRST), *letters(" Yes."), EOS, *letters(SECOND)]
    assert table.prompt[0].tolist() == table.before_response[0].tolist() == asked
    # Step 1 learns the first answer, too, with the EOS behind it.
    learned = [0] * (1 + len(FIRST)) + [1] * len(" Yes.") + [1] + [0] * len(SECOND)
    assert table.learned is not None and table.learned[0].tolist() == learned
    assert rows(table.chosen)[0] == rows(table.response)[0] == [*letters(" So."), EOS]
    assert rows(table.rejected)[0] == [*letters(" No"), EOS]
    assert not table.learned[1].any()
    assert table.row_counts["prompt_held_out"] == 1
    changed = {**row, "prompt": [CHAT[0], turn("assistant", "Yes!"), CHAT[2]]}
    assert table.digest(1) != prepared(
        spec_for(folder_of(tmp_path / "d", [changed, other], [other]), split=(1.0, 0.0, 0.0)), tokenizer, tmp_path
    ).train.digest(1)


def test_the_digest_of_step_1_holds_which_tokens_are_learned() -> None:
    def digests(learned: list[int] | None, before: list[int]) -> list[str]:
        ids, answer = Ragged.of([[5, 6, 7]]), Ragged.of([[8]])
        more = (None, None) if learned is None else (Ragged.of([before]), Ragged.of([learned]))
        orders = dict.fromkeys((1, 2, 3), np.array([0]))
        table = dataset.Table(ids, answer, answer, answer, orders, {}, *more)
        return [table.digest(step) for step in (1, 2, 3)]

    plain, none, one, other = (
        digests(None, []),
        digests([0, 0, 0], [5, 6, 7]),
        digests([0, 1, 0], [5, 6, 7]),
        digests([0, 1, 0], [5, 6, 9]),
    )
    assert len({each[0] for each in (plain, none, one, other)}) == 4
    assert plain[1:] == none[1:] == one[1:] == other[1:]


def test_a_long_dialogue_is_left_out_and_a_long_answer_is_cut(tmp_path: Path, tokenizer: Any) -> None:
    long, short = ([turn("user", "Hi"), turn("assistant", text)] for text in ("a" * 9, "b"))
    train = [{"messages": each} for each in (long, short, [*CHAT, turn("assistant", "So.")])]
    spec = spec_for(
        folder_of(tmp_path / "d", train, [{"messages": short}]),
        split=(1.0, 0.0, 0.0),
        max_prompt_tokens=len(FIRST) + 1,
        max_response_tokens=4,
    )
    table = prepared(spec, tokenizer, tmp_path).train
    assert sorted(table.step_rows[1].tolist()) == [0, 1]
    assert {name: table.row_counts[name] for name in ("prompt_too_long", "answer_cut", "rows")} == {
        "prompt_too_long": 1,
        "answer_cut": 1,
        "rows": 3,
    }
    assert rows(table.response)[:2] == [letters(" aaa"), [*letters(" b"), EOS]]


def test_text_and_messages_are_mixed_and_cached_apart(tmp_path: Path, tokenizer: Any) -> None:
    chat = [{"messages": [turn("user", f"q{i}"), turn("assistant", "So.")]} for i in range(3)]
    said: list[str] = []
    first, second = (
        folder_of(tmp_path / "text", numbered(3), ONE_ROW),
        folder_of(tmp_path / "chat", [*chat, {"messages": []}, {"messages": []}], chat[:1]),
    )
    spec = spec_for(first, second, split=(1.0, 0.0, 0.0))
    table = prepared(spec, tokenizer, tmp_path, said.append).train
    assert f"{second}: dialogues of messages, 3 to learn from, 1 held out; left out: 2 missing answers" in said
    assert (table.row_counts["rows"], table.row_counts["no_answer"]) == (8, 2)
    assert len(chunk_files(tmp_path)) == 4
    assert table.before_response[0].tolist() == [EOS, *letters("q0")] and not table.learned[0].any()  # type: ignore[index]
    assert table.prompt[3].tolist() == [EOS, *letters("\n\nHuman: q0\n\nAssistant:")]
    assert len(table.step_rows[1]) == 6
    before = stamps(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    again = prepared(spec, tokenizer, tmp_path).train  # another template: other ids of the messages alone
    assert before.items() < stamps(tmp_path).items() and len(stamps(tmp_path)) == 6
    assert again.prompt[3].tolist() == [*letters("q0"), EOS]


# --- which data set serves which step ------------------------------------------------------------


def test_each_step_gets_the_rows_that_have_its_columns(tmp_path: Path, tokenizer: Any) -> None:
    learn = [{"prompt": f"a{i}", "response": "s"} for i in range(4)]
    ask = [{"prompt": f"b{i}"} for i in range(6)]
    folders = [
        folder_of(tmp_path / "1", learn, learn[:1]),
        folder_of(tmp_path / "2", ask, ask[:2]),
        folder_of(tmp_path / "3", numbered(3), ONE_ROW),
    ]
    corpus = prepared(spec_for(*folders), tokenizer, tmp_path)
    served = {step: sorted(corpus.train.step_rows[step].tolist()) for step in (1, 2, 3)}
    assert [len(served[step]) for step in (1, 2, 3)] == [4 + 1, 1, 6 + 1]
    assert served[1][:4] == [0, 1, 2, 3] and served[3][:6] == [4, 5, 6, 7, 8, 9]
    assert corpus.train.row_counts["identical_answers"] == 0
    assert {step: len(corpus.held_out.step_rows[step]) for step in (1, 2, 3)} == {1: 2, 2: 1, 3: 3}
    # What stands in an answer's place where there is none: the prompt, else the response.
    assert corpus.train.some_answer[0].tolist() == [*letters("s"), EOS]
    assert corpus.train.some_answer[4].tolist() == [EOS, *letters("b0")]
    assert corpus.train.some_answer[10].tolist() == [*letters("yes0"), EOS]


def test_a_step_that_is_asked_for_and_has_no_rows_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "response": "s"} for i in range(40)])
    alone = dataset.prepare(spec_for(file), tokenizer, cache=tmp_path / "cache", say=print, steps=[1])
    assert [len(order) for order in alone.train.step_rows.values()] == [38, 0, 0]
    with pytest.raises(ToolkitError) as caught:
        prepared(spec_for(file), tokenizer, tmp_path)
    assert (caught.value.what, caught.value.why, caught.value.hint) == (
        "step 2 has no rows: no data set serves it",
        f"`{file}`: responses as text; step 2 needs chosen and rejected, too",
        "name a data set that has them, or ask for step 1 alone",
    )
    with pytest.raises(ToolkitError) as caught:
        dataset.prepare(spec_for(file), tokenizer, cache=tmp_path / "cache", say=print, steps=[1, 3])
    assert caught.value.why == f"`{file}`: responses as text; `steps: [3]` in its entry lets it serve"


def entries(*fields: dict[str, Any], **more: Any) -> Data:
    return Data.model_validate({"datasets": list(fields), "split": [1.0, 1.0, 1.0], **more})


def test_an_entry_names_the_steps_that_it_serves(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "response": "s"} for i in range(40)])
    corpus = dataset.prepare(
        entries({"name": str(file), "steps": [1, 3]}), tokenizer, cache=tmp_path / "cache", say=print, steps=[1, 3]
    )
    assert [len(order) for order in corpus.train.step_rows.values()] == [19, 0, 19]
    with pytest.raises(ToolkitError) as caught:
        prepared(entries({"name": str(file), "steps": [2]}), tokenizer, tmp_path)
    assert (caught.value.what, caught.value.why) == (
        f"data set `{file}` cannot serve step 2",
        "its rows are responses as text; step 2 needs chosen and rejected, too",
    )


def test_weights_repeat_and_thin_out_rows_by_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    first, second = (
        folder_of(tmp_path / "1", numbered(8), ONE_ROW),
        folder_of(tmp_path / "2", numbered(8, start=8), ONE_ROW),
    )

    def drawn(seed: int, **weights: float) -> list[int]:
        spec = entries(
            {"name": str(first), "weight": weights.get("first", 1.0)},
            {"name": str(second), "weight": weights.get("second", 1.0)},
            split=[1.0, 0.0, 0.0],
            seed=seed,
        )
        found: list[int] = prepared(spec, tokenizer, tmp_path).train.step_rows[1].tolist()
        return found

    counts = Counter(drawn(3, first=2.5, second=0.25))
    assert sorted(counts[row] for row in range(8)) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert sorted(counts[row] for row in range(8, 16)) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert drawn(3, first=2.5, second=0.25) == drawn(3, first=2.5, second=0.25)
    assert drawn(4, second=0.25) != drawn(3, second=0.25)
    plain = prepared(spec_for(first, second, split=(1.0, 0.0, 0.0), seed=3), tokenizer, tmp_path).train
    assert drawn(3) == plain.step_rows[1].tolist()
    assert len(set(drawn(3, second=0.01)) & {*range(8, 16)}) == 1  # a data set that is named is used


def test_tables_of_text_are_those_of_older_versions(tmp_path: Path, tokenizer: Any) -> None:
    """A run of another version resumes. The digests are those that commit 401fdae prints."""
    names = ["prompt", "chosen", "rejected", "response"]
    made = [(f"q{i % 30} é</s>", f"yes{i}", f"no{i}", "said") for i in range(40)]
    lines = [dict(zip(names[: 4 if i % 3 else 3], row, strict=False)) for i, row in enumerate(made)]
    spec = spec_for(write(tmp_path / "rows.jsonl", lines), split=(1.0, 2.0, 1.0), max_response_tokens=5)
    corpus = prepared(spec, tokenizer, tmp_path)
    assert corpus.digest == "8d23e325708099a5c879173026c497f79a4f3d09e7ffe08a089f4b7d942aaaf1"
    digests = [table.digest(step)[:16] for table in (corpus.train, corpus.held_out) for step in (1, 2, 3)]
    assert digests == [
        "f41da9aedaf6a011",
        "2e38839603e956e2",
        "6a4f2c1f5a6ca5c3",
        "5204e6904ad3a204",
        "47d26d615f778e36",
        "305004808f84fe52",
    ]


# --- the cache ----------------------------------------------------------------------------------


def stamps(tmp_path: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in chunk_files(tmp_path)}


def test_the_second_call_tokenises_nothing(tmp_path: Path, tokenizer: Any) -> None:
    folder = folder_of(tmp_path / "d", numbered(9), numbered(3))
    messages: list[str] = []
    first = prepared(spec_for(folder), tokenizer, tmp_path, messages.append)
    before = stamps(tmp_path)
    read = [f"reading {folder}", f"{folder}: pairs of text, 9 to learn from, 3 held out"]
    assert messages == [*read, "tokenising: part 1 of 2, 9 rows"]
    messages.clear()
    # This call changes the settings of a fast tokenizer, which must not matter here.
    tokenizer(["abc", "d"], truncation=True, max_length=2, padding=True)
    second = prepared(
        spec_for(folder, seed=3, split=(1.0, 2.0, 3.0), max_prompt_tokens=9, max_response_tokens=7, eval_rows=1),
        tokenizer,
        tmp_path,
        messages.append,
    )
    assert stamps(tmp_path) == before
    assert messages == read
    assert rows(first.train.chosen) == rows(second.train.chosen) == [[*letters(f"yes{i}"), EOS] for i in range(9)]


def test_what_the_cache_holds_is_mapped_and_not_copied(tmp_path: Path, tokenizer: Any) -> None:
    """Ranks of a machine then share it; lists that are cut or picked are no copies either."""
    folder = folder_of(tmp_path / "d", numbered(9), numbered(3))
    table = prepared(spec_for(folder, max_response_tokens=3), tokenizer, tmp_path).train
    for column in (table.prompt, table.response, table.chosen, table.rejected, table.chosen.pick(np.array([5, 2]), 2)):
        base: Any = column[1]
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
    assert table.chosen.pick(np.array([5, 2]), 2)[0].tolist() == letters("ye")


def test_progress_says_how_long_it_will_take(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 4)
    monkeypatch.setattr(tokens, "SAY_EVERY_S", 0)
    said: list[str] = []
    prepared(spec_for(folder_of(tmp_path / "d", numbered(9), numbered(3))), tokenizer, tmp_path, said.append)
    told = [line for line in said if line.startswith("tokenising")]
    assert [line.partition(", about")[0] for line in told] == [
        "tokenising: part 1 of 4, 4 rows",
        "tokenising: part 2 of 4, 4 rows",
        "tokenising: part 3 of 4, 1 row",
        "tokenising: part 4 of 4, 3 rows",
    ]
    assert [line.endswith(" left") for line in told] == [False, True, True, True]


def test_other_text_or_another_tokenizer_is_another_key(tmp_path: Path, tokenizer: Any) -> None:
    train = numbered(9)
    folder = folder_of(tmp_path / "d", train, numbered(3))
    prepared(spec_for(folder), tokenizer, tmp_path)
    assert len(chunk_files(tmp_path)) == 2
    train[8]["rejected"] = "on8"  # was no8
    write(folder / "train.jsonl", train)
    prepared(spec_for(folder), tokenizer, tmp_path)
    assert len(chunk_files(tmp_path)) == 3
    train[7]["prompt"], train[8]["prompt"] = "q7q", "8"  # were q7 and q8: the same letters, another border
    write(folder / "train.jsonl", train)
    prepared(spec_for(folder), tokenizer, tmp_path)
    assert len(chunk_files(tmp_path)) == 4
    for word, files in (("no0", 6), ("yes", 8)):
        other = wrapped(bytes_tokenizer())
        other.backend_tokenizer.add_tokens([word])
        corpus = prepared(spec_for(folder), other, tmp_path)
        assert len(chunk_files(tmp_path)) == files
    assert rows(corpus.train.chosen)[0] == [258, *letters("0"), EOS]
    other.eos_token = "<pad>"
    assert rows(prepared(spec_for(folder), other, tmp_path).train.chosen)[0] == [258, *letters("0"), PAD]


def test_many_chunks_make_the_same_table(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [{**row, "response": "other"} if i % 3 else row for i, row in enumerate(numbered(11))]
    folder = folder_of(tmp_path / "d", mixed, numbered(3))
    whole = prepared(spec_for(folder), tokenizer, tmp_path).train
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 4)
    parts = prepared(spec_for(folder), tokenizer, tmp_path).train
    assert len(chunk_files(tmp_path)) == 2 + 3 + 1
    for column in Row._fields:
        assert rows(getattr(parts, column)) == rows(getattr(whole, column))
    assert rows(whole.response)[:2] == [[*letters("yes0"), EOS], [*letters("other"), EOS]]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[:-9] + b"x" + content[-8:]]
)
def test_a_torn_chunk_is_made_again(tmp_path: Path, tokenizer: Any, damage: Callable[[bytes], bytes]) -> None:
    folder = folder_of(tmp_path / "d", numbered(9), numbered(3))
    whole = rows(prepared(spec_for(folder), tokenizer, tmp_path).train.chosen)
    good = {path: path.read_bytes() for path in chunk_files(tmp_path)}
    for path, content in good.items():
        path.write_bytes(damage(content))
    again = prepared(spec_for(folder), tokenizer, tmp_path).train
    assert rows(again.chosen) == whole
    assert [hash(path.read_bytes()[:32]) for path in chunk_files(tmp_path)] == [
        hash(content[:32]) for content in good.values()
    ]
    assert chunk_files(tmp_path) == list(good)  # and nothing lies next to them


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer: Any) -> None:
    folder = folder_of(tmp_path / "d", numbered(9), numbered(3))
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ToolkitError) as caught:
        prepared(spec_for(folder), tokenizer, tmp_path)
    assert caught.value.what.startswith(f"cannot write the token cache {tmp_path}/cache/tokens/")
    assert (caught.value.exit_code, caught.value.hint) == (
        ExitCode.UNFIT,
        "free some disk space, or put the cache into a folder that you may write to",
    )


# --- processes ----------------------------------------------------------------------------------

CHILD = """
import json, resource, sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from jobs.errors import ToolkitError
from jobs.spec import Data
from rlhf_train.data import dataset, tokens

rank, world_size, sign, largest_file, folder, cache, tokenizer_file = json.loads(sys.argv[1])
tokens.CHUNK_ROWS, tokens.SAY_EVERY_S, written, messages = 10, 0.2, [], []
columns_of, write = tokens.token_columns, tokens._write_chunk
def columns(*args):
    while sign and not Path(sign).exists():  # the slow rank begins when the test says so
        time.sleep(0.01)
    return columns_of(*args)
tokens.token_columns = columns
tokens._write_chunk = lambda file, columns: (written.append(file.name), write(file, columns))[1]
if largest_file:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))  # as good as a full disk
tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="</s>")
spec = Data(datasets=(folder,), split=(1.0, 1.0, 1.0))
try:
    corpus = dataset.prepare(spec, tokenizer, cache=Path(cache), rank=rank, world_size=world_size, say=messages.append)
except ToolkitError as error:
    sys.exit(str(error))
print(json.dumps([written, messages, corpus.train.chosen.values.tolist(), corpus.train.step_rows[2].tolist()]))
"""


def start(
    tmp_path: Path, *, rank: int = 0, world_size: int = 1, sign: Path | None = None, largest_file: int = 0
) -> subprocess.Popen[str]:
    bytes_tokenizer().save(str(tmp_path / "tokenizer.json"))
    paths = [str(tmp_path / name) for name in ("d", "cache", "tokenizer.json")]
    argument = json.dumps([rank, world_size, str(sign or ""), largest_file, *paths])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, argument], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_ranks_share_the_work_and_the_quick_one_waits_for_the_slow_one(tmp_path: Path, tokenizer: Any) -> None:
    # 5 chunks and 1: rank 0 has chunks 0, 2, 4 of the training rows.
    folder_of(tmp_path / "d", numbered(45), numbered(3))
    sign = tmp_path / "go"
    ranks = [start(tmp_path, rank=0, world_size=2), start(tmp_path, rank=1, world_size=2, sign=sign)]
    deadline = time.monotonic() + 60
    while len(chunk_files(tmp_path)) < 3:
        assert ranks[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(2)  # it says what it waits for each 0.2 s
    sign.touch()
    results = [process.communicate(timeout=120) for process in ranks]
    (quick_wrote, quick_said, *quick), (slow_wrote, _, *slow) = (json.loads(output) for output, _ in results)
    assert quick_wrote == ["chunk-00000", "chunk-00002", "chunk-00004"]
    assert slow_wrote == ["chunk-00001", "chunk-00003", "chunk-00000"]
    waited = [line for line in quick_said if line.startswith("waiting for another rank to tokenise part 2 of 5: ")]
    assert waited
    assert waited[0].endswith("/chunk-00001")
    assert quick == slow
    assert quick[0] == [token for i in range(45) for token in (*letters(f"yes{i}"), EOS)]


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path) -> None:
    folder_of(tmp_path / "d", numbered(45), numbered(3))
    process = start(tmp_path, largest_file=100)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"error: cannot write the token cache {tmp_path}/cache/tokens/" in errors
    assert "  why: [Errno 27] File too large" in errors
    assert chunk_files(tmp_path) == []


# --- the datasets library, against a hub on loopback --------------------------------------------

READER = """
import json, sys
from pathlib import Path
import pandas
from jobs.errors import ToolkitError
from rlhf_train.data import reading
from jobs.spec import DataSet

names, parquet, saved = json.loads(sys.argv[1])
for file, rows in parquet.items():
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(file)
import datasets
for folder, splits in saved.items():
    datasets.disable_progress_bar()
    made = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    (datasets.DatasetDict(made) if len(made) > 1 else next(iter(made.values()))).save_to_disk(folder)
for name in names:
    try:
        entry = DataSet(**(name if isinstance(name, dict) else {"name": name}))
        parts = reading.read(entry, [Path.cwd()])
        print(json.dumps([[list(row) for row in part.rows] if part else [] for part in parts]))
    except ToolkitError as error:
        print(json.dumps([error.what, error.why, error.hint, error.exit_code]))
"""


class Reader:
    """`read_rows` in a fresh process, since HF_ENDPOINT is read at import."""

    def __init__(self, root: Path, hub: Hub) -> None:
        self.root, self.hub = root, hub

    def __call__(
        self,
        *names: str | dict[str, Any],
        parquet: dict[str, Any] | None = None,
        saved: dict[str, Any] | None = None,
        **environment: str,
    ) -> list[Any]:
        (self.root / "here").mkdir(exist_ok=True)
        settings = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.root / "home"),
            "PYTHONPATH": str(ROOT),
            "HF_TOKEN": "",
            **environment,
        }
        argument = json.dumps(
            [names, {str(self.root / file): rows for file, rows in (parquet or {}).items()}, saved or {}]
        )
        command, settings = [sys.executable, "-c", READER, argument], os.environ | settings
        done = subprocess.run(
            command, cwd=self.root / "here", env=settings, check=False, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert "Generating" not in done.stderr  # a progress bar; those of many ranks would be mixed
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with Hub(tmp_path, gated=["some/gated"]) as hub:
        yield Reader(tmp_path, hub)


def texts_of(start: int, n: int, **extra: Any) -> list[dict[str, Any]]:
    return [{**row, **extra} for row in numbered(n, start)]


def test_data_sets_of_the_hub_and_of_the_datasets_library(reader: Reader) -> None:
    hub, here = "datasets/Dahoas/rm-static/data", reader.root / "here"
    parquet = {
        f"{hub}/train-00000-of-00001-2a1df75c6bce91ab.parquet": texts_of(0, 3, response="said", more=1),
        f"{hub}/test-00000-of-00001-8c7c51afc6d45980.parquet": texts_of(3, 1, response="said", more=1),
        "datasets/some/gated/train.parquet": texts_of(0, 2),
        "datasets/some/renamed/train.parquet": [{"question": "q", "chosen": "c", "rejected": "r"}],
        "datasets/some/nulls/train.parquet": [*texts_of(0, 1), {"prompt": None, "chosen": "c", "rejected": None}],
        "here/chat/train.parquet": [{"messages": CHAT[:2], "source": "x"}],
        "here/local/train.parquet": texts_of(0, 2),
        "here/local/validation.parquet": texts_of(2, 1),
    }
    saved = {
        "saved": {"train": texts_of(0, 2), "test": texts_of(2, 1)},
        "saved one": {"train": texts_of(0, 2)},
        "saved chat": {
            "train_sft": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]}]
        },
    }
    names = [
        "Dahoas/rm-static",
        "no/such",
        "some/gated",
        "some/renamed",
        "some/nulls",
        "local",
        "saved",
        "saved one",
        str(here / "empty"),
        "chat",
        {"name": "saved chat"},
        {"name": "saved", "split": "train_sft"},
        {"name": "local", "config": "en"},
        {"name": "some/renamed", "columns": {"prompt": "question"}},
    ]
    (here / "empty").mkdir(parents=True)
    static, absent, gated, renamed, nulls, local, both, one, empty, *more = reader(*names, parquet=parquet, saved=saved)

    assert static == [[[f"q{i}", "said", f"yes{i}", f"no{i}"] for i in range(3)], [["q3", "said", "yes3", "no3"]]]
    assert any(line.startswith(f"GET /{hub.replace('/data', '')}/resolve/") for line in reader.hub.requests)
    local_rows = [[f"q{i}", f"yes{i}", f"yes{i}", f"no{i}"] for i in range(3)]
    assert local == both == [local_rows[:2], local_rows[2:]]
    assert one == [local_rows[:2], []]

    for what, _, hint, _ in (absent, gated):
        assert what in (
            "cannot load the data set `no/such` from the hub",
            "cannot load the data set `some/gated` from the hub",
        )
        assert hint == "check the name; HF_TOKEN opens a gated or private data set"
    assert "no/such" in absent[1]
    assert absent[3] == ExitCode.USAGE
    assert renamed[:2] == [
        "data set `some/renamed`, split `train`: no column `prompt`",
        "its columns: question, chosen, rejected",
    ]
    nulls_found = [
        "row 1, column `prompt`: text is wanted, not null",
        "row 1, column `rejected`: text is wanted, not null",
    ]
    assert (nulls[0], nulls[1].splitlines()) == ("bad rows in data set `some/nulls`, split `train`", nulls_found)
    assert empty[0] == f"cannot load the data set in {here}/empty"

    said = [[[["user", "Hi", None]], ["assistant", "Yes.", None], None, None]]
    chat, saved_chat, no_split, no_config, named = more
    assert chat == saved_chat == [said, []]
    assert no_split[:2] == ["data set `saved` has no split `train_sft`", "its splits: train, test"]
    assert no_config[0] == "data set `local` has no configuration `en`"
    assert named == [[["q", "c", "c", "r"]], []]

    assert reader("some/gated", HF_TOKEN=TOKEN) == [[local_rows[:2], []]]


def test_a_hub_that_cannot_be_reached(reader: Reader) -> None:
    [[what, why, _, code]] = reader("Dahoas/rm-static", HF_HUB_OFFLINE="1")
    assert (what, code) == ("cannot load the data set `Dahoas/rm-static` from the hub", ExitCode.UNFIT)
    assert "offline" in why.lower()


# --- real data ----------------------------------------------------------------------------------


def test_real_preference_data(tmp_path: Path, tokenizer: Any) -> None:
    if not HH_RM_MINI.is_dir():
        assert os.environ.get("RLHF_CI") != "1", f"CI needs {HH_RM_MINI}"
        pytest.skip(f"no {HH_RM_MINI}")
    spec = spec_for(HH_RM_MINI, split=(2.0, 4.0, 4.0), max_prompt_tokens=2000, max_response_tokens=300)
    corpus = prepared(spec, tokenizer, tmp_path)
    lines = [json.loads(line) for line in (HH_RM_MINI / "train.jsonl").read_bytes().splitlines()]
    assert corpus.train.row_counts["rows"] == len(lines) == 1500
    # Bytes are tokens here, so the lengths can be counted without the tokenizer.
    blank = [not all(line[column].strip() for column in Row._fields) for line in lines]
    assert corpus.train.row_counts["prompt_too_long"] == sum(
        len(line["prompt"].encode()) + 1 > 2000 for line, none in zip(lines, blank, strict=True) if not none
    )
    assert corpus.train.chosen.lengths.tolist() == [min(len(line["chosen"].encode()) + 1, 300) for line in lines]
    assert all(0 < len(order) <= 512 for order in corpus.held_out.step_rows.values())
    used = np.concatenate(list(corpus.train.step_rows.values())).tolist()
    assert len(used) == len(set(used))
    for row in corpus.train.step_rows[3][:5]:
        assert tokenizer.decode(corpus.train.prompt[row][1:]) == lines[row]["prompt"]
