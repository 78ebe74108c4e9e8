"""docs/cli.md is what the code says; no option has two spellings or two meanings."""

import importlib.util
from collections import defaultdict
from pathlib import Path

from unihema.modeling_unihema import tasks
from unihema.results import export
from unihema_cli import analyse, options


ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
make_cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_cli)

# Options that are said in two ways, and why.
VARIANTS = {
    "--output": "a folder where a command leaves several files, one file where it is optional beside what is printed",
    "--task": "several tasks can be analysed, trained and measured; a file, a card and a list are of one",
    "--split": "several splits become shards; figures are of one",
}
# Words of which the other spelling must not come back.
ONE_SPELLING = {"licence": "license", "lr": "learning-rate", "init": "initial-checkpoint", "bf16": "mixed-precision"}


def all_options():
    return [(name, option) for _, name, command in make_cli.commands() for option in make_cli.options(command)]


def test_the_page_is_what_the_code_says():
    assert make_cli.PAGE.read_text(encoding="utf-8") == make_cli.page(), "run python docs/make_cli.py"


def test_an_option_has_one_meaning():
    meanings = defaultdict(set)
    for _, option in all_options():
        meanings[make_cli.long_name(option)].add((make_cli.value_of(option), option.help, tuple(option.opts)))
    several = {name for name, found in meanings.items() if len(found) > 1}
    assert several == set(VARIANTS)
    assert all(None not in (help for _, help, _ in found) for found in meanings.values())
    for name in VARIANTS:
        values, helps, spellings = (set(part) for part in zip(*meanings[name]))
        assert len(values) == len(spellings) == 1 and len(helps) == 2


def test_a_meaning_has_one_spelling():
    spellings, letters = defaultdict(set), defaultdict(set)
    for _, option in all_options():
        spellings[option.help].add(make_cli.long_name(option))
        for short in set(option.opts) - {make_cli.long_name(option)}:
            letters[short].add(make_cli.long_name(option))
    assert [names for names in spellings.values() if len(names) > 1] == []
    assert [names for names in letters.values() if len(names) > 1] == []
    for _, option in all_options():
        assert not set(make_cli.long_name(option).strip("-").split("-")) & set(ONE_SPELLING)


def test_a_setting_has_its_own_name_and_help():
    for _, _, command in make_cli.commands():
        for dotted, option in getattr(command, "setting_options", {}).items():
            assert make_cli.long_name(option) == "--" + dotted.rpartition(".")[2].replace("_", "-")
            assert len(option.help) > 10


def test_tasks_are_those_of_the_table():
    assert tuple(tasks.TASK_TABLE) == options.TASKS


def test_formats_are_those_of_the_results():
    assert export.FORMATS == analyse.FORMATS


def test_help_is_plain_text():
    from click.testing import CliRunner

    from unihema_cli import app

    shown = CliRunner().invoke(app, ["--help"], color=True).output
    assert shown.isascii() and "\x1b" not in shown
    headings = [line.rstrip(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options", "Analyse", "Review", "Teach", "Measure", "Serve", "Share", "Data"]


def test_every_command_that_computes_takes_a_device():
    takers = {name for name, option in all_options() if make_cli.long_name(option) == "--device"}
    assert takers == {"adapt", "ask", "evaluate", "predict", "reference", "serve", "train"}
