"""Grading that cannot be stalled: whatever a policy writes gets a verdict within its CPU time and memory (G14)."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promises import Counted
from reasonrun.grading.judgement import JudgementGrader
from reasonrun.grading.number import NumberGrader
from reasonrun.grading.symbolic import SymbolicGrader
from reasonrun.grading.verdict import StepVerdictGrader
from reasonrun.grading.written import WrittenGrader
from reasonrun.records import Message, Problem, Score

pytestmark = pytest.mark.attack

CPU_SECONDS = 0.5
MEMORY_MIB = 768
START_SECONDS = 3.0  # CPU time of a fresh grading process, which imports sympy and compiles a grammar; it takes 1
POLICY_FAILED = {"wrong", "unparseable", "no_answer"}
COULD_NOT_TELL = {"deadline", "memory", "too_large", "unreadable_reference"}
SETTINGS = SymbolicGrader.Settings(cpu_seconds=CPU_SECONDS, memory_mib=MEMORY_MIB, num_workers=1)
CORPUS = Path(__file__).parent / "hostile_maths.jsonl"


def _text(parts: str | list[Any]) -> str:
    """A text as the corpus writes it: whole, or in parts, each a text or [text, number of times]."""
    if isinstance(parts, str):
        return parts
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts)


def corpus() -> list[dict[str, Any]]:
    """``about``, the ``item`` to grade, and the reasons that are ``allowed``; correct only where the line says so."""
    found = []
    for line in CORPUS.read_text(encoding="ascii").splitlines():
        entry = json.loads(line)
        answer = _text(entry["answer"])
        text = answer if entry.get("raw") else f"So \\boxed{{{answer}}}"
        allowed = set(entry.get("allowed", POLICY_FAILED | COULD_NOT_TELL))
        found.append({**entry, "item": item(_text(entry["reference"]), text), "allowed": allowed})
    return found


def item(reference: str, text: str) -> tuple[Problem, str, bool]:
    messages = (Message(role="user", content="How many?"),)
    return Problem(id="p", task="t", split="dev", messages=messages, reference=reference), text, False


def check(score: Score) -> None:
    """A verdict: 1, 0 with the policy's reason, or None with the grader's; and it can be written to any file."""
    if score.value is None:
        assert score.reason in COULD_NOT_TELL, score
    else:
        assert score.value == float(score.reason == "correct"), score
        assert score.value == 1.0 or score.reason in POLICY_FAILED, score
    (score.answer or "").encode("utf-8")
    assert len(score.answer or "") <= 1_000


def children_cpu_seconds() -> float:
    """CPU time of all processes that this one has started, ended or not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children():
        times = child.cpu_times()
        total += times.user + times.system
    return total


@dataclass
class Graded:
    """A line of the corpus with its verdict and the CPU seconds it took, in grading processes and in this one."""

    entry: dict[str, Any]
    score: Score
    spent: float
    own: float


@pytest.fixture(scope="module")
def graded() -> list[Graded]:
    """The whole corpus, one text after another, through one grading process at a time."""
    found = []
    with closing(SymbolicGrader(SETTINGS)) as grader:
        for entry in corpus():
            before, own = children_cpu_seconds(), time.process_time()
            score = grader.grade(entry["item"][0], entry["item"][1], truncated=False)
            own = time.process_time() - own
            found.append(Graded(entry=entry, score=score, spent=children_cpu_seconds() - before, own=own))
            for worker in grader._pool._processes.workers if grader._pool else ():
                limits = psutil.Process(worker.process.pid).rlimit(psutil.RLIMIT_AS)
                assert limits == (MEMORY_MIB * 2**20,) * 2 or not worker.ready
    return found


def test_every_hostile_text_gets_a_verdict_within_its_caps(
    graded: list[Graded], capsys: pytest.CaptureFixture[str], counted: Counted
) -> None:
    assert len(graded) > 110
    for one in graded:
        check(one.score)
        assert one.score.reason in one.entry["allowed"], (one.entry["about"], one.score)
        assert one.spent < CPU_SECONDS + START_SECONDS, (one.entry["about"], one.spent)
        assert one.own < 2.0, (one.entry["about"], one.own)  # the supervisor grades beside other work
    reasons = Counter(one.score.reason for one in graded)
    assert {"deadline", "too_large", "unreadable_reference"} <= COULD_NOT_TELL & reasons.keys()
    slowest = max(one.spent for one in graded)
    with capsys.disabled():
        print(f"\n{len(graded)} hostile texts: {dict(reasons)}; at most {slowest:.1f} s of CPU time, start included")
    counted("G14", "hostile texts", len(graded))


@contextmanager
def _busy_machine() -> Iterator[None]:
    """Two processes a core that compute without end."""
    context = multiprocessing.get_context("fork")
    burners = [
        context.Process(target=_burn, daemon=True) for _ in range(2 * len(psutil.Process().cpu_affinity() or [0]))
    ]
    for burner in burners:
        burner.start()
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.join()


def _burn() -> None:
    while True:
        sum(range(10_000))


@pytest.mark.promise("G14", "busy machines")
def test_verdicts_depend_neither_on_load_nor_on_order(graded: list[Graded]) -> None:
    endless = {"sum of many terms", "gamma"}
    chosen = [one for one in graded if one.entry["about"] in endless or len(one.entry["allowed"]) == 1]
    assert len(chosen) > 25
    alone = [one.score.reason for one in chosen]
    assert alone.count("deadline") == len(endless)
    with closing(SymbolicGrader(SETTINGS)) as grader, _busy_machine():
        items = [one.entry["item"] for one in reversed(chosen)]
        loaded = [score.reason for score in grader.grade_many(items)]
    assert loaded[::-1] == alone


@pytest.mark.promise("G14", "deadly answers")
def test_an_answer_that_ends_its_process_every_time_is_asked_so_often_and_no_more() -> None:
    """A policy that has found such an answer writes it a thousand times; each costs two processes."""
    with closing(SymbolicGrader(SETTINGS)) as grader:
        items = [item("x", "\\boxed{x+1}")] * 50
        pool = grader._started_pool()
        asked = []
        real = pool._ask

        def ask_and_kill(worker: Any, ticket: Any) -> None:
            asked.append(ticket)
            worker.process.kill()
            real(worker, ticket)

        pool._ask = ask_and_kill  # type: ignore[method-assign]
        scores = [next(grader.grade_many([one])) for one in items]
    assert {(score.value, score.reason) for score in scores} == {(None, "crash")}
    assert len(asked) == 4


# -- fuzzing -----------------------------------------------------------------------------------------------------------

ANYTHING = st.one_of(
    st.text(max_size=300),
    st.binary(max_size=300).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    st.binary(max_size=300).map(lambda raw: raw.decode("latin-1")),
)
_WORDS = (
    *("\\boxed{", "}", "{", "####", "The answer is", "1", ",", ".", "-", "/", "\\", "\\text{", "\\frac{", "step 1"),
    *("incorrect", "neutral", "correct", ";", "[RESULT]", "**", ":", "*", "5", "A", "=", "+", "(", ")", "^", "!"),
    *("\\left", "$", "%", "\u200b", "\u2009", "or", "to", "million", "yes", "[", "]", "&", "_", "\\$", "{,}", "\\%"),
    *("10^", "e9", "\\times", "\u2212", " ", "\n", "\u2028", "\x00", "\ud800"),
)
TOKENS = st.sampled_from(_WORDS)
_LEAVES = (
    *("0", "1", "2", "3", "7", "10", "0.5", "-1", "99", "1e9", "x", "y", "n", "a_1", "e", "i", "\\pi ", "\\infty "),
    *("\\alpha ", "\\text{kg}", "10\\%", "\\emptyset ", "\\ldots "),
)
_OPERATORS = ("+", "-", "\\cdot ", "/", "=", "<", "\\le ", ",", "^", "\\pm ", "|")
_OF_TWO = (
    *(r"\frac{%s}{%s}", "{%s}^{%s}", r"\binom{%s}{%s}", r"\sum_{n=%s}^{%s} n", r"\log_{%s}(%s)", "[%s,%s)"),
    *(r"\begin{pmatrix}%s&%s\\0&1\end{pmatrix}", r"\int_{0}^{%s} %s dx"),
)
_OF_ONE = ("(%s)!", r"\sqrt{%s}", r"\sin(%s)", r"\{%s\}", r"\left|%s\right|", r"\boxed{%s}")


def in_process_graders() -> list[Any]:
    return [
        NumberGrader(),
        NumberGrader(NumberGrader.Settings(last_number=True)),
        StepVerdictGrader(),
        WrittenGrader(),
        *(JudgementGrader(JudgementGrader.Settings(decision=kind)) for kind in ("score", "choice", "yes_no")),
    ]


@pytest.mark.promise("G14", "fuzzed graders")
@settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(ANYTHING, st.lists(TOKENS, max_size=40).map("".join)), ANYTHING)
def test_graders_in_the_supervisor_answer_anything(text: str, reference: str) -> None:
    for grader in in_process_graders():
        for gold in ("3", reference):
            score = grader.grade(item(gold, text)[0], text, truncated=False)
            assert score.reason and score.value in (None, 0.0, 1.0)
            (score.answer or "").encode("utf-8")


@pytest.mark.promise("G14", "fuzzed graders")
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(TOKENS, max_size=3).map("".join),
    st.lists(TOKENS, min_size=1, max_size=3).map("".join),
    st.lists(TOKENS, max_size=3).map("".join),
)
def test_graders_in_the_supervisor_take_time_in_proportion(head: str, unit: str, tail: str) -> None:
    text = head + unit * (40_000 // len(unit)) + tail
    symbolic = SymbolicGrader(SETTINGS)  # nothing this long reaches its processes
    for grader in [*in_process_graders(), symbolic]:
        begin = time.process_time()
        grader.grade(item("3", text)[0], text, truncated=False)
        assert time.process_time() - begin < 1.5, (type(grader).__name__, head, unit, tail)
    symbolic.close()


def _filled(shapes: tuple[str, ...], *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    # a shape may hold the sign % only as a place, so it is filled place by place
    return st.tuples(st.sampled_from(shapes), *parts).map(lambda found: _placed(found[0], found[1:]))


def _placed(shape: str, parts: tuple[str, ...]) -> str:
    for part in parts:
        before, _, after = shape.partition("%s")
        shape = before + part.replace("%s", "") + after
    return shape


def _latex() -> st.SearchStrategy[str]:
    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        joined = st.tuples(inner, st.sampled_from(_OPERATORS), inner).map("".join)
        return st.one_of(joined, _filled(_OF_TWO, inner, inner), _filled(_OF_ONE, inner))

    return st.recursive(st.sampled_from(_LEAVES), grown, max_leaves=12)


@st.composite
def _damaged(draw: st.DrawFn) -> str:
    """LaTeX with up to two places cut out or filled with something else."""
    text = draw(_latex())
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 3)))
        text = text[:start] + draw(st.one_of(st.just(""), TOKENS, st.text(max_size=2))) + text[stop:]
    return text


@pytest.fixture(scope="module")
def pooled() -> Iterator[SymbolicGrader]:
    quick = SymbolicGrader.Settings(cpu_seconds=0.3, memory_mib=MEMORY_MIB, num_workers=1)
    with closing(SymbolicGrader(quick)) as grader:
        yield grader


@pytest.mark.promise("G14", "fuzzed graders")
@settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(_latex(), _damaged()), min_size=8, max_size=8))
def test_the_grading_processes_answer_anything_like_latex(pooled: SymbolicGrader, pairs: list[tuple[str, str]]) -> None:
    scores = list(pooled.grade_many([item(gold, f"\\boxed{{{answer}}}") for gold, answer in pairs]))
    assert len(scores) == len(pairs)
    for score in scores:
        check(score)


@pytest.mark.promise("G14", "fuzzed graders")
@settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ANYTHING, min_size=10, max_size=10))
def test_the_grading_processes_answer_any_bytes(pooled: SymbolicGrader, answers: list[str]) -> None:
    for score in pooled.grade_many([item("x+1", f"#### {answer}") for answer in answers]):
        check(score)
