"""What this machine can do: versions, devices, attention kernels, room on the disk, and what is missing for what."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from t2i_align.errors import UserError

EXTRAS = {
    "bitsandbytes": "optim.optimizer=adamw8bit",
    "optimizers": "optim.optimizer=prodigy and lion",
    "xformers": "train.attention=xformers",
    "xlsx": "Excel files",
    "video": "measures of clips",
    "tensorboard": "log.trackers=[tensorboard]",
    "wandb": "log.trackers=[wandb]",
    "demo": "the demo",
}
FREE_GB = 20  # of a disk, below which a model and its caches hardly fit
CONNECTED = 3.0  # seconds to wait for the Hub


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where that is a problem."""

    what: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What was found. problems: without which nothing works; advice: what could be better."""

    facts: list[Finding] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    advice: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(one.what) for one in (*self.facts, *self.problems, *self.advice))
        lines = [f"{one.what:<{width}}  {one.found}" for one in self.facts]
        for title, found in (("problems", self.problems), ("could be better", self.advice)):
            if found:
                lines += ["", f"{title}:", *(f"{one.what:<{width}}  {one.found}: {one.remedy}" for one in found)]
        return "\n".join([*lines, "", "This machine can train." if not self.problems else ""]).rstrip()


def doctor(*, online: bool = False) -> Diagnosis:
    """Look at the environment and say what is missing, and how to get it.

    Args:
        online: also ask whether the Hub can be reached and who is logged in.

    Raises:
        UserError: something without which nothing works; the message is the whole diagnosis.
    """
    diagnosis = Diagnosis()
    for kind, finding in chain(_packages(), _devices(), _disk(), _hub(online)):
        getattr(diagnosis, kind).append(finding)
    if diagnosis.problems:
        raise UserError(f"this machine cannot train yet\n{diagnosis}")
    return diagnosis


Found = Iterator[tuple[str, Finding]]


def _packages() -> Found:
    system = f"{platform.system()} {platform.machine()}"
    yield "facts", Finding("python", f"{platform.python_version()} on {system} ({sys.executable})")
    for name, requirement, extra in _requirements():
        installed = _version(name)
        wrong = installed is not None and not requirement.specifier.contains(installed, prereleases=True)
        need = f"{name}{requirement.specifier}"
        if extra:
            if installed is None:
                yield "advice", Finding(name, f"not installed, needed for {EXTRAS[extra]}", _pip(extra))
            elif wrong:
                yield "advice", Finding(name, installed, f"{EXTRAS[extra]} needs {need}: {_pip(extra)}")
        elif installed is None or wrong:
            yield "problems", Finding(name, installed or "not installed", f"pip install '{need}'")
    shown = ("torch", "diffusers", "transformers", "accelerate", "peft")
    yield "facts", Finding("packages", ", ".join(f"{name} {_version(name)}" for name in shown if _version(name)))


def _requirements() -> Iterator[tuple[str, Requirement, str]]:
    """The packages that are needed, and those of each extra in EXTRAS, from the installed metadata or setup.cfg."""
    try:
        lines = requires("t2i-align") or []
    except PackageNotFoundError:  # run from a clone
        setup = ConfigParser()
        setup.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
        extras = dict(setup["options.extras_require"]) if setup.has_section("options.extras_require") else {}
        lines = setup.get("options", "install_requires", fallback="").split("\n")
        lines += [f"{line}; extra == '{name}'" for name, text in extras.items() for line in text.split("\n") if line]
    seen = set[tuple[str, str]]()
    for line in filter(None, map(str.strip, lines)):
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"](.*?)['\"]", str(requirement.marker or ""))
        key = (requirement.name, extra[1] if extra else "")
        if key not in seen and (not key[1] or key[1] in EXTRAS):
            seen.add(key)
            yield requirement.name, requirement, key[1]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _pip(extra: str) -> str:
    return f"pip install 't2i-align[{extra}]'"


def _devices() -> Found:
    if importlib.util.find_spec("torch") is None:
        return  # a problem already
    import torch

    built = (torch.version.cuda and f"CUDA {torch.version.cuda}") or (torch.version.hip and f"ROCm {torch.version.hip}")
    yield "facts", Finding("torch built for", built or "CPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    from t2i_align.inference.options import cpu_computes_bf16

    bf16 = ", computes in bf16" if cpu_computes_bf16() else ""
    yield "facts", Finding("CPU", f"{cores} cores, {torch.get_num_threads()} threads{bf16}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _gpu(torch, index)
    elif torch.backends.mps.is_available():
        yield "facts", Finding("GPU", "Apple MPS")
    elif shutil.which("nvidia-smi"):
        how = "pip install torch --index-url https://download.pytorch.org/whl/cu128, or update the driver"
        yield "problems", Finding("GPU", "there is a driver, but torch sees no GPU", how)
    else:
        yield "facts", Finding("GPU", "none: the bundled models train on the CPU; for others rent one")
    kernels = ["native (torch SDPA)"]
    if torch.cuda.is_available() and _version("xformers"):
        kernels.append(f"xformers {_version('xformers')}")
    yield "facts", Finding("attention", ", ".join(kernels))


def _gpu(torch: Any, index: int) -> Found:
    properties = torch.cuda.get_device_properties(index)
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
    precisions = ["fp16", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])]
    precisions += ["tf32"] if properties.major >= 8 else []
    yield (
        "facts",
        Finding(
            f"GPU {index}",
            f"{properties.name}, {total:.1f} GiB ({free:.1f} free), capability {properties.major}.{properties.minor}, "
            f"{', '.join(precisions)}",
        ),
    )
    if free < 0.8 * total:
        yield "advice", Finding(f"GPU {index}", f"{total - free:.1f} GiB are in use", "end what else runs on it")


def _disk() -> Found:
    places = {"working folder": Path.cwd(), "Hub's cache": Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))}
    for name, place in places.items():
        there = place.expanduser().absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free / 1e9
        yield "facts", Finding(name, f"{place.expanduser()}, {free:.0f} GB free")
        if free < FREE_GB:
            yield "advice", Finding(name, f"{free:.0f} GB free", f"a model and its caches want {FREE_GB} GB or more")
        if not os.access(there, os.W_OK):
            yield "problems", Finding(name, "cannot be written to", "choose another (HF_HOME is the Hub's)")


def _hub(online: bool) -> Found:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        yield "facts", Finding("Hub", "HF_HUB_OFFLINE is set: only models that are in the cache")
        return
    if importlib.util.find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import HfApi, get_token

    token = get_token()
    yield (
        "facts",
        Finding("Hub", "a token is set" if token else "no token (HF_TOKEN or `hf auth login`): public models"),
    )
    if not online:
        return
    try:
        name = HfApi().whoami()["name"] if token else "nobody"
        if not token:
            HfApi().model_info("hf-internal-testing/tiny-random-bert", timeout=CONNECTED)
        yield "facts", Finding("Hub", f"reached, logged in as {name}")
    except Exception as error:  # no network, a bad token: the Hub's and the connection's own errors
        first = str(error).strip().partition("\n")[0]
        yield "advice", Finding("Hub", first, "without a network, give models as folders and set HF_HUB_OFFLINE=1")
