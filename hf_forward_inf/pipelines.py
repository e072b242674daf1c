"""The transformers task "data-attribution": `pipeline("data-attribution", model=..., candidates=...)`."""

import inspect
from typing import Any, cast

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_forward_inf.forward_inf import ForwardInf

OPTIONS = inspect.signature(ForwardInf).parameters.keys() - {"model", "processor"}
"""Options of [`ForwardInf`] that the pipeline hands on."""


class DataAttributionPipeline(Pipeline):
    """Gives the training examples behind an output.

    Args:
        candidates (`datasets.Dataset`): Training examples, at the pipeline's making or at a call.
        top_k (`int`, defaults to 10): How many are given for each query.
        **options: All options of [`ForwardInf`] (`ascent`, `reduction`, `units`, ...), when the pipeline is made.

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

    def __init__(self, *args: Any, candidates: Dataset | None = None, **kwargs: Any):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        super().__init__(*args, **kwargs)
        self.candidates = candidates
        self.tracer = ForwardInf(self.model, self.tokenizer, **options)

    def _sanitize_parameters(
        self, top_k: int | None = None, candidates: Dataset | None = None, **unknown: Any
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(f"The data-attribution pipeline has no option {', '.join(unknown)}.")
        forward: dict[str, Any] = {} if candidates is None else {"candidates": candidates}
        return {}, forward if top_k is None else {**forward, "top_k": top_k}, {}

    def __call__(self, inputs: Any, *args: Any, **options: Any) -> Any:
        """Trace one output or several.

        Args:
            inputs (`str`, `dict`, or a list of them): Input texts (of a causal model: prompts), which the model
                answers, or rows with the candidates' columns, whose targets are taken as the output.
            *args: None.
            **options: `top_k`, `candidates`.

        Returns:
            `list[dict]`: The best candidates, with `rank`, `score`, `candidate` (row number) and their columns; for a
            list of inputs, a list of such lists.
        """
        several = isinstance(inputs, list | tuple)
        rows = [self.preprocess(value) for value in (inputs if several else [inputs])]
        _, forward, _ = self._sanitize_parameters(**options)
        # Together, so that what no query changes is computed once for all of them.
        answers = self.postprocess(self._forward(rows, **{**self._forward_params, **forward}))
        return answers if several else answers[0]

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> Any:
        """Make a query: what the user gave, answered by the model where it has no target."""
        adapter = self.tracer.adapter
        if isinstance(input_, dict):
            query = dict(input_)
        elif isinstance(input_, str):
            query = {adapter.columns[0]: input_}
        else:
            raise TypeError(f"A query is a text or a row (dict), not {type(input_).__name__}.")
        if adapter.columns[0] in query and adapter.columns[-1] not in query:
            query[adapter.columns[-1]] = adapter.answer({key: [value] for key, value in query.items()})[0]
        return query

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        """Trace rows that `preprocess` made."""
        top_k = forward_parameters.get("top_k", 10)
        among = forward_parameters.get("candidates", self.candidates)
        if among is None:
            raise ValueError("The data-attribution pipeline needs candidates=..., when it is made or at the call.")
        if not input_tensors:
            return {"found": [], "top_k": top_k}
        return {"found": self.tracer.trace(Dataset.from_list(input_tensors), among, top_k=top_k), "top_k": top_k}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[list[dict[str, Any]]]:
        """Give each ranking as a list of dictionaries, rank and score first."""
        found = model_outputs["found"]
        tops = [found.top(i, model_outputs["top_k"]).to_list() for i in range(len(found))]
        first = ("rank", "score", "candidate")
        return [[{**{key: row[key] for key in first}, **row} for row in top] for top in tops]


PIPELINE_REGISTRY.register_pipeline(
    "data-attribution",
    pipeline_class=DataAttributionPipeline,
    pt_model=cast(Any, (AutoModelForSeq2SeqLM, AutoModelForCausalLM)),
    type="text",
)
