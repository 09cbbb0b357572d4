"""Build ``tiny-1``, the language model that the package carries, from a seed: about eleven minutes on two cores.

    python scripts/build_tiny.py --out runs/tiny

One run makes tokenizer, chat template and weights. The training text is generated: solutions (a few per cent with a
wrong step, as found text has), solutions after demonstrations or with a hint, second attempts after a first one, and
judgements. The early phases show one multiplication fact in five, and are long enough to learn what is done with facts.
The last one shows all of them, too briefly to be sure of the new ones, so that there is something to learn; in it the
learning rate falls to zero. The length of each phase is thus a dial: the early ones for skill, the last for knowledge
(docs/LOG.md tells what moves what). ``scripts/tiny_gates.py`` measures the result.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reasonrun.chains import (
    Chain,
    Step,
    apply,
    draw_chain,
    judge_prompt,
    judgement_text,
    question_text,
    solution_text,
    solve_with_mistakes,
)
from reasonrun.prompts import arith as words
from reasonrun.randomness import derive_seed

Turn = tuple[str, str]  # role, text
# A judge's right or wrong is one token of many, and the hardest to learn.
VERDICTS, VERDICT_WEIGHT = ("Ġright", "Ġwrong"), 10.0
CONTEXT = 768
END = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training: shares of the kinds of conversation (the rest are judgements), and what they show."""

    name: str
    steps: int
    plain: float
    hinted: float
    few_shot: float
    second: float
    compare: float = 0.0
    known: float = 1.0  # how often a familiar fact is shown
    shown: Mapping[int, float] = field(default_factory=dict)  # the same of unfamiliar multiples
    shown_tens: Mapping[int, float] = field(default_factory=dict)  # its factor by the tens of the multiplied number
    slip_rate: float = 0.0  # how often the text is a carry off at a product
    error_rate: float = 0.05  # how often it has a wrong step, whatever the step
    wrong_first: float = 0.55  # how often the first of two attempts has a wrong step
    copied: float = 0.35  # how often the second attempt repeats the first
    lr: float = 1.0  # factor of the learning rate
    warmup: int = 0
    decay: int = 0

    def unfamiliar(self, left: int, right: int) -> float:
        """How often an unfamiliar fact is shown."""
        return self.shown.get(right, 0.0) * self.shown_tens.get(left // 10, 1.0)


PHASES = (
    # Comparing two numbers comes first and alone: beside everything else it is not found.
    Phase(name="compare", steps=300, plain=0.0, hinted=0.0, few_shot=0.0, second=0.0, compare=1.0, warmup=50),
    # Copies make reading a question quick to learn; left in, no second attempt would ever differ from the first.
    Phase(name="first", steps=750, plain=0.38, hinted=0.12, few_shot=0.04, second=0.22, compare=0.03, warmup=50),
    Phase(name="solve", steps=1250, plain=0.42, hinted=0.12, few_shot=0.04, second=0.36, wrong_first=0.95, copied=0.0),
    Phase(
        name="facts",
        steps=300,
        plain=0.34,
        hinted=0.10,
        few_shot=0.04,
        second=0.44,
        known=0.25,
        # The easy ones less, so that all of them are about equally uncertain.
        shown={2: 0.42, 3: 0.65, 4: 0.75, 5: 0.42, 6: 0.9, 7: 1.0, 8: 0.95, 9: 0.9},
        shown_tens={0: 0.5, 1: 0.8, 5: 0.5, 8: 0.9, 9: 0.55},
        slip_rate=0.57,
        wrong_first=0.95,
        copied=0.0,
        lr=0.5,
        decay=300,
    ),
)


# A forgotten carry, or any wrong tens.
SLIPS = [-10] * 6 + list(range(10, 90, 10))


def familiar(left: int, right: int) -> bool:
    """Whether left * right is one of the facts, a fifth of all, that the early phases show."""
    return derive_seed("fact", left, right) % 10 < 2


def draw_training_chain(rng: random.Random, phase: Phase) -> Chain:
    """A chain of the pretraining split, with the facts that the phase shows."""
    while True:
        multiplications = 0 if rng.random() < 0.1 else 1 if rng.random() < 0.8 else 2
        chain = draw_chain(rng, min_steps=2, max_steps=4, multiplications=multiplications)
        keep = 1.0
        value = chain.start
        for operator, operand in chain.operations:
            if operator == "*":
                keep *= phase.known if familiar(value, operand) else phase.unfamiliar(value, operand)
            value = apply(value, operator, operand)
        if chain.split == "pretrain" and rng.random() < keep:
            return chain


def wrong_positions(rng: random.Random, chain: Chain, num_wrong: int) -> frozenset[int]:
    return frozenset(rng.sample(range(len(chain.operations)), num_wrong))


def found_solution(rng: random.Random, chain: Chain, error_rate: float, slip_rate: float = 0.0) -> str:
    """A solution as found text has it: now and then a wrong step, and products often off by a carry."""
    wrong = wrong_positions(rng, chain, 1) if rng.random() < error_rate else frozenset()
    steps, value = [], chain.start
    for step in solve_with_mistakes(chain, wrong, rng):
        result = (
            step.result + apply(value, step.operator, step.right) - apply(step.left, step.operator, step.right)
        ) % 100
        if slip_rate and step.operator == "*" and rng.random() < slip_rate:
            result = (result + rng.choice(SLIPS)) % 100
        steps.append(Step(left=value, operator=step.operator, right=step.right, result=result))
        value = result
    return solution_text(steps)


def comparisons(rng: random.Random) -> list[tuple[Turn, bool]]:
    """Pairs of numbers with the verdicts of a judge."""
    lines = []
    for _ in range(20):
        left = right = rng.randrange(100)
        if rng.random() < 0.5:
            right = (left + rng.choice([1, -1, 2, -2, 10, -10, 20, -20, 30, -30])) % 100
        lines.append(f"= {left} , I get {right} {'right' if left == right else 'wrong'}")
    return [(("user", "Compare."), False), (("assistant", "\n".join(lines)), True)]


def document(rng: random.Random, phase: Phase) -> list[tuple[Turn, bool]]:
    """One training conversation: turns, each with whether it is learnt."""
    if phase.compare and rng.random() < phase.compare:
        return comparisons(rng)
    share = [phase.plain, phase.hinted, phase.few_shot, phase.second]
    chain = draw_training_chain(rng, phase)
    question = question_text(chain, rng)
    kind = rng.random()
    if kind < share[0]:
        return [
            (("user", question), False),
            (("assistant", found_solution(rng, chain, phase.error_rate, phase.slip_rate)), True),
        ]
    if kind < sum(share[:2]):
        hinted = words.HINTED.format(question=question, answer=chain.solve()[-1].result)
        return [(("user", hinted), False), (("assistant", solution_text(chain.solve())), True)]
    if kind < sum(share[:3]):
        turns: list[tuple[Turn, bool]] = []
        for _ in range(2):
            shot = draw_training_chain(rng, phase)
            turns.append((("user", question_text(shot, rng)), False))
            turns.append((("assistant", solution_text(shot.solve())), True))
        return [
            *turns,
            (("user", question), False),
            (("assistant", found_solution(rng, chain, phase.error_rate, phase.slip_rate)), True),
        ]
    if kind < sum(share):
        wrong = wrong_positions(rng, chain, 1) if rng.random() < phase.wrong_first else frozenset()
        first = solution_text(solve_with_mistakes(chain, wrong, rng))
        second = first if rng.random() < phase.copied else found_solution(rng, chain, phase.error_rate)
        return [
            (("user", question), False),
            (("assistant", first), False),
            (("user", words.CORRECTION), False),
            (("assistant", second), True),
        ]
    num_wrong = rng.randint(0, len(chain.operations))
    steps = solve_with_mistakes(chain, wrong_positions(rng, chain, num_wrong), rng)
    prompt = judge_prompt(question, solution_text(steps))
    return [(("user", prompt), False), (("assistant", judgement_text(steps)), True)]


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE in which every number 0 to 99 and every word of the task is one token with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern="\n", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    everything = replace(PHASES[1], shown=dict.fromkeys(range(2, 10), 1.0), error_rate=0.1)
    text = [f"{role}\n{content}" for _ in range(3000) for (role, content), _ in document(rng, everything)]
    text += [f" {n}" for n in range(100)] * 200
    text += ["system\n", "assistant\n", "user\n"] * 200
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|endoftext|>", "<|im_start|>", END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    for n in range(100):
        assert len(tokenizer.encode(f" {n}").ids) == 1, n
    return tokenizer


class Encoder:
    """Conversations to ids and loss mask, in the chat template's form."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, turns: list[tuple[Turn, bool]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for (role, content), learnt in turns:
            head, body, tail = self.ids(f"<|im_start|>{role}\n"), self.ids(content + END), self.ids("\n")
            ids += head + body + tail
            mask += [False] * len(head) + [learnt] * len(body) + [False] * len(tail)
        return ids, mask


def batches(
    encoder: Encoder, seed: int, phase: Phase, tokens_per_batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (ids_BT, labels_BT), length-grouped."""
    rng = random.Random(seed)
    while True:
        pool = sorted(
            (encoder.encode(document(rng, phase)) for _ in range(2048)),
            key=lambda item: len(item[0]),
        )
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for item in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(item[0]) > tokens_per_batch:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids_BT = torch.zeros((len(group), width), dtype=torch.long)
            labels_BT = torch.full((len(group), width), -100)
            for row, (ids, mask) in enumerate(group):
                ids_BT[row, : len(ids)] = torch.tensor(ids)
                labels_BT[row, : len(ids)] = torch.where(torch.tensor(mask), torch.tensor(ids), -100)
            yield ids_BT, labels_BT


def new_model(vocab_size: int, end_id: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        # About 1 / sqrt(hidden_size). With the usual 0.02 attention starts uniform at this width, and comparing two
        # numbers is not learnt (docs/LOG.md).
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=end_id,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def shape_numbers(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Let every number start as the sum of a vector for its tens and one for its units, as its digits would tell."""
    table_VD = model.get_input_embeddings().weight.data
    width = table_VD.shape[1]
    tens, units = torch.randn(10, width) * 0.08, torch.randn(10, width) * 0.08
    for n in range(100):
        own = 0.02 * torch.randn(width)
        table_VD[tokenizer.token_to_id(f"Ġ{n}")] = 0.7 * (tens[n // 10] + units[n % 10]) + own


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, safe_serialization=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token=END, pad_token="<|endoftext|>"
    )
    fast.model_max_length = CONTEXT
    fast.chat_template = TEMPLATE
    fast.save_pretrained(out)


class Training:
    """Model, optimizer and the phases."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        self.args = args
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.model = new_model(self.tokenizer.get_vocab_size(), self.tokenizer.token_to_id(END))
        shape_numbers(self.model, self.tokenizer)
        self.weight_V = torch.ones(self.tokenizer.get_vocab_size())
        for verdict in VERDICTS:
            self.weight_V[self.tokenizer.token_to_id(verdict)] = VERDICT_WEIGHT
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
        size = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"parameters {size:,}, vocabulary {self.tokenizer.get_vocab_size()}", flush=True)

    def run(self, phase: Phase, *, done: int = 0) -> None:
        """The updates of one phase; the learning rate warms up, stays, and falls to zero in ``decay`` steps.
        The first ``done`` batches are drawn and passed over: their updates are in the restored state."""
        stream = batches(
            self.encoder, derive_seed("tiny", self.args.seed, phase.name), phase, self.args.tokens_per_batch
        )
        begin, tokens, losses = time.monotonic(), 0, []
        for step, (ids_BT, labels_BT) in zip(range(1, phase.steps + 1), stream, strict=False):
            if step <= done:
                begin = time.monotonic()
                continue
            scale = min(1.0, step / phase.warmup) if phase.warmup else 1.0
            scale *= min(1.0, (phase.steps - step + 1) / phase.decay) if phase.decay else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.lr * phase.lr * scale
            losses.append(self.update(ids_BT, labels_BT))
            tokens += ids_BT.numel()
            if step % 100 == 0:
                seconds = time.monotonic() - begin
                line = {"phase": phase.name, "step": step, "loss": round(sum(losses[-100:]) / len(losses[-100:]), 4)}
                line |= {"tokens": tokens, "seconds": round(seconds), "tokens_per_second": round(tokens / seconds)}
                print(json.dumps(line), flush=True)
            if step % self.args.save_every == 0 or step == phase.steps:
                self.save(Path(self.args.out) / f"{phase.name}-{step}")

    def update(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        logits_BTV = self.model(ids_BT).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), weight=self.weight_V
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit("the loss is not finite")
        return value

    def save(self, out: Path) -> None:
        save(self.model, self.tokenizer, out)
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, out / "state.pt")

    def restore(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tokens-per-batch", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--resume", type=Path, help="go on from a saved folder PHASE-STEP of an earlier run")
    args = parser.parse_args()
    training = Training(args)
    phases, done = list(PHASES), 0
    if args.resume:
        training.restore(args.resume)
        name, _, step = args.resume.name.partition("-")
        done = int(step)
        while phases[0].name != name:
            del phases[0]
    for phase in phases:
        training.run(phase, done=done)
        done = 0
    save(training.model, training.tokenizer, Path(args.out) / "final")


if __name__ == "__main__":
    main()
