"""A stand-in for vLLM whose model is a table: the logits after a token are its row. It answers the routes that the
sampler uses, draws from the table it was told to load, and fails where a test wants it to."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

END = 0
PLACE = "dp0:pp0:pcp0:tp0:"
GENERATE = "/inference/v1/generate"


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


class Handler(BaseHTTPRequestHandler):
    """Plays the next fault of a route, if there is one; else answers."""

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        stub, route = self.server.stub, self.path.partition("?")[0]
        with stub.lock:
            stub.counts[route] += 1
            stub.bodies.append((route, body))
            fault = stub.faults[route].pop(0) if stub.faults.get(route) else None
        reply = stub.reply(route, body)
        found = fault(self, stub, reply) if fault else reply
        if found is not None:
            self.send(200, json.dumps(found).encode())

    def send(self, status, body, size=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Stub:
    """The server: what it holds, what it was asked, and the faults still to come, by route."""

    def __init__(self, port=0, name="stub", table=None):
        self.table, self.version, self.name, self.mode = table, "default", name, "processed_logprobs"
        self.loads, self.counts, self.bodies, self.faults = True, Counter(), [], {}
        self.lock, self.over = threading.Lock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads, self.http.stub = True, self
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def start(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def reply(self, route, body):
        match route:
            case "/weight_info":
                return {"weight_version": self.version}
            case "/v1/models":
                return {"data": [{"id": self.name}]}
            case "/server_info":
                model = {"logprobs_mode": self.mode, "dtype": "torch.float32"}
                return {"vllm_config": {"model_config": model}}
            case "/collective_rpc":
                if self.loads:
                    self.table = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")["table"]
                return {"results": [None]}
            case "/update_weight_version":
                self.version = body["new_version"]
                return {"success": True}
            case "/weight_checker":
                return {"checksums": {PLACE + "table": sha256(self.table.tobytes()).hexdigest()}}
            case "/inference/v1/generate":
                return self.drawn(body)
            case _:
                return {}

    def drawn(self, body):
        sampling, prompt = body["sampling_params"], body["token_ids"]
        rng, ids, content = np.random.default_rng(sampling["seed"]), [prompt[-1]], []
        while len(content) < sampling["max_tokens"] and not (content and ids[-1] in sampling["stop_token_ids"]):
            logps = log_softmax(self.table[ids[-1]].astype(np.float64) / sampling.get("temperature", 1.0))
            ids.append(int(rng.choice(len(logps), p=np.exp(logps))))
            content.append({"token_id": ids[-1], "logprob": float(logps[ids[-1]])})
        pairs = pairwise(prompt)
        told = [None, *({str(b): {"logprob": float(log_softmax(self.table[a])[b])}} for a, b in pairs)]
        stopped = ids[-1] in sampling["stop_token_ids"]
        choice = {
            "token_ids": ids[1:],
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": None,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(content)}],
            "logprobs": {"content": content},
        }
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}, "prompt_logprobs": told}


@pytest.fixture
def stub():
    """A server within this process."""
    one = Stub().start()
    yield one
    one.close()


def main(arguments):
    """Stands in for `python -m vllm... --model FOLDER --port N --served-model-name NAME`."""
    given = dict(pairwise(arguments))
    table = load_file(Path(given["--model"]) / "model.safetensors")["table"]
    Stub(int(given["--port"]), given["--served-model-name"], table).http.serve_forever()


if __name__ == "__main__":
    main(sys.argv)
