"""Images or clips from a model: PNG or MP4 files, and a list of their prompts, seeds and settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from t2i_align.data.media import save_clip, to_bytes
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_base, with_base
from t2i_align.inference.options import check_options, memory_for, resolve_prompts, use_precision
from t2i_align.inference.users import resolve_user, user_on
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.files import append_line, atomic_file, output_lock, whole_lines
from t2i_align.utils.logging import silent
from t2i_align.utils.progress import progress_bar
from t2i_align.utils.whole import is_whole

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from reward_scorers import Scorer

TOTAL = ""  # the key of a score itself, beside the names of its parts
LIST, PART = "samples.jsonl", ".part-"
ClipFormat = Literal["mp4", "webm", "gif", "webp", "frames"]
ENDINGS = (".png", *(f".{kind}" for kind in get_args(ClipFormat) if kind != "frames"), "")
NAME = re.compile(rf"\d{{5,}}({'|'.join(map(re.escape, ENDINGS))})")
FRAME = re.compile(r"\d{5,}\.png")
Sample = Image.Image | Tensor  # an image, or a clip [F, 3, H, W] of 8 bits


def sample_seed(seed: int, prompt: int, k: int) -> int:
    """The seed of the k-th image of the prompt at this index, 32 bits; both sides of a comparison share it."""
    return stable_seed(seed, prompt, k) % 2**32


def sample(
    pipeline: TrainablePipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int | None = None,
    **options: Any,
) -> list[Any]:
    """A `Sample` per prompt and seed, 8 bits as it would be saved; a clip of one frame is an image.

    `options` are those of `TrainablePipeline.generate`.

    Raises:
        UserError: the batch does not fit into the GPU's memory.
    """
    batch_size = batch_size or pipeline.sampling()[2]
    with memory_for(batch_size):
        samples = to_bytes(pipeline.generate(prompts, seeds, batch_size=batch_size, **options))
    if samples.ndim == 5 and samples.shape[1] > 1:
        return list(samples)
    return [to_pil_image(image) for image in samples.flatten(0, -4)]


def judge(scorer: Scorer, samples: Sequence[Sample], prompts: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
    """The index of each sample, with its score under TOTAL and the parts of that under their names.

    All images are judged together, and each clip alone.
    """
    stills = [index for index, item in enumerate(samples) if not isinstance(item, Tensor)]
    clips = [[index] for index, item in enumerate(samples) if isinstance(item, Tensor)]
    for indices in [stills, *clips] if stills else clips:
        part: list[Any] = [samples[index] for index in indices]
        media = part[0].unsqueeze(0).float() / 255 if isinstance(part[0], Tensor) else part
        with torch.no_grad():
            total, parts = scorer.judge(media, [prompts[index] for index in indices])
        columns = {name: values.tolist() for name, values in {TOTAL: total, **parts}.items()}
        for place, index in enumerate(indices):
            yield index, {name: values[place] for name, values in columns.items()}


@silent
def generate(
    model: str | Path | TrainablePipeline,
    prompts: str | Path | Sequence[str] | None = None,
    out: str | Path | None = "images",
    *,
    prompt: Sequence[str] = (),
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    user: str | Path | None = None,
    users: str | Mapping[str, float] | None = None,
    user_scale: float = 1.0,
    per_prompt: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    format: ClipFormat = "mp4",
    batch_size: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    expert: str | None = None,
    prediction_type: str | None = None,
    segments: int | None = None,
    precision: str = "fp32",
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Any:
    """Write `00000.png` … and `samples.jsonl` (one line per image) to the folder `out`; returns the list's path.

    With `out=None` nothing is written, and the images are returned: PIL images, or clips [F, 3, H, W] of 8 bits.

    Models that make clips write `00000.mp4` … or another `format`. Each file is complete before its line is written,
    so an interrupted run leaves a usable shorter list. Under torchrun the processes share the batches, each in a hidden
    folder of its own, and the first one joins them at the end; as many have to continue an interrupted run.

    Args:
        model: diffusers folder, single file, Hub id, `testbed:sd`, a loaded pipeline, or the folder of a training run
            or of a step of it, for its base with what it trains.
        prompts: text file with one prompt per line; .jsonl, .json, .csv, .tsv or .parquet with `prompt`, `caption` or
            `text` in each row; `testbed:test`; or a list.
        out: folder for the samples and their list.
        prompt: further single prompts, after those.
        lora: LoRA to put on the model: file, folder, Hub id, training run, or a step of it, as in `checkpoints/`.
        lora_scale: strength of the LoRA.
        user: file of a person's choices (pairs of images, as data for training), for whom `lora`, a run with a personal
            branch, makes the images (default: for nobody).
        users: one user or a mix by name, such as ann:0.7,bob:0.3, from the file `user` or the run's data.
        user_scale: strength of the personal branch.
        per_prompt: images per prompt; their seeds are `sample_seed(seed, prompt index, k)`, those of `evaluate`.
        seed: first seed.
        steps: denoising steps (default: the diffusers pipeline's own).
        guidance: guidance scale (default: the diffusers pipeline's own).
        negative_prompt: text that guidance leads away from.
        height, width: in pixels (default: the model's own).
        frames: frames of a clip, for models that make clips (default: the model's own).
        fps: frame rate of the clips (default: the model's own).
        format: of the clips: `mp4` (H.264), `webm` (VP9), `gif`, `webp`, or `frames`, a folder of PNG files each.
        batch_size: samples at a time (default: 8 images, or 1 clip).
        revision: branch, tag or commit of the model on the Hub (default: that of the training run `lora` is from, if
            any; the same for the next four).
        variant: variant of the weight files, such as fp16.
        single_file_config: folder or Hub id with the configuration of a single file.
        expert: denoiser that the LoRA is for, `high` or `low`, where a model has two.
        prediction_type: `epsilon` or `v_prediction`, where the model's files do not say it or are wrong.
        segments: encode prompts of any length in segments, padded to a multiple of so many tokens, such as 240
            (default: as the training run of `lora` or `model` did).
        precision: of the weights: `fp32`, `tf32`, `bf16` or `fp16`; a loaded pipeline runs under autocast instead.
        device: such as cpu or cuda:1 (default: the GPU if there is one).
        force: replace the images of an earlier run in `out`.

    Raises:
        UserError: anything above that cannot be used, or an `out` that is not empty.
    """
    texts = [*(resolve_prompts(prompts) if prompts is not None else ()), *(resolve_prompts(prompt) if prompt else ())]
    if not texts:
        raise UserError("no prompts: give a prompt file or single prompts")
    counts = {"steps": steps, "height": height, "width": width, "frames": frames, "batch_size": batch_size}
    counts["segments"] = segments
    check_options(precision, fps, per_prompt=per_prompt, **counts)
    run_or_model = model if isinstance(model, str | Path) else None
    base_path, adapter = with_base(run_or_model, lora)
    served = resolve_user(adapter, user, users, user_scale)
    folder, autocast, processes = None if out is None else Path(out).expanduser(), None, Distributed()
    if folder is not None:
        _earlier_run(folder, force, range(len(texts) * per_prompt))
    if isinstance(model, str | Path):
        version = {"revision": revision, "variant": variant, "single_file_config": single_file_config}
        version |= {"expert": expert, "prediction_type": prediction_type}
        base = resolve_base(base_path, adapter, segments, **version)
        pipeline = load_pipeline(base, precision, device)
        columns: dict[str, Any] = {"model": base.path, "revision": base.revision}
        columns |= {"segments": base.segments.tokens} if base.segments else {}
    elif segments:
        raise UserError("segments: only for a model that is given by its path; a loaded pipeline has its own way")
    else:
        pipeline, autocast = model, use_precision(precision)
        columns = {"model": pipeline.source, "revision": None}
    rows = [(text, sample_seed(seed, i, k)) for i, text in enumerate(texts) for k in range(per_prompt)]
    steps, guidance, batch_size = pipeline.sampling(steps, guidance, batch_size)
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt}
    columns |= {"lora": adapter and str(lora or model), "lora_scale": adapter and lora_scale, **options}
    columns |= served.recorded if served else {}
    size = {"height": height, "width": width, "frames": frames}
    columns |= {**size, "precision": precision}
    options |= {**size, "autocast": autocast}
    if pipeline.video:
        columns["fps"] = fps = fps or pipeline.fps
    ending = "" if format == "frames" else f".{format}"
    if folder is None:
        with adapter_on(pipeline, adapter, lora_scale), user_on(pipeline, served, guidance):
            drawn = _drawn(pipeline, rows, 0, batch_size, progress, options)
            return [item for _, _, samples in drawn for item in samples]
    whole = folder
    if processes.world > 1:
        folder = whole / f"{PART}{processes.rank}-of-{processes.world}"
    own = [i for i in range(len(rows)) if i // batch_size % processes.world == processes.rank]
    rows = [rows[i] for i in own]
    with output_lock(folder), adapter_on(pipeline, adapter, lora_scale), user_on(pipeline, served, guidance):
        earlier = _earlier_run(folder, force, own)  # another one may have come and gone meanwhile
        done = 0 if force else _done(folder, rows, columns)

        def save(start: int, batch: Sequence[tuple[str, int]], samples: Sequence[Sample]) -> None:
            for index, (text, number), item in zip(own[start:], batch, samples, strict=False):
                file = folder / f"{index:05d}{ending if isinstance(item, Tensor) else '.png'}"
                if isinstance(item, Tensor):
                    save_clip(item, file, fps or pipeline.fps)
                else:
                    save_image(item, file)
                append_line(folder / LIST, {"prompt": text, "seed": number, "file": file.name, **columns})

        with in_background() as run:
            for start, batch, samples in _drawn(pipeline, rows, done, batch_size, progress, options):
                if start == 0:  # with which nothing is wrong that the sampling could show
                    for file in earlier:
                        shutil.rmtree(file) if file.is_dir() else file.unlink()
                    (folder / LIST).write_bytes(b"")
                run(save, start, batch, samples)
    processes.gather(None)  # waits for all of them
    if processes.rank == 0 and processes.world > 1:
        parts = [whole / f"{PART}{rank}-of-{processes.world}" for rank in range(processes.world)]
        _join(whole, parts, _earlier_run(whole, force, range(len(texts) * per_prompt)))
        for part in filter(Path.exists, parts):  # without samples of its own, a process makes none
            shutil.rmtree(part)
    return whole / LIST


def _join(folder: Path, parts: Sequence[Path], earlier: Sequence[Path]) -> None:
    """Copy what the processes have made, each in its own folder, as one would have made it; a kill leaves both."""
    for file in earlier:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (folder / LIST).write_bytes(b"")
    made = [(part / row["file"], row) for part in parts for row in whole_lines(part / LIST)]
    for file, row in sorted(made, key=lambda one: int(one[0].stem)):
        copy: Callable[..., Any] = shutil.copytree if file.is_dir() else shutil.copyfile
        copy(file, folder / file.name)
        append_line(folder / LIST, row)


def _drawn(
    pipeline: TrainablePipeline,
    rows: Sequence[tuple[str, int]],
    done: int,
    batch_size: int,
    progress: bool,
    options: Any,
) -> Iterator[tuple[int, Sequence[tuple[str, int]], list[Sample]]]:
    """Batch by batch from row `done` on: the number of its first row, its prompts and seeds, and their samples."""
    with progress_bar(initial=done, total=len(rows), unit="img", disable=not progress) as bar:
        for start in range(done, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            texts, seeds = map(list, zip(*batch, strict=True))
            yield start, batch, sample(pipeline, texts, seeds, batch_size=batch_size, **options)
            bar.update(len(batch))


@contextmanager
def in_background() -> Iterator[Callable[..., None]]:
    """Yield `run(function, *arguments)`: calls it in a thread, so that the device does not wait for files.

    A call is awaited before the next one or the end of the block, which raises its error.
    """
    with ThreadPoolExecutor(1) as thread:
        pending: list[Future[Any]] = []

        def run(function: Callable[..., Any], *arguments: Any) -> None:
            if pending:
                pending.pop().result()
            pending.append(thread.submit(function, *arguments))

        yield run
        if pending:
            pending.pop().result()


def save_image(image: Image.Image, file: Path) -> None:
    """Write a PNG atomically."""
    with atomic_file(file, sync=False) as temporary:
        image.save(temporary, format="PNG")


def _earlier_run(folder: Path, force: bool, new: Sequence[int]) -> list[Path]:
    """The files that an earlier run listed, and one that a kill kept out of its list.

    Raises:
        UserError: the folder holds something else than the beginning of `new` samples and `force` is not set, or one of
            them would replace a file that is not of such a run. new: their numbers.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder")
    names = {file.name for file in folder.iterdir() if file.name[0] != "."} if folder.is_dir() else set()
    unfinished = LIST in names and len(whole_lines(folder / LIST, repair=False)) < len(new)
    if names and not (force or unfinished):
        raise UserError(f"{folder}: not empty; choose another folder, or force (--force) to replace its images")
    own: set[str] = set()
    if LIST in names:
        rows = whole_lines(folder / LIST, repair=False)
        if any(not row.keys() >= {"prompt", "seed", "file", "model", "lora"} for row in rows):
            raise UserError(f"{folder / LIST}: is not the list of an earlier run; choose another folder")
        listed = {str(row["file"]) for row in rows if NAME.fullmatch(str(row["file"]))}
        coming = new[len(rows)] if len(rows) < len(new) else len(rows)
        own = names & {*listed, *(f"{coming:05d}{ending}" for ending in ENDINGS)}
        own -= {name for name in own if (folder / name).is_dir() and not _only_frames(folder / name)}
    wanted = {f"{index:05d}{ending}" for index in new for ending in ENDINGS}
    if foreign := sorted(names & wanted - own):
        raise UserError(f"{folder / foreign[0]}: is not of an earlier run; choose another folder")
    return [folder / name for name in own]


def _only_frames(folder: Path) -> bool:
    return all(FRAME.fullmatch(file.name) for file in folder.iterdir())


def _done(folder: Path, rows: Sequence[tuple[str, int]], columns: Mapping[str, Any]) -> int:
    """How many of these samples an interrupted run has left. Raises UserError where it was another one."""
    listed = whole_lines(folder / LIST)
    for line, (text, seed) in zip(listed, rows, strict=False):
        wanted = {"prompt": text, "seed": seed, **columns}
        other = [name for name, value in wanted.items() if line.get(name) != value]
        if other or not is_whole(folder / str(line["file"])):
            what = f"with another {other[0]}" if other else f"of which {line['file']} is missing or cut"
            raise UserError(
                f"{folder}: not empty: it holds the beginning of a run {what}; choose another folder, or force "
                "(--force) to replace its images"
            )
    return len(listed)
