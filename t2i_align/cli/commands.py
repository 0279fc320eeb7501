"""The table of commands: the function that each one calls, and how its result is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from t2i_align.cli import actions

CONTINUES = "Run the same command again; it continues where it was stopped."
RESUMES = "Add resume=true to the same command to continue from the newest checkpoint."


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command.

    function: `module:name`; its signature and docstring are the command's options (`cli.signature`). report: prints the
    function's result, given its arguments. interrupted: printed after Ctrl-C. single: list options that take one value
    each time they are given, the others take several. silent: whether the libraries' progress bars are silenced.
    """

    function: str
    summary: str
    examples: tuple[str, ...]
    report: Callable[[Any, dict[str, Any]], None] = lambda result, options: None
    interrupted: str = "Nothing needs cleaning up; run the same command again."
    single: tuple[str, ...] = ()
    silent: bool = True


COMMANDS = {
    "quickstart": Command(
        function="t2i_align.quickstart:quickstart",
        summary="align the bundled model on the bundled preferences and measure it",
        examples=("t2i-align quickstart", "t2i-align quickstart train.steps=50 --output runs/short"),
        report=actions.quickstart,
        interrupted="Nothing was replaced. Run the same command again; it starts afresh.",
        silent=False,
    ),
    "prepare": Command(
        function="t2i_align.cli.actions:prepare",
        summary="encode a configuration's images and prompts into the cache, without training",
        examples=("t2i-align prepare configs/sd15_diffusion_dpo.yaml data.path=my_pairs.jsonl",),
        report=actions.rows,
        interrupted="Run the same command again; it continues with what is not encoded yet.",
    ),
    "train": Command(
        function="t2i_align.training.run:align",
        summary="run a configuration: prepare, train, save",
        examples=(
            "t2i-align train configs/sd15_diffusion_dpo.yaml data.path=my_pairs.jsonl output_dir=runs/mine",
            "t2i-align train configs/sd15_diffusion_dpo.yaml data.path=my_pairs.jsonl output_dir=runs/mine resume=true",
            "torchrun --nproc_per_node 2 -m t2i_align.train configs/sd15_diffusion_dpo.yaml",
        ),
        report=actions.trained,
        interrupted=RESUMES,
    ),
    "generate": Command(
        function="t2i_align.inference.generate:generate",
        summary="images or clips from a model, with or without a LoRA",
        examples=(
            "t2i-align generate testbed:sd --lora runs/quickstart/run --prompts testbed:dev --out runs/images "
            "--steps 20 --guidance 1",
        ),
        report=lambda result, options: print(f"images listed in {result}"),
        interrupted="The images that are listed are complete; --force replaces them.",
        single=("prompt",),
    ),
    "export-lora": Command(
        function="t2i_align.inference.export:export_lora",
        summary="write a LoRA under the names that other tools read",
        examples=("t2i-align export-lora runs/mine --format kohya --out mine.safetensors",),
        report=lambda result, options: print(f"written to {result}"),
    ),
    "score": Command(
        function="t2i_align.labeling.score:score",
        summary="score images against their prompts",
        examples=("t2i-align score runs/images --scorers oracle --out runs/scores.jsonl",),
        interrupted="Run the same command again; with --out it continues where it was stopped.",
    ),
    "train-scorer": Command(
        function="t2i_align.reward_models.train:train_scorer",
        summary="train a preference model: a CLIP-style scorer from pairs, ties and rankings",
        examples=(
            "t2i-align train-scorer configs/scorers/clip_lora.yaml data.path=my_pairs.jsonl output_dir=runs/scorer",
            "t2i-align score runs/images --scorers trained:runs/scorer",
        ),
        report=actions.trained_scorer,
        interrupted=RESUMES,
    ),
    "audit-scorer": Command(
        function="t2i_align.reward_models.audit:audit",
        summary="how far scorers can be trusted: accuracy by slice, calibration, agreement, over-optimisation",
        examples=(
            "t2i-align audit-scorer my_pairs.jsonl --scorers pickscore hpsv2.1 --out runs/audit",
            "t2i-align audit-scorer testbed:pairs --scorers trained:runs/scorer --optimise --out runs/audit",
        ),
        report=actions.summary,
    ),
    "evaluate": Command(
        function="t2i_align.evaluation.compare:evaluate",
        summary="compare two models at the same seeds: win rate with interval, report with images",
        examples=(
            "t2i-align evaluate --base testbed:sd --aligned runs/quickstart/run --prompts testbed:test "
            "--scorers oracle --out runs/comparison --steps 20 --guidance 1",
        ),
        report=actions.summary,
    ),
    "caption": Command(
        function="t2i_align.labeling.annotate:caption",
        summary="captions of each image of preference data, for DCPO",
        examples=(
            "t2i-align caption testbed:pairs --variant h --captioner testbed:captioner --out runs/captions.jsonl",
            "t2i-align caption my_pairs.jsonl --variant c --captioner llava-hf/llava-v1.6-mistral-7b-hf "
            "--precision bf16 --out captions.jsonl",
        ),
        report=actions.annotated,
        interrupted=CONTINUES,
    ),
    "perturb": Command(
        function="t2i_align.labeling.annotate:perturb",
        summary="prompts changed so that they do not fit their images, for TDPO and TKTO",
        examples=("t2i-align perturb testbed:pairs --kinds attribute relation --out runs/negatives.jsonl",),
        report=actions.annotated,
        interrupted=CONTINUES,
    ),
    "relabel": Command(
        function="t2i_align.labeling.annotate:relabel",
        summary="scores of preference data by one scorer or by the vote of several, for SmPO and RankDPO",
        examples=(
            "t2i-align relabel testbed:pairs --scorers oracle --out runs/scores.jsonl",
            "t2i-align relabel my_pairs.jsonl --scorers clip:ViT-B-32:laion400m_e32 clip:ViT-L-14:openai "
            "--rule majority --out scores.jsonl",
        ),
        report=actions.annotated,
        interrupted=CONTINUES,
    ),
    "data inspect": Command(
        function="t2i_align.data.inspect:inspect",
        summary="counts, sizes, ties, duplicates, users, prompt lengths and disagreement of preference data",
        examples=("t2i-align data inspect my_pairs.jsonl --out report.html",),
        report=actions.inspected,
        silent=False,
    ),
    "data split": Command(
        function="t2i_align.data.spec:split",
        summary="hold some prompts or users out: train.yaml, held_out.yaml and the held-out prompts",
        examples=("t2i-align data split my_pairs.jsonl --held-out 0.1 --out runs/split",),
        report=actions.rows,
        silent=False,
    ),
    "synthesize": Command(
        function="t2i_align.labeling.synthesize:synthesize",
        summary="preference data from prompts alone: images by models, ranked by scorers",
        examples=(
            "t2i-align synthesize testbed:dev --models testbed:sd --scorers oracle --per-prompt 4 --out runs/made "
            "--steps 20 --guidance 2",
            "torchrun --nproc_per_node 8 -m t2i_align synthesize prompts.txt --models my_sdxl my_sd3 "
            "--scorers clip:ViT-L-14:openai pickscore --out made --pairs best_worst --agree 0.8",
        ),
        report=actions.synthesized,
        interrupted=CONTINUES,
    ),
    "objectives": Command(
        function="t2i_align.cli.actions:objectives",
        summary="list the objectives, or explain one",
        examples=("t2i-align objectives", "t2i-align objectives diffusion_dpo"),
        report=lambda result, options: print(result),
        silent=False,
    ),
}
GROUPS = {"data": "inspect preference data, or hold some prompts or users out"}
