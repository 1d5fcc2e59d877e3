"""A server that fails in every way a script can: what is asked again, how often, what becomes a verdict, and that
nothing is made up. The server is real, on this machine; no pause is waited for."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefopt_judges.kept import Replies
from prefopt_judges.openai import OpenAI
from prefopt_judges.server import Server
from pydantic import ValidationError

from prefopt.api import Completion, ConfigError, Pair, Rollout, ServiceError

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def alternatives(**logps):
    tokens = [{"token": token, "logprob": logp} for token, logp in logps.items()]
    return reply({"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": tokens}]}})


def reply(choice, **more):
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1}, **more}


def said(text, **more):
    return reply({"message": {"content": text, **more}})


SURE = alternatives(A=0.0, B=-40.0)
JSON_A = said('{"answer": "A"}')


class Handler(BaseHTTPRequestHandler):
    """Plays the next line of the script, the last one for ever."""

    def do_POST(self):
        stub = self.server.stub
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        with stub.lock:
            stub.requests.append((self.path, dict(self.headers), json.loads(sent)))
            line = stub.script.pop(0) if len(stub.script) > 1 else stub.script[0]
        line(self, stub) if callable(line) else self.send(200, {}, json.dumps(line).encode())

    def send(self, status, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def status(code, body=b"{}", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, stub: handler.send(code, named, body)


def raw(body):
    return status(200, body)


def never(handler, stub):
    stub.over.wait(10)


def drip(handler, stub):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not stub.over.wait(0.01):
        handler.wfile.write(b"X")


def reset(handler, stub):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = handler.rfile = open(os.devnull, "r+b")  # noqa: SIM115  what the base class flushes and closes


def cut(handler, stub):
    handler.send(200, {"Content-Length": "1000"}, b'{"choices": [')
    handler.close_connection = True


class Stub:
    """A server on this machine that follows a script and keeps the requests."""

    def __init__(self, *script):
        self.script, self.requests = list(script), []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.stub = True, self
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def stub():
    made = []

    def make(*script):
        made.append(Stub(*script))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Asked:
    """A judge of a stub, whose pauses are kept instead of waited for."""

    def __init__(self, stub, token="", cache=None, **settings):
        told = {"parallel": 1, "retries": 2, "timeout": 2.0, "canaries": 0, **settings}
        self.judge = OpenAI(url=stub.url, model="m", **told)
        self.pauses = []
        self.server = Server(self.judge, token, Replies(cache), lambda: 0.5, self.pause, lambda: NOW)

    async def pause(self, seconds):
        self.pauses.append(seconds)

    def __call__(self, *pairs):
        return self.judge._compared(self.server, pairs)


def pair(a="Paris is the capital.", b="I do not know.", prompt="Capital of France?"):
    return Pair(prompt, Completion(a), Completion(b))


BIG = b'{"choices": [' + b" " * 10_000_000 + b"]}"
FAULTS = {
    # name: script, requests, P(a better) or the reason there is none
    "1 timeout, then an answer": ([never, SURE], 2, 1.0),
    "2 timeout for ever": ([never], 3, "failed 3 times, at last with: TimeoutError"),
    "3 slow drip": ([drip], 3, "failed 3 times, at last with: TimeoutError"),
    "4 429 with Retry-After": ([status(429, Retry_After="7"), SURE], 2, 1.0),
    "5 429 with a date": ([status(429, Retry_After="Thu, 01 Jan 2026 00:00:09 GMT"), SURE], 2, 1.0),
    "6 429 that asks for an hour": ([status(429, Retry_After="3600")], 1, "wants 3600 s of rest, more than 120"),
    "7 a burst of 500": ([status(500), status(500), SURE], 3, 1.0),
    "8 500 for ever": ([status(500)], 3, "failed 3 times, at last with: HTTP 500"),
    "9 503, then 502, then an answer": ([status(503), status(502), SURE], 3, 1.0),
    "10 connection reset": ([reset, SURE], 2, 1.0),
    "11 reset for ever": ([reset], 3, "the server failed 3 times"),
    "12 a reply cut short": ([cut, SURE], 2, 1.0),
    "13 truncated JSON": ([raw(b'{"choices": [{"mess'), SURE], 2, 1.0),
    "14 an empty body": ([raw(b"")], 3, "at last with: a reply that is not JSON"),
    "15 a page of HTML": ([status(200, b"<html>busy</html>", Content_Type="text/html"), SURE], 2, 1.0),
    "16 wrong schema: no choices": ([{"error": "x"}], 1, "the reply has no choices"),
    "17 wrong schema: a list": ([[1, 2]], 1, "the reply has no choices"),
    "18 no text and no probabilities": ([reply({"message": {"content": None}})], 2, "the reply has no text"),
    "19 refusal": ([said(None, refusal="I cannot")], 1, "the model refused to answer"),
    "20 a content filter": ([reply({"message": {"content": ""}, "finish_reason": "content_filter"})], 1, "refused"),
    "21 10 MB": ([raw(BIG)], 1, "longer than 1048576 bytes"),
    "22 redirect to another host": ([status(302, Location="https://elsewhere.example/")], 1, "redirects to another"),
    "23 a compressed reply": ([status(200, b"x", Content_Encoding="gzip")], 1, "compressed its reply"),
    "24 a bad request": ([status(400)], 1, "the server answered HTTP 400"),
    "25 no label among the alternatives": ([alternatives(Yes=-0.1, No=-2.0)], 1, "none of A, B is among the likely"),
    "26 log-probabilities that are none": ([alternatives(A=3.0)], 2, "is not JSON"),
    "27 JSON with another answer": ([said("A"), said('{"answer": "C"}')], 2, 'is not {"answer": A or B}'),
    "28 JSON with more than was asked": ([said("A"), said('{"answer": "A", "score": 9}')], 2, "is not {"),
    "29 NaN": ([raw(b'{"choices": [NaN]}'), SURE], 2, 1.0),
    "30 deep nesting": ([raw(b"[" * 100_000), SURE], 2, 1.0),
    "31 only text, then JSON": ([said("A"), JSON_A], 2, 1.0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_cost_so_many_requests_and_never_make_a_verdict(name, stub):
    script, requests, expected = FAULTS[name]
    server = stub(*script)
    quick = {"timeout": 0.08} if never in script or drip in script else {}
    (verdict,) = Asked(server, **quick)(pair())
    assert len(server.requests) == requests
    assert verdict.usage["calls"] == requests
    if isinstance(expected, str):
        assert verdict.a_better is None
        assert expected in verdict.reason
    else:
        assert verdict.a_better == pytest.approx(expected)


def test_a_server_that_always_says_a_ends_in_ties(stub):
    from prefopt.api import both_orders

    server = stub(SURE)
    (verdict,) = both_orders(lambda pairs: Asked(server)(*pairs))([pair()])
    assert (verdict.value, verdict.tie, len(server.requests)) == (0.5, 1.0, 2)


def test_pauses_grow_and_obey_the_server(stub):
    asked = Asked(stub(status(500), status(500), status(500), SURE), retries=3)
    asked(pair())
    assert asked.pauses == [0.25, 0.5, 1.0]
    asked = Asked(stub(status(429, Retry_After="7"), SURE))
    asked(pair())
    assert asked.pauses == [7.25]
    asked = Asked(stub(status(429, Retry_After="Thu, 01 Jan 2026 00:00:09 GMT"), SURE))
    asked(pair())
    assert asked.pauses == [9.25]


def test_probabilities_are_shared_by_the_allowed_answers(stub):
    from math import exp

    server = stub(reply({"logprobs": {"content": [{"top_logprobs": [
        {"token": "A", "logprob": -1.0}, {"token": " A", "logprob": -3.0}, {"token": "B", "logprob": -2.0},
        {"token": "The", "logprob": -0.5},
    ]}]}}))  # fmt: skip
    (verdict,) = Asked(server)(pair())
    assert verdict.a_better == pytest.approx((exp(-1) + exp(-3)) / (exp(-1) + exp(-3) + exp(-2)))
    assert verdict.usage == {"calls": 1.0, "tokens_in": 100.0, "tokens_out": 1.0}


def test_completions_give_probabilities_as_a_table(stub):
    server = stub(reply({"text": " A", "logprobs": {"top_logprobs": [{" A": -0.5, " B": -0.5, "x": -3.0}]}}))
    (verdict,) = Asked(server, api="completions")(pair())
    assert verdict.a_better == 0.5
    path, _, sent = server.requests[0]
    assert path == "/v1/completions"
    assert sent["prompt"].endswith("\nAnswer:")


def test_a_server_without_probabilities_is_asked_for_json_from_then_on(stub):
    server = stub(said("A"), JSON_A)
    found = Asked(server)(pair("one reply"), pair("two replies"))
    assert [v.a_better for v in found] == [1.0, 1.0]
    assert ["response_format" in sent for _, _, sent in server.requests] == [False, True, True]
    label = Asked(stub(said(" B\n")), answer="label")
    assert label(pair())[0].a_better == 0.0


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refusal_that_all_questions_would_get_stops_and_says_so(code, stub):
    server = stub(SURE, status(code))
    with pytest.raises(ServiceError, match=f"HTTP {code}") as raised:
        Asked(server)(pair("one reply"), pair("two replies"), pair("three replies"))
    assert raised.value.exit_code == 6


def test_a_server_that_is_not_there_stops_and_says_so(stub):
    server = stub(SURE)
    server.close()
    with pytest.raises(ServiceError, match="not to be reached 3 times"):
        Asked(server)(pair())


def test_what_was_answered_before_a_failure_is_kept_and_not_asked_again(stub, tmp_path):
    server = stub(SURE, SURE, status(404))
    pairs = [pair(f"reply {i}") for i in range(4)]
    with pytest.raises(ServiceError):
        Asked(server, cache=tmp_path / "r.sqlite")(*pairs)
    server.script[:] = [SURE]
    before = len(server.requests)
    found = Asked(server, cache=tmp_path / "r.sqlite")(*pairs)
    assert [v.a_better for v in found] == [pytest.approx(1.0)] * 4
    assert len(server.requests) - before == 2
    assert [v.usage.get("cached", 0) for v in found] == [1, 1, 0, 0]


def test_a_kept_result_replays_offline_to_the_same_verdicts(stub, tmp_path):
    server = stub(alternatives(A=-0.3, B=-1.4))
    before = Asked(server, cache=tmp_path / "r.sqlite")(pair(), pair("another reply"))
    server.close()
    after = Asked(server, cache=tmp_path / "r.sqlite", offline=True)(pair(), pair("another reply"), pair("a new one"))
    assert [v.a_better for v in after[:2]] == [v.a_better for v in before]
    assert after[2].a_better is None
    assert "the judge is offline" in after[2].reason


KILLED = """
import sys
from pathlib import Path
from prefopt.api import Completion, Pair
from prefopt_judges.kept import Replies
from prefopt_judges.openai import OpenAI
from prefopt_judges.server import Server
judge = OpenAI(url=sys.argv[1], model="m", parallel=2, canaries=0)
pairs = [Pair("p", Completion(f"reply {i}"), Completion("other")) for i in range(20)]
judge._compared(Server(judge, "", Replies(Path(sys.argv[2])), lambda: 0.0), pairs)
"""


def test_a_killed_run_repeats_at_most_the_requests_in_flight(stub, tmp_path):
    """Killed as the 9th request arrives, with 2 at a time: one more answer may have been on its way."""
    process = []

    def kill(handler, stub):
        process[0].send_signal(signal.SIGKILL)

    server = stub(*[SURE] * 8, kill)
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path / "r.sqlite")]
    process.append(subprocess.Popen(command))
    assert process[0].wait(60) == -signal.SIGKILL
    asked = len(server.requests)
    server.script[:] = [SURE]
    pairs = [Pair("p", Completion(f"reply {i}"), Completion("other")) for i in range(20)]
    found = Asked(server, cache=tmp_path / "r.sqlite")(*pairs)
    assert all(v.a_better is not None for v in found)
    assert len(server.requests) <= 20 + 2
    assert asked >= 9


def test_budgets_stop_asking_and_keep_what_there_is(stub):
    server = stub(SURE)
    pairs = [pair(f"reply {i}") for i in range(5)]
    found = Asked(server, max_tokens=250)(*pairs)
    assert [v.a_better is None for v in found] == [False, False, False, True, True]
    assert found[4].reason == "the budget of 250 tokens is used up"
    assert len(server.requests) == 3
    money = Asked(server, max_cost=0.0002, price_in=1.0, price_out=10.0)(*pairs)
    assert [v.a_better is None for v in money] == [False, False, True, True, True]
    assert money[0].usage["cost"] == pytest.approx((100 * 1.0 + 1 * 10.0) / 1e6)


def test_twenty_secrets_appear_in_no_byte_that_is_written(stub, tmp_path, monkeypatch):
    """A hostile server sends back the token and whatever else it knows."""
    secrets = [f"planted-secret-{i:02d}-{'x' * 8}" for i in range(17)]
    secrets += ["hf_abcdefghijklmnopqrst", "sk-abcdefghijklmnopqrstuv", "ghp_abcdefghijklmnopqrstuvwxyz"]
    for i, value in enumerate(secrets[1:17]):
        monkeypatch.setenv(f"SERVICE_{i}_{['TOKEN', 'API_KEY', 'PASSWORD', 'SECRET'][i % 4]}", value)
    monkeypatch.setenv("MY_JUDGE", secrets[0])
    told = " ".join(secrets)
    choice = {"message": {"content": told}, "logprobs": {"content": [{"top_logprobs": [
        {"token": "A", "logprob": -0.1}, {"token": told, "logprob": -0.2, "note": {told: told}}]}]}}  # fmt: skip
    server = stub(reply(choice, id=told, model=told), said(told), said(told), status(400, told.encode()))
    own = {"token": "env:MY_JUDGE", "cache": str(tmp_path / "r.sqlite"), "canaries": 0, "parallel": 1}
    judge = OpenAI(url=server.url, model="m", **own)

    class Services:
        def rng(self, *purpose):
            import numpy

            return numpy.random.default_rng(0)

    found = judge.open(Services())([pair("one reply"), pair("two replies")])
    found += judge.open(Services())([pair("three replies")])
    (tmp_path / "log.txt").write_text(repr(found) + repr(judge) + judge.model_dump_json())
    assert server.requests[0][1]["Authorization"] == f"Bearer {secrets[0]}"
    assert found[0].a_better is not None
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"A" in written
    assert [secret for secret in secrets if secret.encode() in written] == []


def test_a_token_must_be_there_and_is_never_part_of_a_configuration(monkeypatch):
    monkeypatch.delenv("MY_JUDGE", raising=False)
    with pytest.raises(ConfigError, match="MY_JUDGE is not set"):
        OpenAI(url="https://a.example/v1", model="m", token="env:MY_JUDGE").asker(None, Replies(None))
    with pytest.raises(ValidationError, match="pattern"):
        OpenAI(url="https://a.example/v1", model="m", token="abc")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"url": "http://judge.example/v1"}, "unencrypted"),
        ({"url": "http://169.254.169.254/"}, "network card"),
        ({"url": "https://a.example/v1", "max_cost": 1.0}, "price_in"),
        ({"url": "https://a.example/v1", "api": "completions", "answer": "json"}, "no JSON schema"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        OpenAI(model="m", **settings)


def test_ratings_are_the_expected_grade_and_hollow_replies_are_not_read(stub):
    server = stub(alternatives(**{"1": -1.0, "5": -1.0}))
    asked = Asked(server)
    group = Rollout(prompt="p", index=2, completions=(Completion("fine"), Completion(" :")))
    ((first, second),) = asked.judge._rated(asked.server, [group])
    assert (first.value, second.value) == (3.0, 1.0)
    assert len(server.requests) == 1
