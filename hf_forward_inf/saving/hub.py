"""A result on the hub: a dataset whose viewer shows the best rows of each query, with a card."""

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, snapshot_download

from hf_forward_inf.report.lines import Line, classes_of, lines
from hf_forward_inf.report.texts import shortened
from hf_forward_inf.saving.folder import ABOUT, about, arguments, scores, tables
from hf_forward_inf.scores.levels import RULE
from hf_forward_inf.utils.fingerprints import FINGERPRINT
from hf_forward_inf.utils.processes import progress_bars

TABLE = "attribution"
"""The table that the viewer shows."""
CARD = Path(__file__).with_name("card.md")
SHOWN = 5
"""Queries in the card."""


def push(
    found: Any, repo_id: str, k: int = 10, *, private: bool | None = None, token: Any = None, **options: Any
) -> str:
    """Upload a result to a dataset of the hub, which is made if need be.

    Args:
        found (`Attribution`): The result. All columns of its queries and candidates are uploaded; where only the best
            were kept, of these candidates alone.
        repo_id (`str`): Such as `"me/why-lima"`.
        k (`int`, defaults to 10): Candidates of each query in the table that the viewer shows.
        private (`bool`, *optional*): Whether a new dataset is private. Defaults to the owner's setting.
        token (`str`, *optional*): Defaults to the one that is logged in.
        **options: `commit_message`, `revision`, `create_pr` of `HfApi.upload_folder`.

    Returns:
        `str`: The dataset's address.
    """
    hub = HfApi(token=token)
    address = hub.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        write(found, Path(folder), repo_id, k)
        options.setdefault("commit_message", "Upload an attribution")
        hub.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, **options)
    return str(address)


def write(found: Any, folder: Path, repo_id: str, k: int = 10) -> None:
    """Write the files that [`push`] uploads: parquet, JSON and the card."""
    compact = found.compact()
    parts = {TABLE: shown(found, k), **tables(compact), "scores": scores(compact)}
    written = [name for name, rows in parts.items() if rows is not None]
    with progress_bars(False):
        for name in written:
            _embedded(parts[name]).to_parquet(folder / f"{name}.parquet")
    (folder / ABOUT).write_text(about(compact))
    card(found, repo_id, written, k).save(folder / "README.md")


def _embedded(rows: Dataset) -> Dataset:
    """Return rows with the pictures that they name as files."""
    if "Image(" not in str(rows.features):
        return rows
    inside = rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True)
    return inside.with_format(None)


def shown(found: Any, k: int) -> Dataset:
    """Return the table that the viewer shows: `query`, `rank`, `score`, `level`, `row` and the texts of both."""
    best = found.to_dataset(k)
    asked = [line.text for line in lines(found.queries, classes_of(found.candidates))]
    texts = [line.text for i in range(len(found)) for line in lines(found.top(i, k))]
    order = ["query", "rank", "score", "level", "row", "asked", "text"]
    best = best.rename_column("candidate", "row").add_column("asked", [asked[i] for i in best["query"]])
    return best.add_column("text", texts).select_columns(order)


def card(found: Any, repo_id: str, written: list[str], k: int) -> DatasetCard:
    """Return the card: the result, the settings, and how to load it."""
    configs = [
        {"config_name": name, "data_files": f"{name}.parquet", **({"default": True} if name == TABLE else {})}
        for name in written
    ]
    metadata = DatasetCardData(
        pretty_name=f"Attribution by {found.method}",
        tags=["data-attribution", "hf-forward-inf"],
        configs=configs,
    )
    queries = [_query(found, i) for i in range(min(SHOWN, len(found)))]
    return DatasetCard.from_template(
        metadata, template_path=str(CARD), repo_id=repo_id, found=found, queries=queries, k=k, rule=RULE,
        settings={name: value for name, value in found.config.items() if value is not None and name != FINGERPRINT},
        version=version("hf-forward-inf"),
    )  # fmt: skip


def _query(found: Any, i: int) -> dict[str, Any]:
    query = lines(found.queries.select([i]), classes_of(found.candidates))[0]
    rows = [{**line.row, "text": _cell(line)} for line in lines(found.top(i, 3))]
    return {"text": _cell(query), "verdict": found.verdict(i), "rows": rows}


def _cell(line: Line) -> str:
    """Return a row's text for a cell of a Markdown table: nothing in it is markup."""
    text = shortened(line.text, 120)
    return "".join(f"\\{one}" if one in r"\`*_{}[]<>()#+-.!|~" else one for one in text)


def load(repo_id: str, *, revision: str | None = None, token: Any = None) -> dict[str, Any]:
    """Download what [`push`] has uploaded, and return the arguments of the [`Attribution`].

    Raises:
        FileNotFoundError: If the dataset holds no attribution.
        ValueError: If a newer version of the library saved it.
    """
    folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token))
    if not (folder / ABOUT).exists():
        raise FileNotFoundError(f"{repo_id} holds no attribution: there is no {ABOUT} in it.")
    with progress_bars(False):
        saved = {path.stem: Dataset.from_parquet(str(path)) for path in folder.glob("*.parquet") if path.stem != TABLE}
    return arguments((folder / ABOUT).read_text(), saved, repo_id)
