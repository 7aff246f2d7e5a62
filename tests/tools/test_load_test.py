"""A few seconds of load, and that answers that aren't right would be noticed."""

import json
from pathlib import Path

import pytest

from tests.availability import require_server
from tests.tools.canned_server import canned
from tools import load_test
from tools.served import serve

WHOLE = {"choices": [{"text": "12345678 x", "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}


@pytest.mark.slow
def test_answers_under_load(chat_file: Path) -> None:
    require_server()
    with serve(chat_file, "--context", 256, "--parallel", 4, "--threads", 1) as server:
        load = load_test.run(server, clients=8, seconds=4)
    assert load.findings == []
    assert set(load.finished) == set(load_test.KINDS)
    with serve(chat_file, "--context", 256, "--parallel", 1, "--threads", 1) as server:
        load = load_test.compare(server, clients=4, rounds=3)
    assert (load.findings, load.finished["as alone"]) == ([], 12)


def answer(status: int, body: bytes, *, stream: bool = False) -> tuple[str, str]:
    with canned(status, "text/event-stream" if stream else "application/json", body) as server:
        return load_test.ask(server, {"stream": stream})


def test_what_there_is_to_find_is_found() -> None:
    assert answer(200, json.dumps(WHOLE).encode()) == ("12345678 x", "")
    assert answer(500, b"{}")[1].startswith("status 500")
    assert "usage None" in answer(200, json.dumps({**WHOLE, "usage": None}).encode())[1]
    assert answer(200, json.dumps(WHOLE).encode().replace(b" x", b"\xff"))[1].startswith("UnicodeDecodeError")
    event = b"data: " + json.dumps(WHOLE).encode() + b"\n\n"
    assert answer(200, event + b"data: [DONE]\n\n", stream=True)[1] == ""
    assert answer(200, event, stream=True)[1].endswith("cut off")
    assert answer(0, b"")[1].startswith("RemoteDisconnected")


def test_an_answer_to_another_request_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.served.Server.memory", 1)
    with canned(200, "application/json", json.dumps(WHOLE).encode()) as server:
        load = load_test.run(server, clients=1, seconds=0.2)
    assert any(finding.startswith("whole: not the answer to") for finding in load.findings)


def test_growth_counts_from_a_quarter_of_the_time() -> None:
    assert load_test.Load(memory=[(0.0, 1), (1.0, 50), (2.0, 60), (4.0, 70)]).growth == 20
