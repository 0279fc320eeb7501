"""`t2i-align data split`: a held-out part of a source, by prompt or user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from t2i_align.data import hub, readers, spec
from t2i_align.data.opening import Survey
from t2i_align.data.schema import Skipped
from t2i_align.data.spec import By, Part
from t2i_align.errors import UserError
from t2i_align.utils.files import check_own, mark, write_files
from t2i_align.utils.settings import read_yaml

COMMAND = "data split"
SIDES, PROMPTS = ("train", "held_out"), "held_out_prompts.txt"


def split(
    source: str | Path,
    out: str | Path,
    *,
    held_out: float = 0.1,
    by: Sequence[By] = ("prompt",),
    seed: int = 0,
    format: str = "auto",
) -> dict[str, int]:
    """Write `train.yaml`, `held_out.yaml` and `held_out_prompts.txt`; returns how many groups and prompts are in each.

    No group is copied: the files say by which rule a group belongs to them (`spec.Part`).

    Args:
        source: preference data: file, folder, dataset spec, `hub:owner/name`, or `testbed:pairs`.
        out: folder to write them to.
        held_out: share of prompts or users that is held out.
        by: what is kept apart: `prompt`, `user` or both.
        seed: selects which are held out.
        format: format of the source; `auto` detects it.

    Raises:
        UserError: a source that cannot be read, is a part already, or leaves one side empty; or files with these names
            that this did not write, or wrote with other settings: a run may be using them.
    """
    folder = Path(out).expanduser()
    check_own(COMMAND, *(folder / f"{name}.yaml" for name in SIDES), folder / PROMPTS)
    path = readers.resolve(source).absolute()
    values: dict[str, Any] = {"path": str(path), "format": readers.detect(path, format)}
    if spec.is_spec(path):
        described, file = spec.load(path)
        if described.part:
            raise UserError(f"{source}: this is one part of a split already; split what it describes")
        values = read_yaml(path)
        if not described.path.startswith(hub.PREFIX):
            values["path"] = str(file)
    part = {"held_out": held_out, "by": list(by), "seed": seed}
    sides = {name: Part(of=name, **part) for name in SIDES}  # type: ignore[arg-type]
    texts = {}
    for name in sides:
        text = yaml.safe_dump({**values, "part": {"of": name, **part}}, sort_keys=False, allow_unicode=True)
        texts[f"{name}.yaml"] = f"# {mark(COMMAND)}\n{text}"
        there = folder / f"{name}.yaml"
        if there.exists() and there.read_text(encoding="utf-8") != texts[there.name]:
            raise UserError(f"{there}: this split was made with other settings; choose another folder for `out`")
    counts = dict.fromkeys([*sides, "on_neither_side", "skipped"], 0)
    survey = Survey()
    prompts: dict[str, None] = {}
    for item in readers.read(path, format, images=False):
        survey.add(item)
        if isinstance(item, Skipped):
            counts["skipped"] += 1
            continue
        belongs = {name: side.belongs(item) for name, side in sides.items()}
        counts[next((name for name, on in belongs.items() if on), "on_neither_side")] += 1
        if belongs["held_out"]:
            prompts[" ".join(item.prompt.split())] = None
    survey.check_usable(source)
    if empty := [name for name in sides if not counts[name]]:
        choice = f"held_out={held_out:g} and seed={seed}"
        skipped = f" Skipped rows: {counts['skipped']}, such as {survey.reasons[0]}" if survey.reasons else ""
        raise UserError(f"{source}: with {choice}, {empty[0]} is empty; choose others.{skipped}")
    write_files(folder, {**texts, PROMPTS: "".join(f"{text}\n" for text in prompts)})
    return {**counts, "held_out_prompts": len(prompts)}
