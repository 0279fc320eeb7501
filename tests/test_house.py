"""The layout, the packaging and the documents are as the documents promise."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines import FAMILIES
from reward_scorers.registry import FACTORIES
from t2i_align import config, objectives
from t2i_align.data.readers import READERS
from t2i_align.quickstart import CONFIG
from tools.testbed.__main__ import COMMANDS as TOOLS

ROOT = Path(__file__).parents[1]
PACKAGES = ("t2i_align", "pipelines", "reward_scorers")
SCORERS = ROOT / "configs" / "scorers"
CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*.y*ml") if SCORERS not in file.parents)
DOCUMENTS = sorted(
    file for pattern in ("*.md", "configs/*.md", "docs/**/*.md", "t2i_align/assets/*.md") for file in ROOT.glob(pattern)
)


def modules() -> list[str]:
    roots = [(str(ROOT / package), f"{package}.") for package in (*PACKAGES, "tools")]
    names = [info.name for path, prefix in roots for info in pkgutil.walk_packages([path], prefix=prefix)]
    return sorted([*PACKAGES, *(name for name in names if not name.endswith("__main__"))])


def test_the_list_of_modules_is_not_empty() -> None:
    assert {"t2i_align.objectives.sft", "t2i_align.cli", "pipelines.sd", "reward_scorers.base"} <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_a_users_own_pipelines_folder_does_not_break_the_objectives(tmp_path: Path) -> None:
    for package in ("pipelines", "reward_scorers"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('a package of the user')")
    code = "import sys, t2i_align.config; from t2i_align.objectives import OBJECTIVES; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    loaded = done.stdout.decode().split()
    assert "t2i_align.objectives.diffusion_dpo" in loaded
    assert not {"diffusers", "transformers", "pipelines"} & set(loaded)


def imported(file: Path) -> set[str]:
    """Every module that a file imports, at its top or later."""
    return names_in(ast.walk(ast.parse(file.read_text())))


def imported_at_once(file: Path) -> set[str]:
    """The modules that are imported together with a file: not those in functions or for type checkers alone."""
    nodes, at_once = list(ast.parse(file.read_text()).body), []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef):
            at_once.append(node)
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names_in(at_once)


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_imports_have_no_cycle() -> None:
    graph = {name: imported_at_once(file_of(name)) & set(modules()) - {name} for name in modules()}
    for name, imports in graph.items():  # `from package import module` needs the module; the package is its parent
        graph[name] = {i for i in imports if not any(other.startswith(f"{i}.") for other in imports)}
    assert len(graph) > 100 and graph["t2i_align.config"] >= {"t2i_align.objectives", "t2i_align.utils.settings"}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", ["pipelines", "reward_scorers"])
def test_pipelines_and_scorers_import_nothing_of_the_toolkit(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert "t2i_align" not in {name.partition(".")[0] for name in imported(file)}, file


def test_modules_are_few_at_the_top_and_short() -> None:
    assert len(list((ROOT / "t2i_align").glob("*.py"))) <= 8
    files = [file_of(name) for name in modules()] + list((ROOT / "tests").rglob("*.py"))
    assert not [file for file in files if len(file.read_text().splitlines()) > 350]


@pytest.mark.parametrize("file", sorted((ROOT / "t2i_align" / "objectives").glob("*.py")), ids=lambda file: file.stem)
def test_objectives_know_neither_trainer_nor_readers(file: Path) -> None:
    allowed = re.compile(r"t2i_align\.(objectives|errors|plugins|diffusion|data\.(batch|schema)|utils\.settings)(\.|$)")
    for name in imported(file):
        assert not name.startswith("t2i_align") or allowed.match(name), f"{file.name} imports {name}"


def test_every_configuration_loads_and_survives_a_round_trip() -> None:
    assert len(CONFIGS) >= 29
    for file in [*CONFIGS, CONFIG]:
        run = config.load(file)
        assert config.from_mapping(config.to_mapping(run)) == run, file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_configuration_is_named_after_family_and_objective_and_is_listed(file: Path) -> None:
    run = config.load(file)
    assert run.objective.name in file.stem
    assert run.output_dir == f"runs/{file.stem}"
    assert f"`{file.name}`" in (ROOT / "configs" / "README.md").read_text()


def test_readme_map_matches_the_folders() -> None:
    block = re.search(r"## The folders\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    listed, parent = set(), Path()
    for line in block[1].splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else Path(name)
        listed.add(parent / name if line.startswith(" ") else parent)
    missing = [str(path) for path in listed if not (ROOT / path).exists()]
    assert not missing, f"README lists {missing}"
    package = ROOT / "t2i_align"
    folders = {file.parent for file in package.glob("*/*.py")}
    for path in folders | {file for file in package.glob("*.py") if "__" not in file.name}:
        assert path.relative_to(ROOT) in listed, f"README's map lacks {path.name}"


def test_the_readme_lists_every_method_with_its_paper_file_and_configuration() -> None:
    rows = re.findall(r"^\| `(\w+)`.*$", section("## Methods"), re.MULTILINE)
    assert sorted(rows) == sorted(objectives.OBJECTIVES)
    for line in section("## Methods").splitlines():
        if not (row := re.match(r"\| `(\w+)`", line)):
            continue
        cls = objectives.get(row[1])
        assert cls.paper.removeprefix("arXiv ") in line
        assert f"{cls.__module__.replace('.', '/')}.py" in line
        assert re.findall(r"\(configs/([^)]+)\)", line) == [cls.config]


def section(title: str) -> str:
    text = (ROOT / "README.md").read_text()
    return text.split(title, 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_in_the_documents_resolve(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
        assert target.startswith("http") or (file.parent / target).exists(), f"{file.name} -> {target}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_configurations_and_keys_named_in_the_documents_exist(file: Path) -> None:
    text = file.read_text()
    for name in re.findall(r"\bconfigs/[\w.]+\.yaml", text):
        assert (ROOT / name).is_file(), f"{file.name} names {name}"
    known = config.to_mapping(config.load(CONFIG))
    known["objective"] = {field for cls in objectives.OBJECTIVES.values() for field in cls.__dataclass_fields__}
    for group, key in re.findall(
        r"\b(objective|model|data|lora|optim|train|validation|log|health)\.(\w+)(?==|`)", text
    ):
        assert key in known[group] or f"{group}.{key}" in ("data.md", "train.py", "train.yaml"), (
            f"{file.name} names {group}.{key}"
        )


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_modules_and_scripts_named_in_the_documents_exist(file: Path) -> None:
    text = file.read_text()
    folders = "|".join(path.parent.name for path in (*ROOT.glob("*/*"), *ROOT.glob("t2i_align/*/*")))
    for name in re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]+\.(?:py|md|png|ipynb|parquet)\b", text):
        assert (ROOT / name).is_file() or (ROOT / "t2i_align" / name).is_file(), f"{file.name} names {name}"
    for name, module in re.findall(r"`(\w+)`\s(?:in|of)\s`([\w/]+\.py)`", text):
        path = next(path for path in (ROOT / module, ROOT / "t2i_align" / module) if path.is_file())
        assert re.search(rf"\b{name}\b", path.read_text()), f"{file.name}: {module} has no {name}"
    dotted = re.findall(rf"\b(?:{'|'.join(PACKAGES)}|tools)(?:\.[A-Za-z_]+)+\b(?!/)", text)
    dotted += [f"{package}.{name}" for package, names in re.findall(r"^from (\S+) import (.+)", text, re.M)
               for name in re.findall(r"\w+", names)]  # fmt: skip
    for name in dotted:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_names_imported_by_benchmarks_exist(file: Path) -> None:
    for name in imported(file):
        if name.partition(".")[0] in (*PACKAGES, "tools"):
            pkgutil.resolve_name(name)


def test_scripts_named_in_the_documents_take_the_options_named_with_them() -> None:
    commands = 0
    for file in [*DOCUMENTS, *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("benchmarks/*.py")]:
        for script, options in re.findall(
            r"python (benchmarks/\w+\.py|-m tools\.testbed [a-z][a-z-]*)([^`&\n]*)", file.read_text()
        ):
            sources = [ROOT / script]
            if script.startswith("-m"):
                assert script.split()[-1] in TOOLS, f"{file.name} names {script}"
                sources = [*(ROOT / "tools" / "testbed").glob("*.py")]
            source = "".join(path.read_text() for path in sources)
            missing = [name for name in re.findall(r"--[a-z0-9-]+", options) if f'"{name}"' not in source]
            assert not missing, f"{file.name}: {script} has no {missing}"
            commands += 1
    assert commands > 20


@pytest.mark.parametrize(
    ("guide", "names"),
    [("objectives", objectives.CLASSES), ("families", FAMILIES), ("scorers", list(FACTORIES)), ("data", READERS)],
)
def test_every_built_in_name_is_in_its_guide(guide: str, names: Iterable[str]) -> None:
    text = (ROOT / "docs" / f"{guide}.md").read_text()
    missing = [name for name in names if not re.search(rf"`{re.escape(name)}[`:]", text)]
    assert not missing, f"docs/{guide}.md lacks {missing}"


def test_the_guide_explains_every_key_of_a_run() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    for group, value in config.to_mapping(config.load(CONFIG)).items():
        keys = [f"{group}.{key}" for key in value] if isinstance(value, dict) and group != "objective" else [group]
        for key in keys:
            assert f"`{key}`" in text, f"docs/training.md says nothing of {key}"


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    assert {"quickstart", "test", "lint", "bench", "notebooks", "clean", "help"} <= set(phony[1].split())
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE), target


def test_constraints_are_exact_and_inside_the_declared_ranges() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {}
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator and re.fullmatch(r"[\w.]+", version), line
        pinned[normal(name)] = version
    assert len(pinned) == len(lines)
    for requirement in requirements():
        if requirement.name == "hpsv2":  # its own pins exclude everything else's; see setup.cfg
            continue
        assert normal(requirement.name) in pinned, f"{requirement.name} has no tested version"
        assert requirement.specifier.contains(pinned[normal(requirement.name)]), str(requirement)


def test_every_library_that_is_imported_is_declared() -> None:
    names = {normal(requirement.name) for requirement in requirements()}
    distributions = importlib.metadata.packages_distributions()
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    for module in sorted({name.partition(".")[0] for file in files for name in imported(file)}):
        if module not in (*sys.stdlib_module_names, *PACKAGES):
            owners = {normal(owner) for owner in distributions.get(module, [module])}
            assert owners & names, f"{module} is imported but not in setup.cfg"


def requirements() -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return [Requirement(line) for block in declared for line in block.splitlines() if line and line[0] != "#"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
