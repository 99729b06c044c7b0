"""The command line: what it lists, what it refuses, and commands that plugins bring."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import pytest
from plugins_support import BUILTINS, DISABLE, EXPLODES, SOLVER, run_python
from pydantic import Field

import deqcore
from deqcore import MissingExtraError, SolverChoice, SolverSettings, registry
from deqcore.cli import main
from deqcore.cli.describe import settings_of, type_text

HELLO = """
from typing import Annotated
import typer
from deqcore import hookimpl

def greet(name: str = "world", times: Annotated[int, typer.Option(min=1)] = 1) -> None:
    "Greet somebody."
    for _ in range(times):
        print(f"hello {name}")

@hookimpl
def deqcore_command():
    return greet
"""
SUITE = """
import typer
from deqcore import hookimpl

app = typer.Typer(help="Two commands.")

@app.command()
def one() -> None:
    "The first."
    print("one")

@app.command()
def two(word: str) -> None:
    "The second."
    print("two", word)

@hookimpl
def deqcore_command():
    return app
"""
COMMANDS = "deqcore.commands"


@pytest.fixture
def run(capsys):
    """Run the program here; returns exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def listed(run):
    """The rows of ``plugins list --json``, by (kind, origin, name)."""

    def call(*arguments: str) -> dict[tuple[str, str, str], dict[str, str]]:
        code, out, _ = run("plugins", "list", "--json", *arguments)
        assert code == 0
        return {(row["kind"], row["origin"], row["name"]): row for row in json.loads(out)["plugins"]}

    return call


def refused(result: tuple[int, str, str]) -> str:
    """The text of an error that was reported as it should be: one line on stderr, exit code 2, nothing else."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


# ---- plugins list


def test_version(run):
    assert run("--version") == (0, f"deqcore {deqcore.__version__}\n", "")


def test_list_has_every_builtin_and_its_meaning(listed):
    rows = listed()
    for kind, names in BUILTINS.items():
        for name in names:
            row = rows[kind, "deqcore", name]
            assert row["status"] == "ok", row
            assert row["cause"] == ""
            assert row["version"] == deqcore.__version__
            assert row["module"] == registry.find(kind, name).value
            assert row["meaning"]
            assert "\n" not in row["meaning"]
    assert set(rows["solvers", "deqcore", "anderson"]) == {
        "kind", "name", "origin", "version", "module", "status", "cause", "meaning",
    }  # fmt: skip


def test_list_json_prints_nothing_but_the_document(run):
    code, out, err = run("plugins", "list", "--json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)) == ["plugins"]


@pytest.mark.parametrize("spelling", ["solver", "solvers", "Solvers", "SOLVER"])
def test_list_takes_a_kind_in_singular_and_plural(listed, spelling):
    assert sorted(name for _, _, name in listed(spelling)) == BUILTINS["solvers"]


def test_list_of_an_empty_kind(run, listed):
    assert listed("model") == {}
    assert run("plugins", "list", "models") == (0, "No models installed.\n", "")


def test_table_has_all_columns(run, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, _ = run("plugins", "list")
    header, *body = out.splitlines()
    assert code == 0
    assert header.split() == ["kind", "name", "origin", "version", "status", "meaning"]
    anderson = next(line for line in body if " anderson " in line)
    assert anderson.split()[:5] == ["solvers", "anderson", "deqcore", deqcore.__version__, "ok"]
    assert "Mixes the last states" in anderson


def test_narrow_terminal_loses_no_text(run, listed, site, monkeypatch):
    site.install("acme", {"acme_bad": EXPLODES}, {"deqcore.solvers": {"gauss": "acme_bad"}})
    rows = listed()
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run("plugins", "list")
    squeezed = "".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    for row in rows.values():
        for text in (row["name"], row["status"], row["cause"] or row["meaning"]):
            assert "".join(text.split()) in squeezed


BAD_MODULES = {
    "raises": ("raise RuntimeError('no wheels')", "no wheels"),
    "imports": ("import there_is_no_such_module", "there_is_no_such_module"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "extra": ("from deqcore import MissingExtraError\nraise MissingExtraError('it', 'jax', 'jax')", "deqcore[jax]"),
    "misspelt": ("from deqcore import hookimpl\n@hookimpl\ndef deqcore_solvr(): ...", "deqcore_solver"),
    "nohook": ("", "deqcore_solver"),
    "future": ("DEQCORE_API_VERSION = 99" + SOLVER, "99"),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_a_broken_plugin_is_listed_with_its_cause(listed, site, name):
    source, cause = BAD_MODULES[name]
    site.solver("acme", "gauss", f"acme_{name}", source)
    rows = listed()
    row = rows.pop(("solvers", "acme", "gauss"))
    assert row["status"] == "broken"
    assert cause in row["cause"]
    assert row["meaning"] == ""
    assert {other["status"] for other in rows.values()} == {"ok"}


def test_statuses(listed, site, monkeypatch):
    site.solver("acme", "anderson", "acme_anderson")
    site.solver("acme2", "gauss", "acme_newton")
    site.solver("rival", "gauss", "rival_newton")
    site.solver("off", "quiet", "off_quiet", EXPLODES)
    monkeypatch.setenv(DISABLE, "off/*,solver:broyden")
    rows = {(origin, name): row["status"] for (_, origin, name), row in listed("solver").items()}
    assert rows["deqcore", "anderson"] == "ok"
    assert rows["acme", "anderson"] == "shadowed"
    assert rows["acme2", "gauss"] == rows["rival", "gauss"] == "clash"
    assert rows["off", "quiet"] == rows["deqcore", "broyden"] == "disabled"


def test_local_registrations_are_listed(listed):
    class Mine(deqcore.Solver[SolverSettings]):
        """Nothing yet."""

    with registry.scope():
        registry.register("solver", "mine", Mine)
        row = listed()["solvers", f"local:{__name__}", "mine"]
    assert (row["status"], row["version"], row["meaning"]) == ("ok", "", "Nothing yet.")


def test_works_with_every_builtin_blocked():
    code = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("deqcore_"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Block())
    from deqcore.cli import main
    try:
        main(["plugins", "list", "--json"])
    finally:
        assert not [name for name in sys.modules if name.startswith("deqcore_")]
    """
    rows = json.loads(run_python(code))["plugins"]
    assert {row["status"] for row in rows if row["origin"] == "deqcore"} == {"broken"}
    assert all("is blocked" in row["cause"] for row in rows if row["origin"] == "deqcore")


def test_works_with_every_builtin_disabled(listed, run, monkeypatch):
    monkeypatch.setenv(DISABLE, "deqcore/*")
    assert {row["status"] for row in listed().values()} == {"disabled"}
    assert run("plugins", "list")[0] == 0
    assert "demo" not in run("--help")[1]
    assert DISABLE in refused(run("demo"))


# ---- plugins show


@pytest.mark.parametrize("kind", ["solvers", "gradients", "cores", "norms", "regularizers"])
def test_show_has_every_setting(run, kind):
    for name in BUILTINS[kind]:
        code, out, err = run("plugins", "show", kind, name, "--json")
        assert (code, err) == (0, "")
        shown = json.loads(out)
        cls = registry.get(kind, name)
        assert (shown["kind"], shown["name"], shown["origin"]) == (kind, name, "deqcore")
        assert (shown["version"], shown["module"]) == (deqcore.__version__, cls.__module__)
        assert shown["docstring"].split() == cls.__doc__.split()
        settings = {setting["name"]: setting for setting in shown["settings"]}
        assert {*settings} == {*cls.settings_type.model_fields} - {"name"}
        for field, setting in settings.items():
            assert setting["meaning"] == cls.settings_type.model_fields[field].description
            assert {cls.settings_type.aliases[alias] for alias in setting["aliases"]} <= {field}
        assert sum(len(setting["aliases"]) for setting in settings.values()) == len(cls.settings_type.aliases)
        defaults = cls.settings_type(name=name)
        for field, setting in settings.items():
            value = getattr(defaults, field)
            if value is None or isinstance(value, bool | int | float | str):
                assert setting["default"] == value


def test_show_anderson(run):
    _, out, _ = run("plugins", "show", "solver", "anderson", "--json")
    settings = json.loads(out)["settings"]
    assert settings[0] == {
        "name": "memory",
        "type": "int >= 1",
        "required": False,
        "default": 14,
        "aliases": ["m"],
        "meaning": registry.get("solvers", "anderson").settings_type.model_fields["memory"].description,
        "own": True,
    }
    own = [setting["own"] for setting in settings]
    assert own == sorted(own, reverse=True), "settings of its own come first"
    assert next(setting for setting in settings if setting["name"] == "stop_mode")["type"] == "abs | rel"


def test_show_as_text(run, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, err = run("plugins", "show", "solver", "deqcore/anderson")
    assert (code, err) == (0, "")
    assert out.startswith(f"anderson (solver)\ndeqcore {deqcore.__version__}, module deqcore_solvers.anderson\n")
    assert "Walker and Ni" in out
    memory = next(line for line in out.splitlines() if line.startswith("memory  "))
    assert memory.split()[:6] == ["memory", "int", ">=", "1", "14", "m"]
    assert "    z <- f(z)" in out, "formulas keep their lines"


def test_show_a_command_and_a_plugin_of_another_distribution(run, site):
    site.install("acme", {"acme_hello": HELLO}, {COMMANDS: {"hello": "acme_hello"}}, version="2.0")
    code, out, _ = run("plugins", "show", "command", "acme/hello", "--json")
    shown = json.loads(out)
    assert code == 0
    assert (shown["origin"], shown["version"], shown["docstring"], shown["settings"]) == (
        "acme", "2.0", "Greet somebody.", [],
    )  # fmt: skip


class Nested(SolverSettings):
    aliases = {"h": "count"}  # noqa: RUF012

    count: Annotated[int, Field(gt=0)] = 3
    needed: float = Field(description="no default")
    ratio: float | None = Field(None, ge=0, lt=1)
    ends: float = float("inf")
    mode: Literal["a", "b"] = "a"
    some: tuple[int, ...] = (1, 2)
    inner: SolverChoice = Field("anderson", validate_default=True)  # type: ignore[assignment]


def test_settings_are_said_in_a_readers_words():
    settings = {setting["name"]: setting for setting in settings_of(Nested) if setting["own"]}
    assert {name: setting["type"] for name, setting in settings.items()} == {
        "count": "int > 0",
        "needed": "float",
        "ratio": "float >= 0, < 1 | none",
        "ends": "float",
        "mode": "a | b",
        "some": "list of int",
        "inner": "solver (a name, or a table with one)",
    }
    assert settings["needed"]["required"] is True
    assert settings["needed"]["default"] is None
    assert settings["count"]["aliases"] == ["h"]
    assert settings["ends"]["default"] == "inf", "JSON has no number for it"
    assert settings["some"]["default"] == [1, 2]
    assert type_text(SolverSettings.model_fields["max_iter"]) == "int >= 0"


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plugins", "list", "solvr"], "solvers"),
        (["plugins", "show", "solver", "andersen"], "Did you mean 'anderson'?"),
        (["plugins", "show", "norm", "anderson"], "is a solver"),
        (["plugins", "show", "thing", "anderson"], "kinds:"),
        (["dmeo"], "Did you mean 'demo'?"),
        (["nobody/demo"], "nobody/demo"),
    ],
)
def test_deqcore_errors_are_one_line_and_exit_2(run, arguments, said):
    assert said in refused(run(*arguments))


def test_show_a_broken_and_a_disabled_plugin(run, site, monkeypatch):
    site.solver("acme", "gauss", "acme_newton", "raise RuntimeError('line one\\nline two')")
    text = refused(run("plugins", "show", "solver", "gauss"))
    assert "line one line two" in text
    assert "acme 1.2.3" in text
    monkeypatch.setenv(DISABLE, "acme/*")
    assert DISABLE in refused(run("plugins", "show", "solver", "gauss"))


@pytest.mark.parametrize("arguments", [["plugins", "list", "--frob"], ["plugins", "show"], ["--frob"]])
def test_wrong_options_are_usage_errors(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: deqcore" in err
    assert "Traceback" not in err


def test_a_warning_is_one_line(run, site):
    site.solver("acme", "anderson", "acme_anderson", EXPLODES)
    with pytest.warns(deqcore.PluginWarning):
        registry.find("solvers", "anderson")
    output = run_python(
        """
        import contextlib, io, sys, warnings
        from deqcore.cli import main
        sys.stderr = io.StringIO()
        with contextlib.suppress(SystemExit):
            main(["plugins", "show", "solver", "anderson", "--json"])
        print("STDERR", sys.stderr.getvalue(), end="")
        """,
        env={"PYTHONPATH": str(site.path)},
    )
    lines = output.partition("STDERR ")[2].splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: 'anderson' means deqcore's own solver; acme/anderson")


# ---- commands that plugins bring


def test_a_function_is_a_command(run, site):
    site.install("acme", {"acme_hello": HELLO}, {COMMANDS: {"hello": "acme_hello"}})
    assert run("hello") == (0, "hello world\n", "")
    assert run("hello", "--name", "z", "--times", "2") == (0, "hello z\nhello z\n", "")
    assert run("hello", "--times", "0")[0] == 2
    code, out, _ = run("hello", "--help")
    assert code == 0
    assert "Usage: deqcore hello" in out
    assert "Greet somebody." in out


def test_a_typer_app_is_a_group_of_commands(run, site):
    site.install("acme", {"acme_suite": SUITE}, {COMMANDS: {"suite": "acme_suite"}})
    assert run("suite", "one") == (0, "one\n", "")
    assert run("suite", "two", "x") == (0, "two x\n", "")
    assert "Two commands." in run("suite", "--help")[1]


def test_only_the_command_named_is_imported(run, site):
    site.install("acme", {"acme_hello": HELLO}, {COMMANDS: {"hello": "acme_hello"}})
    site.install("bomb", {"bomb_command": EXPLODES}, {COMMANDS: {"bomb": "bomb_command"}})
    code, out, _ = run("--help")
    assert code == 0
    assert "hello" in out
    assert "bomb" in out
    assert "demo" in out
    assert not {"acme_hello", "bomb_command"} & sys.modules.keys()
    assert run("hello")[:2] == (0, "hello world\n")
    assert "bomb_command" not in sys.modules


def test_help_imports_no_command():
    output = run_python(
        """
        import contextlib, sys
        from deqcore.cli import main
        with contextlib.suppress(SystemExit):
            main(["--help"])
        print("LOADED", [name for name in sys.modules if name.startswith("deqcore_")])
        """
    )
    assert "demo" in output
    assert output.rstrip().endswith("LOADED []")


def test_a_broken_command_breaks_nothing_else(run, site):
    site.install("bomb", {"bomb_command": EXPLODES}, {COMMANDS: {"bomb": "bomb_command"}})
    assert "bomb 1.2.3" in refused(run("bomb"))
    assert "bomb 1.2.3" in refused(run("bomb", "--help"))
    assert run("plugins", "list", "norms")[0] == 0
    assert run("--help")[0] == 0


@pytest.mark.parametrize("answer", ["42", "None", "'hello'", "takes_a_thing"])
def test_a_hook_must_return_a_command(run, site, answer):
    source = f"""
from deqcore import hookimpl

def takes_a_thing(thing: "Nowhere") -> None: ...

@hookimpl
def deqcore_command():
    return {answer}
"""
    site.install("acme", {"acme_odd": source}, {COMMANDS: {"odd": "acme_odd"}})
    assert "acme 1.2.3" in refused(run("odd"))


def test_errors_of_a_command(run, site, monkeypatch):
    source = """
from deqcore import ConfigError, hookimpl

def fail(how: str) -> None:
    raise {"deq": ConfigError("not [bold]this[/bold]"), "stop": KeyboardInterrupt(), "own": ZeroDivisionError()}[how]

@hookimpl
def deqcore_command():
    return fail
"""
    site.install("acme", {"acme_fail": source}, {COMMANDS: {"fail": "acme_fail"}})
    assert refused(run("fail", "deq")) == "error: not [bold]this[/bold]\n"
    assert run("fail", "stop")[0] in (1, 130)
    with pytest.raises(ZeroDivisionError):
        main(["fail", "own"])


def test_names_of_commands(run, site, monkeypatch):
    site.install("acme", {"acme_hello": HELLO}, {COMMANDS: {"hello": "acme_hello", "plugins": "acme_hello"}})
    assert run("plugins", "list", "cores")[0] == 0, "our own commands keep their names"
    assert run("acme/hello")[1] == "hello world\n"
    site.install("other", {"other_hello": HELLO}, {COMMANDS: {"hello": "other_hello"}})
    assert "claimed by" in refused(run("hello"))
    assert run("other/hello")[1] == "hello world\n"
    monkeypatch.setenv(DISABLE, "other/*")
    assert run("hello")[1] == "hello world\n"
    monkeypatch.setenv(DISABLE, "command:hello")
    assert DISABLE in refused(run("hello"))
    assert "hello" not in run("--help")[1]


def test_a_command_registered_in_this_process(run):
    def ping() -> None:
        print("pong")

    with registry.scope():
        registry.register("command", "ping", ping)
        assert run("ping") == (0, "pong\n", "")


def test_missing_extra_says_how_to_get_it(run, site):
    source = f"from deqcore import {MissingExtraError.__name__}\nraise MissingExtraError('this', 'jax', 'jax')"
    site.install("acme", {"acme_extra": source}, {COMMANDS: {"extra": "acme_extra"}})
    assert "pip install 'deqcore[jax]'" in refused(run("extra"))
