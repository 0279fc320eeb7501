"""The parser: typer commands made from signatures, each when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from t2i_align import __version__
from t2i_align.cli.commands import COMMANDS, GROUPS, Command
from t2i_align.cli.signature import parameters
from t2i_align.errors import unknown

PLAIN: dict[str, Any] = {
    "rich_markup_mode": None,  # rich doubles the start-up time
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class LazyGroup(TyperGroup):
    """The commands whose names begin with `prefix`."""

    prefix = ""
    listing = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        self.listing = True  # which shows no options: these are read from each function's source
        super().format_commands(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        names = [name.removeprefix(self.prefix) for name in COMMANDS if name.startswith(self.prefix)]
        return list(dict.fromkeys(name.split()[0] for name in names))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (name := self.prefix + cmd_name) in GROUPS:
            group = type(name, (LazyGroup,), {"prefix": f"{name} "})
            nested = typer.Typer(cls=group, help=GROUPS[name], add_completion=False, **PLAIN)
            nested.callback()(lambda: None)
            return typer.main.get_command(nested)
        if self.listing and name in COMMANDS:
            return TyperCommand(name, short_help=COMMANDS[name].summary)
        return build(name) if name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            what = f"action of {self.prefix.strip()}" if self.prefix else "command"
            print(f"error: {unknown(what, args[0], known)}", file=sys.stderr)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


class SpreadCommand(TyperCommand):
    """A command whose list options take several values: `--scorers a b` as well as `--scorers a --scorers b`."""

    single: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {p.opts[0] for p in self.params if getattr(p, "multiple", False) and p.name not in self.single}
        out: list[str] = []
        flag = ""
        for argument in args:
            if argument.startswith("-") and len(argument) > 1:
                flag = argument if argument in lists else ""
            elif flag and out[-1] != flag:
                out.append(flag)
            out.append(argument)
        return super().parse_args(ctx, out)


def build(name: str) -> Any:
    """The parser of one command, from the signature and docstring of its function."""
    command = COMMANDS[name]
    single = typer.Typer(add_completion=False, **PLAIN)
    single.command(
        name.split()[-1],
        cls=type(name, (SpreadCommand,), {"single": (*command.single, "plugin")}),
        help=f"{command.summary[0].upper()}{command.summary[1:]}.",
        short_help=command.summary,
        epilog="\b\nexamples:\n" + "\n".join(f"  {example}" for example in command.examples),
    )(_entry(command))
    return typer.main.get_command(single)


def _entry(command: Command) -> Callable[..., None]:
    """A function with the signature for typer. It passes on what was given, so that defaults are the library's own."""

    def entry(debug: bool = False, plugin: list[str] | None = None, **values: Any) -> None:
        given = {key: value for key, value in values.items() if not (value is None or value is False or value == [])}
        raise typer.Exit(command.run(given, plugins=plugin or (), debug=debug))

    signature = []
    for p in parameters(command.function):
        text = p.help if p.default is None else f"{p.help} [default: {p.default}]"
        if p.positional:
            info: Any = typer.Argument(help=text, metavar="key=value" if p.name == "overrides" else None)
        else:
            info = typer.Option(f"--{p.name.replace('_', '-')}", help=text)
        optional = not p.required and p.type is not bool
        default = Parameter.empty if p.required else None if optional else False
        kind = Annotated[p.type | None if optional else p.type, info]  # type: ignore[valid-type]
        signature.append(Parameter(p.name, Parameter.KEYWORD_ONLY, annotation=kind, default=default))
    if command.engines:
        engine = typer.Option("--engine", help="what starts the processes, on one machine or many; torchrun needs none")
        workers = typer.Option("--workers", help="processes that Ray starts [default: one for each GPU of the cluster]")
        kinds: dict[str, Any] = {
            "engine": Annotated[Literal["ray"] | None, engine],
            "workers": Annotated[int | None, workers],
        }
        signature += [Parameter(n, Parameter.KEYWORD_ONLY, annotation=kind, default=None) for n, kind in kinds.items()]
    text = "Python file or module to run first; what it registers is known by its name (may be given several times)"
    places = Annotated[list[str] | None, typer.Option("--plugin", help=text)]
    signature.append(Parameter("plugin", Parameter.KEYWORD_ONLY, annotation=places, default=None))
    flag = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
    signature.append(Parameter("debug", Parameter.KEYWORD_ONLY, annotation=flag, default=False))
    entry.__signature__ = Signature(signature)  # type: ignore[attr-defined]
    return entry


def _print_version(asked: bool) -> None:
    if asked:
        print(f"t2i-align {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, help="Align text-to-image diffusion models with human preferences.", **PLAIN)
VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")


@app.callback()
def _options(version: Annotated[bool, VERSION] = False) -> None:
    pass
