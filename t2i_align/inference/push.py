"""Upload what a run trained to the Hub, with a model card that says what it is and how it was made."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from t2i_align import __version__
from t2i_align.errors import UserError
from t2i_align.inference.models import is_checkpoint, load_pipeline, resolve_aligned, run_of
from t2i_align.utils.files import atomic_folder

README = "README.md"


def push(
    run: str | Path, repo: str, *, private: bool = False, evaluation: str | Path | None = None,
    out: str | Path | None = None,
) -> str:  # fmt: skip
    """Upload what a run trained to the Hub as `repo`, with a model card; returns where it is.

    No path of this machine is uploaded: of the run's settings the card has the objective, the base and the numbers.

    Args:
        run: folder of a training run, or of a step of it (as in `checkpoints/`).
        repo: owner/name of the repository, which is made where it is not there.
        private: make a repository that only its owner sees.
        evaluation: folder of an evaluation of the run, whose result goes into the card.
        out: only write what would be uploaded into this new folder.

    Raises:
        UserError: no run, no such name, an `out` that exists, no access, no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError(f"it has no owner: {repo!r}")
    except HFValidationError as error:
        raise UserError(f"repo: expected owner/name; {error}") from error
    weights = resolve_aligned(run)
    settings = run_of(weights)
    if settings is None:
        raise UserError(f"{run}: not a training run or a step of one: there is no run.yaml that says how it was made")
    result = None if evaluation is None else _summary(Path(evaluation))
    card = model_card(repo, weights.kind, settings, result)
    if out is not None:
        if Path(out).expanduser().exists():
            raise UserError(f"{out}: exists already; choose another folder to write")
        with atomic_folder(Path(out).expanduser()) as folder:
            _fill(folder, Path(weights.path), card)
        return f"{out}, as it would be uploaded"
    with tempfile.TemporaryDirectory() as temporary:
        _fill(Path(temporary), Path(weights.path), card)
        try:
            api = HfApi()
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=temporary, commit_message=f"t2i-align {__version__}")
        except Exception as error:  # the Hub's and the connection's own errors
            from pipelines.hub import reason

            raise UserError(f"{repo}: could not be uploaded: {reason(repo, error)}") from error
    return str(address)


def _fill(folder: Path, weights: Path, card: str) -> None:
    if is_checkpoint(weights):  # of all weights: what resumes a run is of no use to others
        load_pipeline(weights, device="cpu").save(folder)
    elif weights.is_dir():
        shutil.copytree(weights, folder, dirs_exist_ok=True)
    else:
        shutil.copy(weights, folder / weights.name)
    (folder / README).write_text(card, encoding="utf-8")


def _summary(folder: Path) -> str:
    from t2i_align.evaluation.compare import RESULT
    from t2i_align.utils.files import read_json

    scorers = read_json(folder / RESULT)["scorers"]
    rows = ["| scorer | win rate against the base | 95 % interval | pairs |", "|---|---|---|---|"]
    for name, scores in scorers.items():
        low, high = scores["win_rate_ci"]
        share = "none" if scores["win_rate"] is None else f"{scores['win_rate']:.1%}"
        interval = "none" if low is None or high is None else f"{low:.1%} to {high:.1%}"
        rows.append(f"| {name} | {share} | {interval} | {scores['n']} |")
    return "\n".join(rows)


def model_card(repo: str, kind: str, settings: dict[str, Any], result: str | None = None) -> str:
    """The README of a repository: metadata as the Hub reads it, what it is, how to use it, how it was made."""
    from huggingface_hub import ModelCardData

    base, objective = str(settings["model"]["path"]), dict(settings["objective"])
    method = str(objective.pop("name")).rpartition(":")[2]
    on_the_hub = base.count("/") == 1 and not Path(base).expanduser().exists() and not base.startswith((".", "~", "/"))
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        library_name="diffusers",
        tags=["t2i-align", "preference-optimization", method, *(["lora"] if kind == "lora" else [])],
    )
    train, optim, lora = settings["train"], settings["optim"], settings.get("lora") or {}
    numbers = {
        "objective": " ".join([method, *(f"{key}={value}" for key, value in objective.items())]),
        "steps": train["steps"], "groups a step": train["batch_size"] * train["accumulate"],
        "learning rate": f"{optim['lr']:g}, {optim['optimizer']}, {optim['schedule']}",
        "precision": train["precision"], "seed": train["seed"],
        **({"LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}, {lora['targets']}"} if lora else {}),
    }  # fmt: skip
    shown = base if on_the_hub else Path(base).name
    language = "python"
    loaded = repo if kind == "model" else shown
    use = f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{loaded}")'
    use += f'\npipe.load_lora_weights("{repo}")' if kind == "lora" else ""
    what = {"lora": "A LoRA for", "model": "A fine-tuned"}.get(kind, f"{kind.replace('_', ' ').capitalize()} for")
    if kind in ("soft_tokens", "personal"):  # which diffusers cannot load
        language, use = "bash", f't2i-align generate {shown} --lora {repo} --prompt "a red fox" --out images'
    rows = "\n".join(f"| {name} | {value} |" for name, value in numbers.items())
    return f"""\
---
{data.to_yaml()}
---

# {repo.partition("/")[2]}

{what} {shown}, aligned with human preferences by t2i-align {__version__}.

```{language}
{use}
```

| | |
|---|---|
{rows}
{f"{chr(10)}{result}{chr(10)}" if result else ""}"""
