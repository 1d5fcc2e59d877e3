"""A scoring service over HTTP, played by a transport: what it is sent, which answers count, when it is asked again."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import inf, nan

import httpx2
import pytest
from prefopt_rewards.service import HTTPReward, Service
from pydantic import ValidationError

from prefopt.api import Completion, ConfigError, Message, Rollout

URL = "https://scores.example/v1"


def group(*texts, index=0, prompt="p", **extra):
    return Rollout(prompt=prompt, index=index, completions=tuple(Completion(t) for t in texts), extra=extra)


async def streamed(body):
    yield body


class Played:
    """A service whose answers come from a list, the last one for ever; it keeps the requests and the pauses."""

    def __init__(self, *answers, **settings):
        self.answers, self.requests, self.pauses = list(answers), [], []
        source = HTTPReward(url=URL, **settings)
        transport = httpx2.MockTransport(self.handle)
        self.score = Service(source, source._headers(), lambda: 0.5, self.pause, transport)

    async def handle(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if answer == "never":
            await asyncio.Event().wait()
        if isinstance(answer, tuple):
            return httpx2.Response(answer[0], headers=answer[1], content=streamed(answer[2]))
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return httpx2.Response(200, content=streamed(body))

    async def pause(self, seconds):
        self.pauses.append(seconds)

    def bodies(self):
        return [json.loads(request.content) for request in self.requests]


def scores(*values):
    return {"scores": list(values)}


def test_a_service_gets_prompts_completions_and_the_columns_it_was_promised():
    played = Played(scores(1, 0.5), columns=("answer",))
    talk = group("a", "b", prompt=(Message("user", "Hi"),), answer=4, private="no")
    ((first, second),) = played.score([talk])
    assert (first.value, second.value) == (1.0, 0.5)
    prompt = [{"role": "user", "content": "Hi"}]
    assert played.bodies() == [{"prompt": prompt, "completions": ["a", "b"], "row": {"answer": 4}}]


def test_every_group_keeps_its_own_answer():
    played = Played(scores(1), scores(1, 2), scores(3), parallel=1)
    found = played.score([group("a"), group("b", "c"), group("d")])
    assert [[s.value for s in own] for own in found] == [[1], [1, 2], [3]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (scores(1.0), "it gave a list of 1 instead of a list of 2 numbers"),
        (scores(1, 2, 3), "it gave a list of 3 instead of a list of 2 numbers"),
        ({"scores": 1.0}, "it gave a float instead of a list of 2 numbers"),
        (scores(nan, nan), "its score is nan, which is not finite"),
        (scores(inf, -inf), "which is not finite"),
        (scores(10**400, 10**400), "which is not finite"),
        (scores("1", [2]), "instead of a number"),
        (scores(None, None), "it gave no score"),
        ([1.0, 2.0], 'the answer is not {"scores": [...]}'),
        (b"<html>", 'the answer is not {"scores": [...]}'),
        (b'{"scores": ' + b"[" * 100_000, 'the answer is not {"scores": [...]}'),
        (b" " * (2**20 + 1), "the answer is longer than 1048576 bytes"),
        ((200, {"Content-Encoding": "gzip"}, b"x"), "compressed its answer"),
        ((302, {"Location": "https://elsewhere.example/"}, b""), "redirects to another address"),
        ((307, {"Location": "/v2"}, b""), "redirects to another address"),
        ((403, {}, b""), "the service answered HTTP 403"),
    ],
)
def test_an_answer_that_is_none_is_a_missing_score_and_is_not_asked_for_again(answer, reason):
    played = Played(answer)
    ((*found,),) = played.score([group("a", "b", index=9)])
    assert [score.value for score in found] == [None, None]
    for sample, score in enumerate(found):
        assert score.reason.startswith(f"http scores.example, row 9, sample {sample}: ")
        assert reason in score.reason
    assert len(played.requests) == 1


def test_passing_failures_are_tried_again_after_growing_random_pauses():
    played = Played((503, {}, b""), httpx2.ConnectError("refused"), (429, {}, b""), scores(2.0))
    assert played.score([group("a")])[0][0].value == 2.0
    assert played.pauses == [0.25, 0.5, 1.0]


def test_a_service_that_keeps_failing_gives_no_score():
    played = Played((500, {}, b""), retries=2)
    assert played.score([group("a")])[0][0].reason.endswith("the service failed 3 times, at last with: HTTP 500")
    assert played.pauses == [0.25, 0.5]


def test_a_request_that_takes_too_long_is_tried_again_until_the_deadline():
    played = Played("never", timeout=0.05, deadline=60)
    assert played.score([group("a")])[0][0].reason.endswith("failed 4 times, at last with: TimeoutError")
    late = Played("never", timeout=60, deadline=0.1)
    assert late.score([group("a")])[0][0].reason.endswith("there was no answer within 0.1 s")


class Dripping(BaseHTTPRequestHandler):
    """Answers with a byte now and then: no single read ever times out."""

    def do_POST(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self.server.over.wait(0.02):
            self.wfile.write(b"X")

    def log_message(self, *_):
        pass


def test_a_service_that_answers_byte_by_byte_is_left_at_the_deadline():
    server = HTTPServer(("127.0.0.1", 0), Dripping)
    server.over = threading.Event()
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    source = HTTPReward(url=f"http://127.0.0.1:{server.server_port}/", deadline=0.3, retries=0)
    began = time.monotonic()
    ((score,),) = Service(source, {}, lambda: 0.0)([group("a")])
    assert time.monotonic() - began < 2.3
    assert score.reason.endswith("there was no answer within 0.3 s")
    server.over.set()
    thread.join()
    server.server_close()


def test_a_row_without_a_promised_column_is_not_sent():
    played = Played(scores(1.0), columns=("answer",))
    assert "the row has no column `answer`; it has other" in played.score([group("a", other=1)])[0][0].reason
    assert "the row cannot be sent" in played.score([group("a", answer=nan)])[0][0].reason
    assert played.requests == []


def test_a_token_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("SCORES_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="SCORES_TOKEN is not set"):
        HTTPReward(url=URL, token="env:SCORES_TOKEN").open(None)
    monkeypatch.setenv("SCORES_TOKEN", "abc")
    played = Played(scores(1.0), token="env:SCORES_TOKEN")
    played.score([group("a")])
    assert played.requests[0].headers["Authorization"] == "Bearer abc"
    assert "abc" not in repr(played.score.source)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://scores.example/", "write https"),
        ("ftp://scores.example/", "write it as https://host/path"),
        ("scores.example", "write it as https://host/path"),
        ("https://me:secret@scores.example/", "leave user and password out"),
        ("http://169.254.169.254/", "the machine's own network card"),
        ("http://[fd00:ec2::254]/", "the machine's own network card"),
    ],
)
def test_addresses_that_are_not_safe_are_refused(url, reason):
    with pytest.raises(ValidationError, match=reason):
        HTTPReward(url=url)


def test_this_machine_and_what_was_allowed_may_go_unencrypted():
    for url in ("http://127.0.0.1:8000/", "http://localhost/", "http://[::1]:80/"):
        assert HTTPReward(url=url).url == url
    assert HTTPReward(url="http://scores.example/", allow_http=True)


def test_a_token_is_never_written_into_a_configuration():
    with pytest.raises(ValidationError, match="pattern"):
        HTTPReward(url=URL, token="abc")


def test_it_works_where_an_event_loop_runs_already():
    async def inside():
        return Played(scores(1.0)).score([group("a")])

    assert asyncio.run(inside())[0][0].value == 1.0
