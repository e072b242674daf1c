"""ForwardInf, what users call. The paper's Algorithm 1 is `algorithm.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hf_forward_inf.adapters import DiffusionAdapter, is_diffusion
from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.lora import RANK
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.sensitivity import DRAWS
from hf_forward_inf.scores.corrections import correct_hubs
from hf_forward_inf.tracing.peft_export import save_perturbation
from hf_forward_inf.tracing.self_influence import rerank, self_influence
from hf_forward_inf.tracing.streaming import trace_stream
from hf_forward_inf.tracing.time_budget import slices
from hf_forward_inf.tracing.token_scores import explain
from hf_forward_inf.tracing.tuning import Tuning, tune
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.processes import progress_bars
from hf_forward_inf.utils.validation import check_dataset, warn_of_lost


class ForwardInf(Scorer):
    """Finds the training examples that made a model give an output, by forward passes.

    The influence of example i on a query mirrors that of the query on example i (the paper's hypothesis, section 1).
    So the model is perturbed once for the query, and every candidate's score is how much its loss rises:
    **higher means a stronger proponent**, about 0 means unrelated, below 0 means that the query's
    unlearning helps the candidate. The scale is the loss's (nats), and grows with the radius; for denoisers it is told
    in units of how much a random step raises or lowers the candidate's loss.

    The model is only read: what it is before `trace`, it is after.

    Args:
        model (`torch.nn.Module`): The trained model, theta, on the device it is to run on.
        processor (*optional*): Its tokenizer or image processor.
        adapter (`Adapter`, *optional*): Defaults to the one that knows this kind of model.
        ascent (`AscentConfig`, *optional*): How the model is perturbed. What it leaves open is the adapter's choice:
            one normalised step, along the gradient for image classifiers, else corrected by curvature.
        reduction (`str`, defaults to `"sum"`): An example's loss is the `"sum"` or the `"mean"` over its
            target tokens.
        measure (`str`, defaults to `"rise"`): What of a candidate is its score: the `"rise"` of its loss, or, of a
            classifier, the `"shift"` of its prediction, the length of the change of its centred logits, whatever its
            label. A shift finds copies and near-duplicates (`recipes/leakage.py`); it has no sign, and says nothing of
            whether the candidate speaks for the query or against it.
        units (`str`, *optional*): What scores are told in: `"loss"`, or `"sensitivity"`, the root mean square of what
            16 random steps of the same length do to the candidate ([`sensitivity`]): one that is shaken by whatever
            moves the model is no stronger a proponent for it. Those steps are taken once for all queries. Defaults to
            the adapter's choice: sensitivity for denoisers, unless steps have no radius or references are given.
        references (`datasets.Dataset`, *optional*): Reference queries; if given, scores are corrected for
            candidates that rise for every query ([`corrections.correct_hubs`]).
        training (`datasets.Dataset`, *optional*): What the model was trained on, for directions that are corrected by
            curvature. Defaults to the candidates of each trace.
        cache_dir (`Path`, *optional*): Where losses are cached. Defaults to `hf_forward_inf` in the Hugging
            Face home, or `HF_FORWARD_INF_CACHE`.
        max_batch_length (`int`, defaults to 4096): Padded tokens in one batch of candidates; halved when
            memory runs out.

    Example:

        >>> tracer = ForwardInf(model, tokenizer)
        >>> found = tracer.trace(queries, candidates, top_k=10)
        >>> found.top(0)
    """

    tuning: Tuning | None = None

    @classmethod
    def from_pipe(cls, pipe: Any, **options: Any) -> "ForwardInf":
        """Trace the outputs of a pipeline.

        Args:
            pipe (`transformers.Pipeline` or `diffusers.DiffusionPipeline`): Its model with tokenizer or image
                processor, or its denoiser with all that comes before ([`adapters.DiffusionAdapter`], for its options).
            **options: Of [`ForwardInf`].
        """
        if is_diffusion(pipe):
            return cls(adapter=DiffusionAdapter(pipe), **options)
        return cls(pipe.model, pipe.tokenizer or pipe.image_processor, **options)

    def tune(self, candidates: Dataset, **options: Any) -> "ForwardInf":
        """Give the same attributor with the settings that self-retrieval finds best; see [`tuning.tune`]."""
        tuning = tune(self, candidates, **options)
        tuned = self.with_options(ascent=tuning.best, references=tuning.references)
        tuned.tuning = tuning
        return tuned

    def trace(
        self,
        queries: Dataset,
        candidates: Dataset,
        top_k: int | None = None,
        tune: bool = False,
        time_budget: float | None = None,
    ) -> Attribution:
        """Score every candidate for every query.

        Args:
            queries (`datasets.Dataset`): Outputs to explain, one a row. A language model answers those without an
                answer: prompts without a completion, conversations that end with the user's turn.
            candidates (`datasets.Dataset`): Training examples that may have caused them.
            top_k (`int`, *optional*): Keep only the best candidates of each query; all of them if it exceeds
                their number. By default every score is kept.
            tune (`bool`, defaults to `False`): Choose the radius first, by self-retrieval on the candidates.
            time_budget (`float`, *optional*): Seconds, tuning aside, after which to stop: candidates are inspected in
                random order, and those not reached have no score. The first 64 are always inspected.

        Returns:
            `Attribution`: float32 scores, `[queries, candidates]` or `[queries, top_k]`; NaN, ranked last,
            where a query has no gradient or a candidate no finite loss (a warning names the rows).

        Raises:
            TypeError: If candidates are a stream: [`trace_stream`] takes it.
            ValueError: If there are no rows, a column is missing, or a target is empty.
        """
        for role, rows in {"queries": queries, "candidates": candidates}.items():
            check_dataset(rows, role)
        if self.adapter.answers_queries:
            queries = self.adapter.with_answers(queries)
        if tune:
            return self.tune(candidates).trace(queries, candidates, top_k, time_budget=time_budget)
        if time_budget is None:
            scores = self._corrected(queries, candidates)
            inspected = np.arange(len(candidates))
        else:
            scores, inspected = self._within(time_budget, queries, candidates)
        warn_of_lost(scores[:, inspected], inspected)
        return Attribution(scores, queries, candidates, method=self.name, config=self.config).keep(top_k)

    def trace_generation(self, inputs: Any, candidates: Dataset, **options: Any) -> Attribution:
        """Let the model answer, and trace the answers.

        Of pictures that a diffusion model draws of several inputs, scores can be told by how a query fares beside the
        others ([`Attribution.standardised`]); a few captions of other things do as well.

        Args:
            inputs (`list`): Texts, or conversations (lists of messages), or one of these; of a model with a chat
                template, texts are the user's turn. Classes or captions of pictures; `None` for a model that draws
                without any.
            candidates (`datasets.Dataset`): As in [`trace`].
            **options: `top_k`, `tune`, `time_budget` of [`trace`]; all others go to the adapter's `with_answers`
                (`num_images`, `seed`; `max_new_tokens`).

        Returns:
            `Attribution`: Its `queries` hold the answers; of a language model, the tokens that it generated too.
        """
        traced = {name: options.pop(name) for name in ("top_k", "tune", "time_budget") if name in options}
        asked = Dataset.from_dict(self.adapter.rows_for(inputs, candidates))
        return self.trace(self.adapter.with_answers(asked, **options), candidates, **traced)

    def trace_stream(self, queries: Dataset, stream: IterableDataset, top_k: int = 100, **options: Any) -> Attribution:
        """Score every row of a stream that is too large to keep, chunk by chunk; see [`streaming.trace_stream`].

        Args:
            queries (`datasets.Dataset`): As in [`trace`].
            stream (`datasets.IterableDataset`): Candidates.
            top_k (`int`, defaults to 100): Candidates kept of each query: no other is left on disk.
            **options: `chunk_size`, `standardise`, `folder`.
        """
        return trace_stream(self, queries, stream, top_k=top_k, **options)

    def explain(self, found: Attribution, k: int = 10) -> Attribution:
        """Tell which tokens of the best candidates the scores come from; see [`token_scores.explain`]."""
        return explain(self, found, k)

    def self_influence(self, rows: Dataset) -> np.ndarray:
        """Tell how much each training example's loss rises when the model is moved against that example (section 4.3).

        Examples that nothing else supports, such as mislabelled ones, come high. Each is forwarded alone, several in a
        batch, under models of their own: all of them cost about a backward and two forward passes, not a pass for
        each (4 to 10 plain passes over them on a CPU, for convolutional networks; more for steps that are corrected
        by curvature, or repeated). With `measure="shift"`, how far the example's own prediction moves.

        Args:
            rows (`datasets.Dataset`): Training examples, with the columns of [`trace`].

        Returns:
            `np.ndarray`: float32 `[rows]`; NaN where an example has no gradient.
        """
        return self_influence(self, rows)

    def sensitivity(self, rows: Dataset, draws: int = DRAWS) -> np.ndarray:
        """Tell how much each training example's loss varies when the model is moved at random, as far as by a query.

        What a step of any kind shakes has high scores for every query, and what the model knows by heart low ones:
        so that scores may be told in units of it (`ForwardInf(units="sensitivity")`). It is the same for all queries,
        and costs `draws` forward passes over the rows.

        Args:
            rows (`datasets.Dataset`): Training examples, with the columns of [`trace`].
            draws (`int`, defaults to 16): Random steps.

        Returns:
            `np.ndarray`: float32 `[rows]`, the root mean square of the rises (with `measure="shift"` of the shifts);
            NaN where an example has no finite loss.

        Raises:
            ValueError: If steps have no radius, or go through a LoRA.
        """
        return self.row_sensitivity(rows, draws)

    def rerank(self, found: Attribution, k: int = 100) -> Attribution:
        """Order the best candidates of each query anew: by the share of what their own step does to them.

        A candidate that any step shakes may come before the one that the query is a copy of; by score /
        self-influence ([`self_influence`]) a copy has about 1, and hardly another more. It costs a self-influence of
        the candidates that are among the best.

        Args:
            found (`Attribution`): What this attributor found, of scores as they are.
            k (`int`, defaults to 100): Candidates of each query; no other is kept.

        Returns:
            `Attribution`: With shares for scores, `[queries, k]`; NaN, ranked last, where a candidate's own step
            does nothing to it.
        """
        return rerank(self, found, k)

    def save_perturbation(self, query: Mapping[str, Any], folder: str | Path, rank: int = RANK) -> float:
        """Perturb the model for a query, and save what changed as an ordinary PEFT adapter.

        `PeftModel.from_pretrained(base, folder)`, or an engine that serves LoRA, then gives theta_K's losses. LoRA
        holds linear layers: perturb those alone, with `AscentConfig(lora_rank=...)`. Of a PEFT model, the adapter that
        it has is saved, perturbed.

        Args:
            query (`dict`): One row of the queries.
            folder (`Path`): Where: `adapter_config.json`, `adapter_model.safetensors` and a model card.
            rank (`int`, defaults to 64): Of LoRA's matrices, at most. One step along the gradient has no higher rank
                than the query has tokens.

        Returns:
            `float`: The share of the change's squared norm that the rank can't hold, 0 where it is exact.

        Raises:
            FileExistsError: If the folder holds something.
            ValueError: If parameters are perturbed that LoRA can't hold, or the query moves the model nowhere.
        """
        return save_perturbation(self, query, Path(folder), rank)

    def _corrected(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        scores = self.in_units(self.score(queries, candidates), candidates)
        if self.references is None:
            return scores
        return correct_hubs(scores, self.in_units(self.score(self.references, candidates), candidates))

    def _within(self, seconds: float, queries: Dataset, candidates: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Score what can be scored in a time, and tell the rows of the candidates that were inspected."""
        scores = np.full((len(queries), len(candidates)), np.nan, dtype=np.float32)
        order = np.random.default_rng(self.ascent.seed).permutation(len(candidates))
        inspected = [order[:0]]
        whole = self.with_options(training=candidates) if self.training is None else self
        with uncached(), progress_bars(False):  # slices differ from run to run
            for rows in slices(order, seconds):
                scores[:, rows] = whole._corrected(queries, candidates.select(rows))
                inspected.append(rows)
        return scores, np.sort(np.concatenate(inspected))
