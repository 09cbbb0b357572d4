"""Solutions of one real ``arith`` problem, cut by the carried model's tokenizer."""

from types import SimpleNamespace

from reasonrun.models import resolve
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Graded, Message, Problem, Rollout, Sampling, Score, Segment
from reasonrun.rendering import Renderer
from reasonrun.tasks.arith import Arith
from reasonrun.verbs.curating import group_of

RENDERER = Renderer.load(resolve(ModelSettings(name="tiny")).path)
TASK = Arith(Arith.Settings(num_train=1, num_dev=1, num_test=1))
PROBLEM = Problem(
    id="p",
    task="arith",
    split="train",
    messages=(Message(role="user", content="a question"),),
    reference="75",
    meta={"start": 8, "operations": [["*", 9], ["+", 3]], "steps": 2},
)
GROUP = group_of(SimpleNamespace(renderer=RENDERER, task=TASK, prompt=None), PROBLEM)
PROMPT_IDS = RENDERER.encode("a question")
RIGHT = "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 75\nAnswer: 75"
EOS = RENDERER.eos_ids[0]


def solution(name, text, value, *, parent=None, given="", finish="stop", reason=None):
    """A graded completion ``given + text``; ``given`` was put in the model's mouth."""
    ids = (*RENDERER.encode(text), *((EOS,) if finish == "stop" else ()))
    segments = (Segment(token_ids=ids, src="model", loss=True),)
    if given:
        segments = (Segment(token_ids=RENDERER.encode(given), src="model", loss=False), *segments)
    rollout = Rollout(
        id=name,
        problem_id="p",
        index=0,
        parent_id=parent,
        kind="plain",
        messages=PROBLEM.messages,
        prompt_ids=PROMPT_IDS,
        segments=segments,
        text=given + text,
        finish_reason=finish,
        policy="w",
        sampling=Sampling(),
        seed=0,
    )
    score = Score(value=value, reason=reason or ("correct" if value else "wrong"), grader="number-1")
    return Graded(rollout=rollout, score=score)


def text_of(ids):
    return RENDERER.decode(ids, skip_special=False)
