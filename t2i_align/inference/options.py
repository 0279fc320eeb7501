"""What commands have in common, resolved or refused before anything is loaded: prompts, scorers, device, numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t2i_align.data import tables
from t2i_align.data.schema import Skipped
from t2i_align.errors import UserError, unknown
from t2i_align.plugins import find_scorer
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.parsing import parse_json

if TYPE_CHECKING:
    from reward_scorers import Scorer

TESTBED = "testbed:"
HPSV2 = "hpsv2:"
NO_PROMPTS = (".yaml", ".yml", ".toml", ".xml", ".html")  # endings of text files whose lines are no prompts
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark, 800 prompts each (arXiv 2306.09341)
# Of frozen weights. `tf32` is float32 whose matrix products NVIDIA GPUs since Ampere round, several times faster.
PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


def resolve_prompts(source: str | Path | Sequence[str]) -> list[str]:
    """Prompts from a file, `testbed:dev`, `hpsv2:photo`, or a list.

    A file is UTF-8 text with one prompt per line (blank lines are skipped); or JSON Lines, a .json list, a .csv, a .tsv
    a parquet or an Excel file: of its objects or columns the first of `tables.PROMPT_KEYS`, in any case.

    Raises:
        UserError: no such file, split or style, of another kind, no prompt in it, or an empty one.
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
        prompts = _hpsv2_prompts(str(source).removeprefix(HPSV2))
    else:
        file = Path(source).expanduser()
        if not file.is_file():
            raise UserError(
                f"{source}: no such prompt file (one prompt per line; to give prompts directly, use a list)"
            )
        prompts = [_prompt(entry, origin) for origin, entry in _entries(file)]
    if not prompts:
        raise UserError(f"{source if isinstance(source, str | Path) else 'prompts'}: no prompt in it")
    return prompts


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """What a prompt file holds: texts, or mappings with a prompt among their values; and how messages name each."""
    kind = file.suffix.lower()
    if kind in tables.WITH_HEADER:
        for row in tables.rows(file):
            if isinstance(row, Skipped):
                raise UserError(f"{row.origin}: {row.reason}")
            yield row.origin, row.values
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
    if kind in NO_PROMPTS:
        raise UserError(f"{file}: expected a text file, .jsonl, .json, .csv, .tsv or .parquet with prompts")
    if kind == ".json":
        with suppress(ValueError, RecursionError):  # JSON Lines, as `Dataset.to_json` writes it
            value = json.loads(text)
            entries = value if isinstance(value, list) else [value]
            yield from ((f"{file}, entry {number}", entry) for number, entry in enumerate(entries))
            return
    lines = text.split("\n")  # other separators are part of a prompt
    as_json = kind in (".json", ".jsonl", ".ndjson") or lines[0].lstrip().startswith('{"')
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{file}, line {number}"
            yield origin, parse_json(line, origin) if as_json else line


def _prompt(entry: Any, origin: str) -> str:
    if isinstance(entry, Mapping):
        names = {str(name).strip().lower(): name for name in entry}
        if not (known := [names[key] for key in tables.PROMPT_KEYS if key in names]):
            raise UserError(
                f"{origin}: expected one of {', '.join(map(repr, tables.PROMPT_KEYS))}, found {_found(entry)}"
            )
        entry = entry[known[0]]
    if not isinstance(entry, str) or not entry.strip():
        raise UserError(f"{origin}: expected a prompt, found {_found(entry)}")
    return entry.strip()


def _found(value: Any) -> str:
    """How messages show what stands where prompts were expected."""
    return f"the keys {', '.join(map(repr, value))}" if isinstance(value, Mapping) else repr(value)


def _hpsv2_prompts(style: str) -> list[str]:
    """A style of HPSv2's benchmark, from where its own package fetches it."""
    from huggingface_hub import hf_hub_download

    if style not in STYLES:
        raise unknown("style", style, STYLES)
    try:
        file = hf_hub_download("zhwang/HPDv2", f"{style}.json", subfolder="benchmark", repo_type="dataset")
    except Exception as error:  # no connection, no access: the Hub's own exceptions
        raise UserError(f"{HPSV2}{style}: could not be fetched: {first_line(error)}") from error
    return list(json.loads(Path(file).read_text(encoding="utf-8")))


def bundled(find: Callable[[Any], Any], spec: str) -> Any:
    """What `find` returns for the name in a spec `testbed:name`; UserError if there is none."""
    try:
        return find(spec.removeprefix(TESTBED))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{spec}: {error}") from error


def build_scorers(specs: str | Sequence[str | Scorer]) -> list[Scorer]:
    """Scorers from their specs, each name checked before the first is built; the testbed's oracles are among them.

    Raises:
        UserError: none given, an unknown name, weights that cannot be used, or two scorers of one name.
    """
    import reward_scorers
    import t2i_align.testbed.scorer  # noqa: F401  (registers `oracle` and the like)
    from reward_scorers.registry import FINDERS

    if find_scorer not in FINDERS:
        FINDERS.append(find_scorer)
    given: list[Any] = [specs] if isinstance(specs, str | reward_scorers.Scorer) else list(specs)
    if not given:
        raise UserError(f"scorers: none given. Choices: {', '.join(reward_scorers.names())}.")
    try:
        return reward_scorers.build_all(given)
    except reward_scorers.ScorerError as error:
        raise UserError(str(error)) from error


def unscorable(scorers: Sequence[Scorer], prompt: str) -> str:
    """Reason a prompt cannot be scored, or ""."""
    from reward_scorers import ScorerError

    try:
        for scorer in scorers:
            scorer.check_prompts([prompt])
    except ScorerError as error:
        return str(error)
    return ""


def use_precision(precision: str) -> torch.dtype | None:
    """Let matrix products round as `precision` has it; the dtype of its autocast, None for float32."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return None if PRECISIONS[precision] == torch.float32 else PRECISIONS[precision]


def cpu_computes_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16; others compute these slower than in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_options(precision: str = "fp32", fps: float | None = None, **counts: int | None) -> None:
    """Raise UserError for an unknown precision, an impossible rate, or a number below 1; None is a default."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"fps must be a number of frames a second above 0, found {fps!r}")
    for key, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{key} must be a whole number of at least 1, found {value!r}")


def pick_device(name: str | None) -> str:
    """The device of this name, or for None the GPU if there is one, of several processes this one's.

    Raises:
        UserError: no such device in this machine.
    """
    if name is None:
        return Distributed().device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no device name; torch built without it; no such number
        raise UserError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return name


@contextmanager
def memory_for(batch_size: int) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one that names the option to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"CUDA out of memory at batch size {batch_size}; lower batch_size (--batch-size)") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return str(error).strip().partition("\n")[0]
