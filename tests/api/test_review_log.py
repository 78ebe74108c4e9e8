"""The log of a review, and the state that follows from it: nothing is changed, lost, or taken for something else."""

import random
import sqlite3

import pytest
from review_results import write_results

from unihema import InputError, OutputError, RequestError
from unihema.review.log import BEGINNING, Change, Log
from unihema.review.reviewed_results import SINCE_SIGNED, reviewed_samples
from unihema.review.state import LOG_FILE, Review, SignedError, StaleError, Target


FIELDS = {"a.png": ["RBC", "neutrophil", "RBC"], "b.png": ["WBC", "Platelets"]}
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "'; DROP TABLE entries; --",
    "=cmd|'/c calc'!A1",
    "\u202egnp.\x1b[31m",
    "🩸 細胞",
]


@pytest.fixture
def folder(tmp_path):
    return write_results(tmp_path / "results", FIELDS)


def labels(review):
    return {(cell.image, cell.original.id): cell.label for cell in review.sample("results").cells if cell.present}


def test_entries_follow_each_other_and_stay(tmp_path):
    with Log(tmp_path / "log.sqlite") as log:
        assert log.head == (0, BEGINNING) and log.verify() is None
        first, second = log.append(
            "Ada", [Change("class", "s", "a", 1, {"label": "x"}, {"label": "y"}), Change("delete")], "why"
        )
        assert (first.number, second.number, second.action, second.previous) == (1, 2, 1, first.hash)
        (third,) = log.append("Bob", [Change("undo")], undoes=1)
        assert list(log.entries()) == [first, second, third] and list(log.entries(after=2)) == [third]
        assert log.verify() is None and log.verify(second.hash) is None
        for statement in ("UPDATE entries SET who = 'Eve'", "DELETE FROM entries WHERE number = 2"):
            with pytest.raises(sqlite3.IntegrityError, match="never"):
                log._connection.execute(statement)
        row = log._connection.execute("SELECT * FROM entries WHERE number = 2").fetchone()
        for number in (2, 5):
            with pytest.raises(sqlite3.IntegrityError, match="follows"):
                log._connection.execute(
                    f"INSERT OR REPLACE INTO entries VALUES ({', '.join('?' * 14)})", (number, *row[1:])
                )
        assert log.verify() is None
        assert log._connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert log._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ("UPDATE entries SET who = 'Eve' WHERE number = 3", 3),
        ('UPDATE entries SET new = \'{"label":"RBC"}\' WHERE number = 2', 2),
        ("DELETE FROM entries WHERE number = 4", 4),
        ("UPDATE entries SET number = 0 WHERE number = 1", 1),
        ("UPDATE entries SET previous = '0' WHERE number = 5", 5),
    ],
)
def test_the_first_changed_or_missing_entry_is_found(tmp_path, change, number):
    path = tmp_path / "log.sqlite"
    with Log(path) as log:
        for each in range(5):
            log.append(f"person {each}", [Change("class", "s", "a", each, None, {"label": "neutrophil"})])
        head = log.head[1]
    raw = sqlite3.connect(path)
    for trigger in ("entries_stay", "entries_remain"):
        raw.execute(f"DROP TRIGGER {trigger}")
    raw.execute(change)
    raw.commit()
    raw.close()
    with Log(path, read_only=True) as log:
        assert log.verify().number == number
        assert log.verify(head).number == number


def test_missing_last_entries_are_found_by_a_hash_that_was_noted(tmp_path):
    path = tmp_path / "log.sqlite"
    with Log(path) as log:
        log.append("Ada", [Change("class"), Change("class")])
        head = log.head[1]
    raw = sqlite3.connect(path)
    raw.execute("DROP TRIGGER entries_remain")
    raw.execute("DELETE FROM entries WHERE number = 2")
    raw.commit()
    raw.close()
    with Log(path) as log:
        assert log.verify() is None and log.verify(head).number == 2


@pytest.mark.parametrize("content", [b"", b"no database, but a text that is long enough to be one" * 40, None])
def test_what_is_no_log_is_told(tmp_path, content):
    path = tmp_path / "log.sqlite"
    if content is None:
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE entries (number)")
        other.commit()
        other.close()
    else:
        path.write_bytes(content)
    if content == b"":
        with Log(path) as log:
            assert log.head[0] == 0
        return
    with pytest.raises(OutputError, match="log of a review"):
        Log(path)
    assert content is None or path.read_bytes() == content


def test_changes_are_there_at_the_next_start_and_predictions_stay(folder):
    before = {path.name: path.read_bytes() for path in (folder / "records").iterdir()}
    results = (folder / "results.json").read_bytes()
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0), Target("a", 3, 0)], "class", "lymphocyte", "small nucleus")
        review.change("Ada", [Target("b", 2, 0)], "delete")
        review.draw("Bob", "b", [150, 100, 400, 130.5], "schistocyte")
        review.change("Bob", [Target("b", 1, 0)], "confirm")
        review.look_through("Bob", "a", review.images["a"].revision)
        assert labels(review) == {
            ("a", 1): "lymphocyte", ("a", 2): "neutrophil", ("a", 3): "lymphocyte", ("b", 1): "WBC", ("b", 3): "schistocyte",
        }  # fmt: skip
        assert review.images["b"].cells[3].original.box == (150, 100, 200, 130.5)
        told = [cell.value for cell in review.sample("results").cells]
        counts = review.sample("results").counts
    assert counts == {"RBC": 0, "WBC": 1, "Platelets": 0, "neutrophil": 1, "lymphocyte": 2, "schistocyte": 1}
    with Review(folder, read_only=True) as review:
        assert [cell.value for cell in review.sample("results").cells] == told
        assert review.images["a"].looked_through and not review.images["b"].looked_through
    assert {path.name: path.read_bytes() for path in (folder / "records").iterdir()} == before
    assert (folder / "results.json").read_bytes() == results


def test_a_change_of_something_that_was_changed_meanwhile_is_refused_whole(folder):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "class", "neutrophil")
        head = review.log.head
        with pytest.raises(StaleError) as refused:
            review.change("Bob", [Target("a", 2, 0), Target("a", 1, 0)], "class", "lymphocyte")
        assert [(cell.original.id, cell.label) for cell in refused.value.cells] == [(1, "neutrophil")]
        assert review.log.head == head and labels(review)["a", 2] == "neutrophil"
        with pytest.raises(StaleError):
            review.look_through("Bob", "a", 0)
        with pytest.raises(StaleError):
            review.sign("Bob", "results", 0)


def test_undo_and_redo_are_entries_of_their_own_for_each_person(folder):
    with Review(folder) as review:
        start = labels(review)
        review.change("Ada", [Target("a", 1, 0), Target("a", 3, 0)], "class", "lymphocyte")
        moved = labels(review)
        review.change("Bob", [Target("b", 1, 0)], "class", "neutrophil")
        review.draw("Ada", "b", [0, 0, 9, 9], "RBC")
        drawn = labels(review)
        review.undo("Ada", "results")
        review.undo("Ada", "results")
        assert labels(review) == {**start, ("b", 1): "neutrophil"}
        with pytest.raises(RequestError, match="nothing of Ada to undo"):
            review.undo("Ada", "results")
    with Review(folder) as review:
        review.redo("Ada", "results")
        assert labels(review) == {**moved, ("b", 1): "neutrophil"}
        review.redo("Ada", "results")
        assert labels(review) == drawn and review.can_undo("Ada", "results") == (True, False)
        review.undo("Ada", "results")
        review.change("Ada", [Target("b", 2, 0)], "confirm")
        assert not review.can_undo("Ada", "results")[1]
        assert [entry.kind for entry in review.log.entries()][-4:] == ["redo", "redo", "undo", "confirm"]
        assert review.log.verify() is None


def test_undo_of_what_others_have_changed_since_is_refused(folder):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "class", "lymphocyte")
        review.change("Bob", [Target("a", 1, review.images["a"].cells[1].revision)], "class", "neutrophil")
        with pytest.raises(StaleError) as refused:
            review.undo("Ada", "results")
        assert refused.value.cells[0].label == "neutrophil"
        review.undo("Bob", "results")
        review.undo("Ada", "results")
        assert labels(review)["a", 1] == "RBC"


def test_any_course_of_changes_replays_to_the_same_state(folder):
    chance = random.Random(3)
    for _ in range(4):
        with Review(folder) as review:
            for _ in range(30):
                who, kind = (
                    chance.choice(["Ada", "Bob"]),
                    chance.choice(["class", "delete", "restore", "confirm", "draw", "undo", "redo"]),
                )
                image = review.images[chance.choice(["a", "b"])]
                cell = chance.choice(list(image.cells.values()))
                try:
                    if kind == "draw":
                        review.draw(who, image.name, [chance.uniform(0, 100) for _ in range(2)] + [180, 150], "RBC")
                    elif kind in ("undo", "redo"):
                        getattr(review, kind)(who, "results")
                    else:
                        review.change(
                            who,
                            [Target(image.name, cell.original.id, cell.revision)],
                            kind,
                            chance.choice(["RBC", "WBC"]),
                        )
                except (RequestError, StaleError):
                    continue
            told = [
                (cell.image, cell.original.id, cell.revision, cell.value) for cell in review.sample("results").cells
            ]
            can = [review.can_undo(who, "results") for who in ("Ada", "Bob")]
        with Review(folder) as again:
            assert told == [(c.image, c.original.id, c.revision, c.value) for c in again.sample("results").cells]
            assert can == [again.can_undo(who, "results") for who in ("Ada", "Bob")]


def test_a_signed_sample_is_changed_by_an_amendment_alone(folder):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "class", "lymphocyte")
        sample = review.sample("results")
        head = review.log.head[1]
        review.sign("Ada", "results", sample.revision)
        assert sample.status == "final" and sample.signatures[0]["head"] == head
        revision = review.images["a"].cells[1].revision
        for forbidden in (
            lambda: review.change("Ada", [Target("a", 1, revision)], "class", "RBC"),
            lambda: review.draw("Ada", "a", [0, 0, 9, 9], "RBC"),
            lambda: review.look_through("Ada", "a", review.images["a"].revision),
            lambda: review.undo("Ada", "results"),
            lambda: review.sign("Ada", "results", sample.revision),
        ):
            with pytest.raises(SignedError, match="signed by Ada"):
                forbidden()
        with pytest.raises(RequestError, match="reason"):
            review.amend("Bob", "results", "  ")
        review.amend("Bob", "results", "second look")
        assert sample.status == "amendment open"
        review.change("Bob", [Target("a", 1, revision)], "class", "neutrophil")
        review.sign("Bob", "results", sample.revision, "looked at by two")
    with Review(folder) as review:
        sample = review.sample("results")
        assert sample.status == "amended"
        assert [(each["who"], each["status"], each["counts"]["lymphocyte"]) for each in sample.signatures] == [
            ("Ada", "final", 1),
            ("Bob", "amended", 0),
        ]
        assert review.log.verify(sample.signatures[0]["head"]) is None


def test_classes_keep_their_order_whatever_moves(folder):
    with Review(folder) as review:
        known = list(review.sample("results").classes)
        for label, number in (("zebra", 3), ("ant", 1)):
            review.change("Ada", [Target("a", number, 0)], "class", label)
        review.undo("Ada", "results")
        assert list(review.sample("results").counts) == [*known, "zebra", "ant"]
    with Review(folder) as review:
        assert list(review.sample("results").counts) == [*known, "zebra", "ant"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_stored_as_they_are(folder, text):
    with Review(folder) as review:
        review.change(text, [Target("a", 1, 0)], "class", text, text)
    with Review(folder) as review:
        entry = list(review.log.entries())[-1]
        assert (entry.who, entry.new["label"], entry.why) == (text, text, text)
        assert labels(review)["a", 1] == text and review.log.verify() is None


@pytest.mark.parametrize("label", ["", " ", None, "x" * 201, "\ud800"])
def test_a_class_is_a_text(folder, label):
    with Review(folder) as review, pytest.raises(RequestError, match="class"):
        review.change("Ada", [Target("a", 1, 0)], "class", label)


def test_other_predictions_than_those_reviewed_are_not_taken_for_them(folder):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "class", "lymphocyte")
    (folder / "settings.json").unlink()
    write_results(folder, {"a.png": ["WBC"], "b.png": FIELDS["b.png"]})
    with pytest.raises(InputError, match="a was analysed again"):
        Review(folder)


def test_images_that_came_later_are_taken_in(folder):
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "class", "lymphocyte")
    write_results(folder, {"c.png": ["WBC"]})
    with Review(folder) as review:
        assert labels(review)["a", 1] == "lymphocyte" and labels(review)["c", 1] == "WBC"


def test_samples_by_image_folder_and_pattern(tmp_path):
    images = {"p1/x_1.png": ["WBC"], "p1/x_2.png": ["RBC"], "p2/y_1.png": ["RBC"]}
    for by, expected in (
        (None, {"results-0": 3}),
        ("folder", {"p1": 2, "p2": 1}),
        ("image", {"x_1": 1, "x_2": 1, "y_1": 1}),
        (r"/([xy])_", {"x": 2, "y": 1}),
    ):
        folder = write_results(tmp_path / str(by).replace("/", "") / "results-0", images)
        with Review(folder, by) as review:
            assert {name: len(sample.images) for name, sample in review.samples.items()} == expected
            names = list(review.samples)
        with Review(folder) as review:
            assert list(review.samples) == names
    with pytest.raises(InputError, match="belongs to the sample"):
        Review(folder, "folder")
    for wrong in ("(", "x_.", "(nothing)"):
        with pytest.raises(RequestError, match="--sample-by"):
            Review(write_results(tmp_path / "w" / "results", images), wrong)


def test_a_damaged_log_and_a_folder_without_results_are_told(folder, tmp_path):
    with pytest.raises(InputError, match="no results folder"):
        Review(tmp_path)
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "class", "lymphocyte")
    raw = sqlite3.connect(folder / LOG_FILE)
    raw.execute("DROP TRIGGER entries_stay")
    raw.execute("UPDATE entries SET who = 'Eve' WHERE number = 3")
    raw.commit()
    raw.close()
    with pytest.raises(OutputError, match="entry 3"):
        Review(folder)


@pytest.mark.parametrize(
    "change",
    [
        Change("class", "elsewhere", "a", 1, {}, {"label": "RBC", "present": True, "looked_at": True}),
        Change("class", "results", "a", 77, {}, {"label": "RBC", "present": True, "looked_at": True}),
        Change("class", "results", "a", 1, {}, {"label": 5, "present": True, "looked_at": True}),
        Change("draw", "results", "a", 9, None, {"label": "RBC", "present": True, "looked_at": True}),
        Change("sign", "results", None, None, None, {"status": "certified"}),
        Change("class", "results", None, 1),
    ],
)
def test_a_log_of_another_folder_is_told(folder, change):
    with Review(folder) as review:
        (entry,) = review.log.append("Eve", [change])
    with pytest.raises(OutputError, match=f"entry {entry.number} is none of a review of this folder"):
        Review(folder)


def test_what_is_analysed_after_a_sample_was_signed_waits_for_an_amendment(tmp_path, caplog):
    images = {"p1/a.png": ["WBC"], "p2/b.png": ["RBC"]}
    folder = write_results(tmp_path / "results", images)
    with Review(folder, "folder") as review:
        review.sign("Ada", "p1", review.sample("p1").revision)
    write_results(folder, images | {"p1/c.png": ["neutrophil"] * 3, "p2/d.png": ["RBC"], "p3/e.png": ["RBC"]})
    for read_only in (True, False):
        with Review(folder, read_only=read_only) as review:
            # How images are shared is said once.
            assert {name: [each.name for each in of.images] for name, of in review.samples.items()} == {
                "p1": ["a"],
                "p2": ["b", "d"],
                "p3": ["e"],
            }
            assert review.late == {"p1": ["c"]} and review.sample("p1").counts["WBC"] == 1
            assert review.sample("p1").status == "final"
    assert "p1 was signed before" in caplog.text
    left_out = {sample.name: sample.details["failed"] for sample in reviewed_samples(folder)}
    assert left_out == {"p1": {"c": SINCE_SIGNED}, "p2": {}, "p3": {}}
    with Review(folder) as review:
        review.amend("Ada", "p1", "one more image")
    with Review(folder) as review:
        assert [each.name for each in review.sample("p1").images] == ["a", "c"] and not review.late


def test_a_log_that_does_not_say_how_images_are_shared_asks_where_that_matters(tmp_path):
    images = {"p1/a.png": ["WBC"], "p2/b.png": ["RBC"]}
    folder = write_results(tmp_path / "results", images)
    with Review(folder, "folder") as review:
        predicted = {entry.image: entry.new for entry in review.log.entries()}
    # As a log was written before.
    (folder / LOG_FILE).unlink()
    with Log(folder / LOG_FILE, False) as log:
        for name, sample in (("a", "p1"), ("b", "p2")):
            new = {key: value for key, value in predicted[name].items() if key != "sample_by"}
            log.append("unihema", [Change("begin", sample, name, None, None, new)])
    with Review(folder) as review:
        assert list(review.samples) == ["p1", "p2"]
    write_results(folder, images | {"p3/c.png": ["RBC"]})
    with pytest.raises(InputError, match="Give --sample-by as when the review began"):
        Review(folder)
    with Review(folder, "folder") as review:
        assert list(review.samples) == ["p1", "p2", "p3"]


def test_a_folder_that_was_renamed_and_a_table_that_is_gone_are_no_hindrance(tmp_path):
    write_results(tmp_path / "results", {"a.png": ["WBC"]})
    with Review(tmp_path / "results") as review:
        assert list(review.samples) == ["results"]
    folder = (tmp_path / "results").rename(tmp_path / "kept")
    write_results(folder, {"a.png": ["WBC"], "b.png": ["RBC"]})
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"failed": {}', '"failed": {"c.png": "no image"}'))
    with Review(folder) as review:
        assert {name: len(of.images) for name, of in review.samples.items()} == {"results": 2}
    (sample,) = reviewed_samples(folder)
    assert sample.details["failed"] == {"c.png": "no image"}
    table = tmp_path / "samples.csv"
    table.write_text("image,sample\na.png,S1\nb.png,S2\n")
    other = write_results(tmp_path / "other", {"a.png": ["WBC"], "b.png": ["RBC"]})
    with Review(other, str(table)) as review:
        assert list(review.samples) == ["S1", "S2"]
    table.unlink()
    assert [sample.name for sample in reviewed_samples(other)] == ["S1", "S2"]
    write_results(other, {"a.png": ["WBC"], "b.png": ["RBC"], "c.png": ["RBC"]})
    with pytest.raises(InputError, match=r"samples\.csv: cannot be read"):
        Review(other)
