"""What the sampler does when a server fails, lies or comes back as another: exact numbers of requests, nothing that was
drawn with other weights, and no log-probability that nobody gave. No pause is waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from prefopt_vllm import client, keeper
from prefopt_vllm.sampler import VLLM
from prefopt_vllm.weights import Weights
from pydantic import ValidationError
from safetensors.torch import save_file

from prefopt.api import DataError, Draw, PluginError, Request, ServiceError

WORDS = 12
GENERATE = "/inference/v1/generate"
LOADED = {"/server_info": 1, "/v1/models": 1, "/pause": 1, "/collective_rpc": 1, "/update_weight_version": 1}
LOADED |= {"/resume": 1, "/weight_info": 1, "/weight_checker": 1}


class Table(torch.nn.Module):
    """Its logits after a token are a row of a table."""

    def __init__(self, seed):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids, **_):
        return type("Out", (), {"logits": self.table[input_ids]})


class Model:
    """A language model around a table."""

    device, end_ids, positions = torch.device("cpu"), frozenset({0}), 64

    def __init__(self, seed=0):
        self.network = Table(seed)

    def decode(self, ids):
        return "".join("abcdefghijkl"[i] for i in ids)

    def export(self, folder):
        folder.mkdir()
        save_file(dict(self.network.state_dict()), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    def logps(self, prompt, ids, temperature=1.0):
        """In float64, by the definition."""
        rows = self.network.table.detach().double()[[prompt[-1], *ids[:-1]]] / temperature
        return torch.log_softmax(rows, -1)[range(len(ids)), ids].tolist()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.0)


@contextmanager
def sampling(folder, **settings):
    class Kept:
        def kept(self, name):
            return folder / name

    usual = {"max_new_tokens": 6, "parallel": 1, "retries": 1, "timeout": 2.0}
    with VLLM(**{**usual, **settings}).running(Kept()) as sampler:
        yield sampler


REQUESTS = [Request((3, 5), 11), Request((7, 1, 2), 12), Request((4,), 13)]


def events(folder):
    return [json.loads(line)["event"] for line in (folder / "vllm/events.jsonl").read_text().splitlines()]


def test_tokens_go_in_and_tokens_with_their_log_probabilities_come_out(stub, tmp_path):
    model = Model()
    with sampling(tmp_path, url=stub.url, temperature=0.7) as sampler:
        draw = sampler.open(model)
        found = dict(draw(REQUESTS))
        assert stub.counts == {**LOADED, GENERATE: 4}  # one of them the probe
        again = dict(draw(REQUESTS[1:]))
        assert stub.counts == {**LOADED, "/weight_info": 2, GENERATE: 6}
    assert again == {0: found[1], 1: found[2]}
    for i, completion in found.items():
        np.testing.assert_allclose(completion.logps, model.logps(REQUESTS[i].prompt, completion.ids, 0.7), atol=1e-6)
        assert completion.finished == (completion.ids[-1] == 0)
        assert completion.text == model.decode(completion.ids[:-1] if completion.finished else completion.ids)
    asked = [body for route, body in stub.bodies if route == GENERATE][1:4]
    assert [body["token_ids"] for body in asked] == [list(request.prompt) for request in REQUESTS]
    assert [body["sampling_params"]["seed"] for body in asked] == [11, 12, 13]
    assert {body["cache_salt"] for body in asked} == {stub.version}


@pytest.mark.parametrize(("limit", "read"), [(None, 32), (9, 8), (100, 32)])
def test_a_probe_and_its_one_more_token_fit_into_what_the_server_reads(limit, read):
    ids, logps = Weights(Model(), limit).probe
    assert (len(ids), len(logps)) == (read, read - 1)
    np.testing.assert_allclose(logps, Model().logps(ids[:1], ids[1:]), atol=1e-6)


def test_each_process_of_a_run_has_a_folder_of_its_own(stub, tmp_path, monkeypatch):
    for rank, place in (("0", "vllm"), ("1", "vllm/rank-1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with sampling(tmp_path, url=stub.url) as sampler:
            dict(sampler.open(Model(int(rank)))(REQUESTS))
            asked = [body for route, body in stub.bodies if route == "/collective_rpc"][-1]
            assert Path(asked["kwargs"]["weights_path"]).parent == tmp_path / place
        assert (tmp_path / place / "events.jsonl").exists()


def test_every_change_of_the_weights_is_loaded_and_checked_once(stub, tmp_path):
    model = Model()
    with sampling(tmp_path, url=stub.url) as sampler:
        draw, versions = sampler.open(model), []
        for _ in range(3):
            dict(draw(REQUESTS))
            versions.append(stub.version)
            with torch.no_grad():
                model.network.table.mul_(1.5)
        assert [path.name for path in (tmp_path / "vllm").glob("prefopt-*")] == versions[-1:]
    assert len(set(versions)) == stub.counts["/collective_rpc"] == 3
    assert events(tmp_path) == ["loaded"] * 3
    assert not list((tmp_path / "vllm").glob("*prefopt-*"))


# --- faults that pass -----------------------------------------------------------------------------------------------


def cut(handler, stub, reply):
    handler.send(200, json.dumps(reply).encode()[:40])


def late(handler, stub, reply):
    stub.over.wait(3)


def busy(handler, stub, reply):
    handler.send(503, b"{}")


def stale(handler, stub, reply):
    reply["choices"][0]["weight_versions"][0]["version"] = "of yesterday"
    return reply


def aborted(handler, stub, reply):
    reply["choices"][0]["finish_reason"] = "abort"
    return reply


def restarted(handler, stub, reply):
    stub.version, stub.table = "default", np.zeros_like(stub.table)
    return {"weight_version": "default"}


PASSING = {
    # name: route, its fault, how often weights are loaded in two draws, requests for completions with a probe each time
    "truncated JSON": (GENERATE, cut, 1, 1 + 3 + 3 + 1),
    "a busy server": (GENERATE, busy, 1, 1 + 3 + 3 + 1),
    "a reply of other weights": (GENERATE, stale, 2, 1 + 3 + 3 + 1 + 1),
    "a reply cut short": (GENERATE, aborted, 2, 1 + 3 + 3 + 1 + 1),
    "a server that was restarted": ("/weight_info", restarted, 2, 1 + 3 + 1 + 3),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again_and_changes_no_completion(name, stub, tmp_path):
    route, fault, loads, asked = PASSING[name]
    model = Model()
    with sampling(tmp_path, url=stub.url) as sampler:
        first = list(sampler.open(model)(REQUESTS))
        stub.faults[route] = [fault]
        second = list(sampler.open(model)(REQUESTS))
    assert second == first  # in the same order, too
    assert (stub.counts["/collective_rpc"], stub.counts[GENERATE]) == (loads, asked)


# --- faults that stay -----------------------------------------------------------------------------------------------


def big(handler, stub, reply):
    handler.send(200, b" " * 10_000_000)


def changed(**more):
    def fault(handler, stub, reply):
        reply["choices"][0].update(more)
        return reply

    return fault


def fewer(handler, stub, reply):
    reply["choices"][0]["logprobs"]["content"].pop()
    return reply


def nan(handler, stub, reply):
    reply["choices"][0]["logprobs"]["content"][0]["logprob"] = float("nan")
    return reply


def impossible(handler, stub, reply):
    reply["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0
    return reply


def of_others(handler, stub, reply):
    reply["choices"][0]["logprobs"]["content"][0]["token_id"] += 1
    return reply


def other_prompt(handler, stub, reply):
    return {**reply, "usage": {"prompt_tokens": 1}}


def refused(handler, stub, reply):
    handler.send(400, b'{"error": "too long"}')


def silent(handler, stub, reply):
    handler.close_connection = True


LASTING = {
    # name: the fault, how often it comes, what is said, requests for completions
    "10 MB": (big, 1, "longer than 8388608 bytes", 1),
    "another number of tokens": (changed(token_ids=[3] * 7), 1, "another number of tokens", 1),
    "fewer log-probabilities": (fewer, 1, "one log-probability for each token", 1),
    "no number": (nan, 1, "no log-probability", 1),
    "minus infinity": (impossible, 1, "no log-probability", 1),
    "log-probabilities of other tokens": (of_others, 1, "belong to other tokens", 1),
    "no log-probabilities": (changed(logprobs=None), 1, "one log-probability for each token", 1),
    "no tokens": (changed(token_ids=None), 1, "no tokens", 1),
    "no version": (changed(weight_versions=None), 1, "with which weights", 1),
    "a shortened prompt": (other_prompt, 1, "read the prompt", 1),
    "a refusal": (refused, 1, "HTTP 400", 1),
    "no answer in time": (late, 2, "failed 2 times", 2),
    "no answer at all": (silent, 2, "failed 2 times", 2),
    "other weights, again and again": (stale, 3, "of yesterday", 3),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_does_not_pass_ends_the_run_with_what_is_wrong(name, stub, tmp_path):
    fault, times, said, asked = LASTING[name]
    model = Model()
    with sampling(tmp_path, url=stub.url, timeout=0.3) as sampler:
        draw = sampler.open(model)
        dict(draw(REQUESTS[:1]))
        before, loads = stub.counts[GENERATE], stub.counts["/collective_rpc"]
        stub.faults[GENERATE] = [f for _ in range(times) for f in ([fault, _answered] if "again" in name else [fault])]
        with pytest.raises(ServiceError, match=said):
            dict(draw(REQUESTS[:1]))
        probes = stub.counts["/collective_rpc"] - loads
    assert stub.counts[GENERATE] - before - probes == asked


def _answered(handler, stub, reply):
    """What the probe after the next load gets."""
    return reply


def deaf(stub):
    stub.loads, stub.table = False, np.ones((WORDS, WORDS), np.float32)


def half_deaf(stub):
    """Its checksums are right, and it draws from something else."""
    deaf(stub)
    right = stub.reply
    told = {"/weight_checker": lambda: {"checksums": {"dp0:pp0:pcp0:tp0:table": stub.told}}}
    stub.reply = lambda route, body: told[route]() if route in told else right(route, body)


UNLOADED = {"checksums": (deaf, "other checksums", 0), "the probe": (half_deaf, "more than `tolerance`", 3)}


@pytest.mark.parametrize("name", UNLOADED)
def test_weights_that_did_not_arrive_are_found_by(name, stub, tmp_path):
    from hashlib import sha256

    prepare, said, probes = UNLOADED[name]
    model = Model()
    stub.told = sha256(model.network.table.detach().numpy().tobytes()).hexdigest()
    prepare(stub)
    with sampling(tmp_path, url=stub.url) as sampler, pytest.raises(ServiceError, match=said):
        dict(sampler.open(model)(REQUESTS))
    assert (stub.counts["/collective_rpc"], stub.counts[GENERATE]) == (3, probes)
    assert events(tmp_path) == ["failed"] * 3


def test_log_probabilities_before_the_filters_are_refused_before_anything_is_paused(stub, tmp_path):
    stub.mode = "raw_logprobs"
    with sampling(tmp_path, url=stub.url) as sampler, pytest.raises(ServiceError, match="--logprobs-mode"):
        dict(sampler.open(Model())(REQUESTS))
    assert stub.counts["/pause"] == stub.counts[GENERATE] == 0


def test_a_failed_load_does_not_leave_the_server_paused(stub, tmp_path):
    stub.faults["/collective_rpc"] = [refused]
    with sampling(tmp_path, url=stub.url) as sampler, pytest.raises(ServiceError, match="HTTP 400"):
        dict(sampler.open(Model())(REQUESTS))
    assert (stub.counts["/pause"], stub.counts["/resume"]) == (1, 1)


# --- a server of one's own ------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    """Settings that start the stand-in instead of vLLM."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("conftest.py")} "$@"\n')
    script.chmod(0o700)
    return {"serve": {"python": str(script), "start_timeout": 20.0}}


def test_a_server_that_dies_is_started_again_and_gives_the_same(served, tmp_path):
    model = Model()
    with sampling(tmp_path, **served) as sampler:
        first = dict(sampler.open(model)(REQUESTS))
        kept = sampler._engine.server.process
        (child,) = map(int, Path(f"/proc/{kept.pid}/task/{kept.pid}/children").read_text().split())
        os.kill(child, signal.SIGKILL)
        kept.wait()
        assert dict(sampler.open(model)(REQUESTS)) == first
        assert not alive(child)
        last = sampler._engine.server
        assert last.alive
    assert not last.alive
    assert events(tmp_path) == ["started", "loaded", "started", "loaded"]


def test_a_server_that_cannot_start_says_why(tmp_path):
    broken = {"python": sys.executable, "args": ["--nothing"], "start_timeout": 20.0}
    with sampling(tmp_path, serve=broken) as sampler, pytest.raises(ServiceError, match="No module named 'vllm'"):
        dict(sampler.open(Model())(REQUESTS))


OWNER = """
import subprocess, sys
kept = subprocess.Popen([sys.executable, "-I", sys.argv[1], "sh", "-c", "echo server $$; exec sleep 60"],
                        stdin=subprocess.PIPE)
print("keeper", kept.pid, flush=True)
kept.wait()
"""


@pytest.mark.parametrize("who", ["the run", "its keeper"])
def test_a_server_dies_with_whoever_was_killed(who):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, keeper.__file__], stdout=subprocess.PIPE, text=True)
    told = dict(owner.stdout.readline().split() for _ in range(2))
    pids = [int(pid) for pid in told.values()]
    assert all(map(alive, pids))
    os.kill(owner.pid if who == "the run" else int(told["keeper"]), signal.SIGKILL)
    owner.wait()
    until = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "how to start one"),
        ({"url": "http://127.0.0.1:1", "serve": {"python": "p"}}, "how to start one"),
        ({"url": "http://elsewhere.example"}, "unencrypted"),
        ({"serve": {"python": "p"}, "token": "env:X"}, "`token` is for `url`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        VLLM(**settings)


def test_it_says_what_it_draws_from():
    plain = VLLM(url="http://127.0.0.1:1", temperature=0.5, stop=("x",))
    assert plain.density == 0.5
    assert VLLM(url="http://127.0.0.1:1", top_k=3).density is None
    assert plain.serves(Draw(2))
    assert not plain.serves(Draw(1, greedy=True))
    filtered = VLLM(url="http://127.0.0.1:1", top_k=3, top_p=0.9, min_p=0.1, min_new_tokens=2)
    assert filtered.distribution == {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "min_tokens": 2}


def test_what_it_cannot_draw_is_refused(stub, tmp_path):
    model = Model()
    with pytest.raises(PluginError, match="within `running`"):
        VLLM(url=stub.url).open(model)
    with sampling(tmp_path, url=stub.url) as sampler:
        with pytest.raises(PluginError, match="mixture"):
            sampler.open(model, model)
        with pytest.raises(PluginError, match="at random"):
            dict(sampler.open(model)([Request((1,), 0, greedy=True)]))
        with pytest.raises(DataError, match="64 tokens"):
            dict(sampler.open(model)([Request((1,) * 64, 0)]))
    assert stub.counts == {}
