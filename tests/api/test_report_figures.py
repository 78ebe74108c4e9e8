"""Figures of a report: limits, differentials, grades, parasites and platelets against values that were worked out by hand."""

import json

import pytest
from scipy.stats import binomtest

from unihema.errors import InputError, RequestError
from unihema.report.sample import ReportOptions, exact_limits, sample_figures
from unihema.report.tables import ReportTables, grade_of


TREE = {"neutrophil": "WBC", "lymphocyte": "WBC", "reactive lymphocyte (ours)": "lymphocyte"}


def shares(figures):
    return {row["name"]: (row["count"], round(row["percent"], 1)) for row in figures["white_cells"]["rows"]}


@pytest.mark.parametrize(
    ("percent", "told"),
    [
        (0, ["0.0-3.6", "0.0-1.8", "0.0-0.9", "0.0-0.4"]),
        (1, ["0.0-5.4", "0.1-3.6", "0.3-2.5", "0.5-1.8"]),
        (5, ["1.6-11.3", "2.4-9.0", "3.1-7.6", "3.7-6.5"]),
        (10, ["4.9-17.6", "6.2-15.0", "7.2-13.4", "8.2-12.0"]),
        (50, ["39.8-60.2", "42.9-57.1", "45.0-55.0", "46.9-53.1"]),
    ],
)
def test_limits_are_those_of_the_table(percent, told):
    found = [exact_limits(percent * of // 100, of) for of in (100, 200, 400, 1000)]
    assert ["{:.1f}-{:.1f}".format(*limits) for limits in found] == told


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (9, 100), (3, 7), (4999, 5000), (5000, 5000)])
def test_limits_are_those_of_scipy(count, of):
    expected = binomtest(count, of).proportion_ci(method="exact")
    assert exact_limits(count, of) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_a_differential_has_all_white_cells_in_its_denominator_and_no_others():
    figures = sample_figures(
        {
            "RBC": 900,
            "WBC": 10,
            "Platelets": 50,
            "neutrophil": 60,
            "lymphocyte": 30,
            "erythroblast": 7,
            "smudge cell": 25,
        },
        TREE,
    )
    assert shares(figures) == {"neutrophil": (60, 60.0), "lymphocyte": (30, 30.0), "unidentified": (10, 10.0)}
    assert figures["white_cells"]["total"] == 100 and figures["white_cells"]["enough"]
    assert [(each["name"], each["per_100"]) for each in figures["beside"]] == [
        ("erythroblast", 7.0),
        ("smudge cell", 25.0),
    ]
    assert figures["platelets"]["per_1000_red_cells"] == pytest.approx(1000 * 50 / 900)
    assert any("fragile lymphocytes" in note for note in figures["notes"])


def test_a_class_of_a_laboratory_counts_by_its_tree_and_stands_after_its_coarser_class():
    figures = sample_figures({"lymphocyte": 5, "reactive lymphocyte (ours)": 3, "neutrophil": 2, "monocyte": 0}, TREE)
    assert shares(figures) == {
        "neutrophil": (2, 20.0),
        "lymphocyte": (5, 50.0),
        "reactive lymphocyte (ours)": (3, 30.0),
        "monocyte": (0, 0.0),
    }
    # Without the tree nobody knows what it is.
    assert sample_figures({"lymphocyte": 5, "clone X": 3}, {})["white_cells"]["total"] == 5


def test_classes_stand_in_the_order_of_counting_programs_and_immature_ones_are_hidden_where_there_are_none():
    names = [
        "plasma cell",
        "basophil",
        "eosinophil",
        "monocyte",
        "atypical_lymphocyte",
        "lymphocyte",
        "blast",
        "promyelocyte",
    ]
    names += ["myelocyte", "metamyelocyte", "band_neutrophil", "segmented neutrophil"]
    rows = sample_figures(dict.fromkeys(names, 0) | {"monocyte": 1, "myelocyte": 1}, {})["white_cells"]["rows"]
    assert [row["name"] for row in rows] == names[::-1]
    shown = [row["name"] for row in rows if not row["hidden"]]
    assert shown == [
        "segmented neutrophil",
        "band_neutrophil",
        "myelocyte",
        "lymphocyte",
        "monocyte",
        "eosinophil",
        "basophil",
    ]


def test_smudge_cells_count_as_lymphocytes_where_that_is_asked_for():
    counts = {"neutrophil": 20, "lymphocyte": 40, "smudge_cell": 40}
    figures = sample_figures(counts, {}, options=ReportOptions(smudge_as_lymphocytes=True))
    assert shares(figures) == {"neutrophil": (20, 20.0), "lymphocyte": (80, 80.0)}
    assert figures["beside"] == []


def test_a_white_count_is_corrected_from_the_border_of_the_table_on_and_only_if_it_is_given():
    def corrected(nucleated, given=10.0):
        counts = {"neutrophil": 100, "NRBC": nucleated}
        return sample_figures(counts, {}, options=ReportOptions(white_count=given))["white_cells"]["white_count"]

    assert corrected(25)["corrected"] == pytest.approx(8.0)
    assert corrected(5)["corrected"] == pytest.approx(10 * 100 / 105)
    assert corrected(4)["corrected"] is None
    assert corrected(25, None) is None


def test_without_a_white_cell_there_is_no_percentage():
    figures = sample_figures({"RBC": 10, "neutrophil": 0, "erythroblast": 2}, {})
    assert figures["white_cells"]["rows"][0]["percent"] is None
    assert figures["beside"][0]["per_100"] is None
    assert "White cells were not looked for." in sample_figures({"RBC": 10}, {})["notes"]


@pytest.mark.parametrize(
    ("name", "count", "of", "grade"),
    [
        # Of 10 000 cells, a hundredth of a per cent each.
        ("target_cell", 499, 10_000, None),
        ("target_cell", 500, 10_000, "2+"),
        ("target_cell", 2000, 10_000, "2+"),
        ("target_cell", 2001, 10_000, "3+"),
        ("macrocyte", 1099, 10_000, None),
        ("macrocyte", 1100, 10_000, "2+"),
        ("macrocyte", 2001, 10_000, "3+"),
        ("oval macrocyte", 199, 10_000, None),
        ("oval macrocyte", 200, 10_000, "2+"),
        ("oval macrocyte", 501, 10_000, "3+"),
        ("sickle cell", 99, 10_000, None),
        ("sickle cell", 100, 10_000, "2+"),
        ("sickle cell", 201, 10_000, "3+"),
        ("schistocyte", 0, 10_000, None),
        ("schistocyte", 1, 10_000, "1+"),
        ("schistocyte", 99, 10_000, "1+"),
        ("schistocyte", 100, 10_000, "2+"),
        ("schistocyte", 200, 10_000, "2+"),
        ("schistocyte", 201, 10_000, "3+"),
        ("schistocyte", 30, 1000, "3+"),
        ("schistocyte", 30, 999, None),
    ],
)
def test_grades_change_exactly_at_their_borders(name, count, of, grade):
    (row,) = sample_figures({"RBC": of - count, name: count}, {})["red_cells"]["rows"]
    assert (row["count"], row["of"], row["grade"]) == (count, of, grade)


def test_a_border_is_compared_exactly():
    # As floats 100 * 7 / 1000 is a little more than 0.7.
    assert grade_of(7, 1000, {"2+": {"above": 0.7}}) is None
    assert grade_of(7, 1000, {"2+": {"from": 0.7}}) == "2+"


def test_spellings_of_a_shape_are_one_finding_and_those_without_a_class_are_named():
    figures = sample_figures(
        {"RBC": 80, "burr_cell": 5, "echinocyte": 15, "uncommon shape": 1}, {"uncommon shape": "RBC"}
    )
    rows = {row["name"]: row for row in figures["red_cells"]["rows"]}
    assert rows["echinocytes"]["count"] == 20 and rows["echinocytes"]["of"] == 101
    assert rows["uncommon shape"]["grade"] is None
    assert "schistocytes" in figures["red_cells"]["not_looked_for"]
    assert "echinocytes" not in figures["red_cells"]["not_looked_for"]


def test_red_cells_and_platelets_are_of_the_monolayer_and_white_cells_of_everything():
    counts = {"RBC": 100, "target_cell": 20, "Platelets": 30, "neutrophil": 10}
    inside = {"RBC": 45, "target_cell": 5, "Platelets": 5, "neutrophil": 4}
    figures = sample_figures(counts, {}, in_monolayer=inside)
    assert figures["white_cells"]["total"] == 10
    assert figures["red_cells"]["rows"][0]["percent"] == pytest.approx(10.0)
    assert figures["platelets"]["per_1000_red_cells"] == pytest.approx(100.0)


def test_parasites_of_a_thin_film():
    counts = {"RBC": 4900, "ring": 60, "trophozoite": 15, "schizont": 5, "gametocyte": 20}
    found = sample_figures(
        counts, {name: "RBC" for name in counts if name != "RBC"}, options=ReportOptions(red_count=4.0)
    )
    share = found["parasites"]["share"]
    assert (share["count"], share["of"], share["percent"]) == (80, 5000, pytest.approx(1.6))
    assert (share["low"], share["high"]) == pytest.approx(exact_limits(80, 5000))
    # 4 million red cells in a microlitre.
    assert found["parasites"]["per_ul"]["percent"] == pytest.approx(64_000)
    assert [stage["counted"] for stage in found["parasites"]["stages"]] == [True, True, True, False]
    assert not any("Parasites" in note for note in found["notes"])


def test_no_parasite_is_a_share_with_an_upper_limit_and_no_class_of_them_is_unknown():
    none = sample_figures({"RBC": 1000, "infected RBC": 0}, {})["parasites"]
    assert none["share"]["percent"] == 0 and round(none["share"]["high"], 1) == 0.4
    unknown = sample_figures({"RBC": 1000}, {})["parasites"]
    assert unknown == {"known": False, "why": unknown["why"]}
    assert "cannot know" in unknown["why"]


def test_parasites_of_a_thick_film_need_a_white_count_that_is_given_or_asked_for():
    def found(**options):
        counts = {"ring": 50, "gametocyte": 3, "WBC": 200}
        return sample_figures(counts, {"ring": "parasite"}, options=ReportOptions(thick_film=True, **options))[
            "parasites"
        ]

    assert found()["per_ul"] is None
    assert found(white_count=6.0)["per_ul"] == pytest.approx(1500)
    assumed = found(assume_white_count=True)
    assert assumed["per_ul"] == pytest.approx(2000) and assumed["white_count_source"] == "assumed"


def test_platelets_are_estimated_by_a_factor_of_the_laboratory_alone():
    counts = {"RBC": 1000, "Platelets": 60, "giant platelet": 10}
    tables = ReportTables.of({"platelets": {**ReportTables.read().platelets, "factor": 15_000, "field_mm2": 0.02}})
    assert sample_figures(counts, {}, area_mm2=0.1)["platelets"]["per_ul"] is None
    found = sample_figures(counts, {}, tables, area_mm2=0.1)["platelets"]
    # 14 in a field of 0.02 square millimetres.
    assert found["per_ul"] == pytest.approx(14 * 15_000)
    assert found["rows"][0]["grade"] == "2+"


def test_a_laboratory_replaces_a_table(tmp_path):
    ours = ReportTables.read()
    grades = {
        "finding": "target cells",
        "classes": ["target cell"],
        "least": 500,
        "grades": {"few": {"above": 1}, "many": {"from": 3}},
    }
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"red_cells": {"name": "ours", "source": "2026", "findings": [grades]}}))
    tables = ReportTables.read(path)
    assert tables.names["red_cells"] == {"name": "ours", "source": "2026"}
    assert tables.differential == ours.differential

    def grade(count):
        return sample_figures({"RBC": 1000 - count, "target_cell": count}, {}, tables)["red_cells"]["rows"][0]["grade"]

    assert [grade(count) for count in (10, 11, 29, 30)] == [None, "few", "few", "many"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"red cells": {}}, "red cells"),
        ({"red_cells": {"name": "x", "source": "y"}}, "red_cells.findings"),
        ({"parasites": []}, "parasites.name"),
        ({"platelets": {"name": "x", "source": "y", "factor": "15000", "field_mm2": None, "findings": []}}, "platelets.factor"),
        (
            {"red_cells": {"name": "x", "source": "y", "findings": [
                {"finding": "a", "classes": ["a"], "least": 0, "grades": {"2+": {"from": 3}, "3+": {"above": 1}}}
            ]}},
            "red_cells.findings",
        ),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_is_an_error_that_names_the_entry(tmp_path, content, named):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=named):
        ReportTables.read(path)


@pytest.mark.parametrize("options", [{"target": 0}, {"white_count": -1}, {"red_count": 5e6}])
def test_numbers_that_cannot_be_are_refused(options):
    with pytest.raises(RequestError):
        ReportOptions(**options)
