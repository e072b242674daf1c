"""The transformers task "data-attribution": `pipeline("data-attribution", model=..., candidates=...)`."""

import inspect
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_forward_inf.adapters.columns import is_conversation
from hf_forward_inf.data.inputs import Given, as_dataset
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.utils.loading import classes_for

OPTIONS = inspect.signature(ForwardInf).parameters.keys() - {"model", "processor"}
"""Options that the pipeline passes to [`ForwardInf`]."""


class AutoModelForAttribution:
    """Loads a model with the head that it was saved with: another would be new, and know nothing."""

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Any:
        """Load a model, by its name on the hub or its folder."""
        loader, _ = classes_for(options.get("config") or AutoConfig.from_pretrained(name))
        return loader.from_pretrained(name, **options)


class DataAttributionPipeline(Pipeline):
    """Returns the training examples behind an output.

    Args:
        candidates (`datasets.Dataset`, *optional*): Training examples, given to the constructor or to a call;
            or what else [`data.as_dataset`] reads.
        top_k (`int`, defaults to 10): Number of candidates returned for each query.
        **options: All options of [`ForwardInf`] (`ascent`, `reduction`, `units`, ...), given to the constructor.

    Example:
        >>> pipe = pipeline("data-attribution", model=model, tokenizer=tokenizer, candidates=candidates)
        >>> pipe("The capital of France is <extra_id_0>.", top_k=3)
        [{'rank': 1, 'score': ..., 'candidate': ..., 'inputs_pretokenized': ...}, ...]
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _pipeline_calls_generate = False

    def __init__(self, *args: Any, candidates: Given | None = None, **kwargs: Any):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        super().__init__(*args, **kwargs)
        self.candidates = candidates
        self.tracer = ForwardInf(self.model, self.tokenizer, **options)

    def _sanitize_parameters(
        self, top_k: int | None = None, candidates: Given | None = None, **unknown: Any
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(f"The data-attribution pipeline has no option {', '.join(unknown)}.")
        forward: dict[str, Any] = {} if candidates is None else {"candidates": candidates}
        return {}, forward if top_k is None else {**forward, "top_k": top_k}, {}

    def __call__(self, inputs: Any, *args: Any, **options: Any) -> Any:
        """Trace one output or several.

        Args:
            inputs (`str`, `dict`, or a list): A text or a conversation (a list of messages), to which the model
                generates the output, a row that holds the output, or a list of one of these. For a model with a chat
                template, texts are the user's turn.
            *args: Ignored.
            **options: `top_k`, `candidates`.

        Returns:
            `list[dict]`: The best candidates, with `rank`, `score`, `candidate` (row number) and their columns; for a
            list of inputs, a list of such lists.
        """
        several = isinstance(inputs, list | tuple) and not is_conversation(inputs)
        if several and not inputs:
            return []
        _, forward, _ = self._sanitize_parameters(**options)
        forward = {"candidates": self.candidates, **self._forward_params, **forward}
        # In one trace: base losses, and all else that no query changes, are computed once.
        answers = self.postprocess(self._forward(self.preprocess(inputs, **forward), **forward))
        return answers if several else answers[0]

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> Any:
        """Return the inputs as query rows."""
        candidates = preprocess_parameters.get("candidates")
        given = None if candidates is None else as_dataset(candidates, "candidates")
        return Dataset.from_dict(self.tracer.adapter.rows_for(input_, given))

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        """Trace the query rows from `preprocess`."""
        top_k = forward_parameters.get("top_k", 10)
        candidates = forward_parameters.get("candidates")
        if candidates is None:
            raise ValueError("The data-attribution pipeline needs candidates=..., in the constructor or the call.")
        return {"found": self.tracer.trace(input_tensors, candidates, top_k=top_k), "top_k": top_k}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[list[dict[str, Any]]]:
        """Return each query's best candidates as a list of dictionaries, rank and score first."""
        found = model_outputs["found"]
        tops = [found.top(i, model_outputs["top_k"]).to_list() for i in range(len(found))]
        first = ("rank", "score", "candidate")
        return [[{**{key: row[key] for key in first}, **row} for row in top] for top in tops]


PIPELINE_REGISTRY.register_pipeline(
    "data-attribution",
    pipeline_class=DataAttributionPipeline,
    pt_model=AutoModelForAttribution,
    type="text",
)
