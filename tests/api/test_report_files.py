"""Reports of samples: what is pooled, left out and signed, and their files against names that are hostile."""

import csv
import io
import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from PIL import Image
from tiny_checkpoint import save_lively

from tests.command import run_command
from tests.review_results import cells_of, write_results
from unihema import Analyzer, SmearReport, SmearResult
from unihema.errors import InputError, OutputError, RequestError
from unihema.processing_unihema.class_names import WHITE_CELL
from unihema.report.classifier_errors import classifier_errors
from unihema.report.fhir import CODES_FILE, LOINC
from unihema.report.page import whole_percent
from unihema.report.report_files import COLUMNS, table_rows, write_reports
from unihema.report.sample import ReportOptions, exact_limits
from unihema.report.samples import sample_of
from unihema.result_folder import failed_images, read_results
from unihema.results.smear_result import Cell
from unihema.review.reviewed_results import reviewed_samples
from unihema.review.rows import class_rows
from unihema.review.state import Review, Target


WHEN = datetime(2026, 11, 28, 8, 0, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script>\"'>=cmd|' /C calc'!A1\x1b[31m\u202e"


def result_of(labels, **more):
    values = {"classes": list(dict.fromkeys(labels)), "image": "smears/field.png", **more}
    return SmearResult(200, 160, cells_of(labels), **values)


def shares(report):
    rows = report.figures["white_cells"]["rows"]
    return {row["name"]: (row["count"], row["of"]) for row in rows if row["count"]}


def test_odd_cells_come_first_until_somebody_has_looked_at_them(tmp_path):
    folder = write_results(tmp_path / "results", {"a.png": ["neutrophil"] * 4}, odd={1: 1.2, 2: 0.9})
    (sample,) = reviewed_samples(folder)
    report = SmearReport.of(sample.results, made=WHEN)
    assert [cell.id for _, cell in report.doubtful()] == [1, 4, 3, 2]
    page = report.to_html()
    assert page.count(" odd</figcaption>") == 1 and "the odd and the least certain first" in page
    with Review(folder) as review:
        review.change("Ada", [Target("a", 1, 0)], "confirm")
    (sample,) = reviewed_samples(folder)
    assert [cell.odd for cell in sample.results[0].result.cells] == [None, 0.9, None, None]
    # Of a crop.
    alone = SmearResult(60, 60, single_cell={"label": "neutrophil", "score": 0.9, "odd": 2.5})
    ((_, cell),) = SmearReport.of([alone], made=WHEN).doubtful()
    assert cell.odd == 2.5


def test_classes_of_crops_count_as_the_checkpoint_has_them(tmp_path):
    labels = ["villous cell", "odd thing", "neutrophil", "pale one"]
    tree = {"villous cell": "reactive lymphocyte", "reactive lymphocyte": "WBC", "pale one": "RBC"}
    checkpoint = save_lively(tmp_path / "unihema", 3, single_cell_labels=labels, single_cell_parents=tree)
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    crop = Image.new("RGB", (60, 60), (190, 150, 190))
    crop.save(tmp_path / "crop.png")
    for one in labels:
        result = analyzer(crop, "single_cell", labels=[one])
        assert result.single_cell["label"] == one and result.class_parents == tree
        row = shares(SmearReport.of([result], made=WHEN)).get(one)
        assert row == (None if one in ("odd thing", "pale one") else (1, 1))
    analyzer.analyze_files([tmp_path / "crop.png"], tmp_path / "results", "single_cell", labels=labels[:1])
    (sample,) = reviewed_samples(tmp_path / "results")
    assert shares(SmearReport.of(sample.results, made=WHEN)) == {"villous cell": (1, 1)}
    with Review(tmp_path / "results") as review:
        of = review.sample(sample.name)
        assert [row["kind"] for row in class_rows(of, of.counts)] == [WHITE_CELL]
    # The tree of crops says nothing of fields alone.
    assert analyzer(crop, "detection", tiles="off").class_parents == {}


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser reads it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_fields_are_pooled_and_percentages_never_averaged():
    report = SmearReport.of(
        [result_of(["neutrophil"] * 1), result_of(["neutrophil"] * 3 + ["lymphocyte"] * 6)], made=WHEN
    )
    # The mean of 100 % and 33 % would be 67 %.
    row = report.figures["white_cells"]["rows"][0]
    assert (row["name"], row["percent"]) == ("neutrophil", 40.0)
    assert (row["low"], row["high"]) == exact_limits(4, 10)
    assert report.to_dict()["status"] == "preliminary" and report.to_dict()["amends"] is None
    assert report.figures["white_cells"]["per_field"] == 5.0


@pytest.mark.parametrize("by", [r"smears/([ABC])_", "samples.csv"])
def test_three_samples_of_one_folder(tmp_path, by):
    fields = {
        "A_1.png": ["neutrophil"] * 6 + ["lymphocyte"] * 2 + ["RBC"] * 9,
        "A_2.png": ["lymphocyte"] * 2,
        "B_1.png": ["WBC", "neutrophil", "RBC"],
        "C_1.png": ["RBC"],
    }
    folder = write_results(tmp_path / "results", fields)
    if by.endswith(".csv"):
        path = tmp_path / by
        path.write_text("image,sample\n" + "".join(f"{name},{name[0]}\n" for name in fields))
        by = str(path)
    samples = reviewed_samples(folder, by)
    found = {sample.name: shares(SmearReport.of(sample.results, sample.name, **sample.details)) for sample in samples}
    assert found == {
        "A": {"neutrophil": (6, 10), "lymphocyte": (4, 10)},
        "B": {"neutrophil": (1, 2), "unidentified": (1, 2)},
        "C": {},
    }


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("image\na.png\n", "no column 'sample'"),
        ("image,sample\na.png,\n", "line 2"),
        ("image,sample\na.png,1\na.png,2\n", "two samples"),
        ("image,sample\nother.png,1\n", "no line for"),
    ],
)
def test_a_table_of_samples_that_does_not_fit_is_an_error(tmp_path, table, named):
    folder = write_results(tmp_path / "results", {"a.png": ["RBC"]})
    (tmp_path / "samples.csv").write_text(table)
    with pytest.raises(InputError, match=named):
        reviewed_samples(folder, str(tmp_path / "samples.csv"))


def test_crops_of_single_cells_are_a_sample_and_the_report_says_that_somebody_chose_them(tmp_path):
    folder = write_results(tmp_path / "results", {"1.png": "neutrophil", "2.png": "neutrophil", "3.png": "basophil"})
    report = SmearReport.of(read_results(folder))
    assert shares(report) == {"neutrophil": (2, 3), "basophil": (1, 3)}
    assert report.area_mm2 is None and report.figures["white_cells"]["per_field"] is None
    assert any("somebody chose" in note for note in report.figures["notes"])


def test_red_cells_outside_the_monolayer_are_left_out_by_the_bands_that_are_given():
    def tile(left, density):
        values = {"box": [left, 0, left + 100, 160], "red_cells": 1, "overlap": None, "focus": 0.5}
        return values | {"density": density, "outside": []}

    bands = {"name": "ours", "source": "", "density": [0.2, 0.8], "overlap": [None, None], "focus": [None, None]}
    monolayer = {"bands": bands, "tiles": [tile(0, 0.5), tile(100, 0.9)]}
    # Ten cells side by side, five in each tile.
    field = result_of(["RBC"] * 9 + ["neutrophil"], monolayer=monolayer)
    report = SmearReport.of([field], monolayer_bands=bands)
    assert report.figures["red_cells"]["total"] == 5
    assert report.figures["white_cells"]["total"] == 1
    assert report.outside_monolayer == {"red_cells": 4, "of": 9, "tiles": 1, "of_tiles": 2, "bands": ["ours"]}
    wider = SmearReport.of([field], monolayer_bands=bands | {"density": [None, None]})
    assert wider.figures["red_cells"]["total"] == 9


def test_images_are_left_out_only_where_that_is_asked_for_and_named_either_way():
    far = result_of(
        ["neutrophil"], out_of_distribution={"distance": 3.0, "limit": 2.0, "nearest": "cbc"}, image="far.png"
    )
    blurred = result_of(["lymphocyte"], warnings=["The image is blurred: sharpness 1."], image="blurred.png")
    good = result_of(["monocyte"], image="good.png")
    failed = {"broken.png": "no image"}
    report = SmearReport.of([far, blurred, good], failed=failed)
    assert report.figures["white_cells"]["total"] == 3
    assert [each["image"] for each in report.to_check] == ["blurred.png"]
    assert report.left_out == [{"image": "broken.png", "why": "no image"}]
    report = SmearReport.of([far, blurred, good], failed=failed, leave_out=["unlike", "quality"])
    assert shares(report) == {"monocyte": (1, 1)}
    assert [each["image"] for each in report.left_out] == ["broken.png", "far.png", "blurred.png"]
    with pytest.raises(RequestError, match="'ugly'"):
        SmearReport.of([good], leave_out=["ugly"])


def test_the_area_is_known_where_every_pixel_is():
    fields = [result_of(["neutrophil"] * 4, um_per_pixel=0.1, um_source="given") for _ in range(2)]
    report = SmearReport.of(fields)
    assert report.area_mm2 == pytest.approx(2 * 0.02 * 0.016)
    assert report.figures["white_cells"]["per_mm2"] == pytest.approx(8 / (2 * 0.02 * 0.016))
    assert SmearReport.of([*fields, result_of(["RBC"])]).area_mm2 is None
    alone = {"tiles": 9, "tile": [9, 9], "scale": 1, "scale_source": "x", "white_cells": 100}
    assert SmearReport.of([result_of(["neutrophil"], um_per_pixel=0.1, tiling=alone)]).area_mm2 is None


def test_the_classifiers_own_error_is_told_for_its_own_results_only(tmp_path):
    metrics = {"detection": {"at_threshold": {"neutrophil": {"precision": 0.5, "recall": 0.75, "cells": 8, "f1": 0.6}}}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    measured = {"detection": {"neutrophil": {"precision": 0.5, "recall": 0.75, "cells": 8}}}
    assert classifier_errors(tmp_path) == measured
    assert classifier_errors(tmp_path, {"model.safetensors": "0"}) == {}
    report = SmearReport.of([result_of(["neutrophil"])], classifier=measured)
    (row,) = [row for row in table_rows(report) if row[COLUMNS.index("name")] == "neutrophil"]
    assert row[COLUMNS.index("recall")] == 75.0 and row[COLUMNS.index("precision")] == 50.0
    assert "Of another kind are the errors of the program itself" in report.to_html()


def test_what_a_person_corrected_counts_and_a_signed_report_is_never_replaced(tmp_path):
    folder = write_results(tmp_path / "results", {"a.png": ["neutrophil", "lymphocyte", "RBC"]})
    (sample,) = reviewed_samples(folder)
    assert SmearReport.of(sample.results, **sample.details).status == "preliminary"
    with Review(folder) as review:
        name = next(iter(review.samples))
        cell = review.images["a"].cells[1]
        review.change("Ada", [Target("a", cell.original.id, cell.revision)], "class", "basophil")
        review.draw("Ada", "a", (100, 100, 120, 120), "neutrophil")
        review.sign("Ada", name, review.sample(name).revision)
    (sample,) = reviewed_samples(folder)
    report = SmearReport.of(sample.results, **sample.details, made=WHEN)
    assert shares(report) == {"basophil": (1, 3), "lymphocyte": (1, 3), "neutrophil": (1, 3)}
    assert (report.status, report.report_version, report.amends) == ("final", 1, None)
    page = report.save(tmp_path / "reports")
    assert page.name == "sample_v1.html" and "Ada" in Page(page.read_text()).text
    report.save(tmp_path / "reports")
    with pytest.raises(OutputError, match="what was signed stays"):
        SmearReport.of(sample.results, **sample.details | {"failed": {"b.png": "?"}}).save(tmp_path / "reports")
    with Review(folder) as review:
        review.amend("Bo", name, "a band")
        review.sign("Bo", name, review.sample(name).revision)
    (sample,) = reviewed_samples(folder)
    amended = SmearReport.of(sample.results, **sample.details)
    assert (amended.status, amended.report_version, amended.amends) == ("amended", 2, 1)
    assert amended.save(tmp_path / "reports").name == "sample_v2.html"
    assert page.exists()


def hostile_report():
    label = HOSTILE[:60]
    field = result_of(["neutrophil", label], image=HOSTILE, warnings=[HOSTILE], class_parents={label: "WBC"})
    field.provenance = {"model": HOSTILE, "image_sha256": "0"}
    signature = {"who": HOSTILE, "time": "2026-11-28", "status": "final", "why": HOSTILE}
    return SmearReport.of([field], HOSTILE, failed={HOSTILE: HOSTILE}, signatures=[signature], made=WHEN)


def test_hostile_names_stay_text_in_the_page():
    page = Page(hostile_report().to_html())
    assert set(page.tags).isdisjoint({"script", "iframe", "object", "embed", "link", "base", "form", "a"})
    assert page.tags.count("meta") == 3
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # Every address is data in the page itself.
    addresses = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert "<script>alert(1)</script>" in page.text
    assert not re.search("[\x00-\x08\x1b\u202e]", page.text)


def test_hostile_names_stay_text_in_the_table(tmp_path):
    (page,) = write_reports([hostile_report()], tmp_path)
    rows = list(csv.reader(io.StringIO(page.with_suffix(".csv").read_text())))
    assert rows[0] == COLUMNS and all(len(row) == len(COLUMNS) for row in rows)
    assert not [text for row in rows for text in row if text[:1] in ("=", "+", "-", "@", "\t")]
    assert not re.search("[\x00-\x09\x1b\u202e]", page.with_suffix(".csv").read_text())
    formula = SmearReport.of([result_of(["neutrophil"])], "=1+1")
    assert all(str(row[0]) == "=1+1" for row in table_rows(formula))
    assert "'=1+1" in write_reports([formula], tmp_path)[0].with_suffix(".csv").read_text()


def test_names_of_files_stay_in_the_folder_and_apart(tmp_path):
    names = ["../../up", "a/b", "a_b", "A_B", ""]
    pages = write_reports([SmearReport.of([result_of(["neutrophil"])], name) for name in names], tmp_path / "reports")
    assert all(page.parent == tmp_path / "reports" for page in pages)
    assert len({page.name.lower() for page in pages}) == len(names)


def has_check_digit(code):
    """Whether the last digit of a LOINC code checks the others (modulus 10)."""
    assert re.fullmatch(r"\d+-\d", code)
    digits = code.replace("-", "")
    doubled = "".join(str(int(digit) * (1 if place % 2 else 2)) for place, digit in enumerate(digits[-2::-1]))
    return (10 - sum(map(int, doubled)) % 10) % 10 == int(digits[-1])


def test_codes_have_the_check_digit_of_loinc():
    codes = json.loads(CODES_FILE.read_text())
    entries = [codes["panel"], *codes["classes"].values(), *codes["findings"].values()]
    assert all(has_check_digit(entry["code"]) for entry in entries)
    assert not has_check_digit("26511-7")


def check_observation(entry, status):
    assert entry["resourceType"] == "Observation" and re.fullmatch(r"[A-Za-z0-9\-.]{1,64}", entry["id"])
    assert entry["status"] == status and entry["code"]["text"].strip()
    for coding in entry["code"].get("coding", ()):
        assert coding["system"] == LOINC and has_check_digit(coding["code"])
    assert ("valueQuantity" in entry) != ("dataAbsentReason" in entry)
    quantities = [entry["valueQuantity"]] if "valueQuantity" in entry else []
    for component in entry.get("component", ()):
        quantities += component.get("valueRange", {}).values()
    for quantity in quantities:
        assert quantity["system"] == "http://unitsofmeasure.org" and isinstance(quantity["value"], (int, float))
        assert quantity["code"] in ("%", "/100{WBCs}", "/1000{RBCs}", "/uL")


def test_fhir_follows_the_rules_of_a_diagnostic_report():
    labels = (
        ["neutrophil"] * 5
        + ["lymphocyte"] * 3
        + ["erythroblast", "WBC", "Platelets"]
        + ["RBC"] * 20
        + ["target_cell"] * 5
    )
    for report, status in (
        (SmearReport.of([result_of(labels)], made=WHEN), "preliminary"),
        (hostile_report(), "final"),
    ):
        found = json.loads(json.dumps(report.to_fhir()))
        assert found["resourceType"] == "DiagnosticReport" and found["status"] == status
        assert found["code"]["coding"][0]["system"] == LOINC
        assert datetime.fromisoformat(found["issued"]).tzinfo is not None
        # What is contained is referred to, and nothing else is.
        assert [entry["reference"] for entry in found["result"]] == [f"#{entry['id']}" for entry in found["contained"]]
        for entry in found["contained"]:
            check_observation(entry, status)
        assert not re.search("[\x00-\x1f\u202e]", json.dumps(found, ensure_ascii=False))
    by_name = {entry["code"]["text"]: entry for entry in SmearReport.of([result_of(labels)]).to_fhir()["contained"]}
    assert by_name["neutrophil"]["code"]["coding"][0]["code"] == "26511-6"
    assert by_name["neutrophil"]["valueQuantity"]["value"] == pytest.approx(500 / 9, abs=1e-4)
    assert by_name["target cells"]["interpretation"] == [{"text": "2+"}]
    assert by_name["parasites"]["dataAbsentReason"]["text"].startswith("No class of parasites")


def test_the_page_has_the_pictures_of_the_least_certain_cells_and_says_where_there_are_none(tmp_path):
    folder = write_results(tmp_path / "results", {"a.png": ["neutrophil"] * 30 + ["RBC"] * 20})
    report = SmearReport.of(read_results(folder))
    page = Page(report.to_html())
    pictures = [value for name, value in page.attributes if name == "src"]
    # 24 of a class, 12 of plain red cells.
    assert len(pictures) == 36 and "30, 24 shown" in page.text
    scores = [cell.score for _, cell in report.doubtful()]
    assert scores[:30] == sorted(scores[:30]) and scores[30:] == sorted(scores[30:])
    # Another field of the same camera.
    Image.new("RGB", (200, 160), "red").save(tmp_path / "smears" / "a.png")
    gone = Page(report.to_html())
    assert not [value for name, value in gone.attributes if name == "src"]
    assert "The image is not where it was" in gone.text


def test_the_command_reports_every_sample_and_names_what_to_look_at(tmp_path):
    folder = write_results(tmp_path / "results", {"a.png": ["neutrophil", "lymphocyte", "RBC"], "b.png": ["WBC"]})
    done = run_command("report", folder, "--sample-by", "image", "--least-certain", 1, "--target", 100)
    assert done.returncode == 0, done.stderr
    assert "a: 2 white cells: neutrophil 50 %, lymphocyte 50 %" in done.stdout
    assert "a, cell 2: lymphocyte" in done.stdout and "b, cell 1: WBC" in done.stdout
    written = json.loads((folder / "report" / "a.json").read_text())
    assert written["options"]["target"] == 100 and written["report_version"] == 1
    assert {path.name for path in (folder / "report").iterdir()} == {
        f"{name}{end}" for name in "ab" for end in (".html", ".json", ".csv", "_fhir.json")
    }
    # A count of one patient is not taken for that of all.
    wrong = run_command("report", folder, "--sample-by", "image", "--white-count", 7.5)
    assert wrong.returncode == 2 and "of one sample, and here are 2" in wrong.stderr
    wrong = run_command("report", tmp_path)
    assert wrong.returncode == 2 and "no results folder" in wrong.stderr


def test_images_that_failed_are_read_of_the_results(tmp_path):
    folder = write_results(tmp_path / "results", {"a.png": ["RBC"]})
    assert failed_images(folder) == {}
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"failed": {}', '"failed": {"b.png": "no image"}'))
    assert failed_images(folder) == {"b.png": "no image"}
    (sample,) = reviewed_samples(folder)
    assert sample.details["failed"] == {"b.png": "no image"}
    path.write_text("[")
    with pytest.raises(InputError, match="results.json"):
        failed_images(folder)


def parasitaemia(infected: int, red: int, **options) -> SmearReport:
    labels = ["RBC"] * (red - infected) + ["infected red blood cell"] * infected + ["parasite"] * 3 + ["WBC"] * 200
    cells = [Cell(number, (1, 1, 9, 9), label, 0.9) for number, label in enumerate(labels, 1)]
    classes = ["RBC", "WBC", "infected red blood cell", "parasite"]
    result = SmearResult(200, 100, cells, classes, {"infected red blood cell": "RBC"})
    return SmearReport.of([result], "p", options=ReportOptions(**options))


def test_a_table_has_the_parasites_however_few_they_are():
    def rows(report):
        found = [dict(zip(COLUMNS, row)) for row in table_rows(report)]
        return {row["name"]: row for row in found if row["section"] == "parasites"}

    thin = parasitaemia(3, 10_000, red_count=5)
    share = rows(thin)["infected red cells"]
    assert (share["count"], share["percent"], share["low"], share["high"]) == (3, 0.03, 0.0062, 0.088)
    of_red_cells = rows(thin)["per microlitre"]
    assert [of_red_cells[name] for name in ("count", "low", "high")] == [1500, 309.4, 4382.4]
    assert of_red_cells["note"] == "with 5 x 10^12/L red cells"
    told = {each["code"]["text"]: each for each in thin.to_fhir()["contained"]}
    assert told["infected red cells per microlitre"]["valueQuantity"]["value"] == 1500
    assert "<b>0.005 %</b> of 20" in parasitaemia(1, 20_000).to_html()
    thick = rows(parasitaemia(0, 1, thick_film=True, assume_white_count=True))
    assert thick["parasites"]["count"] == 3 and thick["parasites"]["note"] == "beside 200 white cells"
    assert (thick["per microlitre"]["count"], thick["per microlitre"]["note"]) == (
        120,
        "with 8 x 10^9/L white cells, assumed",
    )


def test_samples_whose_files_would_be_called_alike_keep_theirs(tmp_path):
    result = SmearResult(9, 9, [Cell(1, (1, 1, 5, 5), "WBC", 0.9)], ["WBC"])
    signed = [{"who": "Ada", "time": "2026-01-01", "status": "final", "why": ""}]
    first = SmearReport.of([result], "a", signatures=signed)
    others = [SmearReport.of([result, result], name) for name in ("a_v1", "a", "a_fhir")]
    assert len(set(write_reports([first, *others], tmp_path))) == 4
    assert json.loads((tmp_path / "a_v1.json").read_text())["status"] == "final"
    assert json.loads((tmp_path / "a_fhir.json").read_text())["resourceType"] == "DiagnosticReport"
    # Written by another call it stays as well.
    with pytest.raises(OutputError, match=r"a_v1\.json: a signed report"):
        write_reports(others[:1], tmp_path)


def test_images_of_two_samples_are_not_taken_for_one(tmp_path):
    names = ["p1/day1/01.png", "p1/day1/02.png", "p2/day1/01.png"]
    folder = write_results(tmp_path / "results", {name: ["WBC"] for name in names})
    with pytest.raises(RequestError, match=r"p1/day1 and .*p2/day1 have the same name. Give a regular expression"):
        reviewed_samples(folder, "folder")
    samples = reviewed_samples(folder, r"([^/]+/[^/]+)/[^/]+$")
    assert [(each.name, len(each.results)) for each in samples] == [("p1/day1", 2), ("p2/day1", 1)]
    table = tmp_path / "samples.csv"
    table.write_text("image,sample\n01.png,A\n02.png,A\n")
    for read in (reviewed_samples, Review):
        with pytest.raises(
            RequestError, match=r"p1/day1/01.png and .*p2/day1/01.png have the same name. Write their paths"
        ):
            read(folder, str(table))
    table.write_text(f"image,sample\n01.png,A\n02.png,A\n{tmp_path / 'smears' / names[2]},B\n")
    assert [(each.name, len(each.results)) for each in reviewed_samples(folder, str(table))] == [("A", 2), ("B", 1)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0, "0"),
        (0.5, "< 1"),
        (0.99, "< 1"),
        (1, "1"),
        (2.5, "3"),
        (12.5, "13"),
        (99.5, "> 99"),
        (100, "100"),
    ],
)
def test_a_cell_that_is_there_is_never_none_of_a_hundred(value, said):
    assert whole_percent(value) == said


def test_what_a_person_looked_through_is_certain_and_what_was_deleted_is_gone(tmp_path):
    images = {"a.png": ["neutrophil", "WBC"], "b.png": "neutrophil", "c.png": "monocyte"}
    folder = write_results(tmp_path / "results", images)
    with Review(folder) as review:
        review.look_through("Ada", "a", 0)
        review.change("Ada", [Target("b", 0, 0)], "delete")
    (sample,) = reviewed_samples(folder)
    assert [stored.name for stored in sample.results] == ["a", "c"]
    assert [cell.probability for cell in sample.results[0].result.cells] == [1.0, 1.0]
    with Review(folder) as review:
        numbers = [(number, review.images["a"].cells[number].revision) for number in (1, 2)]
        review.change("Ada", [Target("a", number, revision) for number, revision in numbers], "delete")
    report = SmearReport.of(*[(sample.results, sample.name) for sample in reviewed_samples(folder)][0])
    assert report.figures["white_cells"]["total"] == 1


def test_while_an_amendment_is_open_the_report_is_of_the_next_version(tmp_path):
    folder = write_results(tmp_path / "results", {"a.png": ["WBC"]})
    for version, status, amends in ((1, "final", None), (2, "preliminary", 1), (2, "amended", 1)):
        with Review(folder) as review:
            if status == "preliminary":
                review.amend("Ada", "results", "one was missed")
            else:
                review.sign("Ada", "results", review.sample("results").revision)
        (sample,) = reviewed_samples(folder)
        report = SmearReport.of(sample.results, sample.name, **sample.details)
        assert (report.report_version, report.status, report.amends) == (version, status, amends)
        assert bool(report.signatures) == (status != "preliminary")
        opened = "An amendment of version 1, signed by Ada, is open."
        assert (opened in report.figures["notes"]) == (status == "preliminary")


def test_images_that_can_no_longer_be_analysed_are_left_out_and_not_counted(tmp_path):
    folder = write_results(tmp_path / "results", {"a.png": ["RBC"], "b.png": ["RBC"]})
    gone = str(tmp_path / "smears" / "b.png")
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"failed": {}', json.dumps({"failed": {gone: "no image"}})[1:-1]))
    (sample,) = reviewed_samples(folder)
    assert [stored.name for stored in sample.results] == ["a"] and sample.details["failed"] == {gone: "no image"}
    record = folder / "records" / "a.json"
    record.write_text(record.read_text().replace('"score": 0.95', '"score": 0.94'))
    with pytest.raises(InputError, match=r"a\.json: not what was written"):
        reviewed_samples(folder)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="this system has no links")
def test_samples_are_told_by_where_images_were_given_not_by_what_links_lead_to(tmp_path):
    folder = write_results(tmp_path / "results", {"store/1f.png": ["RBC"], "store/2e.png": ["WBC"]})
    names = {}
    for stored, patient in zip(read_results(folder), ("S1", "S2"), strict=True):
        given = stored._replace(result=replace(stored.result, image=str(tmp_path / patient / "a.png")))
        relative = stored._replace(result=replace(stored.result, image=f"{patient}/a.png"))
        for by, table in (
            ("folder", None),
            (r"/?(S\d)/", None),
            ("x.csv", {str(tmp_path / patient / "a.png"): patient}),
        ):
            names.setdefault(patient, set()).add(sample_of(given, folder, by, table))
        names[patient].add(sample_of(relative, folder, "folder"))
    assert names == {"S1": {"S1"}, "S2": {"S2"}}
