"""Cards: nothing empty or false in them, metadata that huggingface_hub reads back, texts as text, code that runs."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from card_code import code_of
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint
from tiny_models import very_tiny_config

import unihema
from unihema.errors import CardError, CheckpointError
from unihema.hub_cards import (
    DataRecord,
    DataSource,
    adapter_card,
    check_card,
    checkpoint_card,
    dataset_card,
    folder_card,
)
from unihema.hub_cards.card import TEMPLATES, as_text
from unihema.modeling_unihema.tasks import TASK_TABLE


METRICS = {
    "detection": {
        "mAP50": 0.7123,
        "mAP": None,
        "intervals": {"mAP50": [0.65, 0.771]},
        "morphology": {"macro_f1": 0.55},
        "rows": 19,
    },
    "single_cell": {"accuracy": 0.9, "macro_f1": 0.8, "per_class": {"neutrophil": {"f1": 0.1234}}, "rows": 50},
}
OF_SEVERAL_SETS = {
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
DATA = DataRecord(
    (
        DataSource("cbc", "mit", "https://example.org/cbc", {"train": 205, "val": 19}),
        DataSource("pbc", "cc-by-4.0", "lab/pbc", {"train": 400, "val": 50}),
    ),
    {"train": 605, "val": 69},
    shared=3,
)
RUN = {
    "data": {"val_split": "val"},
    "model": {"initial_checkpoint": "lab/base"},
    "optimisation": {"learning_rate": 4e-4, "seed": 7, "ema_decay": 0.998, "mixed_precision": "bf16", "max_steps": 100},
    "provenance": {"python": "3.11.9", "platform": "Linux", "packages": {"torch": "2.14.1", "peft": None}},
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["v_proj", "q_proj"],
    "modules_to_save": ["class_head"],
    "auto_mapping": {"base_model_class": "UniHemaForDetection"},
}


def full_card(**changes) -> str:
    options = {"data": DATA, "run": RUN, "name": "Smears", "licence": "cc-by-4.0", **changes}
    return checkpoint_card(very_tiny_config(trained={"tasks": ["detection", "single_cell"]}), METRICS, **options)


def test_metadata_are_those_that_the_hub_indexes():
    card = check_card(full_card())
    data = ModelCard(str(card)).data
    assert data.to_dict() == card.data.to_dict()
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "object-detection", "cc-by-4.0")
    assert data.base_model == "lab/base" and data.datasets == ["lab/pbc"] and data.metrics == ["map", "accuracy", "f1"]
    assert [(r.task_type, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("object-detection", "map", 0.7123),
        ("image-classification", "accuracy", 0.9),
        ("image-classification", "f1", 0.8),
    ]
    detection = data.eval_results[0]
    assert detection.dataset_args == {"rows": 19} and detection.metric_args == {"interval": [0.65, 0.771]}
    assert (detection.dataset_name, detection.dataset_split) == ("cbc + pbc", "val")


def test_the_text_has_data_figures_licences_and_environment():
    text = full_card()
    for line in (
        "| cbc | mit | 205 train, 19 val | https://example.org/cbc |",
        "| pbc | cc-by-4.0 | 400 train, 50 val | [lab/pbc](https://huggingface.co/datasets/lab/pbc) |",
        "| detection | 19 | mAP50 0.712 (0.650 to 0.771), morphology macro_f1 0.550 |",
        "| single_cell | 50 | accuracy 0.900, macro_f1 0.800 |",
        "- Code: apache-2.0.",
        "- Weights: cc-by-4.0.",
        "- Data, cbc: mit.",
        "Python 3.11.9 on Linux; torch 2.14.1.",
    ):
        assert f"\n{line}\n" in text
    assert (
        "605 train images and 69 val images were compared (SHA-256): 3 validation images are also training images"
        in text
    )
    assert "AdamW, learning rate 0.0004, bfloat16, averaged weights (decay 0.998), seed 7, at most 100 steps." in text
    assert "It is not a medical device" in text and "@inproceedings" in text and "0.1234" not in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: cc-by-4.0\n", "", "no `license` in its metadata"),
        ("license: cc-by-4.0", "license: my-own", "the Hub knows no license 'my-own'"),
        ("license: cc-by-4.0", "license: other", "needs license_name and license_link"),
        ("license: cc-by-4.0", "license: unknown", "`license` is 'unknown'"),
        ("- lab/pbc", "- /home/me/pbc", "`datasets` is '/home/me/pbc'"),
        ("base_model: lab/base", "base_model: ../runs/base", "`base_model` is '../runs/base'"),
        ("value: 0.7123", "value: .nan", r"`model-index\[0\].results\[0\].metrics\[0\].value` is empty"),
        ("value: 0.7123", "value: TBD", "is 'TBD', which says nothing"),
        ("- blood-smear\n", "- ''\n", r"`tags\[2\]` is empty"),
        ("not a medical device", "wonderful", "must say that this is not a medical device"),
        ("\n# Smears", "\n# Smears\n\n[More Information Needed]", "more information needed"),
        ("## Limits", "## Nothing\n\n## Limits", "nothing under 'Nothing'"),
        ("---\n", "", "no metadata at its beginning"),
        ("tags:\n", "tags: [\n", "metadata that cannot be read"),
    ],
)
def test_empty_and_false_fields_are_errors(old, new, message):
    text = full_card()
    assert old in text
    with pytest.raises(CardError, match=message):
        check_card(text.replace(old, new))


def test_a_licence_of_ones_own_has_a_name_and_a_link():
    card = check_card(full_card(licence="other", licence_name="Lab terms", licence_link="LICENSE"))
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "Lab terms", "LICENSE")
    assert "- Weights: [Lab terms](LICENSE)." in card.text
    with pytest.raises(CardError, match="needs license_name and license_link"):
        full_card(licence="other")
    with pytest.raises(CardError, match="knows no license 'free'"):
        full_card(licence="free")


def test_a_base_that_is_a_folder_is_no_base_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "base").mkdir(parents=True)
    assert ModelCard(full_card()).data.base_model is None


def test_the_code_in_a_checkpoints_card_runs_in_its_folder(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    text = folder_card(folder, licence="mit", data_licences={"smears": "mit"})
    for name in ("smear.png", "cell.png"):
        Image.new("RGB", (64, 48), "pink").save(folder / name)
    code = code_of(text)
    assert all(name in code for name in ("detect(", "segment(", "classify(", "ask(", "fill_in("))
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "'answer'" in result.stdout and (folder / "mask.png").is_file()


def test_a_card_from_a_folder_asks_for_what_it_does_not_know(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "checkpoint", trained={"tasks": ["detection"]})
    with pytest.raises(CardError, match="--data-license NAME=LICENCE"):
        folder_card(folder, licence="mit")
    (folder / "data.json").write_text(
        json.dumps({"sources": [{"name": "mine", "images": {"train": 4}}], "compared": {}, "shared": 0})
    )
    with pytest.raises(CardError, match="licence of the data set 'mine' is not known"):
        folder_card(folder, licence="mit")
    with pytest.raises(CardError, match="No data set 'other'; the run was trained on mine"):
        folder_card(folder, licence="mit", data_licences={"other": "mit"})
    with pytest.raises(CardError, match=r"--license LICENCE.*mine \(mit\)"):
        folder_card(folder, licence=None, data_licences={"mine": "mit"})
    (folder / "metrics.json").write_text(json.dumps({"segmentation": {"dice": 0.5, "rows": 3}}))
    with pytest.raises(
        CardError, match="metrics.json measures segmentation, which this checkpoint was not trained for"
    ):
        folder_card(folder, licence="mit", data_licences={"mine": "mit"})
    (folder / "metrics.json").unlink()
    text = folder_card(folder, licence="mit", data_licences={"mine": "mit"}, data_sources={"mine": "lab/mine"})
    assert "Nothing was measured on validation data." in text and "## Measured" not in text
    (folder / "data.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"data.json: not readable as JSON \(a dictionary is expected"):
        folder_card(folder, licence="mit")
    (folder / "data.json").write_text("{}")
    with pytest.raises(CardError, match="not the record of a run's data"):
        folder_card(folder, licence="mit")
    (folder / "data.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"data.json: not readable as JSON"):
        folder_card(folder, licence="mit")


def test_an_adapters_card_says_what_it_changes_and_where_its_base_is():
    measured = {"detection": METRICS["detection"]}
    options = {"name": "Mine", "licence": "mit", "data": DATA}
    card = check_card(adapter_card(ADAPTER, "lab/base", "detection", metrics=measured, run=RUN, **options))
    assert (card.data.library_name, card.data.base_model) == ("peft", "lab/base")
    assert card.data.base_model_relation == "adapter" and "lora" in card.data.tags
    assert "LORA, rank 4, on `q_proj`, `v_proj`." in card.text and "Trained in full: `class_head`." in card.text
    with pytest.raises(CardError, match="base is '../base', which nobody else has"):
        adapter_card(ADAPTER, "../base", "detection", **options)
    with pytest.raises(CardError, match="Unknown task 'counting'"):
        adapter_card(ADAPTER, "lab/base", "counting", **options)
    with pytest.raises(CardError, match="not recorded; name it"):
        adapter_card(ADAPTER, "lab/base", "detection", **{**options, "data": DataRecord()})


@pytest.mark.parametrize("task", ["detection", "segmentation", "single_cell", "question_answering", "cloze"])
@pytest.mark.parametrize("of_all_heads", [False, True], ids=["one-head", "all-heads"])
def test_the_code_in_an_adapters_card_runs(tmp_path, monkeypatch, task, of_all_heads):
    from peft import LoraConfig, get_peft_model

    name = "UniHemaForMultiTask" if of_all_heads else TASK_TABLE[task].model_class
    base = save_tiny_checkpoint(tmp_path / "lab" / "base")
    model = getattr(unihema, name).from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["value_proj", "q"])).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    text = adapter_card(values, "lab/base", task, name="Mine", licence="mit", data=DATA)
    for picture in ("smear.png", "cell.png"):
        Image.new("RGB", (64, 48), "pink").save(tmp_path / picture)
    # The base is found as the folder of that name.
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(text), "card", "exec"), {})


def test_an_adapters_card_from_its_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**ADAPTER, "base_model_name_or_path": "lab/base"}))
    options = {"licence": "mit", "data_licences": {"mine": "mit"}}
    with pytest.raises(CardError, match="not recorded; give it: --task TASK"):
        folder_card(tmp_path, **options)
    (tmp_path / "metrics.json").write_text(json.dumps({"detection": METRICS["detection"]}))
    card = check_card(folder_card(tmp_path, name="Mine", **options))
    assert card.data.base_model == "lab/base" and card.data.eval_results[0].metric_value == 0.7123
    assert check_card(folder_card(tmp_path, base_model="lab/other", **options)).data.base_model == "lab/other"


def test_a_dataset_card_counts_and_names_its_origin():
    source = DataRecord(DATA.sources[1:], {"train": 400, "val": 50})
    tasks = {"single_cell": {"train": 400, "val": 50}, "question_answering": {"train": 900, "val": 90}}
    labels = {"single_cell": ["lymphocyte", "neutrophil"], "detection": []}
    text = dataset_card(source, tasks, labels, description="Single cells, named by two pathologists.")
    card = check_card(text, "dataset")
    assert DatasetCard(text).data.to_dict() == card.data.to_dict()
    assert card.data.task_categories == ["image-classification", "visual-question-answering"]
    assert (card.data.license, card.data.size_categories, card.data.language) == ("cc-by-4.0", "n<1K", "en")
    assert "| question_answering rows | 900 | 90 |" in text and "none is in both" in text
    assert "- single_cell: lymphocyte, neutrophil" in text and "- detection" not in text
    for changes, message in (
        ({"description": " "}, "--description"),
        ({"tasks": {}}, "no images that the readers find"),
        ({"record": DATA}, "about one data set, not 2"),
        ({"record": DataRecord((DataSource("pbc", "mit"),))}, "--data-source"),
    ):
        values = {"record": source, "tasks": tasks, "labels": labels, "description": "Cells.", **changes}
        with pytest.raises(CardError, match=message):
            dataset_card(**values)


def test_a_checkpoints_card_lists_the_trained_tasks_and_the_figures_of_whole_tasks():
    report = {
        "detection": {
            "mAP50": 0.7123,
            "per_class": {"platelet": {"AP50": 0.9}},
            "morphology": {"macro_f1": 0.55, "per_attribute": {"vacuoles": {"accuracy": 0.1}}},
            "rows": 19,
        }
    }
    card = checkpoint_card(very_tiny_config(trained={"tasks": ["detection"]}), report)
    assert "| detection | 19 | mAP50 0.712, morphology macro_f1 0.550 |" in card
    assert "0.9" not in card and "0.1" not in card
    assert "- `detection`" in card and "- `segmentation`" not in card and "Single-cell classes" not in card
    assert "red blood cell, platelet, neutrophil" in card and "- vacuoles: absent, prominent" in card
    assert ModelCard(card).data.library_name == "transformers"


def test_a_checkpoints_card_does_not_claim_what_was_not_measured():
    card = checkpoint_card(very_tiny_config())
    assert "Nothing was measured on validation data." in card and "## Measured" not in card
    assert "- `cloze`" in card


def test_each_data_set_has_a_row_under_the_whole():
    text = checkpoint_card(very_tiny_config(), OF_SEVERAL_SETS)
    rows = (
        "| detection | 38 | mAP50 0.800 (0.750 to 0.840), morphology macro_f1 0.500 |",
        "| detection, cbc | 19 | mAP50 0.900 (0.850 to 0.950) |",
        "| cloze | 4 | exact_match 0.250 |",
    )
    assert "\n|---|---|---|\n" + "\n".join(rows) + "\n" in text


def test_intervals_are_explained_where_there_are_any():
    with_intervals = checkpoint_card(very_tiny_config(), OF_SEVERAL_SETS)
    without = checkpoint_card(very_tiny_config(), {"cloze": OF_SEVERAL_SETS["cloze"]})
    assert "In brackets: 95 % interval" in with_intervals
    assert "| cloze | 4 | exact_match 0.250 |\n" in without and "In brackets" not in without


# Each of them is something else than text to HTML, Markdown, YAML or Jinja.
HOSTILE = (
    "<script>alert(1)</script>",
    "{{ 7 * 191 }} {% raw %} {# gone #}",
    "a | b\n\n## Heading\n---",
    "[link](javascript:alert) ![image](x) `code` **bold** __init__ ~~gone~~ $$x$$ &lt;",
    "# heading",
    "- item",
    "1. item",
)


def read(card: str) -> tuple[list[str], str]:
    """A card as a reader of Markdown has it: the kinds of its parts, and its text."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = [token for block in parser.parse(ModelCard(card).text) for token in (block, *(block.children or ()))]
    return [f"{token.type} {token.tag}" for token in tokens], "\n".join(token.content for token in tokens)


def assert_text(card_of: Callable[[str], str], text: str) -> None:
    """Asserts that a text in a card is read as it is, as often as a word would be, and changes nothing else."""
    parts, shown = read(card_of("harmless"))
    hostile_parts, hostile_shown = read(card_of(text))
    assert hostile_parts == parts
    escaped = as_text(text)
    line = " ".join(text.split())
    assert hostile_shown.replace(escaped, "harmless").replace(line, "harmless") == shown and "harmless" in shown


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_from_files_are_text_in_a_checkpoints_card(text):
    def card_of(text: str) -> str:
        config = very_tiny_config(trained={"tasks": ["detection", "single_cell"]})
        config.id2label = {0: text, 1: "platelet"}
        config.morphology = {text: ["absent", text]}
        config.single_cell_labels = [text, "neutrophil"]
        record = DataRecord((DataSource(text, text, text, {text: 3}),), {text: 3, "val": 2})
        run = {**RUN, "provenance": {"python": text, "platform": text, "packages": {text: text}}}
        metrics = {"detection": {"mAP50": 0.5, "rows": text, "datasets": {text: {"mAP50": 0.5}}}, text: {text: 0.25}}
        card = checkpoint_card(
            config, metrics, data=record, run=run, name=text, licence="other", licence_name=text, licence_link="LICENSE"
        )
        assert check_card(card).data.license_name == text
        return card

    assert_text(card_of, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_from_files_are_text_in_an_adapters_card(text):
    def card_of(text: str) -> str:
        record = DataRecord((DataSource(text, text, text, {text: 3}),))
        adapter = {
            **ADAPTER,
            "peft_type": text,
            "r": text,
            "auto_mapping": {"base_model_class": f"UniHemaForQA({text}"},
        }
        card = adapter_card(adapter, "lab/base", "detection", name=text, data=record, licence="mit")
        check_card(card)
        return card

    assert_text(card_of, text)
    # A class that there is not is no code.
    assert "unihema.UniHemaForDetection.from_pretrained" in card_of(text)
    # Names of layers are shown as code, in which nothing but a backtick means anything.
    changed = {**ADAPTER, "target_modules": [text], "modules_to_save": [text]}
    layers = adapter_card(changed, "lab/base", "detection", name="Mine", data=DATA, licence="mit")
    assert layers.count("`" + " ".join(text.split()).replace("`", "'") + "`") == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_from_files_are_text_in_a_dataset_card(text):
    def card_of(text: str) -> str:
        record = DataRecord((DataSource(text, "other", text, {"train": 3}),))
        tasks, labels = {"detection": {text: 3}}, {"detection": ["platelet", text]}
        about = {"description": "{{ 7 * 191 }} cells.", "licence_name": text, "licence_link": "LICENSE"}
        card = dataset_card(record, tasks, labels, **about)
        check_card(card, "dataset")
        # What its author says of it is Markdown, and no template either.
        assert "\n{{ 7 * 191 }} cells.\n" in card
        return card

    assert_text(card_of, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_in_code_and_links_stay_within_them(text):
    record = DataRecord((DataSource("mine", "mit", "lab/mine", {text: 3}),))
    code = code_of(dataset_card(record, {"detection": {text: 3}}, {}, description="Cells."))
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert text in strings
    card = full_card(licence="other", licence_name="Lab terms", licence_link=text)
    assert read(card)[0] == read(full_card(licence="other", licence_name="Lab terms", licence_link="LICENSE"))[0]


@pytest.mark.parametrize(
    "text", ["band cell (stab), 5 %", "red_blood_cell", "https://example.org/a_/~b*c?x=1&y=2", "CC-BY 4.0"]
)
def test_ordinary_texts_and_addresses_stay_as_they_are(text):
    record = DataRecord((DataSource(text, text, text, {"train": 3}),))
    assert f"| {text} | {text} | 3 train | {text} |" in checkpoint_card(very_tiny_config(), data=record)


def test_the_templates_are_plain_ascii():
    # huggingface_hub 1.5 reads them in the encoding of the machine.
    templates = sorted(path.name for path in TEMPLATES.rglob("*.jinja") if path.read_text("ascii"))
    assert templates == ["README.md.jinja", "adapter.md.jinja", "checkpoint.md.jinja", "dataset.md.jinja"]
