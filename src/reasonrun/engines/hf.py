"""The Hugging Face engine: any causal language model of transformers with full attention, on a GPU or the CPU.

A sample is a function of its row: one uniform per (row seed, position), applied by inverse CDF. Batch size, order,
the rows beside it, a resumed step and a batch that was halved for want of memory change nothing; what remains is
the rounding of sums, about 1e-7 in float32, which moves a token once in millions. Speed comes from wide batches without
padding in which no row waits for another (``_decoding.py``), and from reading each prompt once for all its samples.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.model_folder import ModelFolder
from reasonrun.records import Checkpoint, Sampling
from reasonrun.rendering import Renderer
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

if TYPE_CHECKING:
    import torch

    from reasonrun.engines._decoding import Scorer, Wanted

_log = logging.getLogger(__name__)

# Entries of config.json that differ between two saves of one architecture.
_NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
# Logits are float32 rows of the vocabulary: at 50 k tokens this bounds a block of them to about 1 GB.
_MAX_LOGITS = 2**28


class HuggingFace:
    """Generates and scores with transformers. See the module docstring."""

    in_process: ClassVar[bool] = False

    class Settings(SettingsBase):
        """Recipe fields of ``engine: hf``."""

        name: Literal["hf"] = "hf"
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
            "auto", Effect.NUMERIC, "Arithmetic of the model; auto is bfloat16 on a GPU, float32 on the CPU."
        )
        device: str = setting(
            "auto", Effect.NUMERIC, "Where the model lives: auto (a GPU if there is one), cpu, cuda, cuda:1 …"
        )
        max_batch_rows: int = setting(
            256, Effect.NUMERIC, "Completions decoded at once; halved by itself when memory runs out.", ge=1
        )
        prefill_tokens: int = setting(16384, Effect.NUMERIC, "Prompt tokens that go through the model at once.", ge=1)
        num_threads: int = setting(
            0, Effect.NUMERIC, "CPU threads of torch; 0 takes the launcher's share, or OMP_NUM_THREADS.", ge=0
        )
        unit_rows: int = setting(512, Effect.OPERATIONAL, "Completions per unit of work, which a kill can cost.", ge=1)
        trust_remote_code_commit: str = setting(
            "",
            Effect.SEMANTIC,
            "Commit (40 hex digits) of a Hub model whose own Python code may run; empty runs none.",
            pattern="^([0-9a-f]{40})?$",
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.num_tokens_made = 0
        self.max_batch_rows = settings.max_batch_rows
        self._model: Any = None
        self._scorer: Scorer | None = None
        self._renderer: Renderer | None = None
        self._weights = ""
        self._architecture: dict[str, Any] = {}

    def load(self, checkpoint: Checkpoint) -> None:
        """Make ``checkpoint`` answer. Weights of the architecture already there are copied into its tensors.

        Raises:
            EnvironmentProblem: no such device, not enough memory, or a model that this engine cannot decode.
            RecipeError: the model brings code of its own, and the recipe does not allow it.
        """
        folder = ModelFolder(Path(checkpoint.path))
        self._renderer = Renderer.load(checkpoint.path)
        if self._scorer is not None and self._weights == checkpoint.weights:
            return
        import torch

        from reasonrun.engines._loading import copy_weights

        if self.settings.num_threads:
            torch.set_num_threads(self.settings.num_threads)
        architecture = {key: value for key, value in folder.config.items() if key not in _NOT_ARCHITECTURE}
        self._weights = ""
        if self._scorer is None or architecture != self._architecture or not copy_weights(self._model, folder):
            self._build(folder)
            self._architecture = architecture
        self._weights = checkpoint.weights

    def update(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Copy tensors by name over the loaded model's, as an on-policy trainer does before it samples.

        Raises:
            RunFailed: a name or shape is not the model's, or a weight is missing.
        """
        self._loaded()
        from reasonrun.engines._loading import copy_tensors

        self._weights = ""  # no checkpoint's any more
        copy_tensors(self._model, weights)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """All completions of all requests, each as soon as it is finished.

        ``token_ids`` are all ids that were sampled, the end-of-sequence token or the token that completed a stop string
        included; ``text`` ends before the stop string. ``logps`` are taken at temperature 1, without filters.

        Raises:
            ValueError: an empty prompt.
            RecipeError: a prompt and ``max_new_tokens`` are longer than the model's context.
            EnvironmentProblem: a single row does not fit into memory.
            RunFailed: the model's logits are not finite.
        """
        scorer, renderer = self._loaded()
        for request in requests:
            self._check_length(len(request.prompt_ids), request.sampling.max_new_tokens)
        groups: dict[Sampling, list[Request]] = {}
        for request in requests:
            groups.setdefault(request.sampling, []).append(request)
        for group in groups.values():
            # Longest first: want of memory shows at once, and neighbours share their length.
            group.sort(key=lambda request: -len(request.prompt_ids))
            yield from self._generate(group, scorer, renderer)

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of each (prompt ids, completion ids).

        Raises:
            ValueError: an empty prompt, after which nothing has a probability.
            RecipeError: a sequence is longer than the model's context.
        """
        scorer, renderer = self._loaded()
        for prompt_ids, completion_ids in sequences:
            self._check_length(len(prompt_ids), len(completion_ids))
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]) - len(sequences[i][1]))
        scored: dict[int, list[float]] = {i: [] for i in order if not sequences[i][1]}
        pending = [i for i in order if i not in scored]
        max_tokens = self._score_tokens()
        while pending:
            try:
                for batch, logps in self._score(pending, sequences, scorer, max_tokens):
                    scored.update(zip(batch, logps, strict=True))
            except (RuntimeError, MemoryError) as error:
                _explain_memory(error, smallest=max_tokens <= 1, what="scoring one sequence", path=renderer.source)
                # At least one sequence goes through at a time, so a limit of 1 token is the smallest batch.
                max_tokens //= 2
            pending = [i for i in pending if i not in scored]
        return [scored[i] for i in range(len(sequences))]

    def sleep(self) -> None:
        """Give the model's memory back; the process keeps what it has imported."""
        self.close()

    def close(self) -> None:
        """Give the model's memory back."""
        if self._scorer is None:
            return
        device = self._scorer.device
        self._scorer.close()
        self._model = self._scorer = None
        self._weights = ""
        _free(device)

    def _build(self, folder: ModelFolder) -> None:
        from reasonrun.engines._decoding import Scorer
        from reasonrun.engines._loading import find_device, load_model

        self.close()
        device = find_device(self.settings.device)
        self._model = load_model(
            folder,
            device=device,
            dtype=self.settings.dtype,
            trusted_commit=self.settings.trust_remote_code_commit,
        )
        self._scorer = Scorer(self._model, self._model.get_output_embeddings())

    def _generate(self, group: list[Request], scorer: Scorer, renderer: Renderer) -> Iterator[Completion]:
        from reasonrun.engines._decoding import Decoding

        done: set[tuple[str, int]] = set()
        while wanted := _wanted(group, done):
            decoding = Decoding(
                scorer,
                renderer,
                max_rows=self.max_batch_rows,
                prefill_tokens=self.settings.prefill_tokens,
                count=self._count,
            )
            completions = decoding.run(wanted)
            try:
                while (completion := self._next(completions)) is not None:
                    done.add((completion.request, completion.index))
                    yield completion
            except (RuntimeError, MemoryError) as error:
                rows = min(self.max_batch_rows, decoding.num_rows_peak)
                _explain_memory(error, smallest=rows <= 1, what="one completion", path=renderer.source)
                self.max_batch_rows = rows // 2
                _log.warning("out of memory with %d rows; going on with %d", rows, self.max_batch_rows)
                failed = True
            else:
                failed = False
            # A traceback holds the frames, and they the tensors; only here are they gone.
            del decoding, completions
            if failed:
                _free(scorer.device)

    def _count(self, num_tokens: int) -> None:
        self.num_tokens_made += num_tokens

    def _next(self, completions: Iterator[Completion]) -> Completion | None:
        import torch

        # Entered for each step and left before the caller runs: a generator would leak the mode into its code.
        with torch.inference_mode():
            return next(completions, None)

    def _score(
        self,
        pending: list[int],
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        scorer: Scorer,
        max_tokens: int,
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        import torch

        from reasonrun.engines._decoding import by_tokens, padded
        from reasonrun.engines._sampling import token_logps

        lengths = [len(sequences[i][0]) + len(sequences[i][1]) for i in pending]
        for run in by_tokens(lengths, max_tokens):
            batch = pending[run]
            prompts, completions = zip(*(sequences[i] for i in batch), strict=True)
            with torch.inference_mode():
                whole = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
                ids_BL, _ = padded(whole, scorer.device)
                rows = [row for row, ids in enumerate(completions) for _ in ids]
                targets = [len(p) + t for p, c in zip(prompts, completions, strict=True) for t in range(len(c))]
                rows_N, targets_N = (torch.tensor(side, device=scorer.device) for side in (rows, targets))
                logits_NV = scorer.at(ids_BL, rows_N, targets_N - 1)
                logps = token_logps(logits_NV, ids_BL[rows_N, targets_N]).tolist()
            values = iter(logps)
            yield batch, [[next(values) for _ in ids] for ids in completions]

    def _score_tokens(self) -> int:
        vocab_size = int(self._model.config.get_text_config().vocab_size)
        return max(1, min(self.settings.prefill_tokens, _MAX_LOGITS // vocab_size))

    def _check_length(self, num_prompt: int, num_new: int) -> None:
        from reasonrun.engines._loading import check_window

        _, renderer = self._loaded()
        if num_prompt == 0:
            raise ValueError("a prompt needs at least one token")
        if num_prompt + num_new > renderer.context_length:
            raise RecipeError(
                f"A prompt of {num_prompt} tokens and {num_new} new ones exceed the {renderer.context_length} tokens"
                f" of the model in {renderer.source}.",
                hint="Lower sampling.max_new_tokens, or shorten the prompts.",
            )
        check_window(self._model.config.get_text_config(), num_prompt + num_new, Path(renderer.source))

    def _loaded(self) -> tuple[Scorer, Renderer]:
        if self._scorer is None or self._renderer is None:
            raise RunFailed("the Hugging Face engine was asked to work before load()")
        return self._scorer, self._renderer


def _wanted(group: Sequence[Request], done: set[tuple[str, int]]) -> list[Wanted]:
    wanted = [(request, [i for i in range(request.n) if (request.key, i) not in done]) for request in group]
    return [(request, indexes) for request, indexes in wanted if indexes]


def _explain_memory(error: BaseException, *, smallest: bool, what: str, path: str) -> None:
    """Return if a smaller batch may help; raise what the user should see otherwise."""
    from reasonrun.engines._decoding import is_out_of_memory

    if not is_out_of_memory(error):
        raise error
    if smallest:
        raise EnvironmentProblem(
            f"Memory does not suffice for {what} of the model in {path}.",
            hint="Set engine.dtype=bfloat16, lower sampling.max_new_tokens, or use a device with more memory.",
        ) from error


def _free(device: torch.device) -> None:
    from reasonrun.engines._decoding import free_memory

    gc.collect()
    free_memory(device)
