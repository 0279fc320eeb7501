"""Samples of a validation on one sheet: each before training and now, with its prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE = (192, 512)  # pixels of a sample's longer side on the sheet, at least and at most
GAP, FONT, LINES = 8, 14, 3


def contact_sheet(
    prompts: Sequence[str], before: Sequence[Image.Image] | None, now: Sequence[Image.Image], step: int
) -> Image.Image:
    """A grid with a cell per prompt: the sample before training, if it is known, the one of now, and the prompt.

    Samples lie side by side, strips of frames above each other.
    """
    wide = now[0].width > 2 * now[0].height
    cells = [[_scaled(image) for image in pair] for pair in (zip(before, now, strict=True) if before else zip(now))]
    (width, height), count = cells[0][0].size, len(cells[0])
    across, down = (1, count) if wide else (count, 1)
    cell = across * (width + GAP), down * (height + GAP)
    font = ImageFont.load_default(FONT)
    text_height = LINES * (FONT + 3)
    columns = 1 if wide else max(1, round((len(now) / across) ** 0.5))
    rows = -(-len(now) // columns)
    head = FONT + 2 * GAP
    sheet = Image.new("RGB", (columns * (cell[0] + GAP) + GAP, head + rows * (cell[1] + text_height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    order = ("above: before, below" if wide else "left: before, right") if before else "all"
    draw.text((GAP, GAP), f"{order}: step {step}", fill="black", font=font)
    for index, (prompt, pair) in enumerate(zip(prompts, cells, strict=True)):
        left = GAP + index % columns * (cell[0] + GAP)
        top = head + index // columns * (cell[1] + text_height + GAP)
        for place, image in enumerate(pair):
            x, y = (0, place) if wide else (place, 0)
            sheet.paste(image, (left + x * (width + GAP), top + y * (height + GAP)))
        draw.text((left, top + cell[1]), _fitting(prompt, cell[0], font), fill="black", font=font)
    return sheet


def _scaled(image: Image.Image) -> Image.Image:
    """Large samples smaller, and tiny ones as blocks."""
    longer = max(image.height, min(image.size) if image.width > 2 * image.height else image.width)
    if longer > SIDE[1]:
        factor = SIDE[1] / longer
        return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    factor = max(1, SIDE[0] // longer)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text in at most LINES lines of so many pixels."""
    letters = max(4, int(width / font.getlength("n")))
    return "\n".join(textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …"))
