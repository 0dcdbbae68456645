import ast
import io
import math
import os
import pty
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs import console
from jobs.console import Board, Live, Pace, Plain, duration, number, print_error, print_report, size, sparkline, view, visible
from jobs.errors import ToolkitError

RawEvent = dict[str, Any]


def event(kind: str, step: int | None = None, at_s: float = 0.0, **fields: Any) -> RawEvent:
    minutes, seconds = divmod(at_s, 60)
    time = f"2025-01-05T12:{int(minutes):02}:{seconds:06.3f}Z"
    return {"schema": 1, "seq": 0, "time": time, "kind": kind, **({} if step is None else {"step": step}), **fields}


PLAN = event(
    "plan", 3, updates=480, rows=1920, ranks=1, device="cpu", device_reason="PyTorch sees no GPU", precision="float32", global_batch=32,
    micro_batch=16, gradient_accumulation=2, zero_stage=0,
    data={"rows": 2000, "empty_prompt": 0, "empty_answer": 3, "prompt_too_long": 1, "identical_answers": 2, "answer_cut": 5},
)  # fmt: skip
PPO = event(
    "metrics", 3, update=120, updates=480, elapsed_s=96.0, learning_rate=9.65e-6, tokens_per_s=3120.4, real_token_share=0.9, grad_norm=1.5,
    policy_loss=0.01234, value_loss=0.45678, mean_reward=1.234, kl=0.0321, entropy=2.3456, clip_fraction=0.0214, response_length=64.25,
    eos_share=0.921, kl_coef=0.1, ratio=1.0,
)  # fmt: skip
SFT = event("metrics", 1, update=1, updates=10, elapsed_s=2.0, learning_rate=9.65e-6, tokens_per_s=900.0, grad_norm=1.25, loss=3.21)
REWARD = event(
    "metrics", 2, update=10, updates=10, elapsed_s=20.0, learning_rate=5e-5, tokens_per_s=1e6, grad_norm=1.25, loss=0.6931, accuracy=0.625, margin=0.1
)
END_1 = event("end", 1, updates=10, seconds=62.0, model="runs/demo/step1/model", perplexity_before=31.2, perplexity_after=8.414)
END_2 = event("end", 2, updates=10, seconds=38.4, model="runs/demo/step2/model", reward_accuracy=0.874)
END_3 = event(
    "end", 3, updates=480, seconds=3720.0, model="runs/demo/step3/model", mean_reward_before=-0.52, mean_reward_after=1.934, kl_before=0.0,
    kl=0.4101, good_share_before=0.48, good_share_after=0.94, response_length_before=20.31, response_length_after=30.1, eos_share_before=0.7,
    eos_share_after=0.991,
)  # fmt: skip


def sample(when: str, response: str, **fields: Any) -> RawEvent:
    return event("sample", 3, when=when, prompt=fields.pop("prompt", "Human: hi\nAssistant:"), response=response, **fields)


def plain(events: Iterable[RawEvent]) -> list[str]:
    stream = io.StringIO()
    with Plain(stream) as lines:
        for each in events:
            lines.feed(each)
    return stream.getvalue().splitlines()


# --- words and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.01234, ".4f", "0.0123"),
        (-0.0, ".2f", "-0.00"),
        (0.000012, ".4f", "1.2e-05"),  # would look like nothing
        (-0.000012, ".4f", "-1.2e-05"),
        (0, ".3f", "0.000"),
        (123456789.0, ".4f", "1.23e+08"),
        (0.921, ".1%", "92.1%"),
        (math.nan, ".4f", "nan"),
        ("nan", ".4f", "nan"),
        ("-inf", ".1%", "-inf"),
        ("Infinity", ".0f", "inf"),
        ("much\x1b[1m", ".0f", "much\\x1b[1m"),
        (None, ".0f", "?"),
    ],
)
def test_number(value: object, spec: str, text: str) -> None:
    assert number(value, spec) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (42.4, "42s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3744, "1h02m"),
        (190_800, "2d05h"),
        (-3, "0s"),
        (math.nan, "?"),
        ("inf", "?"),
        (None, "?"),
    ],
)
def test_duration(seconds: object, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (12_345_678, "12.3 MB"), (2_630_000_000, "2.63 GB"), (None, "nan GB")],
)
def test_size(size_bytes: object, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    "unsafe", [*(chr(i) for i in range(32) if chr(i) not in "\n\t"), *(chr(i) for i in range(0x7F, 0xA0)), "\u2028", "\u202e", "\u2066", "\udc80"]
)
def test_what_a_terminal_would_obey_is_spelt_out(unsafe: str) -> None:
    shown = visible(f"a{unsafe}b")
    assert shown.startswith("a\\") and shown.endswith("b") and shown.isprintable()


def test_harmless_text_stays_as_it_is() -> None:
    assert visible("Ünïcode 你好\n\t[bold] :smile: \\n") == "Ünïcode 你好\n\t[bold] :smile: \\n"


# --- lines ---------------------------------------------------------------------------------------------------------

LINES = [
    (
        PLAN,
        [
            "step 3  PPO: 480 updates, 1920 prompts",
            "step 3  batch 32 = 16 micro x 2 accumulation x 1 rank",
            "step 3  on cpu (PyTorch sees no GPU), float32, ZeRO 0",
            "step 3  data of all steps: 2000 rows; left out: 3 empty answers, 1 overlong prompt; cut: 5 overlong answers",
        ],
    ),
    (
        PLAN | {"step": 2, "updates": 1, "ranks": 2, "data": {"rows": 9, "identical_answers": 2, "too_odd": 1}},
        [
            "step 2  reward model: 1 update, 1920 pairs",
            "step 2  batch 32 = 16 micro x 2 accumulation x 2 ranks",
            "step 2  on cpu (PyTorch sees no GPU), float32, ZeRO 0",
            "step 2  data of all steps: 9 rows, 1 too odd; left out: 2 identical answers",
        ],
    ),
    (event("progress", 3, doing="evaluating on [held-out] prompts :eyes:"), ["step 3  evaluating on [held-out] prompts :eyes:"]),
    (SFT, ["step 1  update 1/10  loss 3.2100  learning_rate 9.65e-06  grad_norm 1.25  900 tok/s  eta 18s"]),
    (REWARD, ["step 2  update 10/10  loss 0.6931  accuracy 62.5%  margin 0.100  1000000 tok/s"]),
    (PPO, ["step 3  update 120/480  policy_loss 0.0123  value_loss 0.4568  kl 0.032  reward 1.23  3120 tok/s  eta 4m48s"]),
    (
        PPO | {"kl": "nan", "policy_loss": math.inf},
        ["step 3  update 120/480  policy_loss inf  value_loss 0.4568  kl nan  reward 1.23  3120 tok/s  eta 4m48s"],
    ),
    (
        sample("before", "I am \x1b[31mred\nand \x9b2J.", reward=-0.52, good=False),
        ["step 3  before  reward -0.52  bad  prompt: Human: hi\\nAssistant:  response: I am \\x1b[31mred\\nand \\x9b2J."],
    ),
    (sample("after", "Fine.", reward="nan"), ["step 3  after  reward nan  prompt: Human: hi\\nAssistant:  response: Fine."]),
    (
        sample("after", "r" * 310, reward=1.0, prompt="p" * 25 + "q" * 100, good=True),
        [f"step 3  after  reward 1.00  good  prompt: (25 characters) ... {'q' * 100}  response: {'r' * 300} ... (10 more characters)"],
    ),
    (
        event("checkpoint", 1, update=200, path="runs/a b/step1/model", size_bytes=2_630_000_000, seconds=12.4),
        ["step 1  checkpoint at update 200: 2.63 GB in 12s, runs/a b/step1/model"],
    ),
    (event("warning", 3, message="KL is 41.2\nnats", hint="lower it"), ["step 3  warning: KL is 41.2 nats  hint: lower it"]),
    (event("warning", message="slow disk"), ["warning: slow disk"]),
    (
        event("error", 3, rank=1, message="out of memory", why="tried\nto \x1b[2J allocate", hint="lower hardware.micro_batch", exit_code=4),
        ["error: step 3, rank 1: out of memory", "  why: tried", "       to \\x1b[2J allocate", "", "hint: lower hardware.micro_batch"],
    ),
    (event("error", rank=0, message="no", exit_code=1), ["error: rank 0: no"]),
    (event("resumed", 3, from_update=200), ["step 3  resumed after update 200"]),
    (event("resumed", 3, from_update=0), ["step 3  starts anew"]),
    (END_1, ["step 1  done in 1m02s  perplexity 31.20 -> 8.41  model runs/demo/step1/model"]),
    (END_2, ["step 2  done in 38s  accuracy 87.4%  model runs/demo/step2/model"]),
    (
        END_3,
        [
            "step 3  done in 1h02m  good answers 48.0% -> 94.0%  reward -0.52 -> 1.93  kl 0.000 -> 0.410  length 20.3 -> 30.1  "
            "eos 70.0% -> 99.1%  model runs/demo/step3/model"
        ],
    ),
    (event("telepathy", 3, message="from a newer writer"), []),
    (event("progress", 3, doing="x", mood="a field from a newer writer"), ["step 3  x"]),
]


@pytest.mark.parametrize(("raw", "lines"), LINES, ids=[f"{raw['kind']}-{i}" for i, (raw, _) in enumerate(LINES)])
def test_plain_line(raw: RawEvent, lines: list[str]) -> None:
    assert plain([raw]) == lines


def test_events_with_missing_fields_break_no_view() -> None:
    bare = [event(kind, 3) for kind in ("plan", "progress", "metrics", "sample", "checkpoint", "warning", "error", "resumed", "end")]
    assert len(plain(bare)) >= len(bare)
    assert squeezed(shown(bare[:-1], 79))[:2] == ["▸ step 3 PPO 0 of 0 0%", "─" * 77]
    assert squeezed(shown(bare, 79)) == ["✓ step 3 PPO ?"]
    assert "step 3 ? None" in squeezed(reported([raw for raw in bare if raw["kind"] != "resumed"]))


def curve(updates: int, step: int = 1, seconds: float = 1.0, start_s: float = 0.0) -> list[RawEvent]:
    """One update every `seconds`."""
    return [
        event("metrics", step, start_s + i * seconds, update=i, updates=updates, elapsed_s=i * seconds, tokens_per_s=1.0, loss=1.0)
        for i in range(1, updates + 1)
    ]


def updates_shown(lines: Iterable[str]) -> list[str]:
    return [match[1] for line in lines if (match := re.search(r"update (\S+)", line))]


def test_of_fast_updates_the_first_the_last_and_one_in_ten_seconds() -> None:
    assert updates_shown(plain(curve(35))) == ["1/35", "11/35", "21/35", "31/35", "35/35"]


def test_slow_updates_are_all_shown() -> None:
    assert updates_shown(plain(curve(4, seconds=10.5))) == ["1/4", "2/4", "3/4", "4/4"]


def test_a_long_log_stays_short() -> None:
    # 21 lines in the first 201 s, one in 10 s; then each gap is a twentieth of the elapsed time: 201 * (20/19)^n = 900, n = 29.2.
    assert 45 <= len(plain(curve(900))) <= 53
    assert updates_shown(plain(curve(900)))[-1] == "900/900"


def test_each_step_shows_its_first_update() -> None:
    assert updates_shown(plain([*curve(3), *curve(3, step=2, start_s=4.0)])) == ["1/3", "3/3", "1/3", "3/3"]


def test_the_last_update_before_an_error_is_shown() -> None:
    lines = plain([*curve(9)[:5], event("error", rank=0, message="boom", exit_code=4)])
    assert updates_shown(lines) == ["1/9", "5/9"] and lines[-1] == "error: rank 0: boom"


def test_the_last_update_of_a_stream_that_stops_is_shown() -> None:
    assert updates_shown(plain(curve(9)[:5])) == ["1/9", "5/9"]


def test_a_line_is_never_wrapped() -> None:
    (line,) = plain([event("warning", 1, message="word " * 100 + "/a/path" * 50)])
    assert len(line) > 800


def test_a_stream_that_cannot_hold_a_character_gets_its_escape() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Plain(stream).feed(event("progress", 1, doing="你好"))
    stream.flush()
    assert raw.getvalue() == b"step 1  \\u4f60\\u597d\n"


# --- time left -----------------------------------------------------------------------------------------------------


def eta(events: Iterable[RawEvent]) -> float | None:
    pace = Pace()
    for each in events:
        pace.feed(each)
    return pace.eta_s


def metrics(update: int, elapsed_s: float, step: int = 3) -> RawEvent:
    return event("metrics", step, update=update, updates=480, elapsed_s=elapsed_s)


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([], None),
        ([metrics(12, 96.0)], 3744.0),  # 8 s an update, 468 to go
        ([metrics(12, 96.0), metrics(24, 240.0)], 4560.0),  # 10 s an update, 456 to go
        ([metrics(480, 96.0)], None),
        ([metrics(12, math.nan)], None),
        ([metrics(400, 900.0, step=2), metrics(12, 96.0)], 3744.0),  # another step's pace says nothing
        # After a resume the clock may begin anew or go on: 5 s an update, 440 or 430 to go.
        ([metrics(100, 96.0), event("resumed", 3, from_update=40), metrics(40, 7.0)], None),
        ([metrics(100, 96.0), event("resumed", 3, from_update=39), metrics(40, 7.0), metrics(50, 57.0)], 2150.0),
        ([metrics(100, 96.0), event("resumed", 3, from_update=39), metrics(40, 97.0), metrics(50, 147.0)], 2150.0),
        ([metrics(100, 96.0), event("resumed", 3, from_update=0), metrics(40, 200.0)], 2200.0),
    ],
)
def test_eta(events: list[RawEvent], seconds: float | None) -> None:
    assert eta(events) == seconds


# --- panel ---------------------------------------------------------------------------------------------------------


def shown(events: Iterable[RawEvent], width: int, now: float = 0.0) -> list[str]:
    board = Board()
    for each in events:
        board.feed(each, 0.0)
    return [line.plain.rstrip() for line in board.lines(width, now)]


def squeezed(lines: Iterable[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines if line.strip()]


# Four points: 0, 1/3, 2/3 and 1 of the way up, in eight heights.
ROLLOUTS = [PPO | {"update": i * 30, "elapsed_s": i * 24.0, "mean_reward": 0.5 * i - 0.8, "kl": 0.03 * i} for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(("width", "done", "left"), [(79, 19, 58), (119, 29, 88)])
def test_panel_of_step_3(width: int, done: int, left: int) -> None:
    assert squeezed(shown([END_1, END_2, PLAN, *ROLLOUTS], width)) == [
        "✓ step 1 supervised fine-tuning 1m02s perplexity 31.20 → 8.41",
        "✓ step 2 reward model 38s accuracy 87.4%",
        "▸ step 3 PPO 120 of 480 25% 1m36s eta 4m48s",
        "━" * done + "─" * left,
        "reward 1.20 ▁▃▆█ -0.30 to 1.20",
        "kl 0.120 ▁▃▆█ 0.030 to 0.120",
        "policy_loss 0.0123 value_loss 0.4568 entropy 2.346",
        "clip_fraction 2.1% response_length 64.2 eos_share 92.1%",
        "grad_norm 1.50 learning_rate 9.65e-06 tok/s 3120",
    ]


def test_panel_of_step_1() -> None:
    assert squeezed(shown([SFT], 79)) == [
        "▸ step 1 supervised fine-tuning 1 of 10 10% 2s eta 18s",
        "━" * 7 + "─" * 70,
        "loss 3.2100 ▁ 3.2100 to 3.2100",
        "learning_rate 9.65e-06 grad_norm 1.25 tok/s 900",
    ]


def test_panel_of_step_2() -> None:
    assert squeezed(shown([REWARD], 79)) == [
        "▸ step 2 reward model 10 of 10 100% 20s",
        "━" * 77,
        "loss 0.6931 ▁ 0.6931 to 0.6931",
        "accuracy 62.5% ▁ 62.5% to 62.5%",
        "margin 0.100 learning_rate 5e-05",
        "grad_norm 1.25 tok/s 1000000",
    ]


def test_a_plan_without_updates_yet() -> None:
    assert squeezed(shown([PLAN], 79)) == ["▸ step 3 PPO 0 of 480 0%", "─" * 77]


def test_elapsed_goes_on_and_time_left_shrinks_between_events() -> None:
    assert "120 of 480   25%  1m46s  eta 4m38s" in shown([PPO], 79, now=10.0)[0]


def test_what_is_being_done_with_its_time() -> None:
    doing = event("progress", 3, doing="evaluating on held-out prompts")
    assert squeezed(shown([PPO, doing], 79, now=12.0))[-1] == "evaluating on held-out prompts 12s"
    assert "evaluating" not in " ".join(shown([PPO, doing, PPO], 79))


def test_the_last_checkpoint_stays_in_sight() -> None:
    saved = event("checkpoint", 3, update=100, path="x", size_bytes=1500, seconds=1)
    assert squeezed(shown([saved, PPO], 79))[-1] == "checkpoint at update 100: 1.5 kB in 1s"


def test_a_failed_step_says_so() -> None:
    lines = squeezed(shown([PPO, event("error", rank=0, message="out of\nmemory", exit_code=4)], 79))
    assert lines[0].startswith("✗ step 3 PPO 120 of 480") and "eta" not in lines[0] and lines[-1] == "failed: out of memory"


def test_a_resume_takes_back_the_curve_and_the_end() -> None:
    lines = squeezed(shown([PLAN, *ROLLOUTS, END_3, event("resumed", 3, from_update=60)], 79))
    assert lines == ["▸ step 3 PPO 60 of 480 12%", "━" * 9 + "─" * 68]
    lines = squeezed(shown([PLAN, *ROLLOUTS, END_3, event("resumed", 3, from_update=60), ROLLOUTS[2]], 79))
    assert "reward 0.70 ▁▄█ -0.30 to 0.70" in lines


@pytest.mark.parametrize("width", [20, 39, 79, 119, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    long = event("progress", 3, doing="调" * 100)
    board = Board()
    for each in (END_1, END_2, END_3, event("resumed", 3, from_update=0), *ROLLOUTS * 40, long):
        board.feed(each, 0.0)
    assert max(line.cell_len for line in board.lines(width, 5.0)) <= width


def test_a_finished_line_shows_as_much_as_fits() -> None:
    assert squeezed(shown([END_3], 79)) == ["✓ step 3 PPO 1h02m good answers 48.0% → 94.0%"]
    assert squeezed(shown([END_3], 119)) == ["✓ step 3 PPO 1h02m good answers 48.0% → 94.0% reward -0.52 → 1.93 kl 0.000 → 0.410"]


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, ("▁▂▃▄▅▆▇█", 0, 7)),
        ([0, 2, 4, 4], 2, ("▁█", 1, 4)),  # means of two
        ([0, 0, 0, 9, 9], 2, ("▁█", 0, 6)),  # 2 and 3 points
        ([5.0, 5.0], 8, ("▁▁", 5, 5)),
        ([1.0, math.nan, 3.0, math.inf], 8, ("▁?█?", 1, 3)),
    ],
)
def test_sparkline(values: list[float], width: int, drawn: tuple[str, float, float]) -> None:
    assert sparkline(values, width) == drawn


def terminal(width: int, colors: bool = False) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=40, color_system="standard" if colors else None, soft_wrap=True, markup=False,
        highlight=False, emoji=False, legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip


def written(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_live_on_a_terminal(width: int) -> None:
    screen = terminal(width)
    with Live(screen, clock=lambda: 0.0) as live:
        for each in (
            END_1,
            PLAN,
            *ROLLOUTS,
            event("warning", 3, message="[b, t] and \x1b[2J " + "long " * 40, hint="see [/paths]"),
            END_3,
            event("telepathy", 3),
        ):
            live.feed(each)
    text = written(screen)
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= width
    assert "step 3  batch 32 = 16 micro x 2 accumulation x 1 rank" in lines
    assert "step 3  warning: [b, t] and \\x1b[2J long" in text and "see [/paths]" in text
    assert "▸ step 3  PPO                     120 of 480   25%  1m36s  eta 4m48s" in lines
    # The last frame stays: both steps, finished, below everything else; and the cursor is back.
    final = [line.rstrip() for line in lines if line.strip()][-2:]
    assert final[0] == "✓ step 1  supervised fine-tuning  1m02s    perplexity 31.20 → 8.41"
    assert final[1].startswith("✓ step 3  PPO                     1h02m    good answers 48.0% → 94.0%")
    assert text.endswith("\x1b[?25h") and text.count("\x1b[2J") == 0


def test_a_narrower_terminal_has_folded_the_old_lines() -> None:
    screen = terminal(100)
    with Live(screen, clock=lambda: 0.0) as live:
        live._live.auto_refresh = False
        live.feed(PLAN)
        live._live.refresh()
        screen.width = 60
        before = len(written(screen))
        live._live.refresh()
        # Five lines (empty, title, bar, empty, status): four steps up, and one for the bar's second half.
        assert written(screen)[before:].count("\x1b[1A") == 5
        before = len(written(screen))
        live._live.refresh()
        assert written(screen)[before:].count("\x1b[1A") == 4


# --- which view ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, io.TextIOWrapper]]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        yield master, stream
    os.close(master)


def seen_on(master: int, stream: io.TextIOWrapper) -> str:
    with view(stream) as panel:
        assert isinstance(panel, Live)
        panel.feed(END_2)
    said = b""
    while not said.endswith(b"\x1b[?25h"):  # the cursor is shown again
        said += os.read(master, 65536)
    return said.decode()


def test_a_terminal_gets_the_panel_in_colour(tty: tuple[int, io.TextIOWrapper]) -> None:
    assert "\x1b[32m✓" in seen_on(*tty)


def test_no_color_takes_the_colour_only(tty: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = seen_on(*tty)
    assert "✓ " in text and "accuracy 87.4%" in text and not re.search(r"\x1b\[[\d;]*3\dm", text)


def test_a_dumb_terminal_gets_lines(tty: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(view(tty[1]), Plain)


def test_a_terminal_without_the_characters_gets_lines(tty: tuple[int, io.TextIOWrapper]) -> None:
    with io.TextIOWrapper(os.fdopen(os.dup(tty[1].fileno()), "wb"), encoding="ascii") as stream:
        assert stream.isatty() and isinstance(view(stream), Plain)


def test_a_pipe_gets_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with view() as lines:
        assert isinstance(lines, Plain)
        lines.feed(END_2)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("step 2  done in 38s")


# --- the end -------------------------------------------------------------------------------------------------------


def reported(events: list[RawEvent], width: int = 80) -> list[str]:
    screen = Console(file=io.StringIO(), width=width)
    print_report(events, screen)
    return written(screen).splitlines()


WHOLE_RUN = [
    END_1,
    END_2,
    PLAN,
    sample("before", "I do not \x1b[31mknow.", reward=-0.52, good=False),
    *ROLLOUTS,
    sample("after", "Hello!\nHow are you?", reward=1.9, good=True),
    END_3,
]


def test_report_of_a_whole_run() -> None:
    lines = reported(WHOLE_RUN)
    assert squeezed(lines) == [
        "step on held-out data before after",
        "─" * 70,
        "1 supervised fine-tuning perplexity 31.20 8.41",
        "2 reward model accuracy on pairs - 87.4%",
        "3 PPO good answers, by the rule 48.0% 94.0%",
        "mean reward -0.52 1.93",
        "KL to the reference 0.000 0.410",
        "response length, tokens 20.3 30.1",
        "answers that ended (EOS) 70.0% 99.1%",
        "step 1 1m02s runs/demo/step1/model",
        "step 2 38s runs/demo/step2/model",
        "step 3 1h02m runs/demo/step3/model",
        "total 1h03m",  # 62 + 38.4 + 3720 s = 63 min 40 s
        "prompt 1",
        "Human: hi",
        "Assistant:",
        "before reward -0.52 bad",
        "I do not \\x1b[31mknow.",
        "after reward 1.90 good",
        "Hello!",
        "How are you?",
    ]
    assert max(map(len, lines)) <= 80


def test_report_has_no_rows_for_what_was_not_measured_or_not_run() -> None:
    no_rule = {key: value for key, value in END_3.items() if not key.startswith("good")}
    lines = squeezed(reported([END_1, no_rule]))
    assert not any("good" in line or "reward model" in line or "step 2" in line for line in lines)
    assert "3 PPO mean reward -0.52 1.93" in lines and "total 1h03m" in lines


def test_report_leaves_out_what_was_undone() -> None:
    late = sample("after", "New.", reward=2.0)
    assert reported([*WHOLE_RUN, event("resumed", 3, from_update=0), late]) == reported([END_1, END_2, late])


def test_report_takes_the_newest_of_a_sample_written_twice() -> None:
    lines = squeezed(reported([sample("after", "Old.", reward=1.0), sample("after", "New.", reward=2.0)]))
    assert "Old." not in lines and lines[-2:] == ["after reward 2.00", "New."]


def test_report_shows_three_prompts() -> None:
    lines = reported([sample("after", "x", reward=1.0, prompt=f"number {i}") for i in range(5)])
    assert [line.strip() for line in lines if "number" in line] == ["number 0", "number 1", "number 2"]


def test_report_folds_long_texts_and_loses_nothing() -> None:
    words, path = "word " * 100 + "x" * 200, "runs/" + "long/" * 30 + "model"
    lines = reported([END_1 | {"model": path}, sample("after", words, reward=1.0)])
    assert "".join("".join(lines[lines.index("after   reward 1.00") + 1 :]).split()) == "word" * 100 + "x" * 200
    assert any(line.endswith(path) for line in lines)  # whole, to be copied
    assert max(len(line) for line in lines if path not in line) <= 80


def test_report_of_nothing() -> None:
    assert reported([]) == ["no step has ended yet"]


def test_report_is_data_and_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    print_report([END_1])
    said = capsys.readouterr()
    assert "perplexity" in said.out and said.err == ""


def test_an_error_goes_to_standard_error_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(ToolkitError("cannot find [/model] " + "x" * 100, why="it is\ngone \x1b[2J", hint="look :eyes:"))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: cannot find [/model] " + "x" * 100 + "\n  why: it is\n       gone \\x1b[2J\n\nhint: look :eyes:\n"


def test_a_view_needs_no_training_code() -> None:
    tree = ast.parse(Path(console.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} & {"torch", "rlhf_train", "remote", "transformers", "deepspeed"} == set()
