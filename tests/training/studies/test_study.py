"""The study engine: what is finished is kept for the same settings only, and what was stopped is shown and gone on with."""

import json

import pytest

from unihema.errors import RunConfigError
from unihema.training.studies.study import Report, Run, read_record, run_study, shown, table


def study(folder, names, done=None, rate=1, **options):
    """Runs that note their names in `done`, and give how many results there were before them."""
    done = [] if done is None else done

    def run(name):
        def measure(results):
            if name == "stops":
                raise KeyboardInterrupt
            done.append(name)
            return {"before": len(results), "rate": rate}

        return Run(name, {"rate": rate}, measure)

    def report(results):
        return Report({"best": max(results)}, table(("run", "before"), [(n, r["before"]) for n, r in results.items()]))

    return run_study(folder, "trial", [run(name) for name in names], report, **options)


def test_finished_runs_are_kept_and_a_stopped_study_shows_them(tmp_path):
    done = []
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, ["a", "b", "stops"], done)
    written = json.loads((tmp_path / "trial.json").read_text())
    assert list(written["runs"]) == ["a", "b"] and written["best"] == "b"
    assert (tmp_path / "trial.md").read_text() == "| run | before |\n|---|---|\n| a | 0 |\n| b | 1 |\n"
    with pytest.raises(RunConfigError, match=r"trial.json holds a, b of an earlier run. Go on with it \(resume=True\)"):
        study(tmp_path, ["a"])
    found = study(tmp_path, ["c", "a"], done, resume=True)
    assert done == ["a", "b", "c"] and found["c"]["before"] == 2 and list(found) == ["a", "b", "c"]
    assert study(tmp_path, ["a"], done, overwrite=True) == {"a": {"before": 0, "rate": 1}} and done[3:] == ["a"]


def test_other_settings_are_named(tmp_path):
    study(tmp_path, ["a"], settings={"data": {"split": "val"}})
    with pytest.raises(
        RunConfigError, match=r"a in .*trial.json is finished and was made with rate=1; now it is 2\. Keep"
    ):
        study(tmp_path, ["a"], rate=2, resume=True, settings={"data": {"split": "val"}})
    with pytest.raises(RunConfigError, match=r"begun with data.split='val'; now it is 'test'.*delete .*trial.json"):
        study(tmp_path, ["b"], resume=True, settings={"data": {"split": "test"}})
    (tmp_path / "trial.json").write_text('{"runs": []}')
    with pytest.raises(RunConfigError, match=r"trial.json: cannot be read .*Delete it"):
        read_record(tmp_path, "trial")


def test_a_run_whose_folder_is_gone_is_done_again_with_those_that_need_it(tmp_path):
    done = []

    def run(name, *needs):
        def measure(_):
            (tmp_path / name).mkdir()
            done.append(name)
            return name

        return Run(name, {}, measure, tmp_path / name, needs)

    runs = [run("a"), run("b", "a"), run("c")]
    run_study(tmp_path, "trial", runs)
    (tmp_path / "a").rmdir()
    with pytest.raises(RunConfigError, match="/b was made from a, which is to be done again: delete it too"):
        run_study(tmp_path, "trial", runs, resume=True)
    (tmp_path / "b").rmdir()
    stopping = [
        Run("a", {}, runs[0].measure, tmp_path / "a"),
        Run("b", {}, lambda _: 1 / 0, tmp_path / "b", ["a"]),
        runs[2],
    ]
    with pytest.raises(ZeroDivisionError):
        run_study(tmp_path, "trial", stopping, resume=True)
    # The old result of b is gone at once, or a kill after b was made would keep it.
    assert list(read_record(tmp_path, "trial")["runs"]) == ["c", "a"]
    run_study(tmp_path, "trial", runs, resume=True)
    assert done == ["a", "b", "c", "a", "b"]


def test_what_is_new_is_what_would_be_read(tmp_path):
    run = Run("a", {"of": (1, 2)}, lambda _: {"x": float("nan"), "y": (1, 2)})
    new = run_study(tmp_path, "trial", [run])
    assert new == {"a": {"x": None, "y": [1, 2]}} == run_study(tmp_path, "trial", [run], resume=True)
    nothing = run_study(tmp_path / "none", "trial", [Run("a", {}, lambda _: None)])
    assert nothing == {} and not (tmp_path / "none").exists()


def test_a_figure_and_its_interval():
    assert shown(0.12345, [0.1, 0.2]) == "0.123 (0.100 to 0.200)" and shown(None, missing="-") == "-"
