"""From a configuration to a run folder: the only file that puts the pieces together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import nn

from prefopt.batch import Draw
from prefopt.components import RolloutAlgorithm, Sampler
from prefopt.components import Scorer as RewardScorer
from prefopt.config import ModelConfig, ReferenceConfig, RunConfig, anchored, dump, resolved
from prefopt.data.adapt import adapt
from prefopt.data.check import write_rejects
from prefopt.data.render import Renderer, load_tokenizer
from prefopt.data.streams import derive
from prefopt.engine import checkpoint as checkpoints
from prefopt.engine.alarms import Alarms
from prefopt.engine.card import card
from prefopt.engine.collect import Collector
from prefopt.engine.columns import Forwarder, Meter, asked, told
from prefopt.engine.evaluate import Evaluator, judge
from prefopt.engine.failures import explained
from prefopt.engine.folder import RunFolder, write_text
from prefopt.engine.forward import Scorer, warn_if_slow
from prefopt.engine.inputs import HeldOut, Inputs
from prefopt.engine.journal import TABLE, Journal
from prefopt.engine.loop import Loop, Progress
from prefopt.engine.measure import Measured
from prefopt.engine.memory import peak_bytes, reset_peak
from prefopt.engine.models import Model, build, load_causal, load_classifier, load_critic, open_model, positions, save
from prefopt.engine.optimize import CRITIC, Optimizer
from prefopt.engine.origin import compare, describe
from prefopt.engine.probe import probe
from prefopt.engine.ranks import Ranks
from prefopt.engine.recompute import prepare
from prefopt.engine.record import TIMINGS, Recorder, numbers
from prefopt.engine.reference import AdapterOff, Cached, Moving, Reference, Resident
from prefopt.engine.reusing import reusing
from prefopt.engine.rollout import draw
from prefopt.engine.services import EngineServices, RewardModel
from prefopt.engine.stops import stop_requests
from prefopt.engine.store import Store
from prefopt.errors import DataError, Preempted, redact
from prefopt.hookspecs import RunInfo
from prefopt.plugins import Plugins
from prefopt.preflight import check, world_recipe
from prefopt.rows import Prompt, Rollout, Row
from prefopt.sampling import Drawer

TOKEN_BUDGET = {"small": 8192, "cpu": 1024, "cuda": 16_384}
SMALL = 10_000_000
"""Weights up to which a CPU is kept busy by many tokens at a time rather than by large matrices."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, how it ended, and the budget it used."""

    folder: Path
    outcome: str
    budget: Mapping[str, int]
    verdict: str = ""
    """What the signs of reward hacking came to, in a run that samples."""

    @property
    def model(self) -> Path:
        return self.folder / "model"


def train(config: RunConfig, plugins: Plugins, *, resume: bool = False, warn: Callable[[str], None] = print) -> Result:
    """Runs a configuration to its end. Raises `PrefoptError` for whatever the user can mend; nothing saved is lost."""
    check(config, plugins.registry)
    with explained(config.run.dir):
        return _train(anchored(config), plugins, resume, warn)


def _train(config: RunConfig, plugins: Plugins, resume: bool, warn: Callable[[str], None]) -> Result:
    ranks = Ranks(config.run.device, config.run.threads)
    folder = RunFolder(Path(config.run.dir))
    if ranks.main and not resume:
        folder.create()
    ranks.wait()
    if not ranks.main:
        return Session(config, plugins, ranks, folder, warn).run()
    with folder.locked():
        return Session(config, plugins, ranks, folder, warn).run()


@dataclass
class Session:
    """One run, being put together and carried out."""

    config: RunConfig
    plugins: Plugins
    ranks: Ranks
    folder: RunFolder
    warn: Callable[[str], None]
    failed_observers: set[str] = field(default_factory=set)
    alarms: Alarms = field(default_factory=Alarms)
    closing: ExitStack = field(default_factory=ExitStack)
    _small: bool = False

    @cached_property
    def recorder(self) -> Recorder:
        return Recorder(self.folder.path, self.ranks.main)

    def run(self) -> Result:
        began = time.perf_counter()
        reset_peak(self.ranks.device)
        try:
            with self.closing:
                return self._run()
        finally:
            used = {"total_seconds": time.perf_counter() - began, "peak_memory_bytes": peak_bytes(self.ranks.device)}
            self.recorder.line(TIMINGS, used)

    def _run(self) -> Result:
        self._describe()
        loop, evaluator = self.assemble()
        info = RunInfo(self.folder.path, self.config.algorithm.name, loop.progress.step, loop.total)
        self._notify("prefopt_run_started", run=info)
        if loop.collector is not None:
            loop.collector.drawn = partial(self._show, info)
        outcome = "failed"
        try:
            with stop_requests() as requests:
                loop.run(lambda metrics, seconds: self._after_step(loop, evaluator, info, metrics, seconds, requests))
            outcome = "stopped" if loop.progress.step < loop.total else "finished"
            return self._finish(loop, outcome)
        except Preempted:
            outcome = "preempted"
            raise
        finally:
            self._notify("prefopt_run_finished", run=info, outcome=outcome)

    def _notify(self, hook: str, **arguments: Any) -> None:
        if self.ranks.main:
            self.plugins.notify(hook, self._observer_failed, **arguments)

    def _show(self, info: RunInfo, step: int, rollouts: List[Rollout]) -> None:
        self._notify("prefopt_rollouts_drawn", run=info, step=step + 1, rollouts=rollouts)

    def _observer_failed(self, name: str, error: Exception) -> None:
        """Says so once for each observer."""
        if name in self.failed_observers:
            return
        self.failed_observers.add(name)
        self.warn(f"observer {name} failed and is ignored: {type(error).__name__}: {error}")

    # --- putting together -------------------------------------------------------------------------------------------

    def assemble(self) -> tuple[Loop, Evaluator | None]:
        """The loop, restored from the last checkpoint if there is one, and the evaluation beside it."""
        config = self.config
        warn_if_slow(self.ranks.device, config.optim.precision, self._warn)
        torch.manual_seed(derive(config.run.seed, "torch"))
        self.services = EngineServices(config.run.seed, self.ranks.device, self.folder.path)
        self.model = self._model_config(config.model)
        self.tokenizer = load_tokenizer(self.model.path, self.model.trust_remote_code)
        scorer = self._scorer(self.model)
        if config.optim.gradient_checkpointing:
            scorer.recomputed = prepare(scorer.network)
        inputs = Inputs.of(config, self.tokenizer, positions(scorer.network.config), self.services)
        inputs.check()
        if self.ranks.main:
            write_rejects(self.folder.path / "rejects.jsonl", inputs.rejects)
        reference = self._reference(scorer)
        forwarder = Forwarder(self.ranks.wrap(scorer), self.ranks, self._budget, config.optim.precision)
        forwarder.temperature = self._temperature
        forwarder.told = bool(config.draws) and told(config.algorithm, self._sampler, config.optim)
        recall = reusing(config, scorer, self.ranks.world, self._warn)
        optimizer = Optimizer(scorer, config.optim, self._lasting(scorer), self._critic_scale)
        data = (inputs.assembler, inputs.order, inputs.total)
        loop = Loop(config.algorithm, config.optim, *data, config.run.seed, forwarder, optimizer, reference, inputs.mix)
        loop.warn = self._warn
        loop.noise = config.model.embedding_noise
        loop.recall = recall
        loop.collector = self._collector(loop)
        evaluator = self._evaluator(loop, inputs.held_out)
        if isinstance(reference, Cached):
            self._fill(reference, loop, evaluator)
        if evaluator is not None:
            evaluator.rehearse(loop)
        self._restore(loop)
        return loop, evaluator

    def _model_config(self, model: ModelConfig) -> ModelConfig:
        """The model with `world:NAME` replaced by a folder in which the world's base model has been built."""
        recipe = world_recipe(model.path, self.plugins.find)
        if recipe is None:
            return model
        if self.ranks.main and not (self.folder.base / "config.json").exists():
            build(recipe, self.folder.base, self.config.run.seed)
        self.ranks.wait()
        return model.model_copy(update={"path": str(self.folder.base)})

    def _scorer(self, model: ModelConfig) -> Scorer:
        if self.config.algorithm.trains_reward:
            return self._on_device(Scorer(load_classifier(model, self.tokenizer, self.config.run.seed)))
        needs, critic = self.config.algorithm.needs(), self.config.critic
        values = "values" in needs.during or "old_values" in needs.columns
        scorer = Scorer(load_causal(model, self.config.run.seed), values=values and critic is None)
        if scorer.value_head is not None:
            scorer.value_head.requires_grad_("values" in needs.during)
        scorer = self._on_device(scorer)
        if critic is not None:
            other, self.critic_tokenizer = load_critic(critic.path, self.tokenizer, self.config.run.seed)
            scorer.value_by(self._on_device(other), self._warn)
        return scorer

    @property
    def _critic_scale(self) -> float:
        """The critic's learning rate as a multiple of the policy's."""
        critic = self.config.critic
        return 1.0 if critic is None or critic.lr is None else critic.lr / self.config.optim.lr

    def _on_device(self, scorer: Scorer) -> Scorer:
        """The scorer with the fastest paths that hold for it."""
        scorer.to(self.ranks.device)
        size = sum(p.numel() for p in scorer.network.parameters())
        self._small = size <= SMALL and self.ranks.device.type == "cpu"
        if self.config.optim.forward == "fast":
            scorer.paths = probe(scorer, self._warn, self.config.optim.head_bytes)
        return scorer

    def _lasting(self, scorer: Scorer) -> list[nn.Parameter]:
        """The parameters whose gradients stay where they are. Several ranks must exchange theirs."""
        alone = self.ranks.world == 1 and self.ranks.device.type == "cpu"
        if not alone or self.config.optim.forward != "fast":
            return []
        outputs = self.config.algorithm.needs().during
        return scorer.accumulate_in_place(bool(outputs - {"values", "scores"}) or self.config.data.mix is not None)

    @property
    def _budget(self) -> int:
        return self.config.optim.token_budget or TOKEN_BUDGET["small" if self._small else self.ranks.device.type]

    def _reference(self, scorer: Scorer) -> Reference | None:
        """The reference, if the algorithm needs one. Without a path it is the policy as it is now, before training."""
        needs = self.config.algorithm.needs()
        if not needs.reference:
            return None
        settings = self.config.reference or ReferenceConfig()
        device, budget, dtype = self.ranks.device, self._budget, self.config.optim.precision
        live = "token_kl" in needs.during
        if settings.every is None and settings.mode != "resident" and not live and not self.config.draws:
            kept = Path(settings.store) if settings.store else self.folder.kept
            name = f"reference-{self.ranks.rank}.sqlite" if self.ranks.world > 1 else "reference.sqlite"
            source = self._initial() if settings.path is not None else scorer
            return Cached(Resident(source, device, budget, dtype, frozen=True), Store(kept / name))
        new = self.model.lora is not None and self.model.lora.path is None
        if new and settings.every is None and not live and settings.path is None:
            return AdapterOff(scorer, device, budget, dtype, self._temperature)
        other = self._initial()
        if live:
            scorer.compare_with(other, self._warn)
        if settings.every is not None and settings.mix is not None:
            return Moving(other, device, budget, dtype, self._temperature, every=settings.every, mix=settings.mix)
        return Resident(other, device, budget, dtype, self._temperature, frozen=not live)

    def _initial(self) -> Scorer:
        """A second copy of the reference model."""
        return self._on_device(Scorer(load_causal(self._initial_config)))

    @property
    def _warn(self) -> Callable[[str], None]:
        """Says something on one rank alone."""
        return self.ranks.by_one(self.warn)

    # --- sampling while training ------------------------------------------------------------------------------------

    @cached_property
    def _sampler(self) -> Sampler:
        sampler = self.config.sampler or default_sampler(self.plugins)
        return self.closing.enter_context(sampler.running(self.services))

    @property
    def _temperature(self) -> float:
        """That of all log-probabilities: a run that samples scores its samples as they were drawn."""
        return (self._sampler.density or 1.0) if self.config.draws else 1.0

    @cached_property
    def _reward(self) -> RewardScorer | None:
        return None if self.config.reward is None else self.config.reward.open(self.services)

    def _collector(self, loop: Loop) -> Collector | None:
        """What draws and scores the samples of each step, in a run that samples."""
        algorithm = self.config.algorithm
        if not self.config.draws or self._reward is None:
            return None
        keep = algorithm.keep if isinstance(algorithm, RolloutAlgorithm) else _all
        journal = Journal(self.folder.journal, self.ranks.main)
        given = (loop.assembler.rows, loop.order, loop.assembler.renderer, self.config.draws)
        opened = partial(self._drawer, loop)
        more = (self.config.rollout, self.ranks, journal, self.config.run.seed)
        return Collector(*given, opened, self._reward, keep, *more, warn=self._warn, again=loop.recall is not None)

    def _drawer(self, loop: Loop, draw: Draw) -> Drawer:
        """The sampler on the model that a draw comes from."""
        policy = self._model(loop.scorer.network, recall=loop.recall)
        if draw.source == "policy":
            return self._sampler.open(policy)
        assert isinstance(loop.reference, Resident), "a run that draws from the reference keeps it in memory"
        reference = self._model(loop.reference.network)
        given = (reference,) if draw.source == "reference" else (policy, reference, draw.mix)
        return self._sampler.open(*given)

    def _model(self, network: nn.Module, **more: Any) -> Model:
        more["compiled"] = self.config.rollout.compile
        return Model(network, self.tokenizer, self.ranks.device, self._warn, **more)

    def _fill(self, reference: Cached, loop: Loop, evaluator: Evaluator | None) -> None:
        """Scores every sequence the run will meet, while the reference is still there, and lets it go."""
        steps = (loop.assembler(loop.order.step(step)) for step in range(loop.total))
        for built in chain(steps, [evaluator.built if evaluator is not None else None]):
            if built is not None:
                part = built.select(asked(built, loop.algorithm, "reference_logps"))
                loop.forwarder.meter.forward += reference.share(part.tokens, part.groups, self.ranks)
        loop.recount({})
        reference.close()

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluator(self, loop: Loop, held_out: HeldOut | None) -> Evaluator | None:
        settings = self.config.eval
        if settings is None or held_out is None:
            return None
        built = None if self.config.draws else held_out.assembler(held_out.index)
        if built is None and not self.config.draws:
            raise DataError("no held-out row can be used", where="eval")
        rows = [held_out.assembler.rows[i] for i in held_out.index]
        wanted = bool(settings.samples and not self.config.algorithm.trains_reward) or bool(settings.tasks)
        subject = self._subject(loop) if wanted else None
        return Evaluator(settings, built, rows, subject, self._keep_samples, self._reward)

    def _subject(self, loop: Loop) -> Callable[[int, List[Row]], Measured]:
        """Views of the model in training, beside the model it started from."""
        renderer = Renderer(self.tokenizer, positions(loop.scorer.network.config))
        if self.config.algorithm.trains_reward:
            scorer = RewardModel(loop.scorer, renderer, self.ranks.device)
            return lambda step, rows: Measured(rows, self.services, renderer, scorer=scorer)
        sampler, policy = self._sampler, self._model(loop.scorer.network)
        other = open_model(self._initial_config, self.ranks.device, self._warn)

        def subject(step: int, rows: List[Row]) -> Measured:
            prompts, seed = adapt(rows, Prompt), self.config.run.seed

            def draws(n: int) -> list[Rollout]:
                return draw(sampler.open(policy), renderer, prompts, n, seed, "eval", step)

            def baseline(n: int) -> list[Rollout]:
                return draw(sampler.open(other), renderer, prompts, n, seed, "eval baseline")

            models = (policy, other)
            return Measured(prompts, self.services, renderer, draws, baseline, *models, temperature=sampler.density)

        return subject

    @property
    def _initial_config(self) -> ModelConfig:
        settings = self.config.reference
        if settings is None or settings.path is None:
            return self.model
        return self.model.model_copy(update={"path": settings.path, "lora": None})

    def _keep_samples(self, step: int, rollouts: list[Rollout]) -> None:
        for group in rollouts:
            for completion in group.completions:
                prompt = group.prompt if isinstance(group.prompt, str) else list(map(asdict, group.prompt))
                record = {"step": step, "row": group.index, "prompt": prompt, "completion": completion.text}
                self.recorder.line("samples.jsonl", {**record, "finished": completion.finished})

    # --- the run ----------------------------------------------------------------------------------------------------

    def _after_step(
        self,
        loop: Loop,
        evaluator: Evaluator | None,
        info: RunInfo,
        metrics: dict[str, float],
        seconds: float,
        requests: List[int],
    ) -> None:
        step = loop.progress.step
        self.recorder.line("metrics.jsonl", {"step": step, **numbers(metrics)})
        self.recorder.line(TIMINGS, {"step": step, "seconds": seconds})
        self.alarms.observe(step, metrics)
        self._notify("prefopt_step_finished", run=info, step=step, metrics=metrics)
        last = step == loop.total or loop.progress.stopped
        best = False
        if evaluator is not None and (step % evaluator.config.every == 0 or last):
            best = self._evaluate(loop, evaluator, info)
        stop = self.ranks.any(bool(requests))
        if last or stop or best or step % self.config.run.checkpoint.every == 0 or loop.progress.stopped:
            self._save(loop)
        if stop and step < loop.total:
            raise Preempted(
                "stopped on request; the state is saved", fix=f"`prefopt resume {self.folder.path}` continues."
            )

    def _evaluate(self, loop: Loop, evaluator: Evaluator, info: RunInfo) -> bool:
        """Evaluates and records; True when the model is the best so far and the best is to be kept."""
        found = evaluator(loop)
        metrics = {f"eval/{name}": x for name, x in found.items()}
        self.recorder.line("metrics.jsonl", {"step": loop.progress.step, **numbers(metrics)})
        self.alarms.observe(loop.progress.step, metrics)
        self._notify("prefopt_step_finished", run=info, step=loop.progress.step, metrics=metrics)
        return judge(found, evaluator.metric, evaluator.config, loop.progress) and evaluator.config.keep_best

    def _save(self, loop: Loop) -> None:
        if self.ranks.main:
            loop.progress.files = self.recorder.sizes()
            saved = checkpoints.Checkpoint(loop.tensors(), loop.snapshot())
            checkpoints.save(self.folder.checkpoints, loop.progress.step, saved)
            best = [loop.progress.best_step] if self._keeps_best else []
            checkpoints.rotate(self.folder.checkpoints, self.config.run.checkpoint.keep, best)
        self.ranks.wait()

    @property
    def _keeps_best(self) -> bool:
        return self.config.eval is not None and self.config.eval.keep_best

    def _restore(self, loop: Loop) -> None:
        found = checkpoints.latest(self.folder.checkpoints, set_aside=self.ranks.main)
        if found is None:
            self.recorder.cut({})
            return
        _, saved = found
        loop.progress = Progress(**saved.state)
        loop.forwarder.meter = Meter(**loop.progress.meter)
        loop.recount(loop.progress.counts)
        loop.state.update(saved.tensors.get("algorithm", {}))
        checkpoints.load_tied(loop.scorer, saved.tensors["model"])
        loop.optimizer.load(saved.tensors.get("optimizer", {}))
        if loop.reference is not None:
            loop.reference.load(dict(saved.tensors.get("reference", {})))
        self.recorder.cut(loop.progress.files)
        for line in self.recorder.metrics():
            self.alarms.observe(line["step"], {name: float(x) for name, x in line.items() if name != "step"})

    def _finish(self, loop: Loop, outcome: str) -> Result:
        """Exports the model and says how the run went."""
        progress, budget = loop.progress, loop.snapshot()["meter"]
        facts = {"outcome": outcome, "steps": progress.step, "updates": progress.updates, "skipped": progress.skipped}
        facts |= {"budget": budget, "rows": progress.counts}
        verdict = self.alarms.verdict() if loop.collector is not None else ""
        facts |= {"verdict": verdict} if verdict else {}
        if self._keeps_best:
            facts |= {"best_step": progress.best_step, "best": progress.best}
        if self.ranks.main:
            state = None
            if self._keeps_best and progress.best_step != progress.step:
                _, best = checkpoints.load(self.folder.checkpoints / checkpoints.folder_name(progress.best_step))
                state = best.tensors["model"]
            save(loop.scorer, self.tokenizer, self.folder.model, state)
            if loop.scorer.critic is not None:
                own = None if state is None else {name.removeprefix(CRITIC): x for name, x in state.items()}
                save(loop.scorer.critic, self.critic_tokenizer, self.folder.path / "critic", own)
            text = card(self.config, self.folder, facts, self.recorder.last())
            write_text(self.folder.model / "README.md", text)
            Journal(self.folder.journal, active=True).close(self.folder.path / TABLE)
            self.folder.write(self.folder.result, facts)
            rmtree(self.folder.kept, ignore_errors=True)
        self.ranks.wait()
        return Result(self.folder.path, outcome, budget, verdict)

    def _describe(self) -> None:
        """`config.yaml` and `run.json`: what was asked for, and with which versions and data."""
        if not self.ranks.main:
            return
        if self.folder.info.exists():
            compare(json.loads(self.folder.info.read_text("utf-8")), describe(self.config, self.plugins), self.warn)
            return
        write_text(self.folder.config, dump(redact(resolved(self.config))))
        self.folder.write(self.folder.info, describe(self.config, self.plugins))


def _all(group: Rollout) -> bool:
    """Every group is worth a step."""
    return True


def default_sampler(plugins: Plugins) -> Sampler:
    """The sampler of a configuration that names none."""
    sampler = plugins.find("sampler", "prefopt:continuous")()
    assert isinstance(sampler, Sampler)
    return sampler
