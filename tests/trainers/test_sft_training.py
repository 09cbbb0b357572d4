"""The trainer as a whole: updates, events, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sft_rows import Events, example, random_examples, weights_of

from reasonrun.errors import Finding, RecipeError, RunFailed
from reasonrun.records import Checkpoint, SFTExample
from reasonrun.trainers import launch
from reasonrun.trainers.sft import SFT

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


def batch_gradients(folder: str, examples: list[SFTExample]) -> dict[str, torch.Tensor]:
    """Mean over learnt tokens of the gradient of -log p, from transformers' own loss, one row at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    total, count = torch.zeros(()), 0
    for each in examples:
        prompt, answer = (list(segment.token_ids) for segment in each.segments)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total = total + model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss * len(answer)
        count += len(answer)
    (total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def adam_step(weight: Any, grad: Any, m: Any, v: Any, t: int, lr: float) -> Any:
    """Kingma & Ba 2015, algorithm 1, with the defaults of the settings."""
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
    return weight - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_a_carried_optimizer_changes_the_first_update_as_adams_formula_says(
    make_job: Any, start: Checkpoint, events: Events
) -> None:
    examples = random_examples(4)
    once = {"num_steps": 1, "max_grad_norm": 0.0, "lr": 1e-3}
    first = make_job(examples, out="first", **once)
    SFT().train(first, events)
    before, after_one = weights_of(start.path), weights_of(Path(first.out_dir) / "final")
    grad_0 = batch_gradients(start.path, examples)
    for name, grad in grad_0.items():
        expected = adam_step(before[name], grad, 0.0, 0.0, 1, 1e-3)
        # Where the gradient is as small as epsilon its rounding decides the direction.
        clear = grad.abs() > 1e-5
        assert torch.allclose(after_one[name][clear], expected[clear], atol=1e-6), name

    middle = start.model_copy(update={"path": f"{first.out_dir}/final", "optimizer_path": f"{first.out_dir}/optimizer"})
    grad_1 = batch_gradients(middle.path, examples)
    finals = {}
    for carry in (True, False):
        job = make_job(examples, out=f"carry-{carry}", job={"start": middle, "carry_optimizer": carry}, **once)
        SFT().train(job, events)
        finals[carry] = weights_of(Path(job.out_dir) / "final")
    for name, grad in grad_1.items():
        clear = (grad.abs() > 1e-5) & (grad_0[name].abs() > 1e-5)
        carried = adam_step(after_one[name], grad, 0.1 * grad_0[name], 0.001 * grad_0[name] ** 2, 2, 1e-3)
        fresh = adam_step(after_one[name], grad, 0.0, 0.0, 1, 1e-3)
        assert torch.allclose(finals[True][name][clear], carried[clear], atol=1e-6), name
        assert torch.allclose(finals[False][name][clear], fresh[clear], atol=1e-6), name
    assert not torch.allclose(finals[True]["lm_head.weight"], finals[False]["lm_head.weight"], atol=1e-5)


def test_an_optimizer_of_another_model_is_refused(
    make_job: Any, start: Checkpoint, events: Events, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "optimizer").mkdir()
    elsewhere = start.model_copy(update={"optimizer_path": str(tmp_path / "optimizer")})
    job = make_job(random_examples(4), job={"start": elsewhere, "carry_optimizer": True})
    with pytest.raises(RunFailed, match="does not exist"):
        SFT().train(job, events)
    zeros = {f"{moment}.lm_head.weight": torch.zeros(3) for moment in ("step", "exp_avg", "exp_avg_sq")}
    save_file(zeros, tmp_path / "optimizer" / "adamw.safetensors")
    with pytest.raises(RunFailed, match=r"lm_head.weight is \(64, 32\) here, \(3,\) there"):
        SFT().train(job, events)
    with pytest.raises(RecipeError, match="exclude each other"):
        SFT().train(job.model_copy(update={"settings": {**job.settings, "lora": LORA}}), events)


def test_micro_batches_change_nothing_but_rounding(make_job: Any, events: Events) -> None:
    finals = []
    for micro in (0, 1, 3):
        job = make_job(random_examples(10), out=f"micro-{micro}", lr=1e-4, micro_batch_size=micro)
        SFT().train(job, events)
        finals.append(weights_of(Path(job.out_dir) / "final"))
    for name, whole in finals[0].items():
        assert all(torch.allclose(whole, other[name], atol=1e-6) for other in finals[1:]), name


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_and_bfloat16_train_the_same_model(make_job: Any, events: Events, lora: Any) -> None:
    def run(out: str, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        job = make_job(random_examples(8), out=out, num_steps=3, lr=1e-3, lora=lora, **settings)
        logs = Events()
        SFT().train(job, logs)
        return [log["loss"] for log in logs.of("log")], weights_of(Path(job.out_dir) / "final")

    plain, weights = run("plain")
    recomputed, same_weights = run("recomputed", gradient_checkpointing=True)
    half, _ = run("half", dtype="bfloat16")
    assert recomputed == pytest.approx(plain, abs=1e-5)
    assert all(torch.allclose(weight, same_weights[name], atol=1e-5) for name, weight in weights.items())
    # bfloat16 keeps eight bits: near, and not the float32 numbers under another name.
    assert half == pytest.approx(plain, rel=2e-2) and half != pytest.approx(plain, rel=1e-6)


def test_events_result_and_schedule(make_job: Any, events: Events) -> None:
    examples = random_examples(6)
    job = make_job(examples, num_steps=12, lr=8e-4, schedule="linear", warmup_steps=4, batch_size=3, checkpoint_every=5)
    result = SFT().train(job, events)
    logs = events.of("log")
    assert [log["step"] for log in logs] == list(range(1, 13))
    rising, falling = [0, 2e-4, 4e-4, 6e-4], [8e-4 * (8 - i) / 8 for i in range(8)]
    assert [log["lr"] for log in logs] == pytest.approx(rising + falling)
    assert all(np.isfinite([log["loss"], log["grad_norm"]]).all() for log in logs)
    # Twelve batches of three are six epochs of six rows.
    learnt = sum(len(e.segments[1].token_ids) for e in examples)
    assert result.num_tokens == sum(log["num_tokens"] for log in logs) == 6 * learnt
    assert result.num_padded_tokens >= 6 * sum(len(s.token_ids) for e in examples for s in e.segments)
    assert (result.num_steps, result.metrics["num_epochs"]) == (12, 6.0)
    assert result.metrics["loss"] == logs[-1]["loss"] < result.metrics["first_loss"] == logs[0]["loss"]
    # The last step leaves the final folder, not a checkpoint.
    assert [(e["step"], Path(e["path"]).name) for e in events.of("checkpoint")] == [
        (5, "checkpoint-5"),
        (10, "checkpoint-10"),
    ]
    assert {path.name for path in Path(job.out_dir).iterdir()} == {
        "checkpoint-5",
        "checkpoint-10",
        "final",
        "optimizer",
    }


def test_rows_left_out_are_in_the_metrics_and_none_left_is_a_finding(make_job: Any, events: Events) -> None:
    job = make_job([*random_examples(5, longest=8), example("long", [5] * 9, [6] * 9)], num_steps=1, max_length=12)
    metrics = SFT().train(job, events).metrics
    assert (metrics["num_too_long"], metrics["num_examples"]) == (1, 5)
    with pytest.raises(Finding, match="max_length"):
        SFT().train(make_job([example("long", [5] * 9, [6] * 9)], out="none", max_length=12), events)


def test_the_final_folder_keeps_tokenizer_template_and_dtype_of_the_start(
    make_job: Any, start: Checkpoint, events: Events, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    half = tmp_path / "half"
    shutil.copytree(start.path, half)
    save_file(
        {k: v.bfloat16() for k, v in weights_of(start.path).items()}, half / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    job = make_job(random_examples(4), num_steps=1, job={"start": start.model_copy(update={"path": str(half)})})
    SFT().train(job, events)
    final = Path(job.out_dir) / "final"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (final / name).read_bytes() == (half / name).read_bytes(), name
    assert {tensor.dtype for tensor in weights_of(final).values()} == {torch.bfloat16}
    moments = load_file(Path(job.out_dir) / "optimizer" / "adamw.safetensors")
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}


def test_a_folder_without_safetensors_is_refused_before_it_is_opened(
    make_job: Any, start: Checkpoint, events: Events, tmp_path: Path
) -> None:
    from reasonrun.errors import EnvironmentProblem

    pickled = tmp_path / "pickled"
    shutil.copytree(start.path, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    job = make_job(random_examples(4), job={"start": start.model_copy(update={"path": str(pickled)})})
    with pytest.raises(EnvironmentProblem, match="safetensors"):
        SFT().train(job, events)


def test_the_merged_model_computes_what_the_adapter_model_computed(
    make_job: Any, start: Checkpoint, events: Events
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = make_job(random_examples(8), num_steps=6, lr=1e-2, lora=LORA)
    SFT().train(job, events)
    out_dir = Path(job.out_dir)
    base = AutoModelForCausalLM.from_pretrained(start.path).eval()
    merged = AutoModelForCausalLM.from_pretrained(out_dir / "final").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out_dir / "adapter").eval()(ids).logits
        after = merged(ids).logits
    assert torch.allclose(adapted, after, atol=1e-4)
    assert (before - after).abs().max() > 0.1
    assert not (out_dir / "optimizer").exists()


# The entry point of one process


def test_the_entry_point_prints_events_and_the_result(make_job: Any, tmp_path: Path, capfd: Any) -> None:
    job = make_job(random_examples(4), num_steps=2)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert launch.main([str(tmp_path / "job.json")]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["log", "log", "result"]
    assert lines[-1]["result"]["num_steps"] == 2


def test_the_entry_point_reports_a_users_error_with_its_class(make_job: Any, tmp_path: Path, capfd: Any) -> None:
    job = make_job([example("long", [5] * 9, [6] * 9)], max_length=12)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert launch.main([str(tmp_path / "job.json")]) == Finding.exit_code
    event = json.loads(capfd.readouterr().out)
    assert event["kind"] == "Finding" and event["evidence"]["num_too_long"] == 1


def test_importing_the_plug_in_loads_no_torch() -> None:
    program = "import sys, reasonrun.trainers.sft; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False).returncode == 0
