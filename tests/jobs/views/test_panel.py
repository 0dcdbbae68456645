import io
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from jobs.events import SHOWN, RawEvent
from jobs.formatting import number
from jobs.steps import STEPS, Step
from jobs.views.gpus import GpuUsage, cards_text
from jobs.views.panel import Board, BoxView, Live, sparkline
from tests.raw_events import (
    BARE,
    END_1,
    END_2,
    END_3,
    EXPECTED,
    PLAN,
    PPO,
    REWARD,
    ROLLOUTS,
    SFT,
    event,
    sample,
    squeezed,
)


def shown(events: Iterable[RawEvent], width: int, now: float = 0.0) -> list[str]:
    board = Board()
    for each in events:
        board.feed(each, 0.0)
    return [line.plain.rstrip() for line in board.lines(width, now)]


@pytest.mark.parametrize(("width", "done", "left"), [(79, 19, 58), (119, 29, 88)])
def test_panel_of_step_3(width: int, done: int, left: int) -> None:
    assert squeezed(shown([END_1, END_2, PLAN, *ROLLOUTS], width)) == [
        "✓ step 1 supervised fine-tuning 1m02s perplexity 31.20 → 8.41",
        "✓ step 2 reward model 38s accuracy 87.4%",
        "▸ step 3 PPO 120 of 480 25% 1m36s eta 4m48s",
        "━" * done + "─" * left,
        "mean reward 1.20 ▁▃▆█ -0.30 to 1.20",
        "kl k3 0.120 ▁▃▆█ 0.030 to 0.120",
        "policy loss 0.0123 value loss 0.4568 entropy 2.346",
        "clip fraction 2.1% response length 64.2 eos share 92.1%",
        "grad norm 1.50 learning rate 9.65e-06 tok/s 3120",
    ]


def test_panel_of_step_1() -> None:
    assert squeezed(shown([SFT], 79)) == [
        "▸ step 1 supervised fine-tuning 1 of 10 10% 2s eta 18s",
        "━" * 7 + "─" * 70,
        "loss 3.2100 ▁ 3.2100 to 3.2100",
        "learning rate 9.65e-06 grad norm 1.25 tok/s 900",
    ]


def test_the_time_left_of_all_steps_stands_behind_the_bar() -> None:
    """5 of 10 updates took 10 s: twice as long as estimated."""
    begun, fifth = event("plan", 1, updates=10, expected=EXPECTED), SFT | {"update": 5, "elapsed_s": 10.0}
    title, bar, *_ = shown([begun, fifth], 79, now=4.0)
    assert title.endswith("5 of 10   50%  14s  eta 6s")
    # 5 updates of 2 s, half of 4 s twice, and twice 60 + 8 s, less the 4 s since the update.
    assert bar == "  " + "━" * 27 + "─" * 28 + "  all steps: eta 2m26s"
    assert "all steps" not in "".join(shown([begun, fifth | {"update": 2}], 79))
    # The only step, or the last one, says it by itself.
    last = begun | {"expected": {"1": EXPECTED["1"]}}
    assert "all steps" not in "".join(shown([last, fifth], 79))


def test_panel_of_step_2() -> None:
    assert squeezed(shown([REWARD], 79)) == [
        "▸ step 2 reward model 10 of 10 100% 20s",
        "━" * 77,
        "loss 0.6931 ▁ 0.6931 to 0.6931",
        "accuracy 62.5% ▁ 62.5% to 62.5%",
        "margin 0.100 learning rate 5e-05",
        "grad norm 1.25 tok/s 1000000",
    ]


@pytest.mark.parametrize("is_far", [False, True])
@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.section)
def test_each_metric_that_is_shown_can_be_drawn(step: Step, is_far: bool) -> None:
    numbers = dict.fromkeys(SHOWN, 0.5)
    board = Board()
    if is_far:
        board.feed_box(BoxView("gpu-box"))
    board.feed(event("metrics", step.number, update=1, updates=9, elapsed_s=1.0, **numbers), 0.0)
    drawn = " ".join(" ".join(line.plain for line in board.lines(200, 0.0)).split())
    for name in step.panel:
        assert f"{SHOWN[name].label} {number(0.5, SHOWN[name].spec)}" in drawn


def test_a_plan_without_updates_yet() -> None:
    assert squeezed(shown([PLAN], 79)) == ["▸ step 3 PPO 0 of 480 0%", "─" * 77]


def test_events_with_missing_fields_break_no_panel() -> None:
    assert squeezed(shown(BARE[:-1], 79))[0] == "▸ step 3 PPO"  # how many updates there will be, nobody has said
    assert squeezed(shown(BARE, 79)) == ["✓ step 3 PPO ?"]


def test_elapsed_goes_on_and_time_left_shrinks_between_events() -> None:
    assert "120 of 480   25%  1m46s  eta 4m38s" in shown([PPO], 79, now=10.0)[0]


def test_what_is_being_done_with_its_time() -> None:
    doing = event("progress", 3, doing="evaluating on held-out prompts")
    assert squeezed(shown([PPO, doing], 79, now=12.0))[-1] == "evaluating on held-out prompts 12s"
    assert "evaluating" not in " ".join(shown([PPO, doing, PPO], 79))


def test_the_last_checkpoint_stays_in_sight() -> None:
    saved = event("checkpoint", 3, update=100, path="x", size_bytes=1500, seconds=1)
    assert squeezed(shown([saved, PPO], 79))[-1] == "checkpoint at update 100: 1.5 kB in 1.0s"


def test_a_failed_step_says_so() -> None:
    lines = squeezed(shown([PPO, event("error", rank=0, what="out of\nmemory", exit_code=4)], 79))
    assert (
        lines[0].startswith("✗ step 3 PPO 120 of 480")
        and "eta" not in lines[0]
        and lines[-1] == "failed: out of memory"
    )


def test_a_resume_takes_back_the_curve_and_the_end() -> None:
    lines = squeezed(shown([PLAN, *ROLLOUTS, END_3, event("resumed", 3, from_update=60)], 79))
    assert lines == ["▸ step 3 PPO 60 of 480 12%", "━" * 9 + "─" * 68]
    lines = squeezed(shown([PLAN, *ROLLOUTS, END_3, event("resumed", 3, from_update=60), ROLLOUTS[2]], 79))
    assert "mean reward 0.70 ▁▄█ -0.30 to 0.70" in lines


@pytest.mark.parametrize("width", [20, 39, 79, 119, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    long = event("progress", 3, doing="调" * 100)
    board = Board()
    for each in (END_1, END_2, END_3, event("resumed", 3, from_update=0), *ROLLOUTS * 40, long):
        board.feed(each, 0.0)
    assert max(line.cell_len for line in board.lines(width, 5.0)) <= width


def test_a_line_that_is_too_long_ends_after_a_word() -> None:
    doing = event("progress", 3, doing="reading the checkpoint of update 480 from a slow disk")
    assert shown([PPO, doing], 40)[-1] == "  reading the checkpoint of update 480…"
    assert shown([PPO, doing], 38)[-1] == "  reading the checkpoint of update…"
    assert shown([PPO, event("progress", 3, doing="x" * 50)], 20)[-1] == "  " + "x" * 17 + "…"


def test_a_finished_step_keeps_all_its_numbers() -> None:
    assert squeezed(shown([END_3], 79)) == [
        "✓ step 3 PPO 1h02m good answers 48.0% → 94.0%",
        "mean reward -0.52 → 1.93 kl k3 0.000 → 0.410 response length 20.3 → 30.1",
        "eos share 70.0% → 99.1%",
    ]
    assert squeezed(shown([END_3], 119)) == [
        "✓ step 3 PPO 1h02m good answers 48.0% → 94.0% mean reward -0.52 → 1.93 kl k3 0.000 → 0.410",
        "response length 20.3 → 30.1 eos share 70.0% → 99.1%",
    ]


def test_a_long_curve_drawn_by_means_names_the_values_between_which_it_went() -> None:
    losses = [SFT | {"update": i, "updates": 200, "loss": 201.0 - i} for i in range(1, 201)]
    (curve,) = [line for line in squeezed(shown(losses, 79)) if line.startswith("loss")]
    assert curve.startswith("loss 1.0000 █") and curve.endswith("▁ 1.0000 to 200.0000")


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
        file=io.StringIO(), force_terminal=True, width=width, height=40, color_system="standard" if colors else None,
        soft_wrap=True, markup=False,
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
    final = [line.rstrip() for line in lines if line.strip()][-4 if width == 80 else -3 :]
    assert final[0] == "✓ step 1  supervised fine-tuning  1m02s    perplexity 31.20 → 8.41"
    assert final[1].startswith("✓ step 3  PPO                     1h02m    good answers 48.0% → 94.0%")
    assert final[-1].endswith("eos share 70.0% → 99.1%")
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
        # Five lines (empty, title, bar, empty, status): four steps up, and one for the bar's second
        # half.
        assert written(screen)[before:].count("\x1b[1A") == 5
        before = len(written(screen))
        live._live.refresh()
        assert written(screen)[before:].count("\x1b[1A") == 4


# --- a run on another machine

BOX = BoxView(
    name="gpu-box",
    line="run demo, connected",
    cards=(GpuUsage(0, 41_984, 81_920, 97),),
    price_per_hour=12.0,
    currency="¥",
    started_at=-3600.0,
)


def far(
    events: Iterable[RawEvent], box: BoxView = BOX, width: int = 79, height: int | None = None, now: float = 0.0
) -> list[str]:
    board = Board()
    for each in events:
        board.feed(each, 0.0)
    board.feed_box(box)
    return [line.plain.rstrip() for line in board.lines(width, now, height)]


WITH_SAMPLE = [END_1, END_2, PLAN, sample("before", "I am\nfine. " * 12, reward=-0.5, good=False), *ROLLOUTS]


def test_panel_of_a_run_on_another_machine() -> None:
    lines = far(WITH_SAMPLE, height=22)
    assert squeezed(lines) == [
        "✓ step 1 supervised fine-tuning 1m02s perplexity 31.20 → 8.41",
        "✓ step 2 reward model 38s accuracy 87.4%",
        "▸ step 3 PPO 120 of 480 25% 1m36s eta 4m48s",
        "━" * 19 + "─" * 58,
        "mean reward 1.20 ▁▃▆█ -0.30 to 1.20",
        "kl k3 0.120 ▁▃▆█ 0.030 to 0.120",
        "policy loss 0.0123 ▁▁▁▁ 0.0123 to 0.0123",
        "value loss 0.4568 entropy 2.346 clip fraction 2.1%",
        "response length 64.2 eos share 92.1% grad norm 1.50",
        "learning rate 9.65e-06 tok/s 3120",
        "gpu 97% busy, 41.0 of 80.0 GiB",
        "cost ¥12.00 so far, about ¥12.96 when the job ends, at ¥12.00/h",
        "prompt Human: hi Assistant:",
        "answer before reward -0.50 bad I am fine. I am fine. I am fine. I am",
        "fine. I am fine. I am fine. I am fine. I am fine. I am fine.",
        "I am fine. I am fine. I am fine.",
        "● gpu-box run demo, connected",
    ]


@pytest.mark.parametrize("height", [3, 10, 15, 18, 19, 20, 40])
def test_what_the_line_is_like_stays_in_sight_however_low_the_terminal(height: int) -> None:
    lines = far(WITH_SAMPLE, height=height)
    assert len(lines) <= height and lines[-1] == "  ● gpu-box       run demo, connected"
    assert sum("I am" in line for line in lines) == {3: 0, 10: 0, 15: 1, 18: 1, 19: 2, 20: 3, 40: 3}[height]


def test_a_sample_goes_with_the_updates_that_it_was_made_after() -> None:
    after = sample("after", "Fine.", reward=1.0)
    assert "answer after reward 1.00 Fine." in squeezed(far([PLAN, *ROLLOUTS, after]))
    assert not any("answer" in line for line in far([PLAN, *ROLLOUTS, after, event("resumed", 3, from_update=60)]))
    before = sample("before", "Well.", reward=0.0)
    assert any("Well." in line for line in far([PLAN, before, *ROLLOUTS, event("resumed", 3, from_update=60)]))
    assert not any("Well." in line for line in far([PLAN, before, event("resumed", 3, from_update=0)]))


ETA_288 = "¥12.00 so far, about ¥12.96"  # 288 s left at ¥12/h: 96 cents


@pytest.mark.parametrize(
    ("events", "box", "cost"),
    [
        ([], {}, "¥12.00 so far, at ¥12.00/h"),
        ([PPO], {}, f"{ETA_288} when the job ends, at ¥12.00/h"),
        ([PPO | {"step": 1}], {}, f"{ETA_288} after step 1, at ¥12.00/h"),  # what comes after it is not known
        ([PPO | {"step": 1}], {"steps": (1,)}, f"{ETA_288} when the job ends, at ¥12.00/h"),
        (
            [PPO | {"step": 1}],
            {"steps": (1, 2, 3)},
            f"{ETA_288} after step 1, then steps 2 and 3",
        ),  # the time of those is not known
        ([PPO | {"step": 2}], {"steps": (1, 2, 3)}, f"{ETA_288} after step 2, then step 3"),
        ([PPO, event("error", 3, what="boom")], {}, "¥12.00 so far, at ¥12.00/h"),
        ([PPO, END_3], {}, "¥12.00 so far, at ¥12.00/h"),
        ([PPO], {"ended_at": -1800.0}, "¥6.00 for this job, ¥12.00/h until the box is stopped"),
        (
            [PPO],
            {"currency": "EUR", "started_at": -3.0, "ended_at": -1.0},
            "0.0067 EUR for this job, 12.00 EUR/h until the box is stopped",
        ),
        ([PPO], {"price_per_hour": None}, None),
        ([PPO], {"started_at": None}, None),
    ],
)
def test_cost_says_what_is_known(events: list[RawEvent], box: dict[str, Any], cost: str | None) -> None:
    said = [line.split(maxsplit=1)[1] for line in far(events, replace(BOX, **box)) if line.startswith("  cost")]
    assert said == ([cost] if cost else [])


def test_cost_leaves_out_what_has_no_room() -> None:
    said = [
        line
        for width in (99, 79, 70, 50, 30)
        for line in far([PPO | {"step": 1}], replace(BOX, currency="EUR", steps=(1, 2)), width)
        if "cost" in line
    ]
    assert [" ".join(line.split()[1:]) for line in said] == [
        "12.00 EUR so far, about 12.96 EUR after step 1, then step 2, at 12.00 EUR/h",
        "12.00 EUR so far, about 12.96 EUR after step 1, then step 2",
        "12.00 EUR so far, about 12.96 EUR after step 1",
        "12.00 EUR so far",
        "12.00 EUR…",
    ]


def test_a_run_that_is_over_has_no_time_left_and_grows_no_older() -> None:
    over = far([PPO], replace(BOX, ended_at=10.0, line="run demo, lost", is_good=False), now=500.0)
    assert squeezed(over)[0] == "▸ step 3 PPO 120 of 480 25% 1m46s" and over[-1] == "  ○ gpu-box       run demo, lost"


def test_a_line_that_is_away_says_for_how_long_and_why() -> None:
    away = far([PPO], replace(BOX, line="run demo, connection lost", away_at=-75.0, away_why="no route"))
    assert away[-1] == "  ○ gpu-box       run demo, connection lost for 1m15s, reconnecting: no route"


EIGHT = [GpuUsage(i, 1024.0 * i, 81_920, 100.0 / 7 * i) for i in range(8)]


@pytest.mark.parametrize(
    ("cards", "width", "text"),
    [
        (EIGHT[:1], 60, "0% busy, 0.0 of 80.0 GiB"),
        (EIGHT[:2], 60, "0% busy, 0.0 of 80.0 GiB   14% busy, 1.0 of 80.0 GiB"),
        (EIGHT[:2], 40, "▁▂  0 to 14% busy, 0 to 1 of 80 GiB each"),
        (EIGHT, 61, "▁▂▃▄▅▆▇█  0 to 100% busy, 0 to 7 of 80 GiB each"),
        ([EIGHT[1]] * 8, 61, "▂▂▂▂▂▂▂▂  14% busy, 1 of 80 GiB each"),
        ([GpuUsage(0, math.nan, 81_920, math.nan)], 60, "?% busy, ? of 80.0 GiB"),
        ([EIGHT[0], GpuUsage(1, math.nan, 40_960, math.nan)], 20, "▁?  ?% busy, ? of 40 to 80 GiB each"),
    ],
)
def test_cards(cards: list[GpuUsage], width: int, text: str) -> None:
    assert cards_text(cards, width) == text


def test_live_takes_old_events_by_their_time_and_quiet_ones_in_silence() -> None:
    screen = terminal(80)
    with Live(screen, clock=lambda: 100.0) as live:
        live.feed(event("warning", 3, message="of old"), quiet=True)
        live.feed(PPO, at=90.0)
        live.feed(event("error", 3, rank=0, what="boom", exit_code=4))
        live.feed(event("resumed", 3, from_update=120))
        live.feed(PPO | {"update": 121}, at=95.0)
        live.note("a \x1b[2J note")
        live.feed_box(BOX)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written(screen))
    assert "of old" not in text and "a \\x1b[2J note" in text and "gpu-box" in text
    assert text.index("error: step 3, rank 0: boom") < text.index("step 3  resumed after update 120")
    assert "121 of 480   25%  1m41s" in text
