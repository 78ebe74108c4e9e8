"""One family of errors: exported, and the only one that the command shows in a line."""

import inspect
import sys

import pytest

import unihema
import unihema_cli
from unihema import errors


# The module; the package's `app` is what it makes.
COMMAND = sys.modules[unihema_cli.main.__module__]
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


def test_every_kind_is_of_the_family_and_exported():
    assert len(KINDS) > 10
    for kind in KINDS:
        assert issubclass(kind, unihema.UniHemaError)
        assert getattr(unihema, kind.__name__) is kind
        assert kind.__name__ in unihema.__all__ and kind.__name__ in errors.__all__


@pytest.mark.parametrize("error", [kind("smear.png: what is wrong. The remedy.") for kind in KINDS], ids=repr)
def test_command_shows_the_family_in_one_line(error, monkeypatch, capsys):
    def fails():
        raise error

    monkeypatch.setattr(COMMAND, "app", fails)
    with pytest.raises(SystemExit) as left:
        unihema_cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "unihema: smear.png: what is wrong. The remedy.\n"


@pytest.mark.parametrize("fault", [ValueError("ours"), OSError("ours"), RuntimeError("ours"), KeyError("ours")])
def test_a_fault_of_ours_looks_like_one(fault, monkeypatch):
    def fails():
        raise fault

    monkeypatch.setattr(COMMAND, "app", fails)
    with pytest.raises(type(fault), match="ours"):
        unihema_cli.main()


def test_debug_shows_the_traceback(monkeypatch):
    def fails():
        raise unihema.InputError("what is wrong")

    monkeypatch.setattr(COMMAND, "app", fails)
    monkeypatch.setenv("UNIHEMA_DEBUG", "1")
    with pytest.raises(unihema.InputError):
        unihema_cli.main()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_says_is_shown_as_text(kind):
    error = kind("a.png: \x1b[2J\x00 \u202e named so\nand a second line \ud800")
    assert str(error) == "a.png: \\x1b[2J\\x00 \\u202e named so\nand a second line \\ud800"
