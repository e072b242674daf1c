"""Options of fact tracing."""

from dataclasses import dataclass, field

from hf_forward_inf.utils.options import RunOptions


@dataclass
class FtraceOptions(RunOptions):
    """What to trace, and where the results go.

    Args:
        model (`str`, *optional*): Seq2seq or causal language model: hub name or local folder.
        candidates (`str`, *optional*): Training sentences: hub name[:config], local folder, parquet, JSON or CSV.
        queries (`str`, *optional*): Queries, in the same forms as `candidates`.
        train (`bool`, defaults to `False`): Train a tiny mT5 on the candidates instead of loading a model.
        epochs (`int`, defaults to 25): Epochs of the training.
        num_candidates (`int`, *optional*): Candidates: the queries' proponents, filled up with distractors. Defaults
            to all; 1,200 of the built-in facts.
        own_candidates (`bool`, defaults to `False`): Rank each query among its own candidates, as FTRACE does.
        num_queries (`int`, defaults to 60): Number of queries traced at most, drawn at random.
        unanswered (`bool`, defaults to `False`): Also trace as many queries that the model answers wrongly; report
            both groups separately.
        paraphrased (`bool`, defaults to `False`): Also trace each query in other words (column paraphrases); report
            them separately.
        repeats (`int`, defaults to 1): Samples of queries and candidates; figures are means over samples.
        strict (`bool`, defaults to `False`): Proponents are only candidates in which the queried object is masked.
        tokens (`bool`, defaults to `False`): Colour the tokens of the best candidates by their part of the score.
        baselines (`bool`, defaults to `True`): Also run BM25 and fixed learning rates.
        compare (`bool`, defaults to `False`): Also run every attributor.
    """

    output: str = "outputs/ftrace"
    model: str | None = None
    candidates: str | None = None
    queries: str | None = None
    train: bool = False
    epochs: int = field(default=25, metadata={"min": 1})
    num_candidates: int | None = field(default=None, metadata={"min": 1})
    own_candidates: bool = False
    num_queries: int = field(default=60, metadata={"min": 1})
    unanswered: bool = False
    paraphrased: bool = False
    repeats: int = field(default=1, metadata={"min": 1})
    strict: bool = False
    tokens: bool = False
    baselines: bool = True
    compare: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("model", "candidates", "queries") if getattr(self, name) is not None]
        if given and (self.candidates is None or self.queries is None):
            raise ValueError(f"--{given[0]} is given: give --candidates and --queries with it.")
        if given and (self.model is None) != self.train:
            raise ValueError(
                "Give either --model, trained before, or --train for a tiny one trained on the candidates."
            )
        if self.own_candidates and self.num_candidates is not None:
            raise ValueError("Give either --own_candidates, sets whose sizes FTRACE fixed, or --num_candidates.")
