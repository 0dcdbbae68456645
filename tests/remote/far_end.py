"""The far end of a connection, which speaks as `supervisor.sh follow`, for tests of runs/watch.py.

Usage: far_end.py FOLDER FILE OFFSET. FOLDER holds the file, and what is to be said: `job` (words),
`gpu` (lines), `ahead` (seconds by which the clock is wrong), `cut` (bytes a frame), `refuse` (exit
code and last words, instead of all this). `lines` gets a line `PID FILE OFFSET` for each
connection.
"""

import os
import sys
import time
from pathlib import Path

POLL_S, BEAT_S = 0.01, 0.05


def main(folder: Path, name: str, position: int) -> None:
    with (folder / "lines").open("a") as lines:
        lines.write(f"{os.getpid()} {name} {position}\n")
    if refuse := text(folder / "refuse"):
        code, _, words = refuse.partition(" ")
        print(words, file=sys.stderr)
        sys.exit(int(code))
    said, beat_at = "", 0.0
    while os.getppid() != 1:
        job = text(folder / "job")
        if job != said:
            say(f"job {job}\n".encode())
            said = job
        data = (folder / name).read_bytes() if (folder / name).exists() else b""
        if len(data) < position:
            position = len(data)
            say(b"shrunk %d\n" % position)
        new, step = data[position:], int(text(folder / "cut") or 1 << 16)
        for start in range(0, len(new), step):
            part = new[start : start + step]
            say(b"bytes %d %d\n" % (position, len(part)), part)
            position += len(part)
        if "exit=" in job and not new:
            say(b"done\n")
            return
        if time.monotonic() >= beat_at:
            for card in text(folder / "gpu").splitlines():
                say(f"gpu {card}\n".encode())
            say(b"beat %.3f\n" % (time.time() + float(text(folder / "ahead") or 0)))
            beat_at = time.monotonic() + BEAT_S
        time.sleep(POLL_S)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def say(*parts: bytes) -> None:
    for part in parts:
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
