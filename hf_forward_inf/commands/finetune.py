"""The run of `finetune`: train a causal model, trace its answers, train it again without what was found."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from transformers import Trainer, TrainingArguments

from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.commands.options import FinetuneOptions, TrainingOptions
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import load_rows, proponents
from hf_forward_inf.data.questions import builtin_questions
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.tables import as_text, compare, flat
from hf_forward_inf.evaluation.task import MAIN, Task, has_facts
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.toys.tiny_models import train_tokenizer, untrained_llama
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.processes import process_state, say
from hf_forward_inf.utils.rows import sample_rows
from hf_forward_inf.utils.storage import default_cache_dir, write_folder

RATES = {"whole": 2e-3, "model": 5e-5, "lora": 1e-2}
"""Learning rates: of a tiny model from the start, of a model that is given, and of LoRA weights."""
COMPARED = ("tracin_cosine", "trackstar", "bm25", "bm25_without_answer")
"""Attributors that are compared with."""


class Finetuning:
    """Trains a model on rows, or loads it if that was done before.

    Args:
        options (`TrainingOptions`): Base model, LoRA, epochs.
        rows (`datasets.Dataset`): All training examples.
        seed (`int`): Order of batches and initial weights.
    """

    def __init__(self, options: TrainingOptions, rows: Dataset, seed: int):
        self.options, self.seed = options, seed
        if options.model:
            self.base, self.tokenizer = load_model(options.model)
        else:
            self.tokenizer = train_tokenizer([*rows["prompt"], *rows["completion"]], 4096)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.base = untrained_llama(len(self.tokenizer)).to(process_state().device)
            if options.lora:  # LoRA needs a model that knows something
                self.base = self._trained(self.base, rows.filter(lambda row: not row["planted"]), RATES["whole"])
        self.adapter = CausalLMAdapter(self.base, self.tokenizer)

    def __call__(self, rows: Dataset) -> CausalLMAdapter:
        """Fine-tune the base model on some rows."""
        rate = self.options.training_rate
        if self.options.lora:
            try:
                from peft import LoraConfig, get_peft_model
            except ImportError as error:
                raise ImportError("--lora needs the extra `peft`: pip install 'hf-forward-inf[peft]'.") from error
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear")
                model = get_peft_model(copy.deepcopy(self.base), lora)
            return self.adapter.with_model(self._trained(model, rows, rate or RATES["lora"]))
        rate = rate or RATES["model" if self.options.model else "whole"]
        return self.adapter.with_model(self._trained(copy.deepcopy(self.base), rows, rate))

    def _trained(self, model: Any, rows: Dataset, rate: float) -> Any:
        """Train with transformers' Trainer; weights are cached under a fingerprint of all that they depend on."""
        adapter = CausalLMAdapter(model, self.tokenizer)
        options, state = self.options, process_state()
        encoded = encode(adapter, rows, "candidates")
        recipe = (options.epochs, options.batch_size, rate, self.seed)
        key = fingerprint(fingerprint_of_model(model), adapter.cache_key, encoded._fingerprint, recipe)
        folder = default_cache_dir() / "models" / key
        if not folder.exists():
            with tempfile.TemporaryDirectory() as scratch:
                Trainer(
                    model,
                    TrainingArguments(
                        scratch, num_train_epochs=options.epochs, learning_rate=rate,
                        per_device_train_batch_size=options.batch_size, lr_scheduler_type="cosine", warmup_steps=0.05,
                        weight_decay=0.01, save_strategy="no", logging_strategy="no", report_to=[], seed=self.seed,
                        use_cpu=state.device.type == "cpu", dataloader_pin_memory=False, remove_unused_columns=False,
                    ),
                    train_dataset=encoded,
                    data_collator=lambda rows: adapter.collate({key: [row[key] for row in rows] for key in rows[0]}),
                ).train()  # fmt: skip
            if state.is_main_process:
                write_folder(folder, lambda part: [one.save_pretrained(part) for one in (model, self.tokenizer)])
            state.wait_for_everyone()
        return _loaded(model, folder).to(state.device).eval()


def _loaded(model: Any, folder: Path) -> Any:
    """Load trained weights, of a PEFT model into the base that it was made of."""
    if not hasattr(model, "peft_config"):
        return type(model).from_pretrained(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(model.unload(), str(folder))


def finetune_run(options: FinetuneOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    Where it is known which examples are wrong (columns `facts` and `planted`), the answers that repeat a planted one
    are traced, and right answers reported as `right/...`; then the best candidates of the wrong answers are removed,
    and `wrong_gone` is the share of them that the model no longer gives after training again, `random/wrong_gone` the
    same after removing as many random rows.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
        ValueError: If no answer repeats what it was taught.
    """
    run = Run(options)
    train, queries = load_data(options)
    finetuning = Finetuning(options, train, options.seed)
    adapter = finetuning(train)
    task, figures = _task(adapter, train, queries)
    if options.contrast:
        task = replace(task, queries=against_right(task.queries))
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    found = {"forward_inf": tracer.trace(task.queries, train)}
    if task.proponents is not None:
        found |= {name: one.trace(task.queries, train) for name, one in attributors_for(tracer, COMPARED).items()}
    table = compare(found, task)
    metrics: dict[str, Any] = {**figures, "queries": len(task.queries), "candidates": len(train)}
    metrics |= flat(table)
    if table:
        say(as_text(table, {}))
    if task.proponents is not None and options.removed:
        metrics |= _without(finetuning, train, task, found["forward_inf"].ranking, options.removed)
    metrics |= cost.measure(tracer, task.queries, train)
    shown = tracer.explain(found["forward_inf"].keep(options.top_k))
    written = run.write(shown, metrics, tracer, table=table, proponents=task.proponents)
    return {**written, "answers": run.answer(shown)}


def load_data(options: TrainingOptions) -> tuple[Dataset, Dataset]:
    """Load training rows and queries, the built-in ones by default."""
    if options.model:
        say(f"Fine-tuning {options.model} on {options.candidates}, tracing its answers to {options.queries}.")
        return load_rows(str(options.candidates), "abstracts"), load_rows(str(options.queries), "queries")
    say("A tiny Llama learns built-in facts, some of them wrong; --model, --candidates, --queries for yours.")
    corpus = builtin_questions()
    return corpus["train"], corpus["queries"]


def _task(adapter: CausalLMAdapter, train: Dataset, queries: Dataset) -> tuple[Task, dict[str, float]]:
    """Return what is traced: the planted and right answers that the model gives, or all its answers, and figures."""
    if "planted" not in queries.column_names or not has_facts(queries, train):
        asked = queries.remove_columns([n for n in ("completion", "output_ids") if n in queries.column_names])
        return Task(adapter.with_answers(asked), train), {}
    answers = adapter.answer(queries[:])
    given = np.array([a.strip() == t.strip() for a, t in zip(answers, queries["completion"], strict=True)])
    planted = np.array(queries["planted"], dtype=bool)
    figures = {"wrong_answers": float(given[planted].mean()), "right_answers": float(given[~planted].mean())}
    say(f"The model repeats {given[planted].sum()} of {planted.sum()} planted answers, and {given[~planted].sum()} of "
        f"{(~planted).sum()} right ones.")  # fmt: skip
    if not given[planted].any():
        raise ValueError("The model repeats none of the planted answers: train it for more epochs (--epochs).")
    wrong, right = (np.flatnonzero(given & kind) for kind in (planted, ~planted))
    asked = queries.select([*wrong, *right])
    groups = {MAIN: list(range(len(wrong)))}
    if len(right):
        groups["right"] = list(range(len(wrong), len(asked)))
    return Task(asked, train, proponents(asked, train), groups), figures


def against_right(queries: Dataset) -> Dataset:
    """Return the queries with a column `contrast`: the right answer (`right`) where they give another, else `None`.

    Raises:
        ValueError: If it is not known which answers are right.
    """
    if "right" not in queries.column_names:
        raise ValueError("--contrast needs queries with a column `right`: what should have been answered.")
    pairs = zip(queries["completion"], queries["right"], strict=True)
    contrasts = [None if right is None or said.strip() == right.strip() else right for said, right in pairs]
    others = queries.remove_columns([name for name in ("contrast",) if name in queries.column_names])
    return others.add_column("contrast", contrasts, feature=Value("string"))


def _without(finetuning: Finetuning, train: Dataset, task: Task, ranking: Any, count: int) -> dict[str, float]:
    """Train again without the best candidates of the wrong answers, and without as many random rows."""
    wrong = task.queries.select(task.main)
    found = sorted({int(row) for i in task.main for row in ranking(i)[:count]})
    drawn = sample_rows(Dataset.from_dict({"row": list(range(len(train)))}), len(found), finetuning.seed)["row"]
    figures: dict[str, float] = {"removed": len(found)}
    for name, rows in {"": found, "random/": drawn}.items():
        say(f"Training again without {len(rows)} {'random rows' if name else 'found rows'} ...")
        adapter = finetuning(train.select(sorted(set(range(len(train))) - set(rows))))
        now = np.array([answer.strip() for answer in adapter.answer(wrong[:])])
        planted, right = (np.array([text.strip() for text in wrong[column]]) for column in ("completion", "right"))
        figures[f"{name}wrong_gone"] = float(np.mean(now != planted))
        figures[f"{name}wrong_righted"] = float(np.mean(now == right))
    say(f"Wrong answers gone: {figures['wrong_gone']:.0%}, now right: {figures['wrong_righted']:.0%}; without random "
        f"rows {figures['random/wrong_gone']:.0%} and {figures['random/wrong_righted']:.0%}.")  # fmt: skip
    return figures
