import io
import math
import re
from collections.abc import Iterable

import pytest

from jobs.events import RawEvent, parsed
from jobs.views.console import console_on
from jobs.views.plain import LINES as plain_lines
from jobs.views.plain import Plain
from tests.raw_events import BARE, END_1, END_2, END_3, EXPECTED, PLAN, PPO, REWARD, SFT, event, sample


def plain(events: Iterable[RawEvent]) -> list[str]:
    stream = io.StringIO()
    with Plain(console_on(stream)) as lines:
        for each in events:
            lines.feed(each)
    return stream.getvalue().splitlines()


LINES = [
    (
        PLAN,
        [
            "step 3  PPO: 480 updates, 1920 prompts",
            "step 3  batch 32 = 16 micro x 2 accumulation x 1 rank",
            "step 3  on cpu (PyTorch sees no GPU), float32, ZeRO 0",
            "step 3  data of all steps: 2000 rows; left out: 3 empty answers, 1 overlong prompt; cut: 5 overlong "
            "answers",
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
    (
        event("progress", 3, doing="evaluating on [held-out] prompts :eyes:"),
        ["step 3  evaluating on [held-out] prompts :eyes:"],
    ),
    (SFT, ["step 1  update 1/10  loss 3.2100  learning rate 9.65e-06  grad norm 1.25  900 tok/s  eta 18s"]),
    (REWARD, ["step 2  update 10/10  loss 0.6931  accuracy 62.5%  margin 0.100  1000000 tok/s"]),
    (
        PPO,
        [
            "step 3  update 120/480  policy loss 0.0123  value loss 0.4568  kl k3 0.032  mean reward 1.23  3120 tok/s  "
            "eta 4m48s"
        ],
    ),
    (
        PPO | {"kl_k3": "nan", "policy_loss": math.inf},
        [
            "step 3  update 120/480  policy loss inf  value loss 0.4568  kl k3 nan  mean reward 1.23  3120 tok/s  "
            "eta 4m48s"
        ],
    ),
    (
        sample("before", "I am \x1b[31mred\nand \x9b2J.", reward=-0.52, good=False),
        [
            "step 3  before  reward -0.52  bad  prompt: Human: hi\\nAssistant:  response: I am \\x1b[31mred\\nand "
            "\\x9b2J."
        ],
    ),
    (
        sample("after", "Fine.", reward="nan"),
        ["step 3  after  reward nan  prompt: Human: hi\\nAssistant:  response: Fine."],
    ),
    (
        sample("after", "r" * 310, reward=1.0, prompt="p" * 25 + "q" * 100, good=True),
        [
            f"step 3  after  reward 1.00  good  prompt: (25 characters) ... {'q' * 100}  response: {'r' * 300} ... "
            f"(10 more characters)"
        ],
    ),
    (
        event("checkpoint", 1, update=200, path="runs/a b/step1/model", size_bytes=2_630_000_000, seconds=12.4),
        ["step 1  checkpoint at update 200: 2.63 GB in 12s, runs/a b/step1/model"],
    ),
    (
        event("warning", 3, message="KL is 41.2\nnats", hint="lower it"),
        ["step 3  warning: KL is 41.2 nats  hint: lower it"],
    ),
    (event("warning", message="slow disk"), ["warning: slow disk"]),
    (
        event(
            "error",
            3,
            rank=1,
            what="out of memory",
            why="tried\nto \x1b[2J allocate",
            hint="lower hardware.micro_batch",
            exit_code=4,
        ),
        [
            "error: step 3, rank 1: out of memory",
            "  why: tried",
            "       to \\x1b[2J allocate",
            "",
            "hint: lower hardware.micro_batch",
        ],
    ),
    (event("error", rank=0, what="no", exit_code=1), ["error: rank 0: no"]),
    (event("resumed", 3, from_update=200), ["step 3  resumed after update 200"]),
    (event("resumed", 3, from_update=0), ["step 3  starts from scratch"]),
    (END_1, ["step 1  done in 1m02s  perplexity 31.20 -> 8.41  model runs/demo/step1/model"]),
    (END_2, ["step 2  done in 38s  accuracy 87.4%  model runs/demo/step2/model"]),
    (
        END_3,
        [
            "step 3  done in 1h02m  good answers 48.0% -> 94.0%  mean reward -0.52 -> 1.93  kl k3 0.000 -> 0.410  "
            "response length 20.3 -> 30.1  eos share 70.0% -> 99.1%  model runs/demo/step3/model"
        ],
    ),
    (
        PLAN | {"data": {}, "own_models": {"actor.sft_model": "my/sft", "critic.reward_model": "my/r\x1bm"}},
        [
            "step 3  PPO: 480 updates, 1920 prompts",
            "step 3  batch 32 = 16 micro x 2 accumulation x 1 rank",
            "step 3  on cpu (PyTorch sees no GPU), float32, ZeRO 0",
            "step 3  starts from actor.sft_model my/sft, critic.reward_model my/r\\x1bm",
        ],
    ),
    (event("telepathy", 3, message="from a newer writer"), []),
    (event("progress", 3, doing="x", mood="a field from a newer writer"), ["step 3  x"]),
]


@pytest.mark.parametrize(("raw", "lines"), LINES, ids=[f"{raw['kind']}-{i}" for i, (raw, _) in enumerate(LINES)])
def test_plain_line(raw: RawEvent, lines: list[str]) -> None:
    assert plain([raw]) == lines


def test_events_with_missing_fields_break_no_line() -> None:
    assert len(plain(BARE)) >= len(BARE)


def curve(updates: int, step: int = 1, seconds: float = 1.0, start_s: float = 0.0) -> list[RawEvent]:
    """One update every `seconds`."""
    return [
        event(
            "metrics",
            step,
            start_s + i * seconds,
            update=i,
            updates=updates,
            elapsed_s=i * seconds,
            tokens_per_s=1.0,
            loss=1.0,
        )
        for i in range(1, updates + 1)
    ]


def updates_shown(lines: Iterable[str]) -> list[str]:
    return [match[1] for line in lines if (match := re.search(r"update (\S+)", line))]


def test_of_fast_updates_the_first_the_last_and_one_in_ten_seconds() -> None:
    assert updates_shown(plain(curve(35))) == ["1/35", "11/35", "21/35", "31/35", "35/35"]


def test_slow_updates_are_all_shown() -> None:
    assert updates_shown(plain(curve(4, seconds=10.5))) == ["1/4", "2/4", "3/4", "4/4"]


def test_a_long_log_stays_short() -> None:
    # 21 lines in the first 201 s, one in 10 s; then each gap is a twentieth of the elapsed time:
    # 201 * (20/19)^n = 900, n = 29.2.
    assert 45 <= len(plain(curve(900))) <= 53
    assert updates_shown(plain(curve(900)))[-1] == "900/900"


def test_each_step_shows_its_first_update() -> None:
    assert updates_shown(plain([*curve(3), *curve(3, step=2, start_s=4.0)])) == ["1/3", "3/3", "1/3", "3/3"]


def test_the_last_update_before_an_error_is_shown() -> None:
    lines = plain([*curve(9)[:5], event("error", rank=0, what="boom", exit_code=4)])
    assert updates_shown(lines) == ["1/9", "5/9"] and lines[-1] == "error: rank 0: boom"


def test_an_error_of_an_older_run_is_shown() -> None:
    old = parsed(b'{"kind": "error", "rank": 1, "message": "boom", "why": "hot", "exit_code": 4}')
    assert old is not None and plain([old]) == ["error: rank 1: boom", "  why: hot"]


def test_the_last_update_of_a_stream_that_stops_is_shown() -> None:
    assert updates_shown(plain(curve(9)[:5])) == ["1/9", "5/9"]


def test_quiet_events_are_not_shown_but_count_for_the_pace() -> None:
    stream, made = io.StringIO(), curve(20, seconds=2.0)
    with Plain(console_on(stream)) as lines:
        for each in [event("warning", 1, message="of old"), *made[:10]]:
            lines.feed(each, quiet=True)
        lines.feed(made[10] | {"elapsed_s": 33.0})
    assert stream.getvalue() == "step 1  update 11/20  loss 1.0000  1 tok/s  eta 27s\n"  # 3 s an update, 9 to go


def test_a_line_is_never_wrapped() -> None:
    (line,) = plain([event("warning", 1, message="word " * 100 + "/a/path" * 50)])
    assert len(line) > 800


def test_a_stream_that_cannot_hold_a_character_gets_its_escape() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Plain(console_on(stream)).feed(event("progress", 1, doing="你好"))
    stream.flush()
    assert raw.getvalue() == b"step 1  \\u4f60\\u597d\n"


def test_a_terminal_shows_the_first_three_prompts() -> None:
    shown = [plain_lines["sample"](sample("before", "Hello", place=place)) for place in range(5)]
    assert [len(lines) for lines in shown] == [1, 1, 1, 0, 0]


def test_the_time_left_of_all_steps_stands_next_to_that_of_the_step() -> None:
    """5 of 10 updates took 10 s, twice as long as estimated: so will the rest, and step 2."""
    begun = event("plan", 1, expected=EXPECTED)
    early, later = (SFT | {"update": update, "updates": 10, "elapsed_s": 2.0 * update} for update in (2, 5))
    assert plain([begun, early])[-1].endswith("900 tok/s  eta 16s")
    # 5 updates of 2 s and half of the 4 s twice, then twice 60 + 8 s: 150 s.
    assert plain([begun, later])[-1].endswith("900 tok/s  eta 10s  all steps: eta 2m30s")
