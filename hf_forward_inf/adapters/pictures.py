"""Pictures in rows of text: where they are, and what a processor makes of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from hf_forward_inf.adapters.columns import PICTURES, UnreadableRow, has_pictures
from hf_forward_inf.utils.images import UnreadableImage, read_image

BY_TOKEN = "tokens/"
"""Begins the names of what a processor says of every token, such as its kind."""
PIXELS = ("pixel_values", "pixel_attention_mask")
"""What vision towers read; the language model does without."""


class Picture(NamedTuple):
    """A picture as a processor hands it to the model: its tokens, what is said of each, and its other inputs."""

    ids: list[int]
    by_token: dict[str, list[int]]
    inputs: dict[str, Tensor]


def pictures_of(row: Mapping[str, Any], conversations: tuple[str, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Return a row's pictures in the order of their places, and the row without them.

    Pictures are in the columns `images` or `image`, or in the messages (`{"type": "image", "image": ...}`). Where no
    message says where those of the columns belong, they come first in the user's first turn, as TRL places them.

    Args:
        row (`dict`): A row.
        conversations (`tuple[str, ...]`): Columns that may hold messages, in the order in which they are read.

    Raises:
        UnreadableRow: If there are more pictures than places, or fewer.
    """
    given = [value for name in PICTURES if has_pictures(row.get(name)) for value in _several(row[name])]
    rest = {name: value for name, value in row.items() if name not in PICTURES}
    talks = [name for name in conversations if isinstance(row.get(name), list)]
    if not talks:
        return given, rest
    parts = {name: [_in_parts(message) for message in row[name]] for name in talks}
    asking = [message for name in talks for message in parts[name] if message.get("role") == "user"]
    if given and asking and not any(part.get("type") == "image" for part in _all_parts(parts)):
        asking[0]["content"] = [{"type": "image"}] * len(given) + list(asking[0].get("content") or [])
    places = [part for part in _all_parts(parts) if part.get("type") == "image"]
    if sum(map(_is_open, places)) != len(given):
        raise UnreadableRow(f"it has {len(given)} pictures and {sum(map(_is_open, places))} places for them")
    waiting = iter(given)
    found = [next(waiting) if _is_open(part) else part["image"] for part in places]
    return found, {**rest, **{name: [_without_pictures(message) for message in parts[name]] for name in talks}}


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _in_parts(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _all_parts(conversations: Mapping[str, list[Any]]) -> list[Mapping[str, Any]]:
    messages = [message for talk in conversations.values() for message in talk if isinstance(message, Mapping)]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part for content in contents for part in content if isinstance(part, Mapping)]


def _is_open(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" and part.get("image") is None


def _without_pictures(message: Any) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [{"type": "image"} if part.get("type") == "image" else part for part in message["content"]]
    return {**message, "content": parts}


def processed(processor: Any, token: str, value: Any) -> Picture:
    """Return what a processor makes of a picture in the place of its token.

    Raises:
        UnreadableRow: If it is no picture, or one that the processor refuses.
    """
    from PIL import ImageOps  # an extra: texts need none

    try:
        image = ImageOps.exif_transpose(read_image(value))
        made = dict(processor(text=token, images=[image], return_tensors="pt", add_special_tokens=False))
    except UnreadableImage as error:
        raise UnreadableRow(f"a picture can't be read: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise UnreadableRow(f"the processor refuses a picture ({error})") from error
    ids = made.pop("input_ids")
    made.pop("attention_mask", None)
    by_token = {name: value[0].tolist() for name, value in made.items() if value.shape == ids.shape}
    return Picture(ids[0].tolist(), by_token, {name: value for name, value in made.items() if name not in by_token})


def expanded(ids: list[int], labels: list[int], token: int, pictures: list[Picture], ignored: int) -> Any:
    """Put the tokens of pictures in the places of their tokens; they never count.

    Returns:
        `tuple`: Tokens, labels, and what is said of every token, by its name.

    Raises:
        UnreadableRow: If there are more pictures than places, or fewer.
    """
    if ids.count(token) != len(pictures):
        raise UnreadableRow(f"it has {len(pictures)} pictures and {ids.count(token)} places for them in its text")
    names = {name for picture in pictures for name in picture.by_token}
    by_token: dict[str, list[int]] = {name: [] for name in names}
    tokens: list[int] = []
    targets: list[int] = []
    waiting = iter(pictures)
    for one, label in zip(ids, labels, strict=True):
        picture = next(waiting) if one == token else Picture([one], {}, {})
        tokens += picture.ids
        targets += [ignored] * len(picture.ids) if one == token else [label]
        for name, values in by_token.items():
            values += picture.by_token.get(name, [0] * len(picture.ids))
    return tokens, targets, by_token


def stored(pictures: list[Picture], by_token: Mapping[str, list[int]]) -> bytes:
    """Return a row's inputs besides its tokens, as bytes that Arrow can hold; nothing where there is no picture."""
    if not pictures:
        return b""
    inputs = {name: padded([picture.inputs[name] for picture in pictures]) for name in pictures[0].inputs}
    kinds = {BY_TOKEN + name: torch.tensor(values) for name, values in by_token.items()}
    return save({name: value.contiguous() for name, value in {**inputs, **kinds}.items()})


def collated(rows: list[bytes], length: int) -> dict[str, Tensor]:
    """Return the inputs of a batch besides its tokens: what is said of them padded, all else one after the other.

    Args:
        rows (`list[bytes]`): From [`stored`].
        length (`int`): Tokens of the longest row.
    """
    loaded = [load(bytes(row)) if row else {} for row in rows]
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in loaded for name in row):
        if name.startswith(BY_TOKEN):
            values = torch.zeros(len(rows), length, dtype=torch.long)
            for i, row in enumerate(loaded):
                if name in row:
                    values[i, : len(row[name])] = row[name]
            batch[name.removeprefix(BY_TOKEN)] = values
        else:
            batch[name] = padded([row[name] for row in loaded if name in row])
    return batch


def padded(parts: list[Tensor]) -> Tensor:
    """Put tensors one after the other, padded with zeros to a common size."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    room = [[largest[axis] - size for axis, size in enumerate(part.shape[1:])] for part in parts]
    return torch.cat([F.pad(part, [n for extra in reversed(rest) for n in (0, extra)])
                      for part, rest in zip(parts, room, strict=True)])  # fmt: skip
