"""What a tunnel leads to, told by a real sshd."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remote.verbs.tunnel import State, Tunnel, state_of


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    tunnels: list[Tunnel] = []

    def open_tunnel(server: Any, port: int) -> tuple[Tunnel, int]:
        local = free_port()
        with server.connection(tmp_path / "state") as connection:
            tunnels.append(Tunnel(connection.stream(forward=[f"127.0.0.1:{local}:127.0.0.1:{port}"]), local))
        return tunnels[-1], local

    yield open_tunnel
    for tunnel in tunnels:
        tunnel.close()


@pytest.mark.parametrize("speaks", [True, False])  # as sshd does; as TensorBoard, which waits to be asked
def test_open(sshd: Any, opened: Callable[..., tuple[Tunnel, int]], speaks: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        if speaks:
            port = sshd.port
        tunnel, local = opened(sshd, port)
        assert tunnel.state == "open"
        if speaks:
            with socket.create_connection(("127.0.0.1", local), 5) as connection:
                assert connection.recv(4) == b"SSH-"


def test_forbidden(make_sshd: Callable[..., Any], opened: Callable[..., tuple[Tunnel, int]]) -> None:
    server = make_sshd("AllowTcpForwarding no")
    tunnel, _ = opened(server, server.port)
    assert tunnel.state == "forbidden"


def test_nobody_listens_until_somebody_does(sshd: Any, opened: Callable[..., tuple[Tunnel, int]]) -> None:
    port = free_port()
    tunnel, _ = opened(sshd, port)
    assert tunnel.state == "nobody listens"
    states: list[State] = []

    def changed(state: State) -> None:
        states.append(state)
        tunnel._process.terminate()

    with socket.create_server(("127.0.0.1", port)):
        watching = threading.Thread(target=lambda: tunnel.watch(changed, "nobody listens"))
        watching.start()
        watching.join(30)
    assert states == ["open"]


def test_an_ssh_that_ends_opens_nothing() -> None:
    tunnel = Tunnel(["ssh", "-o", "BatchMode=yes", "-p", str(free_port()), "127.0.0.1"], free_port())
    assert tunnel.state is None
    tunnel.close()


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("channel 2: open failed: administratively prohibited: open failed\r\n", "forbidden"),
        ("channel 3: open failed: connect failed: Connection refused\r\n", "nobody listens"),
        ("channel 3: open failed: connect failed: No route to host\r\n", "failed"),
        ("Welcome to the box: connection refused to nobody\n", None),
        ("", None),
    ],
)
def test_the_words_of_ssh(words: str, state: State | None) -> None:
    assert state_of(words) == state
