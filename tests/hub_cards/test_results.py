"""Figures in a card: intervals, and the rows of several data sets."""

from unihema.hub_cards.results import result_lines


METRICS = {
    "detection": {
        "mAP50": 0.8,
        "rows": 38,
        "images": 38,
        "intervals": {"mAP50": [0.75, 0.84]},
        "morphology": {"macro_f1": 0.5},
        "datasets": {
            "cbc": {"mAP50": 0.9, "rows": 19, "intervals": {"mAP50": [0.85, 0.95]}},
            "wbc5": {"mAP50": None, "rows": 19, "intervals": {}},
        },
    },
    "cloze": {"exact_match": 0.25, "rows": 4},
}


def test_each_data_set_has_a_row_under_the_whole():
    assert result_lines(METRICS)[2:5] == [
        "| detection | 38 | mAP50 0.800 (0.750 to 0.840), morphology macro_f1 0.500 |",
        "| detection, cbc | 19 | mAP50 0.900 (0.850 to 0.950) |",
        "| cloze | 4 | exact_match 0.250 |",
    ]


def test_intervals_are_explained_where_there_are_any():
    assert "95 % interval" in result_lines(METRICS)[-1]
    assert result_lines({"cloze": METRICS["cloze"]})[-1] == "| cloze | 4 | exact_match 0.250 |"
    assert result_lines({}) == result_lines(None) == []
