"""Carry out one training job in this process: load, train, write what the step leaves. Any objective."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from reasonrun.contracts import TrainEvents
from reasonrun.errors import RecipeError
from reasonrun.model_folder import ModelFolder
from reasonrun.probing import probe_ids
from reasonrun.randomness import derive_seed
from reasonrun.trainers import launch, sharding
from reasonrun.trainers.folders import commit_folder, moments_of, read_moments, write_model, write_moments
from reasonrun.trainers.objective import Fixed, Objective
from reasonrun.trainers.sharded_trainer import ShardedStepTrainer
from reasonrun.trainers.step_trainer import StepTrainer
from reasonrun.training import LoRASettings, OptimizerSettings, TrainJob, TrainResult

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_REPORTED = ("loss", "lr", "grad_norm")
_EXACT_PARAMETERS = 10**10
_COUNTS = ("num_tokens", "num_padded_tokens", "learning_rate", "epoch", "step")


def run_job(
    job: TrainJob,
    settings: OptimizerSettings,
    objective: Objective,
    events: TrainEvents,
    counts: dict[str, int],
) -> TrainResult:
    """Train and write ``final/``, ``optimizer/`` and, with LoRA, ``adapter/`` into ``job.out_dir``.

    Args:
        job: what to do.
        settings: of its kind.
        objective: its rows and their loss.
        events: receives logs and checkpoints, in the first process only.
        counts: added to the metrics (rows left out and the like).

    Raises:
        RunFailed: a loss or gradient is not finite, or one example does not fit into memory.
        RecipeError: the job asks for what cannot be.
    """
    carry = job.carry_optimizer and job.start.optimizer_path is not None
    if carry and settings.lora is not None:
        raise RecipeError(
            "carry_optimizer and lora exclude each other: adapters are merged after every step and the next one starts"
            " with fresh ones, to which the old optimizer state does not belong.",
            hint="Set carry_optimizer=false, or remove lora.",
        )
    transformers_logging.disable_progress_bar()
    Path(job.out_dir).mkdir(parents=True, exist_ok=True)
    with _process_group(job):
        _check_sharding(job, events)
        return _train(job, settings, objective, events, counts, carry=carry)


def _train(
    job: TrainJob,
    settings: OptimizerSettings,
    objective: Objective,
    events: TrainEvents,
    counts: dict[str, int],
    *,
    carry: bool,
) -> TrainResult:
    out_dir = Path(job.out_dir)
    args = _arguments(job, settings, out_dir)
    set_seed(args.seed)  # adapters are drawn before the Trainer seeds
    model, stored_dtype = _load(job, settings, shard=_is_sharded(job))
    rows = objective.plan(settings.batch_size, job.num_steps, job.seed)
    trainer = (ShardedStepTrainer if sharding.is_sharded(model) else StepTrainer)(
        model=model,
        args=args,
        objective=objective,
        num_steps=job.num_steps,
        micro_batch_size=settings.micro_batch_size,
        checkpoint_every=settings.checkpoint_every,
        out_dir=out_dir,
        events=events,
    )
    objective.begin(
        Fixed(
            start=trainer.model,
            # An adapter starts as zero, and a checkpoint to resume from is read later.
            start_is_reference=job.reference is None or job.reference.weights == job.start.weights,
            load_reference=lambda: _load_reference(job, settings, trainer),
            resume_from=Path(job.resume_from) if job.resume_from else None,
            rows=rows,
            tell=lambda text: events({"event": "note", "text": text}),
        )
    )
    trainer.accelerator.free_memory()  # it keeps what it prepared, the reference too
    if carry and job.resume_from is None:
        optimizer = trainer.create_optimizer()
        read_moments(model, optimizer, Path(str(job.start.optimizer_path)), sharding.part_like)
    try:
        trainer.train(resume_from_checkpoint=job.resume_from)
    finally:
        objective.close()
    trainer.remove_staging()
    _write_outputs(model, trainer.optimizer, job, settings, stored_dtype)
    if args.world_size > 1:
        dist.barrier()
    return _result(trainer.state.log_history, objective, settings.batch_size, counts)


@contextmanager
def _process_group(job: TrainJob) -> Iterator[None]:
    if not launch.is_rank():
        yield
        return
    on_gpu = torch.cuda.is_available()
    # A file needs no free port; under torchrun its own store is used.
    method = None if "MASTER_ADDR" in os.environ else f"file://{Path(job.out_dir).resolve() / 'rendezvous'}"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=method,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _arguments(job: TrainJob, settings: OptimizerSettings, out_dir: Path) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(out_dir / "staging"),
        max_steps=job.num_steps,
        per_device_train_batch_size=1,  # one planned batch, which StepTrainer cuts up
        gradient_accumulation_steps=1,
        learning_rate=settings.lr,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps or math.ceil(settings.warmup_ratio * job.num_steps),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=_in_bfloat16(settings),
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not on_gpu,
        seed=derive_seed("trainer", job.seed) % 2**32,
        save_strategy="no",  # StepTrainer decides
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
    )
    # One process drives one device; several devices are several processes, never DataParallel.
    args._setup_devices  # noqa: B018 - a property that sets what the next line corrects
    args._n_gpu = min(args._n_gpu, 1)
    return args


def _check_sharding(job: TrainJob, events: TrainEvents) -> None:
    if job.sharding != "none" and not _is_sharded(job):
        text = f"launcher.sharding={job.sharding} divides nothing in a single process: the model is trained whole"
        events({"event": "note", "text": text})
    if job.resume_from is None or sharding.has_shards(Path(job.resume_from)) == _is_sharded(job):
        return
    made, now = ("none", "fsdp") if _is_sharded(job) else ("fsdp", "none, or a single process,")
    raise RecipeError(
        f"the checkpoint {job.resume_from} was made with launcher.sharding={made}; {now} cannot go on from it",
        hint=f"set launcher.sharding={made} again, or make the step again with --redo and its name",
    )


def _is_sharded(job: TrainJob) -> bool:
    return job.sharding != "none" and dist.is_initialized()


def _load(job: TrainJob, settings: OptimizerSettings, *, shard: bool) -> tuple[Any, torch.dtype]:
    """The model to train and the dtype in which its start checkpoint is stored."""
    ModelFolder(Path(job.start.path)).weight_paths()  # refuses a folder without safetensors before anything is opened
    model = AutoModelForCausalLM.from_pretrained(
        job.start.path, dtype="auto", use_safetensors=True, local_files_only=True
    )
    stored_dtype = model.dtype
    if not shard:
        model = _in_training_dtype(model, settings)
    model = model if settings.lora is None else _with_adapters(model, settings.lora)
    return (_sharded(model, settings) if shard else model), stored_dtype


def _in_training_dtype(model: Any, settings: OptimizerSettings) -> Any:
    return model.float() if _has_master_weights(settings) else model


def _has_master_weights(settings: OptimizerSettings) -> bool:
    """Weights in float32: an update of 1e-6 is lost in bfloat16. Frozen ones may stay as they are stored."""
    return settings.lora is None or settings.dtype == "float32" or not torch.cuda.is_available()


def _sharded(model: Any, settings: OptimizerSettings) -> Any:
    return sharding.shard(
        model,
        stored_as=torch.float32 if _has_master_weights(settings) else None,
        computed_as=torch.bfloat16 if _in_bfloat16(settings) else None,
    )


def _in_bfloat16(settings: OptimizerSettings) -> bool:
    return settings.dtype == "bfloat16" or (settings.dtype == "auto" and torch.cuda.is_available())


def _load_reference(job: TrainJob, settings: OptimizerSettings, trainer: StepTrainer) -> Any:
    """The job's reference model in the arithmetic of the trained one."""
    if job.reference is None:
        raise RecipeError(
            "this training step compares with a reference model, and was given none", hint="pass reference="
        )
    model = AutoModelForCausalLM.from_pretrained(
        job.reference.path, dtype="auto", use_safetensors=True, local_files_only=True
    )
    if sharding.is_sharded(trainer.model):
        model = _sharded(model, settings)
    else:
        model = _in_training_dtype(model, settings).to(trainer.args.device)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def _with_adapters(model: Any, lora: LoRASettings) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    return get_peft_model(model, config)


def _write_outputs(
    model: Any, optimizer: Any, job: TrainJob, settings: OptimizerSettings, stored_dtype: torch.dtype
) -> None:
    """Write what the job leaves, in the first process; the others give it their parts."""
    out_dir, writes = Path(job.out_dir), not dist.is_initialized() or dist.get_rank() == 0
    if settings.lora is None:
        moments = {}
        for name, moment in moments_of(model, optimizer):
            gathered = sharding.whole(moment)
            if writes:
                moments[name] = gathered.cpu().contiguous()
        if writes:
            write_moments(moments, out_dir / "optimizer")
        del moments
    if sharding.is_sharded(model):
        plain = _load(job, settings, shard=False)[0] if writes else None
        sharding.copy_whole(model, plain)
        model = plain
    if not writes:
        return
    if hasattr(model, "merge_and_unload"):
        staged = out_dir / "adapter.partial"
        model.save_pretrained(staged)
        commit_folder(staged, out_dir / "adapter")
        model = model.float().merge_and_unload()
    _cast(model, stored_dtype)
    probe_logps = _probe_logps(model, stored_dtype)
    write_model(model.to(stored_dtype), Path(job.start.path), out_dir / "final", probe_logps)


def _probe_logps(model: Any, stored_dtype: torch.dtype) -> list[float]:
    """Log-probabilities of the probe under the weights as they are stored, by which an engine proves that it has them.

    The weights have ``stored_dtype`` before and after; buffers, such as the frequencies of positions, keep theirs.
    """
    ids = torch.tensor([probe_ids(model.config.get_text_config().vocab_size)], device=model.device)
    # Stored weights, exact arithmetic: what every engine approximates. A large model would not fit a second time.
    exact = model.num_parameters() < _EXACT_PARAMETERS
    if exact:
        _cast(model, torch.float32)
    model.eval()
    # Training in mixed precision has wrapped the model's forward pass; this one is in the dtype of the weights.
    forward = getattr(model, "_original_forward", model.forward)
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        logits_TV = forward(input_ids=ids).logits[0, :-1].float()
        logps_T = logits_TV.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    if exact:
        _cast(model, stored_dtype)
    return [float(logp) for logp in logps_T]


def _cast(model: Any, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _result(
    history: list[dict[str, float]], objective: Objective, batch_size: int, counts: dict[str, int]
) -> TrainResult:
    """Sums over all steps, earlier attempts included: the history travels with each checkpoint."""
    last = history[-max(1, len(history) // 10) :]
    # A statistic of some steps only, such as one of a third attempt, is the mean of those.
    reported = dict.fromkeys([*_REPORTED, *(key for row in last for key in row if key not in _COUNTS)])
    found = {key: [row[key] for row in last if key in row] for key in reported}
    metrics: dict[str, float] = {key: sum(values) / len(values) for key, values in found.items()}
    metrics["first_loss"] = history[0]["loss"]
    metrics.update(objective.totals(history, batch_size))
    metrics.update(counts)
    return TrainResult(
        num_steps=len(history),
        num_tokens=int(sum(row["num_tokens"] for row in history)),
        num_padded_tokens=int(sum(row["num_padded_tokens"] for row in history)),
        metrics=metrics,
    )
