"""The command line: each sub-command is a thin call into the library, which is imported only when it runs."""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from t2i_align import __version__
from t2i_align.errors import UserError, unknown
from t2i_align.utils.logging import silence_libraries

OVERRIDES_HELP = "changes to the configuration: train.steps=200 objective.beta=500 lora=null ..."
# What went wrong outside of the program; the message says it all, a traceback adds nothing.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"t2i-align {__version__}")
        return 0
    name, *rest = arguments
    debug = "--debug" in rest
    try:
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        return COMMANDS[name].run(rest)
    except KeyboardInterrupt as interrupt:
        _say(f"\ninterrupted: {interrupt}" if str(interrupt) else "\ninterrupted.", COMMANDS[name].interrupted)
        return 130
    except BrokenPipeError:  # `t2i-align objectives | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        expected = is_for_people(error)
        if debug or not expected:
            traceback.print_exc()
        else:
            _say(f"error: {error}")
        return 2 if expected else 1


def overview() -> str:
    """The text of `t2i-align --help`."""
    width = max(len(name) for name in COMMANDS)
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: t2i-align COMMAND [arguments]",
            "",
            "Align text-to-image diffusion models with human preferences.",
            "",
            *rows,
            "",
            "`t2i-align COMMAND --help` explains one of them with examples. `--version` prints the version.",
        ]
    )


def is_for_people(error: BaseException) -> bool:
    """Whether the message alone tells a person what to do: bad input, or a system error such as a full disk."""
    # Looked up, not imported: whoever raised one of these has loaded its module.
    for module, name in (
        ("t2i_align.errors", "UserError"),
        ("pipelines.base", "PipelineError"),
        ("reward_scorers.base", "ScorerError"),
    ):
        if isinstance(error, getattr(sys.modules.get(module), name, ())):
            return True
    return isinstance(error, OSError) and error.errno in SYSTEM_ERRORS


# The sub-commands ---------------------------------------------------------------------------------------------------


def _quickstart(argv: list[str]) -> int:
    parser = _parser("quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--output", default="runs/quickstart", help="folder to write to (default: %(default)s)")
    options = _parse(parser, argv)
    from t2i_align.quickstart import quickstart

    result = quickstart(options.overrides, output=options.output)
    print(f"\naligned against base, same prompts and seeds:\n{result.summary()}")
    print(f"{result.settings['seconds']:.0f} seconds in all")
    return 0


def _prepare(argv: list[str]) -> int:
    options = _parse(_run_parser("prepare"), argv)
    from accelerate import Accelerator

    from t2i_align import config as configuration
    from t2i_align.data.store import SKIPPED, Store
    from t2i_align.training.run import load_data, load_model

    silence_libraries()
    config = configuration.load(options.config, options.overrides)
    if not config.data.cache:
        raise UserError("data.cache is false in this configuration, so there is nothing to prepare")
    if config.data.stream:
        raise UserError("data.stream encodes each batch as it comes, so there is nothing to prepare")
    accelerator = Accelerator()
    source = load_data(config, accelerator, load_model(config, accelerator.device), progress=True)
    assert isinstance(source.groups, Store)  # on the fly was refused above
    lines: dict[str, Any] = {**source.counts, "cache": source.groups.path}
    if source.counts["skipped"]:
        lines["why_skipped"] = source.groups.path / SKIPPED
    for name, value in lines.items():
        print(f"{name.replace('_', ' '):<12} {value}")
    return 0


def _train(argv: list[str]) -> int:
    options = _parse(_run_parser("train"), argv)
    from t2i_align.training.run import align

    silence_libraries()
    result = align(options.config, options.overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"trained {result.steps} steps; weights in {result.weights}")
    return 0


def _generate(argv: list[str]) -> int:
    parser = _parser("generate")
    parser.add_argument("model", help="diffusers folder, single file, Hub id, or testbed:sd")
    parser.add_argument("--lora", help="LoRA to put on the model: file, folder, training run, or Hub id")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="its strength (default: %(default)s)")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; give it several times for several")
    parser.add_argument("--prompts", help="text file with one prompt per line, testbed:dev or hpsv2:photo")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: nothing)")
    parser.add_argument("--per-prompt", type=int, default=1, help="samples of each prompt (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder for the images and their list")
    parser.add_argument("--force", action="store_true", help="replace the images of an earlier run in that folder")
    _sampling(parser)
    options = _parse(parser, argv)
    from t2i_align.inference.generate import generate

    silence_libraries()
    listing = generate(**_keywords(options))
    print(f"images listed in {listing}")
    return 0


def _export_lora(argv: list[str]) -> int:
    parser = _parser("export-lora")
    parser.add_argument("lora", help="folder of a training run, or a LoRA's file or folder")
    parser.add_argument("--out", required=True, help="the file to write, ending in .safetensors")
    parser.add_argument("--format", choices=("kohya", "diffusers"), default="kohya", help="(default: %(default)s)")
    parser.add_argument("--model", help="the model that the LoRA is for (default: the run's own)")
    options = _parse(parser, argv)
    from t2i_align.inference.export import export_lora

    silence_libraries()
    print(f"written to {export_lora(**_keywords(options))}")
    return 0


def _score(argv: list[str]) -> int:
    parser = _parser("score")
    parser.add_argument("images", help="folder that `generate` wrote, JSONL or parquet with `image` and `prompt`, or "
                        "preference data")  # fmt: skip
    parser.add_argument("--scorers", nargs="+", required=True, help="scorers, such as clip:ViT-B-32:laion400m_e32")
    parser.add_argument("--out", help=".jsonl or .parquet to add the scores to (default: only the means are printed)")
    _precision(parser)
    _machine(parser)
    options = _parse(parser, argv)
    from t2i_align.labeling.score import score

    silence_libraries()
    score(**_keywords(options))
    return 0


def _evaluate(argv: list[str]) -> int:
    parser = _parser("evaluate")
    parser.add_argument("--base", help="the model before: folder, file, Hub id, testbed:sd (default: the run's own)")
    parser.add_argument("--aligned", required=True, help="the model after: a training run, a LoRA, or another model")
    parser.add_argument("--prompts", required=True, help="text file with one prompt per line, or testbed:test")
    parser.add_argument("--scorers", nargs="+", required=True, help="who decides; the first one gives the headline")
    parser.add_argument("--out", required=True, help="folder for result.json and report.html")
    parser.add_argument("--seeds-per-prompt", type=int, default=1, help="pairs of each prompt (default: %(default)s)")
    parser.add_argument("--tie-margin", type=float, help="smaller differences are ties (default: the scorer's own)")
    parser.add_argument("--ties", choices=("half", "drop"), default="half", help="count as half a win, or leave out")
    parser.add_argument("--images", type=int, default=24, help="pairs in the report (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the evaluation in that folder")
    _sampling(parser)
    options = _parse(parser, argv)
    from t2i_align.evaluation.compare import evaluate

    silence_libraries()
    print(evaluate(**_keywords(options)).summary())
    return 0


def _train_scorer(argv: list[str]) -> int:
    options = _parse(_run_parser("train-scorer"), argv)
    from t2i_align.reward_models.train import train_scorer

    silence_libraries()
    result = train_scorer(options.config, options.overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        for name, accuracy in result.accuracy.items():
            print(f"{name.replace('_', ' '):<12} {accuracy}")
        print(f"trained {result.steps} steps; the scorer is trained:{result.folder}")
    return 0


def _audit_scorer(argv: list[str]) -> int:
    parser = _parser("audit-scorer")
    parser.add_argument("source", help="preference data that the scorers were not trained on, or testbed:pairs")
    parser.add_argument("--scorers", nargs="+", required=True, help="scorers, such as pickscore or trained:FOLDER")
    parser.add_argument("--out", required=True, help="folder for audit.json and report.html")
    parser.add_argument("--format", default="auto", help="of the source (default: as it looks)")
    parser.add_argument("--limit", type=int, help="only the first so many groups")
    parser.add_argument("--optimise", action="store_true", help="testbed: optimise each scorer and ask the oracle")
    parser.add_argument("--prompts", default="testbed:dev", help="for --optimise (default: %(default)s)")
    parser.add_argument("--prompt-count", type=int, default=32, help="so many of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn images (default: %(default)s)")
    _machine(parser)
    options = _parse(parser, argv)
    from t2i_align.reward_models.audit import audit

    silence_libraries()
    print(audit(**_keywords(options)).summary())
    return 0


def _caption(argv: list[str]) -> int:
    parser = _parser("caption")
    parser.add_argument("source", help="preference data: file, folder, or testbed:pairs")
    parser.add_argument(
        "--variant",
        choices=("c", "p", "h"),
        required=True,
        help="c: both images described; p: the prompt, and perturbed for the loser; h: the winner's description, and "
        "the loser's perturbed",
    )
    parser.add_argument("--captioner", help="image-to-text model: folder, Hub id, or testbed:captioner")
    parser.add_argument("--captioner-template", help="what it is told, with {prompt} in it")
    parser.add_argument("--captioner-revision", help="of it on the Hub")
    parser.add_argument("--annotations", nargs="+", default=(), help="files that add to the source, such as scores")
    _perturber(parser)
    _annotating(parser)
    options = _parse(parser, argv)
    from t2i_align.labeling.annotate import caption

    silence_libraries()
    return _annotated(caption(**_keywords(options)))


def _perturb(argv: list[str]) -> int:
    parser = _parser("perturb")
    parser.add_argument("source", help="preference data: file, folder, or testbed:pairs")
    _perturber(parser)
    _annotating(parser)
    options = _parse(parser, argv)
    from t2i_align.labeling.annotate import perturb

    silence_libraries()
    return _annotated(perturb(**_keywords(options)))


def _relabel(argv: list[str]) -> int:
    parser = _parser("relabel")
    parser.add_argument("source", help="preference data: file, folder, or testbed:pairs")
    parser.add_argument("--scorers", nargs="+", required=True, help="scorers, also as one list with commas")
    parser.add_argument(
        "--rule",
        choices=("majority", "mean_rank", "sum"),
        help="how several become one (default: majority; a single scorer's scores stay as they are)",
    )
    _annotating(parser)
    options = _parse(parser, argv)
    options.scorers = [spec for listed in options.scorers for spec in listed.split(",") if spec]
    from t2i_align.labeling.annotate import relabel

    silence_libraries()
    return _annotated(relabel(**_keywords(options)))


def _data(argv: list[str]) -> int:
    from t2i_align.cli.data import data

    return data(argv)


def _synthesize(argv: list[str]) -> int:
    from t2i_align.cli.data import synthesize

    return synthesize(argv)


def _annotated(summary: Any) -> int:
    print(f"{summary.groups} groups annotated in {summary.out}")
    if summary.why_skipped:
        print(f"{summary.skipped} skipped; why: {summary.why_skipped}")
    return 0


def _objectives(argv: list[str]) -> int:
    parser = _parser("objectives")
    parser.add_argument("name", nargs="?", help="explain this one")
    options = _parse(parser, argv)
    from t2i_align import objectives
    from t2i_align.utils.settings import expected

    if options.name:
        cls = objectives.get(options.name)
        facts = f"Needs {cls.needs}. A complete run: configs/{cls.config}"
        print(inspect.getdoc(sys.modules[cls.__module__]), inspect.getdoc(cls), facts, "Hyper-parameters:", sep="\n\n")
        for field in fields(cls):  # type: ignore[arg-type]  # each is a dataclass, their base is not
            print(f"  objective.{field.name} = {field.default!r}  ({expected(cls, field.name)})")
        return 0
    rows = [(name, cls.paper, str(cls.needs), cls.config) for name, cls in sorted(objectives.OBJECTIVES.items())]
    rows = [("name", "paper", "needs", "in configs/"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command. run: takes its arguments, returns the exit status. interrupted: said after Ctrl-C."""

    run: Callable[[list[str]], int]
    summary: str
    examples: tuple[str, ...] = ()
    interrupted: str = "Nothing needs cleaning up; run the same command again."


COMMANDS = {
    "quickstart": Command(
        run=_quickstart,
        summary="align the bundled model on the bundled preferences and measure it",
        examples=("t2i-align quickstart", "t2i-align quickstart train.steps=50 --output runs/short"),
        interrupted="Nothing was replaced. Run the same command again; it starts afresh.",
    ),
    "prepare": Command(
        run=_prepare,
        summary="encode a configuration's images and prompts into the cache, without training",
        examples=("t2i-align prepare configs/sd15_diffusion_dpo.yaml data.path=my_pairs.jsonl",),
        interrupted="Run the same command again; it continues with what is not encoded yet.",
    ),
    "train": Command(
        run=_train,
        summary="run a configuration: prepare, train, save",
        examples=(
            "t2i-align train configs/sd15_diffusion_dpo.yaml data.path=my_pairs.jsonl output_dir=runs/mine",
            "t2i-align train configs/sd15_diffusion_dpo.yaml data.path=my_pairs.jsonl output_dir=runs/mine resume=true",
            "torchrun --nproc_per_node 2 -m t2i_align.train configs/sd15_diffusion_dpo.yaml",
        ),
        interrupted="Add resume=true to the same command to continue from the newest checkpoint.",
    ),
    "generate": Command(
        run=_generate,
        summary="images or clips from a model, with or without a LoRA",
        examples=(
            "t2i-align generate testbed:sd --lora runs/quickstart/run --prompts testbed:dev --out runs/images "
            "--steps 20 --guidance 1",
        ),
        interrupted="The images that are listed are complete; --force replaces them.",
    ),
    "export-lora": Command(
        run=_export_lora,
        summary="write a LoRA under the names that other tools read",
        examples=("t2i-align export-lora runs/mine --format kohya --out mine.safetensors",),
    ),
    "score": Command(
        run=_score,
        summary="score images against their prompts",
        examples=("t2i-align score runs/images --scorers oracle --out runs/scores.jsonl",),
        interrupted="Run the same command again; with --out it continues where it was stopped.",
    ),
    "train-scorer": Command(
        run=_train_scorer,
        summary="train a preference model: a CLIP-style scorer from pairs, ties and rankings",
        examples=(
            "t2i-align train-scorer configs/scorers/clip_lora.yaml data.path=my_pairs.jsonl output_dir=runs/scorer",
            "t2i-align score runs/images --scorers trained:runs/scorer",
        ),
        interrupted="Add resume=true to the same command to continue from the newest checkpoint.",
    ),
    "audit-scorer": Command(
        run=_audit_scorer,
        summary="how far scorers can be trusted: accuracy by slice, calibration, agreement, over-optimisation",
        examples=(
            "t2i-align audit-scorer my_pairs.jsonl --scorers pickscore hpsv2.1 --out runs/audit",
            "t2i-align audit-scorer testbed:pairs --scorers trained:runs/scorer --optimise --out runs/audit",
        ),
    ),
    "evaluate": Command(
        run=_evaluate,
        summary="compare two models at the same seeds: win rate with interval, report with images",
        examples=(
            "t2i-align evaluate --base testbed:sd --aligned runs/quickstart/run --prompts testbed:test "
            "--scorers oracle --out runs/comparison --steps 20 --guidance 1",
        ),
    ),
    "caption": Command(
        run=_caption,
        summary="captions of each image of preference data, for DCPO",
        examples=(
            "t2i-align caption testbed:pairs --variant h --captioner testbed:captioner --out runs/captions.jsonl",
            "t2i-align caption my_pairs.jsonl --variant c --captioner llava-hf/llava-v1.6-mistral-7b-hf "
            "--precision bf16 --out captions.jsonl",
        ),
        interrupted="Run the same command again; it continues where it was stopped.",
    ),
    "perturb": Command(
        run=_perturb,
        summary="prompts changed so that they do not fit their images, for TDPO and TKTO",
        examples=("t2i-align perturb testbed:pairs --kinds attribute relation --out runs/negatives.jsonl",),
        interrupted="Run the same command again; it continues where it was stopped.",
    ),
    "relabel": Command(
        run=_relabel,
        summary="scores of preference data by one scorer or by the vote of several, for SmPO and RankDPO",
        examples=(
            "t2i-align relabel testbed:pairs --scorers oracle --out runs/scores.jsonl",
            "t2i-align relabel my_pairs.jsonl --scorers clip:ViT-B-32:laion400m_e32 clip:ViT-L-14:openai "
            "--rule majority --out scores.jsonl",
        ),
        interrupted="Run the same command again; it continues where it was stopped.",
    ),
    "data": Command(
        run=_data,
        summary="look at preference data (inspect), or hold some of its prompts or users out (split)",
        examples=(
            "t2i-align data inspect my_pairs.jsonl --out report.html",
            "t2i-align data split my_pairs.jsonl --held-out 0.1 --out runs/split",
        ),
    ),
    "synthesize": Command(
        run=_synthesize,
        summary="preference data from prompts alone: images by models, ranked by scorers",
        examples=(
            "t2i-align synthesize testbed:dev --models testbed:sd --scorers oracle --per-prompt 4 --out runs/made "
            "--steps 20 --guidance 2",
            "torchrun --nproc_per_node 8 -m t2i_align synthesize prompts.txt --models my_sdxl my_sd3 "
            "--scorers clip:ViT-L-14:openai pickscore --out made --pairs best_worst --agree 0.8",
        ),
        interrupted="Run the same command again; it continues where it was stopped.",
    ),
    "objectives": Command(
        run=_objectives,
        summary="list the objectives, or explain one",
        examples=("t2i-align objectives", "t2i-align objectives diffusion_dpo"),
    ),
}


# Their parsers ------------------------------------------------------------------------------------------------------


def _parser(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"t2i-align {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in command.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run_parser(name: str) -> argparse.ArgumentParser:
    parser = _parser(name)
    parser.add_argument("config", help="YAML file of a run, such as those under configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser


def _sampling(parser: argparse.ArgumentParser) -> None:
    _drawing(parser)
    parser.add_argument("--frames", type=int, help="of a clip, for models that make clips (default: the model's own)")
    parser.add_argument("--fps", type=float, help="frames a second that clips are shown at (default: the model's own)")
    parser.add_argument("--expert", choices=("high", "low"), help="whose LoRA it is, where a model has two denoisers")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub (default: its main one)")
    parser.add_argument("--variant", help="of the model's weight files, such as fp16")
    parser.add_argument("--single-file-config", help="folder or Hub id with the configuration of a single file")


def _drawing(parser: argparse.ArgumentParser) -> None:
    """How images are drawn, by any model."""
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    own = "(default: what the model's diffusers pipeline takes)"
    parser.add_argument("--steps", type=int, help=f"denoising steps {own}")
    parser.add_argument("--guidance", type=float, help=f"guidance scale {own}")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    _precision(parser)
    _machine(parser, batch=None, of="samples at a time (default: 8 images, or 1 clip)")


def _perturber(parser: argparse.ArgumentParser) -> None:
    kinds = ("attribute", "count", "relation", "exchange")
    parser.add_argument(
        "--perturber", default="rules", help="rules, or a text model: folder or Hub id (default: %(default)s)"
    )
    parser.add_argument("--perturber-template", help="what the model is told, with {caption} in it")
    parser.add_argument("--perturber-revision", help="of it on the Hub")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="of edits by rules (default: all)")
    parser.add_argument("--strength", type=int, default=1, help="number of edits by rules (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of a model's answer (default: %(default)s)")
    _precision(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the perturber (default: %(default)s)")


def _annotating(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="JSONL file to write, for data.annotations of a run")
    parser.add_argument("--format", default="auto", help="of the source (default: as it looks)")
    parser.add_argument("--force", action="store_true", help="replace what that file holds")
    _machine(parser)


def _precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: %(default)s)")


def _machine(
    parser: argparse.ArgumentParser, batch: int | None = 8, of: str = "images at a time (default: %(default)s)"
) -> None:
    parser.add_argument("--batch-size", type=int, default=batch, help=of)
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    return parser.parse_intermixed_args(argv)  # key=value may stand before and after options


def _keywords(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key != "debug"}


def _say(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
