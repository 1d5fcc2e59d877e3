"""The command line as a user meets it: help, exit codes, what is printed where."""

from __future__ import annotations

import json
import os
import resource
import string
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from prefopt.cli import app as cli
from prefopt.errors import PrefoptError
from prefopt.session import Session
from prefopt.testing.tiny import tiny_rows, write_rows

PREFOPT = Path(sys.executable).parent / "prefopt"


def call(*arguments: str) -> tuple[int, str]:
    """Exit code and output, problems included."""
    result = CliRunner().invoke(cli.app, arguments)
    if isinstance(result.exception, PrefoptError):
        return result.exception.exit_code, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def config(tmp_path, tiny_model) -> Path:
    data = write_rows(tmp_path / "pairs.jsonl", tiny_rows("comparison"))
    path = tmp_path / "run.yaml"
    path.write_text(f"""
prefopt: 1
model: {{path: {tiny_model}}}
data: {{source: jsonl, path: {data}}}
algorithm: {{name: dpo}}
optim: {{batch_size: 3}}
run: {{dir: {tmp_path}/run, steps: 2, device: cpu}}
""")
    return path


def quickest(*command: str) -> float:
    """The least processor time of three fresh processes, unobserved by coverage: what the command costs, whatever else
    the machine does, once Python has kept the code it compiled."""
    unlike = ("COVERAGE", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unlike)}
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_is_quick():
    seconds = quickest(str(PREFOPT), "--help")
    print(f"prefopt --help: {seconds:.2f} s")
    assert seconds < 0.4


def test_validate_is_quick(config):
    """A second; on a slow machine at most four times what it takes to import the libraries it stands on."""
    seconds = quickest(str(PREFOPT), "validate", str(config))
    imports = quickest(sys.executable, "-c", "import pydantic, typer.main, ruamel.yaml")
    print(f"prefopt validate: {seconds:.2f} s; its libraries alone: {imports:.2f} s")
    assert seconds < max(1.0, 4 * imports)


def test_help_shows_the_newcomer_s_verbs_first_and_the_exit_codes():
    _, text = call("--help")
    first, more = text.partition("More:")[::2]
    assert all(f"\n  {verb}" in first for verb in ("init", "train", "bench", "show", "plugins"))
    assert all(f"\n  {verb}" in more for verb in ("validate", "resume", "explain", "data", "schema"))
    assert "75 stopped on" in " ".join(text.split())


def test_version():
    assert call("--version") == (0, "prefopt 0.1.0\n")


def test_validate_says_what_a_run_will_do(config):
    code, text = call("validate", str(config))
    assert code == 0
    assert text.startswith("valid: dpo (prefopt-dpo 0.1.0), on comparison rows from jsonl")
    assert text.splitlines()[1] == "data: preference, plain text: comparison rows"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["validate", "none.yaml"], 2, "cannot read the file"),
        (["validate", "RUN", "algorithm.bta=1"], 2, "Did you mean `beta`?"),
        (["validate", "RUN", "algorithm.name=dop"], 2, "unknown algorithm `dop`"),
        (["validate", "RUN", "data.path=none.jsonl"], 3, "cannot read the file"),
        (["validate", "RUN", "model.path=./none"], 2, "there is no folder"),
        (["validate", "RUN", "plugins.allow=[]"], 2, "Not allowed to load"),
        (["train", "RUN", "run.dir=a/../b"], 2, "may not climb"),
        (["resume", "nowhere"], 2, "not a run folder"),
        (["explain", "dop"], 2, "Did you mean `dpo`?"),
        (["init", "x", "--recipe", "frist"], 2, "Did you mean `first`?"),
        (["plugins", "new", "My Method"], 2, "cannot name a plugin"),
        (["plugins", "new", "dpo"], 2, "`dpo` is taken"),
        (["plugins", "new", "loss"], 2, "has a meaning in the module of a method"),
        (["plugins", "new", "step_context"], 2, "has a meaning in the module of a method"),
        (["nonsense"], 2, ""),
        (["train"], 2, ""),
    ],
)
def test_mistakes_of_a_user_have_an_exit_code_and_a_cure(config, monkeypatch, tmp_path, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    found, text = call(*(str(config) if a == "RUN" else a for a in arguments))
    assert found == code
    assert words in text


def test_problems_go_to_standard_error_with_their_kind(config):
    done = subprocess.run(
        [str(PREFOPT), "validate", str(config), "optim.lr=-1", "seed=1"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "configuration: override `optim.lr`: `optim.lr` must be greater than 0, not -1\n"
        "configuration: override `seed`: unknown key `seed`\n    It belongs into `run`.\n"
    )


def test_show_batch_prints_roles_tokens_and_masks(config):
    code, text = call("show", "batch", str(config), "optim.batch_size=6")
    assert code == 0
    assert text.startswith("dpo, step 1 of 2: ")
    assert "12 sequences, 6 pairs, 6 groups" in text
    assert "data: preference, plain text: comparison rows\n" in text
    assert "group 0, chosen: 14 + " in text
    assert "[count from" in text
    assert "<4| |4|<end>>" in text or "|<end>>" in text
    assert "... and 2 more groups" in text


def test_data_check_of_a_file_prints_a_verdict_and_every_bad_row_by_class(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "p", "chosen": "c", "rejected": ""}
    lines = [json.dumps(row) for row in (pair, {**pair, "chosen": 3}, {"prompt": "x"}, {**pair, "rejected": None})]
    path.write_text("\n".join([*lines, "{", json.dumps(pair)]))
    code, text = call("data", "check", str(path), "--rejects", str(tmp_path / "bad.jsonl"))
    assert code == 3
    assert text.splitlines() == [
        f"{path}: preference, plain text: comparison rows",
        "  empty completions: 2",
        "  usable: 2 of 6",
        "  not text: 2",
        f"    {path}:2, field `chosen`: must be text, not int 3",
        f"    {path}:4, field `rejected`: must be text, not NoneType None",
        "  wrong fields: 1",
        f"    {path}:3: fields `prompt`, unlike the first row, which is preference",
        "  not JSON: 1",
        f"    {path}:5: not JSON: Expecting property name enclosed in double quotes at column 2",
    ]
    rejects = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(r["row"], r["class"]) for r in rejects] == [
        (1, "not text"),
        (2, "wrong fields"),
        (3, "not text"),
        (4, "not JSON"),
    ]
    assert all(r["where"].startswith(f"{path}:") and r["reason"] for r in rejects)
    assert call("data", "check", str(path), "--rejects", str(path))[0] == 2


def test_data_check_of_a_configuration_reads_all_of_its_rows(config, tmp_path):
    bad = write_rows(tmp_path / "held.jsonl", [*tiny_rows("comparison", 300), {"prompt": 1}])
    assert call("validate", str(config), "eval.every=1", "eval.data.source=jsonl", f"eval.data.path={bad}")[0] == 0
    code, text = call("data", "check", str(config), "eval.every=1", "eval.data.source=jsonl", f"eval.data.path={bad}")
    assert code == 3
    assert "data: preference, plain text: comparison rows\n  usable: 24 of 24\n" in text
    assert f"{bad}:301: fields `prompt`" in text
    assert call("data", "check", str(config))[0] == 0


@pytest.mark.parametrize(
    ("name", "arguments", "code", "words"),
    [
        ("x.zip", [], 3, "`.zip` files have no rows that prefopt can read"),
        ("x.txt.gz", [], 3, "`.txt` files have no rows"),
        ("LICENSE", [], 3, "`LICENSE` files have no rows"),
        ("none.jsonl", [], 3, "there is no such file"),
        ("x.jsonl", ["data.format=hh"], 2, "overrides belong to a configuration"),
    ],
)
def test_files_that_data_check_cannot_read(tmp_path, name, arguments, code, words):
    if not name.startswith("none"):
        (tmp_path / name).write_text("x")
    found, text = call("data", "check", str(tmp_path / name), *arguments)
    assert (found, words in text) == (code, True)


def test_show_batch_of_a_world_needs_no_model(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        'prefopt: 1\nmodel: {path: "world:replies"}\ndata: {source: replies, size: 40}\nalgorithm: {name: sft}\n'
        f"run: {{dir: {tmp_path}/run}}\n"
    )
    code, text = call("show", "batch", str(path))
    assert code == 0
    assert "group 0, demonstration: " in text
    assert "[Customer: " in text
    assert not (tmp_path / "run").exists()


def test_init_writes_a_recipe_that_is_valid_and_overwrites_nothing(tmp_path):
    code, text = call("init", str(tmp_path / "new"))
    assert code == 0
    assert f"next: cd {tmp_path}/new && prefopt train sft.yaml" in text
    folder = tmp_path / "new"
    assert {p.name for p in folder.iterdir()} == {"sft.yaml", "dpo.yaml", "reward_model.yaml", ".prefopt"}
    assert (folder / "sft.yaml").read_text().startswith("# yaml-language-server: $schema=.prefopt/schema.json")
    assert call("validate", str(folder / "sft.yaml"))[0] == 0
    before = (folder / "dpo.yaml").read_text()
    code, text = call("init", str(folder))
    assert (code, "would overwrite" in text, (folder / "dpo.yaml").read_text()) == (2, True, before)


def test_schema_is_json(plugins):
    code, text = call("schema")
    assert code == 0
    assert {"algorithm.dpo", "world.replies"} <= json.loads(text)["$defs"].keys()


def test_plugins_are_listed_as_a_table_and_as_json():
    code, text = call("plugins", "list")
    assert code == 0
    assert {"dpo", "orpo", "kto"} <= {line.split()[1] for line in text.splitlines() if line.startswith("algorithm ")}
    assert "algorithm  sft " not in text
    found = json.loads(call("plugins", "list", "--all", "--json")[1])
    assert {"sft", "dpo", "replies", "plain"} <= {f["name"] for f in found}
    (dpo,) = (f for f in found if f["name"] == "dpo")
    assert dpo["paper"].startswith("Rafailov et al. 2023")
    assert dpo["source"].endswith(f"dpo.py:{dpo['source'].rpartition(':')[2]}")
    assert dpo.keys() == {"kind", "name", "distribution", "version", "summary", "paper", "source"}


def test_the_list_says_where_components_come_from_and_what_is_missing(tmp_path, install_plugin, monkeypatch):
    lines = call("plugins", "list")[1].splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.split()[:2] == ["algorithm", "dpo"])
    assert lines[place + 1].startswith("    Rafailov et al. 2023")
    assert "dpo.py:" in lines[place + 1]
    assert not any("Not loaded" in line for line in lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    install_plugin(tmp_path, "broken", "import nothing_like_this")
    assert call("plugins", "list")[1].endswith("\nNot loaded: made-broken. `prefopt plugins doctor` says why.\n")


def test_an_empty_list_says_where_to_look(monkeypatch):
    monkeypatch.setenv("PREFOPT_PLUGINS", "")
    assert "plugins list --all" in call("plugins", "list")[1]


def test_the_doctor_is_content_with_what_is_installed():
    done = subprocess.run([str(PREFOPT), "plugins", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    plugins = (path.parent.name for path in (Path(__file__).parents[2] / "plugins").glob("*/pyproject.toml"))
    names = ("prefopt", *sorted(plugins))
    assert done.stdout.splitlines() == [f"loaded: {name} 0.1.0" for name in names]


METHOD = """
from prefopt.api import Algorithm, hookimpl
class Method(Algorithm):
    name = "{}"
@hookimpl
def prefopt_algorithms():
    return [Method]
"""


def test_the_doctor_names_what_is_broken_and_what_loads_torch(tmp_path, install_plugin):
    install_plugin(tmp_path, "broken", "import nothing_like_this")
    install_plugin(tmp_path, "heavy", "import torch\n" + METHOD.format("heavy"))
    install_plugin(tmp_path, "clash", METHOD.format("dpo"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [str(PREFOPT), "plugins", "doctor"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 4
    assert "broken: made-broken 0.1 (entry point `broken`): ModuleNotFoundError" in done.stdout
    assert "clash: algorithm `dpo` is offered by made-clash, prefopt-dpo" in done.stdout
    assert "remark: loading plugins imports torch" in done.stdout
    assert "remark: algorithm `heavy` (made-heavy) has no formula to explain" in done.stdout


NEEDY = """
from prefopt.api import Algorithm, Needs, hookimpl
class Needy(Algorithm):
    name = "needy"
    strength: float
    def needs(self):
        return Needs(rows={"margin"} if self.strength > 1 else set())
@hookimpl
def prefopt_algorithms():
    return [Needy]
"""


def test_explain_does_without_settings_that_have_no_default(tmp_path, install_plugin, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    install_plugin(tmp_path, "needy", NEEDY)
    code, text = call("explain", "needy")
    assert code == 0
    assert "needs       depends on its settings" in text
    assert "setting     strength (required)" in text


def test_explain_tells_all_there_is():
    code, text = call("explain", "dpo")
    assert code == 0
    for words in (
        "algorithm dpo - Direct Preference Optimization.",
        "paper       Rafailov",
        "formula     L = - log σ",
        "needs       reference_logps: [N, T]",
        "setting     beta (default 0.1, above 0): How strongly",
        "label_smoothing (default 0.0, at least 0, below 0.5)",
        "differs     TRL 1.16",
        "from        prefopt-dpo 0.1.0",
    ):
        assert words in text
    both = call("explain", "reward_model")[1]
    assert "algorithm reward_model" in both
    assert "reward reward_model" in both
    assert "path (required)" in both
    assert "algorithm reward_model" not in call("explain", "reward_model", "--kind", "reward")[1]


@pytest.fixture
def sampled(tmp_path, tiny_model) -> Path:
    """A run whose replies end at any letter and are paid by their length."""
    data = write_rows(tmp_path / "prompts.jsonl", tiny_rows("demonstration"))
    path = tmp_path / "sampled.yaml"
    path.write_text(f"""
prefopt: 1
model: {{path: {tiny_model}}}
data: {{source: jsonl, path: {data}}}
algorithm: {{name: grpo, n: 4, beta: 0.01}}
reward: {{name: length, minimum: 16, margin: 15}}
sampler: {{name: continuous, max_new_tokens: 16, stop: {json.dumps(list(string.ascii_letters))}}}
optim: {{lr: 0.05, batch_size: 8, schedule: constant, warmup: 0.0}}
run: {{dir: {tmp_path}/run, steps: 14, device: cpu, threads: 1, checkpoint: {{every: 5}}}}
""")
    return path


def kept_verdict(folder: Path) -> str:
    return json.loads((folder / "result.json").read_text())["verdict"]


def growth(folder: Path) -> str:
    """What is to be said of the lengths in a run's metrics: medians of five steps against that of the first five."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lengths = [line["completion/tokens"] for line in lines]
    medians = [median(lengths[end - 5 : end]) for end in range(5, len(lengths) + 1)]
    times = [now / medians[0] for now in medians]
    first = next(step for step, far in enumerate(times, 5) if far > 2)
    return f"length is {max(times):.3g} times its start (limit 2), first at step {first}"


def test_the_alarms_that_rang_are_printed_and_kept(sampled, tmp_path):
    code, text = call("train", str(sampled))
    verdict = kept_verdict(tmp_path / "run")
    assert (code, text.splitlines()[-2:]) == (0, [f"finished: {tmp_path}/run/model", verdict])
    assert growth(tmp_path / "run") in verdict
    assert verdict.endswith(". Read the samples before you trust the reward")


def test_a_run_in_which_nothing_rang_says_what_was_watched(sampled, tmp_path):
    code, text = call("train", str(sampled), "optim.lr=1e-6")
    watched = "KL divergence in nats, distinct-3, length, perplexity under the base, repetition"
    verdict = f"reward hacking: no sign of it in {watched}"
    assert (code, text.splitlines()[-1], kept_verdict(tmp_path / "run")) == (0, verdict, verdict)


def test_a_resumed_run_is_compared_with_the_first_steps_of_the_whole(sampled, tmp_path, monkeypatch):
    def stop(self: Session, hook: str, **arguments: object) -> None:
        if arguments.get("step") == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_notify", stop)
    assert call("train", str(sampled))[0] != 0
    monkeypatch.undo()
    code, text = call("resume", f"{tmp_path}/run")
    assert (code, text.splitlines()[-1]) == (0, kept_verdict(tmp_path / "run"))
    assert growth(tmp_path / "run") in text
