"""Resolve user-supplied prompts: a text file, a list, or a bundled or published set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t2i_align.errors import UserError, unknown
from t2i_align.inference.options import first_line

TESTBED = "testbed:"
HPSV2 = "hpsv2:"
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark, 800 prompts each (arXiv 2306.09341)


def resolve_prompts(source: str | Path | Sequence[str]) -> list[str]:
    """Prompts from a text file (UTF-8, one per line, blank lines skipped), `testbed:dev`, `hpsv2:photo`, or a list.

    Raises:
        UserError: no such file, split or style, not text, no prompt in it, or an empty one in a list.
    """
    if not isinstance(source, str | Path):
        prompts = list(source)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"prompts[{row}]: expected text, found {prompt!r}")
    elif str(source).startswith(TESTBED):
        from t2i_align.testbed.world import prompts as testbed_prompts

        prompts = list(bundled(testbed_prompts, str(source)))
    elif str(source).startswith(HPSV2):
        prompts = _benchmark(str(source).removeprefix(HPSV2))
    else:
        prompts = _lines(source)
    if not prompts:
        raise UserError(f"{source if isinstance(source, str | Path) else 'prompts'}: no prompt in it")
    return prompts


def bundled(find: Callable[[Any], Any], spec: str) -> Any:
    """What `find` returns for the name in a spec `testbed:name`; UserError if there is none."""
    try:
        return find(spec.removeprefix(TESTBED))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{spec}: {error}") from error


def _lines(source: str | Path) -> list[str]:
    file = Path(source).expanduser()
    if not file.is_file():
        raise UserError(f"{source}: no such prompt file (one prompt per line; to give prompts directly, use a list)")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # other separators are part of a prompt
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text (byte {error.start})") from error
    return [line.strip() for line in lines if line.strip()]


def _benchmark(style: str) -> list[str]:
    """A style of HPSv2's benchmark, from where its own package fetches it."""
    from huggingface_hub import hf_hub_download

    if style not in STYLES:
        raise unknown("style", style, STYLES)
    try:
        file = hf_hub_download("zhwang/HPDv2", f"{style}.json", subfolder="benchmark", repo_type="dataset")
    except Exception as error:  # no connection, no access: the Hub's own exceptions
        raise UserError(f"{HPSV2}{style}: could not be fetched: {first_line(error)}") from error
    return list(json.loads(Path(file).read_text(encoding="utf-8")))
