"""Draw README's pictures from a finished run: the panel, the chat, the report.

    .venv/bin/python benchmarks/pictures.py runs/demo

Panel and chat are SVG of 80 columns in the reader's own monospaced font. The report is a PNG, made
by a headless Chromium, which must be installed.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Sequence
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from jobs.events import RawEvent, effective, read_events
from jobs.run_dir import RunDir
from jobs.views.panel import Board

COLUMNS = 80
PICTURES = Path(__file__).resolve().parents[1] / "docs/pictures"
SHARE = 0.6  # of step 3's updates, where the panel is shown
SEED = 0  # of the answers
TYPED = (
    "Hi there. Tell me the opposite of fast.",
    "/compare step1,step3",
    "Hello. My name is Clara. It is afternoon. Greet my friend Ben.",
)
REPORT_PIXELS = (1000, 570)
# Dark on a grey that stands out from GitHub's white page, and is light on its dark one.
BLACK, RED, GREEN, YELLOW = (31, 35, 40), (207, 34, 46), (26, 127, 55), (154, 103, 0)
BLUE, MAGENTA, CYAN, WHITE = (9, 105, 218), (130, 80, 223), (27, 124, 131), (110, 119, 129)
LIGHT = TerminalTheme((246, 248, 250), BLACK, [BLACK, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, WHITE])
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, "  # before rich's `monospace`
CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--virtual-time-budget=3000",
)  # fmt: skip


def panel_lines(events: Sequence[RawEvent], share: float) -> list[Text]:
    """Return the panel as it was when `share` of step 3's updates were made."""
    board, seconds = Board(), 0.0
    for event in events:
        if event["kind"] == "metrics":
            seconds = float(event["elapsed_s"])
        board.feed(event, seconds)
        if event["kind"] == "metrics" and event["step"] == 3 and event["update"] >= share * event["updates"]:
            break
    lines = board.lines(COLUMNS - 1, seconds)
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return lines


def svg(lines: Sequence[Text], title: str) -> str:
    """Draw lines as a terminal shows them, dark on light, without a font from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), markup=False, highlight=False, emoji=False)
    for line in (*lines, Text()):  # the picture ends with its last line, and would cut off what reaches below it
        console.print(line)
    fonts = re.compile(r"@font-face \{\{.*?\}\}\s*", flags=re.DOTALL)
    style = fonts.sub("", CONSOLE_SVG_FORMAT).replace("Fira Code, ", FONT)
    return console.export_svg(title=title, theme=LIGHT, code_format=style, unique_id="picture")


def talk(run: Path, typed: Sequence[str]) -> str:
    """Type lines into `rlhf-train chat` on a terminal of 80 columns, and return what stands there.

    A dumb terminal, since others get the same text with escape sequences around what is typed.
    """
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    words = [sys.executable, "-m", "rlhf_train", "chat", run.name, "--output-dir", str(run.parent), "--seed", str(SEED)]
    process = subprocess.Popen(
        words, stdin=its_end, stdout=its_end, stderr=its_end, env=os.environ | {"TERM": "dumb"}, start_new_session=True
    )
    os.close(its_end)
    seen = b""
    for line in [*typed, "\4"]:
        seen = _read_until(terminal, seen, b"you> ")
        os.write(terminal, line.encode() + (b"" if line == "\4" else b"\n"))
    process.wait(60)
    text = seen.decode().replace("\r\n", "\n")
    return text.replace("loading ...\r", "").replace(" " * len("loading ...") + "\r", "").removesuffix("you> ").rstrip()


def _read_until(terminal: int, seen: bytes, end: bytes) -> bytes:
    while True:
        seen += os.read(terminal, 4096)  # raises OSError where the chat has ended
        if seen.endswith(end):
            return seen


def shoot(page: Path, picture: Path) -> None:
    """Take a picture of the upper part of a page, in light colours."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("a picture of the report needs Chromium: apt-get install chromium")
    size = f"--window-size={REPORT_PIXELS[0]},{REPORT_PIXELS[1]}"
    with tempfile.TemporaryDirectory() as profile:
        words = [program, *CHROMIUM, f"--user-data-dir={profile}", size, f"--screenshot={picture}", page.as_uri()]
        subprocess.run(words, check=True, timeout=120, stderr=subprocess.DEVNULL)


def main(run: RunDir) -> None:
    PICTURES.mkdir(exist_ok=True)
    events = effective(read_events(run.events)[0])
    panel = svg(panel_lines(events, SHARE), f"rlhf-train --job {run.name} --step all")
    (PICTURES / "panel.svg").write_text(panel, encoding="utf-8")
    said = [Text(line) for line in talk(run.path, TYPED).split("\n")]
    (PICTURES / "chat.svg").write_text(svg(said, f"rlhf-train chat {run.name}"), encoding="utf-8")
    shoot(run.report.resolve(), PICTURES / "report.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(RunDir(Path(sys.argv[1])))
