"""The preview picture: a query's card, in the size that sites show of a page that is linked to."""

from pathlib import Path
from typing import Any

from hf_forward_inf.report.queries import Query
from hf_forward_inf.report.texts import shortened

SIZE = (1200, 630)
INK, SOFT, BACK, CARD, ANSWER = "#1c2530", "#586573", "#ffffff", "#f2f5f8", "#fdeeb3"
LEVELS = {"strong": "#0a6b44", "some": "#9a6200"}
MARGIN = 56
ROWS = 3
"""Rows in the picture."""


def write_preview(path: str | Path, query: Query, title: str, total: int) -> None:
    """Draw a query's answer, its verdict and its best rows as a PNG of 1200 x 630 pixels.

    Args:
        path (`Path`): The file to write.
        query (`Query`): The query.
        title (`str`): The page's question.
        total (`int`): Number of candidates that were traced.

    Raises:
        ImportError: If pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError("A preview picture needs pillow: pip install 'hf-forward-inf[diffusion]'.") from error
    image = Image.new("RGB", SIZE, BACK)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 40), title, fill=SOFT, font=_font(30))
    top = _paragraph(draw, query.title, 92, 50, 2, back=ANSWER if query.view.answer else None)
    ranking = query.rankings[0]
    top = _paragraph(draw, ranking.verdict, top + 14, 28, 2)
    for row in ranking.rows[:ROWS]:
        top = _row(draw, row, top + 16)
        if top > SIZE[1] - 110:
            break
    draw.text((MARGIN, SIZE[1] - 48), f"hf_forward_inf: {total:,} training examples", fill=SOFT, font=_font(22))
    image.save(path, format="PNG")


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _paragraph(draw: Any, text: str, top: float, size: int, most: int, back: str | None = None) -> float:
    """Draw a text in at most so many lines; return where the next may begin."""
    font = _font(size)
    for line in _lines(draw, text, font, SIZE[0] - 2 * MARGIN, most):
        if back:
            box = draw.textbbox((MARGIN, top), line, font=font)
            draw.rounded_rectangle((box[0] - 8, box[1] - 6, box[2] + 8, box[3] + 6), 8, fill=back)
        draw.text((MARGIN, top), line, fill=INK, font=font)
        top += size * 1.35
    return top


def _row(draw: Any, row: Any, top: float) -> float:
    """Draw a training row; return where the next may begin."""
    draw.rounded_rectangle((MARGIN, top, SIZE[0] - MARGIN, top + 78), 10, fill=CARD)
    draw.rectangle((MARGIN, top + 8, MARGIN + 7, top + 70), fill=LEVELS.get(row.level, SOFT))
    source = f" · {row.source}" if row.source else ""
    head = f"{row.rank}.  {row.score:.4g}  {row.level}   row {row.candidate}{source}"
    draw.text((MARGIN + 24, top + 8), head, fill=LEVELS.get(row.level, SOFT), font=_font(21))
    font = _font(27)
    for line in _lines(draw, row.text or row.alt, font, SIZE[0] - 2 * MARGIN - 48, 1):
        draw.text((MARGIN + 24, top + 38), line, fill=INK, font=font)
    return top + 78


def _lines(draw: Any, text: str, font: Any, width: float, most: int) -> list[str]:
    """Break a text into lines of a width; the last one ends in an ellipsis if there is more."""
    lines, width = [""], width - draw.textlength(" …", font=font)
    for word in shortened(text, 400).split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] = f"{lines[-1]} …"
            break
        else:
            lines.append(word)
    return [line for line in lines if line]
