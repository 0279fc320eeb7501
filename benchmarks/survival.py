"""Kill every command that writes, fill its disk, damage its files; then run it again, as a user would.

    python benchmarks/survival.py                              # writes benchmarks/results/survival.md
    python benchmarks/survival.py --commands train score --kills 20

Each command line runs in a process of its own on a tiny model, first twice undisturbed. Its faults then come

- at chosen instructions: an audit hook counts the changes of files in the output's folder (opened for writing, renamed,
  removed, made), and the process is killed with SIGKILL, or finds its disk full from then on, at the n-th of them, for
  n spread evenly over all of them;
- at random: SIGKILL after a random time;
- by signals: SIGINT, SIGTERM and SIGHUP at chosen changes and once at a random time, for `train` once more to its whole
  process group with the loader's workers. It must say so, exit with 130, and end within seconds;
- in small files: those that a kill left are cut in half or emptied, one at a time.

A trial is passed where the inputs are as they were and the same command, run again as its message advises, ends with
the files of an undisturbed run. (Files that differ between the two undisturbed runs, such as those with times, must be
there.) A full disk must be reported in a line, without traceback; a damaged file too, unless the command mends it.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.contents import contents
from t2i_align import cli
from t2i_align.data.media import save_clip
from t2i_align.testbed.captions import describe, write
from t2i_align.testbed.scenes import degrade, render, sample_scene, to_uint8
from tests.reward_scorers.small import write_hf_clip
from tests.runs import moving_clip
from tests.tiny import tiny_sd, tiny_wan

RESULTS = Path(__file__).parent / "results" / "survival.md"
SMALL = 64 * 1024  # bytes of a file that is damaged
PATIENCE = 20  # seconds in which a signal ends a command

# Loaded once, in the process from which those of the commands are forked: importing takes longer than they do.
PRELOAD = ["t2i_align.training.run", "t2i_align.reward_models.train", "t2i_align.reward_models.audit",
           "t2i_align.labeling.synthesize", "t2i_align.labeling.annotate", "t2i_align.labeling.curate",
           "t2i_align.labeling.segments", "t2i_align.evaluation.compare",
           "t2i_align.inference.export", "t2i_align.data.inspect", "t2i_align.testbed.scorer"]  # fmt: skip
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def command_line(command: str, folder: Path, log: Path, fault: str, moment: int) -> None:
    """Run a command in this process, with a fault at a change: a signal, or "full" from it on; "count" only counts."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # both are ignored by what is started in the background
    os.chdir(folder)
    with open(log, "wb", buffering=0) as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    out, process = str(folder / "out" / ""), os.getpid()
    counter = os.open(folder / "changes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or isinstance(arguments[0], int) or os.getpid() != process:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(out):
            return
        count += 1
        if fault == "count":
            os.write(counter, b".")
        elif fault.startswith("SIG") and count == moment:
            send(process, fault)
        elif fault == "full" and count >= moment and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)
    sys.exit(cli.main(shlex.split(command)))


def send(process: int, fault: str) -> None:
    """The signal of that name, "SIGTERM to all" to the process group."""
    name, _, everybody = fault.partition(" ")
    (os.killpg if everybody else os.kill)(process, signal.Signals[name])


COMMANDS = {  # in words, and what is added when it runs again after a fault
    "prepare": ("prepare inputs/run.yaml output_dir=out/made data.cache_dir=out/cache", ""),
    "train": ("train inputs/run.yaml output_dir=out/made data.cache_dir=out/cache data.workers=2 resume=true", ""),
    "train-scorer": ("train-scorer inputs/scorer.yaml output_dir=out/made resume=true", ""),
    "export-lora": ("export-lora inputs/run --format kohya --out out/lora.safetensors", ""),
    "generate": ("generate inputs/model --prompts inputs/prompts.txt --out out/made --steps 2", "--force"),
    "evaluate": ("evaluate --base inputs/model --aligned inputs/run --prompts inputs/prompts.txt --scorers oracle "
                 "--out out/made --steps 2", ""),
    "synthesize": ("synthesize inputs/prompts.txt --models inputs/model --scorers oracle --out out/made --per-prompt 2 "
                   "--steps 2", ""),
    "score": ("score inputs/pairs.jsonl --scorers oracle --out out/scores.jsonl", ""),
    "relabel": ("relabel inputs/pairs.jsonl --scorers oracle --out out/scores.jsonl", ""),
    "perturb": ("perturb inputs/pairs.jsonl --kinds attribute relation --out out/negatives.jsonl", ""),
    "caption": ("caption inputs/pairs.jsonl --variant c --captioner testbed:captioner --out out/captions.jsonl", ""),
    "video pairs": ("video pairs inputs/clips --model inputs/wan --out out/made --steps 7 --fps 16 --guidance 1", ""),
    "video segments": ("video segments inputs/clips.jsonl --scorers motion_smoothness --seconds 0.25 --fps 16 "
                       "--least-decided 0 --out out/labels.jsonl", ""),
    "audit-scorer": ("audit-scorer inputs/pairs.jsonl --scorers oracle --out out/made", ""),
    "data inspect": ("data inspect inputs/pairs.jsonl --out out/report.html", ""),
    "data split": ("data split inputs/pairs.jsonl --held-out 0.3 --out out/made", ""),
}  # fmt: skip
NEEDS_RUN = ("export-lora", "evaluate")  # a trained LoRA among the inputs


@dataclasses.dataclass
class Ended:
    """A process: its exit status, what it printed, seconds."""

    status: int
    text: str
    seconds: float


class Place:
    """A folder with inputs, in which commands write to `out`."""

    def __init__(self, folder: Path, trained: bool) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.folder = folder.resolve()
        self.out, self.changes = self.folder / "out", self.folder / "changes"
        make_inputs(self.folder / "inputs")
        if trained:
            self.clear()
            self.run(COMMANDS["train"][0])
            shutil.copytree(self.out / "made", self.folder / "inputs" / "run")
        self.inputs = contents(self.folder / "inputs")

    def run(self, command: str, fault: str = "none", moment: int = 0, seconds: float | None = None) -> Ended:
        """The command in a process of its own, which gets the signal after `seconds` and has then so long to end."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        process = self.context.Process(target=command_line, args=(command, self.folder, log, fault, moment))
        process.start()
        while process.is_alive() and not log.exists():  # the command begins
            time.sleep(0.01)
        start = time.perf_counter()
        process.join(seconds)
        if seconds is not None and process.is_alive():
            send(process.pid or 0, fault)
            process.join(PATIENCE)
        process.kill()
        process.join()
        text = log.read_text(errors="replace") if log.exists() else ""
        return Ended(process.exitcode or 0, text, time.perf_counter() - start)

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        self.changes.unlink(missing_ok=True)


class Trials:
    """The faults of one command, each a generator of what was wrong (or "") after one fault."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, (self.command, self.again) = place, COMMANDS[name]
        seen = []
        for _ in range(2):
            place.clear()
            ended = place.run(self.command, "count")
            if ended.status:
                raise RuntimeError(f"{self.command}: exit status {ended.status}\n{ended.text}")
            seen.append(contents(place.out))
        self.files = {name: digest if seen[1].get(name) == digest else "" for name, digest in seen[0].items()}
        self.changes, self.seconds = place.changes.stat().st_size, ended.seconds

    def moments(self, number: int) -> list[int]:
        """So many of the command's changes, spread evenly from the first to the last."""
        return sorted({round(moment) for moment in np.linspace(1, self.changes, number)})

    def kills(self, number: int) -> Iterator[str]:
        """At chosen changes."""
        for moment in self.moments(number):
            self.place.clear()
            self.place.run(self.command, "SIGKILL", moment)
            yield self.check(f"killed at change {moment} of {self.changes}")

    def random(self, number: int) -> Iterator[str]:
        """Killed at random times."""
        for seconds in np.random.default_rng(0).uniform(0.3, 1.0, number) * self.seconds:
            self.place.clear()
            self.place.run(self.command, "SIGKILL", seconds=seconds)
            yield self.check(f"killed after {seconds:.1f} s")

    def signals(self, number: int) -> Iterator[str]:
        """Interrupted at chosen changes, and at a random time."""
        groups = ("", " to all") if "workers" in self.command else ("",)
        for fault in [name + group for name in ("SIGINT", "SIGTERM", "SIGHUP") for group in groups]:
            for moment in (*self.moments(number), 0):
                self.place.clear()
                seconds = None if moment else float(np.random.default_rng(len(fault)).uniform(0.3, 0.9) * self.seconds)
                ended = self.place.run(self.command, fault, moment, seconds)
                what = f"{fault} at change {moment} of {self.changes}" if moment else f"{fault} after {seconds:.1f} s"
                if ended.status == 0:  # it had nothing left to do
                    yield self.wrong(ended, what)
                elif ended.status != 130 or "interrupted" not in ended.text or "Traceback" in ended.text:
                    yield f"{what}: exit status {ended.status}: {ended.text.strip()[-400:]}"
                else:
                    yield self.check(what)

    def full(self, number: int) -> Iterator[str]:
        """With a full disk from a chosen change on, which must be reported in a line."""
        for moment in self.moments(number):
            self.place.clear()
            ended = self.place.run(self.command, "full", moment)
            what = f"disk full from change {moment} of {self.changes}"
            if ended.status not in (0, 2) or "Traceback" in ended.text:
                yield f"{what}: exit status {ended.status}: {ended.text.strip()[-400:]}"
            else:
                yield self.check(what)

    def damage(self, number: int) -> Iterator[str]:
        """With a small file damaged that a kill has left after three quarters; it is named, or made again."""
        self.place.clear()
        self.place.run(self.command, "SIGKILL", self.changes * 3 // 4)
        kept = self.place.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.place.out, kept)
        small = [name for name in contents(kept) if 0 < (kept / name).stat().st_size < SMALL]
        for name in small[:: max(1, -(-len(small) // number))]:
            for keep in (0, (kept / name).stat().st_size // 2):
                self.place.clear()
                shutil.copytree(kept, self.place.out, dirs_exist_ok=True)
                os.truncate(self.place.out / name, keep)
                ended = self.place.run(f"{self.command} {self.again}")
                refused = ended.status == 2 and "Traceback" not in ended.text
                named = any(part in ended.text for part in (Path(name).name, Path(name).parent.name))
                yield "" if refused and named else self.wrong(ended, f"{name} cut to {keep} bytes")

    def check(self, fault: str) -> str:
        """Run again after a fault; what is wrong then, or ""."""
        if contents(self.place.folder / "inputs") != self.place.inputs:
            return f"{fault}: the inputs changed"
        return self.wrong(self.place.run(f"{self.command} {self.again}"), fault)

    def wrong(self, ended: Ended, fault: str) -> str:
        """What is wrong after the command has run again, or "": a refusal is right where nothing was left to do."""
        now = contents(self.place.out)
        different = sorted(now.keys() ^ self.files.keys())
        different += [name for name, digest in self.files.items() if digest and now.get(name, digest) != digest]
        if not different and "Traceback" not in ended.text:
            return ""
        return f"{fault}, again: exit status {ended.status}, other files {different}: {ended.text.strip()[-400:]}"


def make_inputs(folder: Path) -> None:
    """A tiny model and scorer, pairs of scenes, prompts and configurations, under names relative to the trial."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    tiny_sd(folder / "model")
    write_hf_clip(folder / "clip")
    rows = []
    for number in range(12):
        scene = sample_scene(rng)
        images = [f"{number}-{side}.png" for side in (0, 1)]
        for name, pixels in zip(images, (render(scene), degrade(render(scene), rng)), strict=True):
            Image.fromarray(to_uint8(pixels)).save(folder / name)
        rows.append({"prompt": write(describe(scene, rng), rng), "chosen": images[0], "rejected": images[1]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(row["prompt"] + "\n" for row in rows[:4]))
    tiny_wan(folder / "wan")
    for number in range(4):
        save_clip(moving_clip(number, 9), folder / "clips" / f"{number}.mp4", 16)
        (folder / "clips" / f"{number}.txt").write_text("a fox runs")
    clips = [
        {"prompt": "a fox runs", "chosen": f"clips/{number}.mp4", "rejected": f"clips/{number + 1}.mp4"}
        for number in (0, 2)
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clips))
    data = {"path": "inputs/pairs.jsonl"}
    run = {"objective": "diffusion_dpo", "model": {"path": "inputs/model"}, "data": data, "lora": {"rank": 2},
           "train": {"steps": 4, "batch_size": 2}, "log": {"every": 1, "checkpoint_every": 2}}  # fmt: skip
    scorer = {"model": "hf-clip:inputs/clip", "tune": "linear", "data": {**data, "holdout_prompts": 0.3},
              "train": {"steps": 4, "batch_size": 4}, "log": {"every": 1, "checkpoint_every": 2}}  # fmt: skip
    for name, values in (("run", run), ("scorer", scorer)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


FAULTS = ("kills", "random", "signals", "full", "damage")


def survive(names: Sequence[str], numbers: dict[str, int]) -> Iterator[tuple[str, str, list[str]]]:
    """Command, fault and what was wrong each time ("" where nothing was)."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), trained=any(name in NEEDS_RUN for name in names))
        for name in names:
            trials = Trials(place, name)
            for fault, number in numbers.items():
                yield name, fault, list(getattr(trials, fault)(number)) if number else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--kills", type=int, default=6, help="at chosen changes of files")
    parser.add_argument("--random", type=int, default=2, help="kills at random times")
    parser.add_argument("--signals", type=int, default=2, help="of each kind, at chosen changes of files")
    parser.add_argument("--full", type=int, default=3, help="full disks, from a chosen change on")
    parser.add_argument("--damage", type=int, default=4, help="small files, each cut in half and emptied")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    table: dict[str, dict[str, str]] = {}
    failures = []
    for name, fault, results in survive(args.commands, {fault: getattr(args, fault) for fault in FAULTS}):
        passed = sum(not wrong for wrong in results)
        table.setdefault(name, {})[fault] = f"{passed} of {len(results)}"
        print(f"{name}: {fault}: {passed} of {len(results)}", flush=True)
        for wrong in filter(None, results):
            failures.append(f"- `{name}`, {wrong}")
            print(f"  {wrong}", flush=True)
    head = [f"| command | {' | '.join(FAULTS)} |", "|---" * (len(FAULTS) + 1) + "|"]
    rows = [f"| {name} | {' | '.join(cells.values())} |" for name, cells in table.items()]
    command = f"`python benchmarks/survival.py` on Python {platform.python_version()}; trials passed:"
    lines = ["# Survival", "", command, "", *head, *rows, "", *failures]
    args.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
