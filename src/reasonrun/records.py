"""The records that every step reads and writes: frozen, keyword-only, JSON round trip.

Token ids are stored, never text that would be tokenised again. Log-probabilities are natural logarithms, one per
token. Digests are lower-case hex SHA-256, cut to 32 characters where they serve as keys.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Role = Literal["system", "user", "assistant", "tool"]
Source = Literal["prompt", "model", "hint", "teacher", "tool", "env", "gold"]
FinishReason = Literal["stop", "length", "stop_string"]


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, cut to 32 hex characters (128 bits)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Message(Record):
    """One chat message."""

    role: Role
    content: str


class Problem(Record):
    """One item to solve. ``id`` is a hash of its content, so equal problems have equal ids in every split."""

    id: str
    task: str
    split: str
    messages: tuple[Message, ...]  # the bare question, before any style is applied
    reference: str  # the gold answer, in the form that the task's grader reads
    meta: dict[str, JsonValue] = Field(default_factory=dict)


class Segment(Record):
    """A run of token ids with one origin.

    ``loss`` says whether these tokens are learnt; ``weight`` scales their loss (may be negative); ``step`` numbers the
    reasoning step from 1, 0 when the text is not segmented.
    """

    token_ids: tuple[int, ...]
    src: Source
    loss: bool
    weight: float = 1.0
    step: int = 0


class Sampling(Record):
    """How a completion was drawn. Temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch the filters off."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    stop: tuple[str, ...] = ()
    logprobs: bool = False


class Rollout(Record):
    """One sampled completion.

    ``id`` is the row key: the request key, a dash, the sample index. ``parent_id`` names the rollout that this one
    continues, corrects or retries. ``prompt_ids`` are the rendered messages; ``segments`` hold what came after them: what
    was put in the model's mouth (``loss`` false), then what it sampled, the end-of-sequence token included when the model
    produced it. A model behind an endpoint gives text and no ids: ``prompt_ids`` and ``segments`` of its rollouts are empty.
    """

    id: str
    problem_id: str
    index: int
    parent_id: str | None = None
    kind: (
        str  # what it answers: a style (plain, few_shot, hinted), a turn, a continuation, a question about its parent …
    )
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    text: str  # decoded completion without special tokens
    finish_reason: FinishReason
    logps: tuple[float, ...] | None = None  # one per sampled token, under the sampling policy at temperature 1
    policy: str  # digest of the weights
    sampling: Sampling
    seed: int

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """All ids after the prompt."""
        return tuple(i for segment in self.segments for i in segment.token_ids)

    @property
    def num_given_tokens(self) -> int:
        """Tokens of the completion that were put there before this sample began: an opening, a prefix."""
        return sum(len(segment.token_ids) for segment in self.segments if not segment.loss)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Score(Record):
    """A grader's verdict on one rollout.

    ``value`` is None only when the *grader* failed (deadline, crash, unreadable reference). A policy's failure
    (truncated, no answer, unparseable) is 0.0 with its reason.
    """

    value: float | None
    answer: str | None = None
    reason: str  # correct, wrong, no_answer, truncated, unparseable, deadline, crash, unreadable_reference …
    grader: str  # grader id with version, such as number-1

    @property
    def correct(self) -> bool:
        return self.value is not None and self.value >= 1.0


class Graded(Record):
    """A rollout with its score."""

    rollout: Rollout
    score: Score

    @property
    def correct(self) -> bool:
        return self.score.correct


class SFTExample(Record):
    """A sequence to imitate: segments in order, those with ``loss`` are learnt, ``weight`` scales the whole example."""

    kind: Literal["sft"] = "sft"
    problem_id: str
    rollout_ids: tuple[str, ...]
    segments: tuple[Segment, ...]
    weight: float = 1.0
    source: str = "self"  # self, hinted, gold …: counted in the round table

    @property
    def num_tokens(self) -> int:
        """Tokens of its forward pass."""
        return sum(len(segment.token_ids) for segment in self.segments)


class PreferenceExample(Record):
    """Two continuations of one prefix. Ids are used as they are: nothing is appended."""

    kind: Literal["preference"] = "preference"
    problem_id: str
    rollout_ids: tuple[str, ...]
    prefix_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    weight: float = 1.0
    margin: float = 0.0
    smoothing: float = 0.0
    win_probability: float = 1.0
    source: str = "self"

    @property
    def num_tokens(self) -> int:
        """Tokens of its forward pass, in which both sequences begin with the prefix."""
        return 2 * len(self.prefix_ids) + len(self.chosen_ids) + len(self.rejected_ids)


Example = SFTExample | PreferenceExample


class PolicyGradientExample(Record):
    """One turn of a rollout to make more or less likely, with a reward and a pull towards the reference of its own.

    ``segments`` begin with the prompt; those with ``loss`` are learnt. Rows of one ``group`` and ``attempt`` are each
    other's baseline. A turn without an example is not learnt from.
    """

    kind: Literal["policy_gradient"] = "policy_gradient"
    problem_id: str
    rollout_id: str
    segments: tuple[Segment, ...]
    reward: float
    kl_coef: float = 0.0
    group: str
    attempt: int = 1
    sampled_logps: tuple[float, ...]  # of the learnt tokens, under the engine that sampled them


class Credit(Record):
    """What an on-policy training step made of a rollout."""

    optimizer_step: int  # the first one that could learn from it, from 1
    reward: float | None = None  # None where nothing was learnt from it, as are the following
    kl_coef: float | None = None
    kl: float | None = None  # log(policy / reference) of its tokens, summed
    advantage: float | None = None


class Experience(Record):
    """A rollout of an on-policy training step, its verdict, and what was made of it."""

    rollout: Rollout
    score: Score
    credit: Credit


class Prefix(Record):
    """The beginning of a rollout's completion, to go on from. No token of it is learnt."""

    kind: Literal["prefix"] = "prefix"
    problem_id: str
    rollout_ids: tuple[str, ...]  # the rollout that was cut
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    num_steps: int  # whole steps of reasoning in it
    source: str = "self"

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The kept ids after the prompt."""
        return tuple(i for segment in self.segments for i in segment.token_ids)


Chosen = Example | Prefix
CHOSEN_TYPES: dict[str, type[SFTExample] | type[PreferenceExample] | type[Prefix]] = {
    "sft": SFTExample,
    "preference": PreferenceExample,
    "prefix": Prefix,
}
"""What curation may choose, by kind."""


class LeftOut(Record):
    """A row that curation did not use, and why."""

    rollout_id: str  # of the problem, where problems alone are curated
    reason: str


class Adapter(Record):
    """Low-rank adapters that make a checkpoint out of another: an engine may serve them without merging."""

    path: str
    base: str  # digest of the weights that they were trained on
    base_path: str


class Checkpoint(Record):
    """A model on disk, or behind an endpoint.

    ``weights`` is the digest of the weights, ``tokenizer`` that of tokenizer and chat template together. ``step``
    names the durable step that made it (empty for a model that the run started from). Of a ``remote`` model nothing but
    its name is known: ``weights`` is a digest of that, ``path`` the URL, ``tokenizer`` empty.
    """

    path: str
    weights: str
    tokenizer: str
    parent: str | None = None
    step: str = ""
    optimizer_path: str | None = None
    remote: bool = False
    adapter: Adapter | None = None
