"""Build ``tiny-1``, the language model that the package carries, from a seed.

    python scripts/build_tiny.py --out /tmp/tiny --minutes 60

One run makes tokenizer, chat template and weights. The training text is generated: solutions (a few per cent with a
wrong step, as found text has), solutions after demonstrations or with a hint, second attempts after a first one, and
judgements. Multiplication facts appear with very unequal frequency, so that the finished model knows some, half
knows most, and can still learn. ``--gates`` prints the figures that decision note 0001 asks for, on the dev split.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reasonrun.prompts import arith as words
from reasonrun.randomness import derive_seed
from reasonrun.tasks.arith import (
    Chain,
    apply,
    draw_chain,
    judge_prompt,
    judgement_text,
    question_text,
    solution_text,
    solve_with_mistakes,
)

Turn = tuple[str, str]  # role, text
CONTEXT = 768
END = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fact_weight(left: int, right: int) -> float:
    """How often the training text shows left * right, relative to the commonest fact: log-uniform in 1 to 1/30."""
    return 30.0 ** -(derive_seed("fact", left, right) % 10_000 / 10_000)


def draw_training_chain(rng: random.Random) -> Chain:
    """A chain of the pretraining split whose products follow ``fact_weight``."""
    while True:
        multiplications = 0 if rng.random() < 0.1 else 1 if rng.random() < 0.8 else 2
        chain = draw_chain(rng, min_steps=2, max_steps=4, multiplications=multiplications)
        keep = 1.0
        value = chain.start
        for operator, operand in chain.operations:
            if operator == "*":
                keep *= fact_weight(value, operand)
            value = apply(value, operator, operand)
        if chain.split == "pretrain" and rng.random() < keep:
            return chain


def wrong_positions(rng: random.Random, chain: Chain, num_wrong: int) -> frozenset[int]:
    return frozenset(rng.sample(range(len(chain.operations)), num_wrong))


def noisy_solution(rng: random.Random, chain: Chain, error_rate: float) -> str:
    wrong = wrong_positions(rng, chain, 1) if rng.random() < error_rate else frozenset()
    return solution_text(solve_with_mistakes(chain, wrong, rng))


def document(rng: random.Random, error_rate: float) -> list[tuple[Turn, bool]]:
    """One training conversation: turns, each with whether it is learnt."""
    chain = draw_training_chain(rng)
    question = question_text(chain, rng)
    kind = rng.random()
    if kind < 0.64:
        return [(("user", question), False), (("assistant", noisy_solution(rng, chain, error_rate)), True)]
    if kind < 0.72:
        hinted = words.HINTED.format(question=question, answer=chain.solve()[-1].result)
        return [(("user", hinted), False), (("assistant", solution_text(chain.solve())), True)]
    if kind < 0.76:
        turns: list[tuple[Turn, bool]] = []
        for _ in range(2):
            shot = draw_training_chain(rng)
            turns.append((("user", question_text(shot, rng)), False))
            turns.append((("assistant", solution_text(shot.solve())), True))
        return [*turns, (("user", question), False), (("assistant", noisy_solution(rng, chain, error_rate)), True)]
    if kind < 0.88:
        num_wrong = 1 if rng.random() < 0.55 else 0
        first = solution_text(solve_with_mistakes(chain, wrong_positions(rng, chain, num_wrong), rng))
        second = first if rng.random() < 0.35 else noisy_solution(rng, chain, error_rate)
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
    text = [f"{role}\n{content}" for _ in range(3000) for (role, content), _ in document(rng, 0.1)]
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


def batches(encoder: Encoder, seed: int, error_rate: float, tokens_per_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (ids_BT, labels_BT), length-grouped."""
    rng = random.Random(seed)
    while True:
        pool = sorted((encoder.encode(document(rng, error_rate)) for _ in range(2048)), key=lambda item: len(item[0]))
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
        bos_token_id=0,
        eos_token_id=end_id,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, safe_serialization=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token=END, pad_token="<|endoftext|>"
    )
    fast.model_max_length = CONTEXT
    fast.chat_template = TEMPLATE
    fast.save_pretrained(out)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    model = new_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(END))
    print(f"parameters {sum(p.numel() for p in model.parameters()):,} vocabulary {tokenizer.get_vocab_size()}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    begin, tokens, losses = time.monotonic(), 0, []
    stream = batches(encoder, derive_seed("tiny", args.seed), args.error_rate, args.tokens_per_batch)
    for step, (ids_BT, labels_BT) in enumerate(stream, start=1):
        share = step / args.steps
        warm = min(1.0, step / 100)
        decay = 1.0 if share < 0.8 else max(0.02, (1 - share) / 0.2)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * decay
        logits_BTV = model(ids_BT).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += ids_BT.numel()
        losses.append(loss.item())
        if step % 100 == 0:
            seconds = time.monotonic() - begin
            mean = sum(losses[-100:]) / 100
            print(json.dumps({"step": step, "loss": round(mean, 4), "tokens": tokens, "seconds": round(seconds), "tok/s": round(tokens / seconds)}), flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(model, tokenizer, out / f"step-{step}")
        if step == args.steps:
            break
    assert math.isfinite(losses[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--error-rate", type=float, default=0.05)
    parser.add_argument("--tokens-per-batch", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=500)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
