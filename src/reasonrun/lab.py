"""The ``Lab``: the verbs that a method calls. Each verb is a durable step."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from reasonrun.asks import ask_in_style, require_room
from reasonrun.contracts import Grader, Probe, Task
from reasonrun.curate.group import Curation, Group
from reasonrun.errors import RecipeError, RunFailed
from reasonrun.grading.judgement import Decision, JudgementGrader
from reasonrun.ledger.steps import OpenStep
from reasonrun.randomness import derive_seed
from reasonrun.records import Checkpoint, Problem, Sampling, digest
from reasonrun.samples import ExampleSet, Extent, GradedSet, OnPolicy, PrefixSet, ProblemSet, RolloutSet
from reasonrun.settings import semantic
from reasonrun.training import OptimizerSettings, TrainKind
from reasonrun.verbs.asking import About, AskAbout, asks, fitting
from reasonrun.verbs.context import Context
from reasonrun.verbs.curating import CurateJob, curate, cut, group_of
from reasonrun.verbs.evaluating import Evaluation, evaluate
from reasonrun.verbs.grading import grade
from reasonrun.verbs.judging import Verdicts, judge
from reasonrun.verbs.merging import merge
from reasonrun.verbs.preflight import PREFLIGHT_PROBLEMS, PREFLIGHT_SAMPLES, look
from reasonrun.verbs.sampling import SampleJob, sample
from reasonrun.verbs.scoring import LogprobSet, evaluate_pairs, logprobs
from reasonrun.verbs.training import TrainRequest, train

_LONGEST = 256
"""Texts that are rendered to learn whether all fit; most tokens are nearly always among most characters."""


class Lab:
    """What a method works with. Steps are named by scope and ``name=``; two steps of one name are an error."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._scopes: list[str] = []
        self._names: set[str] = set()
        self._problem_sets: dict[str, ProblemSet] = {}
        self._whole: dict[str, list[Problem]] = {}  # by step, of which a rehearsal takes a few
        self._has_room: set[tuple[Any, ...]] = set()
        self.evaluations: list[Evaluation] = []
        self.nominees: dict[str, Checkpoint] = {}

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def base(self) -> Checkpoint:
        """The policy that the recipe starts from."""
        return self._context.base

    def model(self, role: str) -> Checkpoint:
        """The model that the recipe names for ``role``; ``policy`` is the base. Raises RecipeError when it names none."""
        models = {"policy": self.base, **self._context.models}
        if role not in models:
            raise RecipeError(
                f"no model has the role {role!r}; the roles of this recipe are {', '.join(models)}",
                hint=f"add it to the recipe: models.{role}.name, .path, .hub or .endpoint",
            )
        return models[role]

    def group(self, problem: Problem) -> Group:
        """What curation functions know about a problem, for a prompt that shows a rollout's steps."""
        return group_of(self._context, problem)

    @property
    def task(self) -> Task:
        return self._context.task

    @property
    def seed(self) -> int:
        """The run seed."""
        return self._context.seed

    @property
    def is_rehearsal(self) -> bool:
        """Whether this is a plan: nothing real is sampled or trained. For what a handful of
        problems cannot show, such as the end of a run or a balanced choice; never for a method."""
        return self._context.planned is not None

    @contextmanager
    def only_possible(self) -> Iterator[None]:
        """Plan the steps inside as ones that need not come: nothing of them is expected. No effect in a real run."""
        planned = self._context.planned
        first = len(planned or ())
        yield
        if planned is not None:
            planned[first:] = [step.only_possible() for step in planned[first:]]

    def rng(self, name: str) -> random.Random:
        """A generator of its own for ``name`` in the current scope: the only randomness a method may use."""
        return random.Random(derive_seed("method", self.seed, self._full(name)))

    def rounds(self, count: int) -> Iterator[int]:
        """Numbers 1 to ``count``; steps inside are named ``round-001/…``."""
        for number in range(1, count + 1):
            with self.scope(f"round-{number:03d}"):
                yield number

    @contextmanager
    def scope(self, name: str, **labels: Any) -> Iterator[None]:
        """Prefix the names of the steps inside: ``lab.scope("probe", T=0.5)`` gives ``probe-T=0.5/…``."""
        self._scopes.append("-".join([name, *(f"{key}={value}" for key, value in sorted(labels.items()))]))
        try:
            yield
        finally:
            self._scopes.pop()

    # -- verbs ---------------------------------------------------------------------------------------------------

    def problems(self, split: str) -> ProblemSet:
        """All problems of a split, committed once for the whole run, so that later changes of a file are noticed."""
        if split in self._problem_sets:
            return self._problem_sets[split]
        context, name = self._context, f"problems/{split}"
        problems = list(context.task.problems(split))
        if not problems:
            raise RecipeError(f"task {context.task.name}: split {split} is empty", hint="check the filters of task.*")
        extent, self._whole[name] = Extent.of(len(problems)), problems
        problems = problems[: context.max_problems]
        fingerprint = {
            "verb": "problems",
            "task": semantic(context.task.config),
            "problems": digest([[problem.id, problem.reference] for problem in problems]),
        }
        step = context.open_step(name, fingerprint)
        new = isinstance(step, OpenStep)
        if isinstance(step, OpenStep):
            step.seal_table("rows", Problem, iter(problems))
            step = step.commit({"num_problems": len(problems)})
        context.record(step, "problems", new=new)
        context.problems_by_id.update({problem.id: problem for problem in problems})
        self._problem_sets[split] = ProblemSet(problems=problems, step=name, extent=extent)
        return self._problem_sets[split]

    def sample(
        self,
        policy: Checkpoint,
        source: ProblemSet | RolloutSet | PrefixSet,
        *,
        n: int,
        sampling: Sampling,
        style: str = "plain",
        turn: str | None = None,
        prompt: AskAbout | None = None,
        name: str = "sample",
        seed_parts: tuple[str | int, ...] | None = None,
    ) -> RolloutSet:
        """``n`` completions per problem in a style, per rollout as its next turn, per prefix as its continuation, or per
        rollout or prefix to a question about it.

        Args:
            policy: the model that answers.
            source: problems, or rollouts or prefixes to go on from; a rollout's children carry its id as ``parent_id``.
            n: completions per prompt.
            sampling: temperature, filters, length, stop strings.
            style: the task's prompt style (problems only); the answers begin with its opening, if it has one.
            turn: the user's next message (rollouts only); the earlier ids are kept as they are.
            prompt: makes, of a problem and a rollout or prefix, the messages of a new conversation; it may be a closure,
                because what it returns is part of the step's fingerprint.
            name: the step's name within the scope.
            seed_parts: start of the request seeds; the run seed and the step's name unless given.

        Raises:
            RecipeError: a prompt does not fit into the context, rollouts come without ``turn`` and ``prompt``, or an
                endpoint is asked for what none can do.
        """
        full = self._claim(name)
        problems = source if isinstance(source, ProblemSet) else source.problems
        if self.is_rehearsal and source is problems and policy.tokenizer == self.base.tokenizer:
            self.require_room(source, styles=[style], max_new_tokens=sampling.max_new_tokens)
        kind = "about" if prompt is not None else "turn" if turn is not None else "continuation"
        job = SampleJob(
            name=full,
            policy=policy,
            asks=asks(self._context, policy, source, style=style, turn=turn, about=prompt),
            kind=style if isinstance(source, ProblemSet) else kind,
            n=n,
            sampling=sampling,
            seed_parts=seed_parts or (self.seed, full),
            problems=problems,
            inputs=(source.step, *([policy.step] if policy.step else [])),
            extent=source.extent,
        )
        return sample(self._context, job)

    def require_room(
        self,
        problems: ProblemSet,
        *,
        styles: Sequence[str],
        turns: Sequence[str] = (),
        max_new_tokens: int,
        limit: int = 1 << 30,
    ) -> None:
        """Refuse answers, or conversations of several turns, that may exceed ``limit`` or the context, before anything is
        sampled. Of many problems only those with the longest texts are rendered; a plan looks at all, too."""
        key = (problems.step, problems.digest, problems.extent, tuple(styles), tuple(turns), max_new_tokens, limit)
        if key in self._has_room or not len(problems):
            return
        context, every = self._context, self._real(problems)
        renderer, task = context.renderer, context.task

        def num_characters(asked: tuple[Problem, str]) -> int:
            return sum(len(message.content) for message in task.messages(*asked))

        asked = heapq.nlargest(_LONGEST, ((p, style) for style in styles for p in every), key=num_characters)
        asks = (ask_in_style(p, task.messages(p, style), task.opening(style), renderer) for p, style in asked)
        require_room(asks, turns, max_new_tokens, min(limit, renderer.context_length), renderer)
        self._has_room.add(key)

    def _real(self, problems: ProblemSet) -> Sequence[Problem]:
        """The problems that a real run has in the place of the few of a rehearsal, where they can be told."""
        whole = self._whole.get(problems.step, [])[: round(problems.extent.expected)]
        return whole if whole[: len(problems)] == list(problems) else problems.problems

    def fitting(self, model: Checkpoint, source: About, *, prompt: AskAbout, max_new_tokens: int) -> About:
        """The rollouts or prefixes whose questions fit into the context of ``model``; all when none does."""
        return fitting(self._context, model, source, prompt, max_new_tokens)

    def grade(self, rollouts: RolloutSet, *, grader: Grader | None = None, name: str = "grade") -> GradedSet:
        """A score for every rollout, by the task's verifier unless another grader is given."""
        return grade(self._context, self._claim(name), rollouts, grader or self._context.grader)

    def judge(
        self,
        model: Checkpoint,
        rollouts: RolloutSet,
        *,
        prompt: AskAbout,
        sampling: Sampling,
        decision: Decision = "score",
        swapped: AskAbout | None = None,
        n: int = 1,
        name: str = "judge",
    ) -> GradedSet:
        """A model's scores for rollouts: the mean of its verdicts on each, from 0 to 1; None where none could be read.

        The verdicts themselves are the steps ``<name>/ask`` and ``<name>/read``.

        Args:
            model: who judges; the policy, the model of a role, one behind an endpoint.
            rollouts: what is judged.
            prompt: makes, of a problem and a rollout, the messages that ask; its answer must end with ``[RESULT]`` and the
                decision.
            sampling: of the verdicts.
            decision: a score from 1 to 5, a choice in which the rollout is A, or yes_no.
            swapped: for a choice: the same question with the rollout as B; both orders then count alike.
            n: verdicts on each rollout, and order.
            name: the step's name within the scope.
        """
        grader = JudgementGrader(JudgementGrader.Settings(decision=decision, of_others=True))
        verdicts = []
        for ask, suffix in ((prompt, ""), (swapped, "-swapped")):
            if ask is None:
                continue
            said = self.sample(model, rollouts, prompt=ask, n=n, sampling=sampling, name=f"{name}/ask{suffix}")
            read = self.grade(said, grader=grader, name=f"{name}/read{suffix}")
            verdicts.append(Verdicts(read=read, swapped=bool(suffix)))
        return judge(self._context, self._claim(name), rollouts, verdicts, decision)

    def curate(
        self, function: Curation, *sets: GradedSet | ProblemSet, name: str | None = None, **params: Any
    ) -> ExampleSet:
        """Examples from graded rollouts, or from problems alone, by a pure function of one problem's rows
        (``curate/group.py``).

        The only way rows reach ``train``. Raises RecipeError for functions that cannot be named across processes.
        """
        full = self._claim(name or function.__name__)
        return curate(self._context, CurateJob(name=full, function=function, sets=sets, params=params))

    def cut(
        self, function: Curation, *sets: GradedSet | ProblemSet, name: str | None = None, **params: Any
    ) -> PrefixSet:
        """Beginnings of rollouts to go on from, chosen by a pure function as in ``curate``."""
        full = self._claim(name or function.__name__)
        return cut(self._context, CurateJob(name=full, function=function, sets=sets, params=params, of_prefixes=True))

    def train(
        self,
        kind: TrainKind,
        rows: ExampleSet | Sequence[ExampleSet] | OnPolicy,
        *,
        start: Checkpoint,
        settings: OptimizerSettings,
        num_steps: int = 0,
        num_epochs: float = 0,
        reference: Checkpoint | None = None,
        carry_optimizer: bool = False,
        keep_optimizer: bool = False,
        name: str = "train",
    ) -> Checkpoint:
        """A new checkpoint: ``num_steps`` optimizer steps, or ``num_epochs`` passes, from ``start`` on ``rows``.

        Args:
            kind: the trainer.
            rows: one set of examples or several, in order; for ``policy_gradient`` the source of the policy's own rollouts.
            start: the weights to begin with.
            settings: optimizer, schedule, batch; nothing is read from the recipe.
            num_steps: optimizer steps; or
            num_epochs: passes over the examples, rounded up to whole steps.
            reference: the frozen model of losses that need one.
            carry_optimizer: go on with the optimizer state of ``start``, which must have been kept.
            keep_optimizer: keep the optimizer state for a later ``carry_optimizer``.
            name: the step's name within the scope.

        Raises:
            Finding: all sets are empty.
            RunFailed: ``carry_optimizer`` without a kept state, a non-finite loss, a trainer that keeps dying.
        """
        if bool(num_steps) == bool(num_epochs):
            raise RecipeError(f"step {self._full(name)}: train takes num_steps or num_epochs, one of them")
        if carry_optimizer and start.optimizer_path is None:
            raise RunFailed(f"step {self._full(name)}: carry_optimizer needs a start made with keep_optimizer=True")
        source = rows if isinstance(rows, OnPolicy) else None
        if (kind == "policy_gradient") != (source is not None) or (source and not num_steps):
            raise RecipeError(
                f"step {self._full(name)}: policy_gradient learns from an OnPolicy source for num_steps, other trainers"
                " from curated examples"
            )
        request = TrainRequest(
            name=self._claim(name),
            kind=kind,
            rows=[rows] if isinstance(rows, ExampleSet) else [] if isinstance(rows, OnPolicy) else list(rows),
            on_policy=source,
            start=start,
            reference=reference,
            settings=settings,
            given_steps=num_steps,
            num_epochs=num_epochs,
            carry_optimizer=carry_optimizer,
            keep_optimizer=keep_optimizer,
        )
        return train(self._context, request)

    def merge(
        self, models: Sequence[Checkpoint], weights: Sequence[float] | None = None, *, name: str = "merge"
    ) -> Checkpoint:
        """A new checkpoint: the average of the weights of several models of one architecture and tokenizer.

        Args:
            models: two or more; configs, tokenizer and data types of the result are the first one's.
            weights: their shares, which sum to 1; equal ones unless given.
            name: the step's name within the scope.

        Raises:
            RecipeError: the models do not fit together, or the weights do not sum to 1.
            RunFailed: the result is not finite.
        """
        shares = [1 / len(models) for _ in models] if weights is None else weights
        return merge(self._context, self._claim(name), models, shares)

    def nominate(self, name: str, policy: Checkpoint) -> None:
        """Have ``policy`` tested at the end of the run, under ``name``, beside the last one and the best one on dev."""
        self.nominees[name] = policy

    def metrics(self, policy: Checkpoint) -> dict[str, Any]:
        """What the training step that made ``policy`` reported; nothing for a model that the run started from."""
        return next((row for row in self._context.rows if policy.step and row["step"] == policy.step), {})

    def evaluate(self, policy: Checkpoint, *, split: str = "dev", name: str = "evaluate") -> Evaluation:
        """Accuracy of ``policy`` on a split, as ``evaluate`` of the recipe says. Dev in rounds; test once, at the end."""
        settings, full = self._context.recipe.evaluate, self._claim(name)
        problems = self._evaluation_problems(split)

        def part(kind: str, n: int, sampling: Sampling, before: RolloutSet | None = None) -> GradedSet:
            rollouts = self.sample(
                policy,
                problems if before is None else before,
                n=n,
                sampling=sampling,
                style=settings.style,
                turn=None if before is None else self.task.correction(),
                name=f"{name}/{kind}",
                seed_parts=("evaluate", settings.seed, kind),
            )
            return self.grade(rollouts, name=f"{name}/grade-{kind}")

        outcome = evaluate(self._context, full, policy, problems, split, part, self._context.evaluation_tokens)
        self.evaluations.append(outcome)
        return outcome

    def preflight(self, probe: Probe) -> dict[str, Any]:
        """How the base does on the first problems of train, in the way that the method will ask it."""
        problems = self.problems("train")
        first = problems.first(min(PREFLIGHT_PROBLEMS, int(problems.extent.expected)))
        num_samples = PREFLIGHT_SAMPLES if probe.sampling.temperature else 1
        with self.scope("preflight"):
            tried = self.sample(
                self.base,
                first,
                n=num_samples,
                style=probe.style,
                sampling=probe.sampling,
                seed_parts=("evaluate", self._context.recipe.evaluate.seed, "preflight"),
            )
            return look(self._context, self._claim("look"), self.grade(tried))

    def logprobs(self, policy: Checkpoint, pairs: ExampleSet, *, name: str = "logprobs") -> LogprobSet:
        """How probable ``policy`` finds both continuations of every pair."""
        return logprobs(self._context, self._claim(name), policy, pairs)

    def evaluate_pairs(
        self, policy: Checkpoint, reference: LogprobSet, *, beta: float, name: str = "evaluate-pairs"
    ) -> dict[str, Any]:
        """Reward margin and pair accuracy of ``policy`` on pairs that it did not learn from, against what another model
        (``logprobs``) makes of them."""
        full = self._claim(name)
        scored = self.logprobs(policy, reference.pairs, name=f"{name}/logprobs")
        return evaluate_pairs(self._context, full, scored, reference, beta)

    def _evaluation_problems(self, split: str) -> ProblemSet:
        whole, limit = self.problems(split), self._context.recipe.evaluate.num_problems
        return whole.first(limit) if 0 < limit < whole.extent.expected else whole

    # -- names ---------------------------------------------------------------------------------------------------

    def _full(self, name: str) -> str:
        return "/".join([*self._scopes, name])

    def _claim(self, name: str) -> str:
        full = self._full(name)
        if full in self._names:
            raise RecipeError(f"two steps are named {full}", hint="give one of them name=, or put it into lab.scope(…)")
        self._names.add(full)
        return full
