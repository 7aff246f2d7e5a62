"""Some hostile requests are answered in order, and what there is to find would be found."""

import json
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from tests.availability import require_server
from tests.tools.canned_server import canned
from tools import hostile_requests
from tools.served import serve

SENT = hostile_requests.Request("POST", "/completion", b"{}", hostile_requests.JSON, "")


@pytest.mark.slow
def test_hostile_requests_are_answered(chat_file: Path) -> None:
    require_server()
    with serve(chat_file, "--context", 256, "--parallel", 2, "--threads", 1) as server:
        answers = list(hostile_requests.run(server, range(40)))
    assert [(seed, wrong) for seed, _, wrong, _, _ in answers if wrong] == []
    assert {200, 400, 404} <= {status for *_, status, _ in answers}


@pytest.mark.parametrize(
    ("status", "message", "found"),
    [
        (200, "", ""),
        (400, "no such field", ""),
        (501, "start it with --embeddings", "status 501"),
        (500, "no such field", "status 500"),
        (400, " ", "no sentence"),
        (400, None, "no sentence"),
        (400, "can't open /home/me/x", "names a file of this machine"),
        (400, "server.cpp:12: failed", "names a file of this machine"),
        (0, "", "no answer: RemoteDisconnected"),
    ],
)
def test_what_there_is_to_find_is_found(status: int, message: str | None, found: str) -> None:
    body = json.dumps({"error": {"message": message}} if message is not None else {}).encode()
    with canned(status, "application/json", body) as server:
        assert hostile_requests.fault(server, SENT)[0][: len(found) or None] == found
    event = json.dumps({"error": {"message": message, "code": status}}).encode()
    if status >= 400 and message is not None:
        with canned(200, "text/event-stream", b"data: " + event + b"\n\n") as server:
            assert hostile_requests.fault(server, SENT)[0] == found, "within a stream"


def test_a_server_that_has_died_is_noticed() -> None:
    with canned(0, "", b"") as server, pytest.raises(D2QError, match=r"after the request of seed 3 \(.*no answer"):
        list(hostile_requests.run(server, range(3, 5)))


def test_requests_are_repeatable() -> None:
    assert hostile_requests.request(5) == hostile_requests.request(5)
    assert len({hostile_requests.request(seed).body for seed in range(200)}) > 150
