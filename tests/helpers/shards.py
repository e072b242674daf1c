"""Webdataset shards, as img2dataset writes them."""

import io
import json
import tarfile

from tests.helpers.drawing import rows, square


def encoded(i, format="JPEG"):
    file = io.BytesIO()
    square(i).save(file, format=format)
    return file.getvalue()


def write_shard(path, examples):
    """Write a `.tar`; an example is its name, and bytes, a text or a dictionary by ending."""
    with tarfile.open(path, "w") as tar:
        for name, files in examples:
            for ending, content in files.items():
                content = json.dumps(content) if isinstance(content, dict) else content
                content = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_shards(folder, count, per_shard=4):
    """Write [`drawing.rows`] as shards of PNG files with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = rows(count)["caption"][:]
    examples = [(f"{i:09}", {"png": encoded(i, "PNG"), "txt": captions[i]}) for i in range(count)]
    for shard, start in enumerate(range(0, count, per_shard)):
        write_shard(folder / f"{shard:05}.tar", examples[start : start + per_shard])
    return folder
