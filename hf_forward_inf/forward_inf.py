"""ForwardInf, the class that users call. The paper's Algorithm 1 is in `algorithm.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset

from hf_forward_inf.adapters import DiffusionAdapter, is_diffusion
from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import Difference
from hf_forward_inf.data.inputs import Given, as_dataset, read_inputs
from hf_forward_inf.plan import Plan
from hf_forward_inf.scores.levels import background
from hf_forward_inf.tracing.peft_export import save_perturbation
from hf_forward_inf.tracing.planning import plan_for
from hf_forward_inf.tracing.predictions import predict
from hf_forward_inf.tracing.self_influence import rerank, self_influence
from hf_forward_inf.tracing.strategy import trace_planned
from hf_forward_inf.tracing.streaming import trace_stream
from hf_forward_inf.tracing.token_scores import explain
from hf_forward_inf.tracing.trained import adapter_of, rows_of
from hf_forward_inf.tracing.tuning import Tuning, tune
from hf_forward_inf.utils.cache import enforce_limit
from hf_forward_inf.utils.fingerprints import FINGERPRINT, fingerprint_of_model
from hf_forward_inf.utils.loading import is_diffusion_folder, load_diffusion, load_model
from hf_forward_inf.utils.memory import unchanged
from hf_forward_inf.utils.progress import progress
from hf_forward_inf.utils.storage import default_cache_dir
from hf_forward_inf.utils.validation import warn_of_lost

TRACED = ("top_k", "time_budget", "strategy")
"""Options of [`ForwardInf.trace`] besides its data."""


class ForwardInf(Scorer):
    """Finds the training examples behind a model's output, by forward passes over them.

    The influence of example i on a query mirrors that of the query on example i (the paper's hypothesis, section 1).
    So the model is perturbed once for the query, and every candidate's score is how much its loss rises:
    **higher means a stronger proponent**, about 0 means unrelated, below 0 means that unlearning the query helps the
    candidate. Scores are differences of losses (in nats) and grow with the radius; for denoisers they are divided by
    the candidate's loss.

    The model is left as it was: the same parameters, training mode and hooks after `trace` as before.

    Args:
        model (`torch.nn.Module`): The trained model, theta, on the device it is to run on.
        processor (*optional*): Its tokenizer or image processor.
        adapter (`Adapter`, *optional*): Defaults to the adapter for this kind of model.
        ascent (`AscentConfig`, *optional*): How the model is perturbed. Unset fields take the adapter's defaults: one
            normalised step, corrected by curvature where the model's size allows it.
        reduction (`str`, defaults to `"sum"`): An example's loss is the `"sum"` or the `"mean"` over its target
            tokens.
        measure (`str`, defaults to `"rise"`): A candidate's score is the `"rise"` of its loss; or, for classifiers,
            the `"shift"` of its prediction: the norm of the change of its centred logits, whatever its label. A shift
            finds copies and near-duplicates (`recipes/leakage.py`); it has no sign, so it does not say whether the
            candidate supports the query or opposes it.
        falls (`float`, *optional*): Weight of a candidate's tokens whose losses fall, from 0 to 1: a token that
            holds the answer is less outweighed by others that the model only guesses at. Where it is not 1, a kept
            candidate is run twice for each query. Defaults to the adapter's choice: 0.25 for language models with PEFT
            adapters, 1 for others.
        units (`str`, *optional*): Units of the scores: `"loss"`, or `"base_loss"`, which divides each rise by the
            candidate's loss: a candidate with a high loss rises under any step, and earns no credit for it. Defaults
            to the adapter's choice: base losses for denoisers.
        training (`datasets.Dataset`, *optional*): The model's training data, for directions that are corrected by
            curvature. Defaults to the candidates of each trace.
        strategy (`str`, defaults to `"auto"`): `"full"`: the finite step is run on all candidates; or `"screen"`: a
            cheap attributor ranks all of them, and the step is run on the best of each query. All others then get the
            floor, what one in ten of the audited others reaches ([`screened.floor_under`]). `"auto"` screens more than
            1,000 candidates of language models, takes the full pass where the audit finds that the screen fails, and
            sets a floor for them in any case.
        screen (`str` or `Attributor`, *optional*): Ranks the candidates: an attributor's name in
            [`baselines.ATTRIBUTORS`], several joined by `+`, whose reciprocal ranks are added, or an attributor.
            Defaults to `"bm25+representation"`, as far as the model and its rows have texts and hidden states.
        keep (`int`, *optional*): Candidates of each query above the floor: those that a screen keeps, or the best of a
            full pass. Defaults to 5% of them, at least 50; to all with `strategy="full"`, which has no floor then.
        audit (`int`, defaults to 30): Random others of each query that are scored, too: from them follows how many
            of the best candidates the screen finds ([`Plan.audits`]).
        storage (`float`, defaults to 4.0): GB that the states before the perturbed part may take in the cache, from
            which later queries of a screened trace go on.
        cache_dir (`Path`, *optional*): Where losses are cached. Defaults to the environment variable
            `HF_FORWARD_INF_CACHE`, or `hf_forward_inf` in the Hugging Face home.
        max_batch_length (`int`, defaults to 4096): Maximum of padded tokens in a batch of candidates; halved when
            memory runs out.
        baseline_model (`torch.nn.Module`, *optional*): Another model of the same architecture, typically the one
            before fine-tuning. Its scores, after a step of its own, are subtracted: what it knew already does not
            count ([`baselines.Difference`]). For [`trace`] only.

    Example:

        >>> tracer = ForwardInf(model, tokenizer)
        >>> found = tracer.trace(queries, candidates, top_k=10)
        >>> found.top(0)
    """

    tuning: Tuning | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "ForwardInf":
        """Return an attributor for a saved model.

        Args:
            name (`str` or `Path`): Hub name or local folder of a transformers model with a head, of a PEFT adapter, or
                of a diffusers pipeline.
            **options: Options of [`ForwardInf`].

        Raises:
            FileNotFoundError: If it is a path where nothing is.
            ImportError: If it is a PEFT adapter or a diffusers pipeline, and these are not installed.
        """
        if is_diffusion_folder(str(name)):
            return cls.from_pipe(load_diffusion(str(name)), **options)
        model, processor = load_model(str(name))
        return cls(model, processor, **options)

    @classmethod
    def from_trainer(cls, trainer: Any, **options: Any) -> "ForwardInf":
        """Return an attributor for a trainer's model, whose candidates are by default the rows that it trains on.

        Args:
            trainer (`transformers.Trainer`): Or one of TRL's that trains on answers or texts (`SFTTrainer`).
            **options: Options of [`ForwardInf`].

        Raises:
            TypeError: If the trainer has no tokenizer or processor, or its rows are a stream.
            ValueError: If several of its rows are packed into one.

        Example:
            >>> tracer = ForwardInf.from_trainer(trainer)
            >>> found = tracer.trace({"prompt": "What is the capital of Australia?"})
        """
        adapter = adapter_of(trainer)
        return cls(adapter=adapter, **{"training": rows_of(trainer, adapter), **options})

    @classmethod
    def from_pipe(cls, pipe: Any, **options: Any) -> "ForwardInf":
        """Return an attributor for the outputs of a pipeline.

        Args:
            pipe (`transformers.Pipeline` or `diffusers.DiffusionPipeline`): Supplies the model with its tokenizer,
                image processor or processor, or the denoiser with the encoders before it. For the options of
                [`adapters.DiffusionAdapter`], use `ForwardInf(adapter=DiffusionAdapter(pipe, ...))`.
            **options: Options of [`ForwardInf`].
        """
        if is_diffusion(pipe):
            return cls(adapter=DiffusionAdapter(pipe), **options)
        processor = getattr(pipe, "processor", None) or pipe.tokenizer or pipe.image_processor
        return cls(pipe.model, processor, **options)

    def tune(self, candidates: Dataset, ascents: Sequence[AscentConfig] | None = None, **options: Any) -> "ForwardInf":
        """Return the same attributor with the best settings, by retraining or self-retrieval; see [`tuning.tune`]."""
        tuning = tune(self, candidates, ascents, **options)
        tuned = self.with_options(ascent=tuning.best)
        tuned.tuning = tuning
        return tuned

    def trace(
        self,
        queries: Given,
        candidates: Given | None = None,
        top_k: int | None = None,
        time_budget: float | None = None,
        strategy: Literal["auto", "full", "screen"] | None = None,
    ) -> Attribution:
        """Score every candidate for every query, or those that a screen keeps.

        Args:
            queries (`datasets.Dataset`): Outputs to explain, one a row; or a list of rows, one row, a dictionary of
                columns, a pandas DataFrame, a file, a folder, or a name on the hub ([`data.as_dataset`]). Columns of
                other names are read where it is unambiguous which are meant, and a warning says so. For a language
                model, rows without an output (prompts without a completion, conversations that end with the user's
                turn) are completed by the model.
            candidates (`datasets.Dataset`, *optional*): Training examples that may have caused them; as `queries`.
                Defaults to `training`.
            top_k (`int`, *optional*): Return only the best candidates of each query; all of them if it exceeds their
                number. Defaults to all scores.
            time_budget (`float`, *optional*): Seconds after which to stop. With a screen, which
                ranks all candidates first, each query's candidates are scored best first, regardless of `keep`, in an
                equal share of the time; those not reached have the floor. Otherwise they are scored in random order,
                and those not reached have no score. The first 64 are always scored.
            strategy (`str`, *optional*): Another strategy than the attributor's.

        Returns:
            `Attribution`: float32 scores, `[queries, candidates]` or `[queries, top_k]`; NaN, ranked last,
            where a query has no gradient or a candidate no finite loss (a warning names the rows). Its `stage` says
            which scores were computed where others have the floor, its `plan` how, and how the screen did.

        Raises:
            TypeError: If candidates are a stream; use [`trace_stream`].
            ValueError: If there are no rows, a column is missing, a target is empty, or there is a time budget and a
                baseline model.
        """
        candidates = self.training if candidates is None else candidates
        if candidates is None:
            raise TypeError("There are no candidates: trace(queries, candidates), or ForwardInf(..., training=...).")
        queries, candidates = read_inputs(self.adapter, queries, candidates)
        enforce_limit(self.cache_dir or default_cache_dir())
        if self.adapter.answers_queries:
            queries = self.adapter.with_answers(queries)
        tracer = self if strategy is None else self._with_strategy(strategy)
        if self.baseline_model is not None:
            return tracer._less_baseline(time_budget).trace(queries, candidates, top_k)
        with unchanged(), progress("tracing", len(queries), "queries"):
            traced = trace_planned(tracer, queries, candidates, time_budget)
            config = {**tracer.config, FINGERPRINT: fingerprint_of_model(self.adapter.model)}
        warn_of_lost(traced.scores[:, traced.reached], traced.reached)
        found = Attribution(
            traced.scores, queries, candidates, method=self.name, config=config,
            stage=traced.stage, plan=traced.plan,
        )  # fmt: skip
        if traced.estimates:
            known = [background(scores, nats=found.in_nats) for scores in traced.estimates]
            found = replace(found, backgrounds=known)
        return found.keep(top_k)

    def _with_strategy(self, strategy: Literal["auto", "full", "screen"]) -> "ForwardInf":
        screen = None if strategy == "full" else self.screen
        return self.with_options(strategy=strategy, screen=screen)

    def _less_baseline(self, time_budget: float | None) -> Difference:
        if time_budget is not None:
            raise ValueError("time_budget= does not work with baseline_model=: leave out one of them.")
        assert self.baseline_model is not None
        other = self.adapter.with_model(self.baseline_model)
        return Difference(
            self.with_options(baseline_model=None), self.with_options(baseline_model=None, adapter=other)
        )

    def plan(self, queries: Dataset, candidates: Dataset) -> Plan:
        """Return what [`trace`] would do, at which cost, without doing it. Only texts and images are encoded.

        Args:
            queries (`datasets.Dataset`): As in [`trace`].
            candidates (`datasets.Dataset`): As in [`trace`].

        Raises:
            TypeError: If the screen can't trace the model.
            ValueError: As [`trace`], or if there is no screen for the model.

        Example:

            >>> print(tracer.plan(queries, candidates))
        """
        queries, candidates = read_inputs(self.adapter, queries, candidates)
        return plan_for(self, queries, candidates, self.candidate_pass(candidates))[0]

    def trace_generation(self, inputs: Any, candidates: Given, **options: Any) -> Attribution:
        """Generate the model's answers to some inputs, and trace them.

        For images that a diffusion model generates from several inputs, scores can be standardised over the queries
        ([`Attribution.standardised`]); a few unrelated captions among the inputs are enough for that.

        Args:
            inputs (`list`): Texts, or conversations (lists of messages), or one of these; for a model with a chat
                template, texts are the user's turn. For a diffusion model, classes or captions of images; `None` if
                it is unconditional.
            candidates (`datasets.Dataset`): As in [`trace`].
            **options: `top_k`, `time_budget` and `strategy` are passed to [`trace`], all others to the
                adapter's `with_answers` (such as `max_new_tokens`, or `num_images` and `seed`).

        Returns:
            `Attribution`: With the answers in its `queries`; for a language model, the generated tokens too.
        """
        traced = {name: options.pop(name) for name in TRACED if name in options}
        candidates = as_dataset(candidates, "candidates")
        asked = Dataset.from_dict(self.adapter.rows_for(inputs, candidates))
        return self.trace(self.adapter.with_answers(asked, **options), candidates, **traced)

    def trace_stream(self, queries: Dataset, stream: IterableDataset, top_k: int = 100, **options: Any) -> Attribution:
        """Score every row of a stream too large for the disk, chunk by chunk; see [`streaming.trace_stream`].

        Of a chunk, all rows are scored, whatever the strategy: floors differ from chunk to chunk.

        Args:
            queries (`datasets.Dataset`): As in [`trace`].
            stream (`datasets.IterableDataset`): Candidates.
            top_k (`int`, defaults to 100): Candidates returned for each query; no others stay on disk.
            **options: `chunk_size`, `standardise`, `folder`.
        """
        return trace_stream(self, queries, stream, top_k=top_k, **options)

    def explain(self, found: Attribution, k: int = 10) -> Attribution:
        """Return the attribution with token-level scores of its best candidates; see [`token_scores.explain`]."""
        return explain(self, found, k)

    def predict(self, found: Attribution, k: int = 10) -> Attribution:
        """Return the attribution with a classifier's predictions for its rows; see [`predictions.predict`]."""
        return predict(self, found, k)

    def self_influence(self, rows: Dataset) -> np.ndarray:
        """Compute how much each training example's loss rises when the model is moved against it (section 4.3).

        Examples that no other example supports, such as mislabelled ones, score high. Several are forwarded in one
        batch, each under its own perturbed model, so all examples together cost about a backward and two forward
        passes over them (on a CPU, for convolutional networks, 4 to 10 plain passes; more for steps that are corrected
        by curvature, or repeated). With `measure="shift"`, how far each example's own prediction moves.

        Args:
            rows (`datasets.Dataset`): Training examples, with the columns of [`trace`].

        Returns:
            `np.ndarray`: float32 `[rows]`; NaN where an example has no gradient.
        """
        return self_influence(self, as_dataset(rows, "candidates"))

    def rerank(self, found: Attribution, k: int = 100) -> Attribution:
        """Sort the best candidates of each query by score / self-influence.

        A candidate whose loss moves under any step may rank above the one that the query is a copy of. Divided by its
        self-influence ([`self_influence`]), a copy's score is about 1, and hardly any other is higher. Computes the
        self-influence of all candidates that are among the best.

        Args:
            found (`Attribution`): This attributor's, with `units="loss"`.
            k (`int`, defaults to 100): Candidates of each query to sort; all others are dropped.

        Returns:
            `Attribution`: Its scores are the quotients, `[queries, k]`; NaN, ranked last, where a candidate's
            self-influence is not above 0.

        Raises:
            ValueError: If the attribution's units are base losses.
        """
        return rerank(self, found, k)

    def save_perturbation(self, query: Mapping[str, Any], folder: str | Path, rank: int | None = None) -> float:
        """Perturb the model for a query, and save the change as an ordinary PEFT adapter.

        `PeftModel.from_pretrained(base, folder)` then computes theta_K's losses: matrices change by LoRA, and
        perturbed biases and normalisations are copied. Engines that serve LoRA alone need linear layers alone
        (`AscentConfig(modules=["*proj.weight"])`). Of a PEFT model, its own adapter is saved with perturbed weights.

        Args:
            query (`dict`): One row of the queries.
            folder (`Path`): Folder for `adapter_config.json`, `adapter_model.safetensors` and a model card.
            rank (`int`, *optional*): Maximum rank of LoRA's matrices; engines accept 64 without configuration.
                Defaults to what the change has: at most the number of the query's tokens, times steps.

        Returns:
            `float`: The share of the change's squared norm beyond this rank; 0 if the adapter is exact.

        Raises:
            FileExistsError: If the folder is not empty.
            ImportError: If peft is not installed.
            TypeError: If this is not a language model.
            ValueError: If an adapter can't hold a perturbed parameter's change, or the query's gradient is zero or not
                finite.
        """
        return save_perturbation(self, query, Path(folder), rank)
