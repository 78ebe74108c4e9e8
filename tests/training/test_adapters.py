"""Adapters: what they change, what their heads start from, and switching between several on one base."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from tiny_checkpoint import save_lively, save_tiny_checkpoint
from tiny_models import batch, lively, very_tiny_config
from tiny_runs import run_config
from transformers import AutoModelForObjectDetection

import unihema
from unihema import Analyzer
from unihema.checkpoint_files import adapter_base
from unihema.errors import CheckpointError, RunConfigError
from unihema.loading import load_model
from unihema.modeling_unihema.adapter_mixin import FIELDS_KEY, adapter_fields
from unihema.modeling_unihema.layers import ClassEmbedding, ClassLinear
from unihema.training.adapters import attach_adapter, load_adapter_weights, save_adapter, save_merged, start_classes
from unihema.training.run.config import AdapterConfig, RunConfig
from unihema.training.run.loop import train


LAB = ["neutrophil", "eosinophil", "band", "red cell"]
TASKS = ("detection", "segmentation", "single_cell", "question_answering")


def rows_of(task: str, labels=LAB) -> dict:
    row = {"task": task, "image": "a.png", "file_name": "a.png", "dataset": "lab"}
    if task == "detection":
        cells = [{"vacuoles": "absent"} for _ in labels]
        row["objects"] = {"bbox": [[0, 0, 1, 1]] * len(labels), "category": list(labels), "morphology": cells}
    rows = [{**row, "label": name} for name in labels] if task == "single_cell" else [row]
    return {task: rows}


def adapted(task: str, seed: int = 0, folder=None, labels=LAB, **settings):
    """A model with a fresh adapter, whose changes are no longer zero."""
    torch.manual_seed(seed)
    if folder is None:
        model = lively(unihema.UniHemaForMultiTask(very_tiny_config(num_queries=12)))
    else:
        model = unihema.UniHemaForMultiTask.from_pretrained(folder)
    processor = unihema.UniHemaProcessor.from_default(max_text_length=16)
    attach_adapter(model, processor, AdapterConfig(**{"method": "lora", **settings}), rows_of(task, labels))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "ia3_l" in name or "modules_to_save" in name):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def plain_inputs(task: str) -> dict:
    inputs = batch(task)
    inputs.pop("labels")
    return inputs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", num_queries=12)
    model = lively(unihema.UniHemaForMultiTask.from_pretrained(folder))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(base):
    """Two adapters of one base, with four and with two detection classes, and a third for single cells."""
    made = {}
    for name, task, labels in (
        ("four", "detection", LAB),
        ("two", "detection", LAB[:2]),
        ("cells", "single_cell", LAB),
    ):
        model = adapted(task, seed=len(labels), folder=base, labels=labels)
        save_adapter(model, base.parent / name)
        made[name] = base.parent / name
    return made


@torch.no_grad()
def outputs(model, task: str = "detection") -> torch.Tensor:
    model.eval()
    arguments = {} if isinstance(model, unihema.UniHemaForDetection) and len(model.tasks) == 1 else {"task": task}
    return model(**arguments, **plain_inputs(task)).logits


@pytest.mark.parametrize(
    ("task", "method"), [*((task, "lora") for task in TASKS), ("detection", "dora"), ("single_cell", "ia3")]
)
def test_every_adapter_weight_is_trained_and_moves_the_output(task, method):
    model = adapted(task, method=method, rank=2)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    prefix = {"lora": "lora_", "dora": "lora_magnitude", "ia3": "ia3_l"}[method]
    assert sum(prefix in name for name in trained) >= 4
    assert all("lora_" in name or "ia3_l" in name or "modules_to_save" in name for name in trained)
    model.train()
    model(task=task, **batch(task)).loss.backward()
    without = [name for name, value in trained.items() if value.grad is None or not value.grad.any()]
    assert without == []
    assert all(value.grad is None for name, value in model.named_parameters() if name not in trained)

    model.eval()
    inputs = batch(task)
    if task != "question_answering":
        inputs.pop("labels")

    def result() -> torch.Tensor:
        output = model(task=task, **inputs)
        parts = ("mask_logits",) if task == "segmentation" else ("logits", "pred_boxes", "pred_morphology")
        return torch.cat([output[part].flatten() for part in parts if output.get(part) is not None])

    with torch.no_grad():
        expected, inert = result(), []
        for name, value in trained.items():
            if "label_embedding" in name:
                # Denoising queries exist in training only.
                continue
            kept = value.clone()
            # The head of the selection is seen only where it selects other tokens.
            value.add_((20 if "query_selection.class_head" in name else 0.5) * torch.randn_like(value))
            if torch.equal(result(), expected):
                inert.append(name)
            value.copy_(kept)
    assert inert == []


def test_classes_start_from_their_namesakes_then_from_their_kind():
    old = ["RBC", "WBC", "platelets"]
    assert start_classes(["neutrophil", "Red blood cell", "debris", "Platelet"], old) == [1, 0, None, 2]
    assert start_classes(["debris"], old, {"debris": "platelets"}) == [2]
    with pytest.raises(ValueError, match=r"the base has no class 'blood'; it has RBC, WBC, platelets"):
        start_classes(["debris"], old, {"debris": "blood"})
    with pytest.raises(ValueError, match=r"the adapter has no class 'dust'; it has debris"):
        start_classes(["debris"], old, {"dust": "RBC"})


def test_new_heads_have_the_rows_they_start_from():
    model = lively(unihema.UniHemaForMultiTask(very_tiny_config()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    processor = unihema.UniHemaProcessor.from_default(max_text_length=64)
    rows = rows_of("detection") | rows_of("single_cell")
    attach_adapter(model, processor, AdapterConfig(method="lora", start_from={"band": "neutrophil"}), rows)
    # The base: red blood cell, platelet, neutrophil.
    expected = [2, None, 2, 0]
    for head in ("detection_head.class_head", "model.query_selection.class_head"):
        old, new = model.get_submodule(head).original_module, model.get_submodule(head).modules_to_save["default"]
        for row, source in enumerate(expected):
            start = old.weight.mean(0) if source is None else old.weight[source]
            torch.testing.assert_close(new.weight[row], start, rtol=0, atol=1e-7)
    embedding = model.denoising.label_embedding
    assert embedding.modules_to_save["default"].weight.shape == (5, 32)
    assert torch.equal(embedding.modules_to_save["default"].weight[-1], embedding.original_module.weight[-1])
    cells = model.single_cell_head.modules_to_save["default"].layers[-1]
    # The base: neutrophil, lymphocyte. Sorted in the data: band, eosinophil, neutrophil, red cell.
    assert cells.out_features == 4
    old = before["single_cell_head.layers.6.weight"]
    assert torch.equal(cells.weight[2], old[0]) and not torch.equal(cells.weight[1], cells.weight[3])
    config = model.config
    assert list(config.id2label.values()) == LAB and config.num_labels == 4
    assert config.single_cell_labels == sorted(LAB)
    assert processor.default_prompts["detection"] == ", ".join(LAB)
    model.disable_adapters()
    assert list(model.config.id2label.values()) == ["red blood cell", "platelet", "neutrophil"]
    for name, value in model.state_dict().items():
        plain = name.replace("base_layer.", "").replace("original_module.", "")
        if plain in before:
            assert torch.equal(value, before[plain]), name


def test_labels_that_lack_a_class_of_the_data_are_refused():
    model = unihema.UniHemaForMultiTask(very_tiny_config())
    processor = unihema.UniHemaProcessor.from_default(max_text_length=64)
    settings = AdapterConfig(method="lora", labels=["neutrophil", "eosinophil"])
    with pytest.raises(ValueError, match=r"class 'band', which is not among the labels neutrophil, eosinophil"):
        attach_adapter(model, processor, settings, rows_of("detection"))


def test_a_pattern_without_layers_or_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"target_modules 'nothing' matches no layer"):
        adapted("detection", target_modules="nothing")
    with pytest.raises(ValueError, match=r"target_modules '\(' is not a pattern"):
        adapted("detection", target_modules="(")


def test_two_adapters_are_switched_and_equal_each_alone(base, two):
    plain = outputs(unihema.UniHemaForMultiTask.from_pretrained(base))
    alone = {name: load_model(two[name], "cpu")[0] for name in ("four", "two")}
    expected = {name: outputs(model) for name, model in alone.items()}
    assert expected["four"].shape[-1] == 4 and expected["two"].shape[-1] == 2
    model, _ = load_model(two["four"], "cpu", adapters=[two["two"], two["cells"]])
    assert model.adapters_in_use == ("four",)
    for name in ("four", "two", "four"):
        model.set_adapter(name)
        assert list(model.config.id2label.values()) == LAB[: expected[name].shape[-1]]
        torch.testing.assert_close(outputs(model), expected[name], rtol=0, atol=0)
    model.disable_adapters()
    torch.testing.assert_close(outputs(model), plain, rtol=0, atol=0)
    assert model.config.num_labels == 3 and model.adapters_in_use == ()
    model.enable_adapters()
    # It may be trained now, and by such weights PyTorch multiplies in another order, which on some processors rounds otherwise.
    torch.testing.assert_close(outputs(model), expected["four"], rtol=1e-5, atol=1e-5)
    # An adapter for another task leaves the detector's head alone.
    model.set_adapter("cells")
    assert outputs(model).shape[-1] == 3 and model.config.single_cell_labels == sorted(LAB)
    model.set_adapter(["two", "four"])
    both = outputs(model)
    assert both.shape[-1] == 2 and (both - expected["two"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="No adapter five; loaded are four, two, cells"):
        model.set_adapter("five")
    with pytest.raises(ValueError, match="An adapter named 'two' is loaded already"):
        model.load_adapter(two["two"], "two")
    other = adapted("detection", folder=base, method="ia3")
    save_adapter(other, base.parent / "ia3")
    with pytest.raises(ValueError, match="an adapter of kind IA3 cannot lie beside one of LORA"):
        model.load_adapter(base.parent / "ia3", "ia3")
    model.delete_adapter("two")
    assert set(model.peft_config) == {"four", "cells"}


def test_every_way_of_loading_gives_the_same(base, two):
    expected = outputs(load_model(two["four"], "cpu")[0])
    wrapped = PeftModel.from_pretrained(unihema.UniHemaForDetection.from_pretrained(base), two["four"])
    # Before anything was computed.
    assert list(wrapped.config.id2label.values()) == LAB
    found = {
        "PeftModel": wrapped,
        "AutoPeftModel": AutoPeftModel.from_pretrained(two["four"], import_allowlist=["unihema"]),
        "from_pretrained": AutoModelForObjectDetection.from_pretrained(two["four"]),
        "load_model": load_model(two["four"], "cpu")[0],
    }
    direct = unihema.UniHemaForDetection.from_pretrained(base)
    assert not direct.load_adapter(two["four"]).missing_keys
    for name, model in {**found, "load_adapter": direct}.items():
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        torch.testing.assert_close(outputs(plain), expected, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert list(plain.config.id2label.values()) == LAB
    wrapped.load_adapter(two["two"], "two")
    wrapped.set_adapter("two")
    assert outputs(wrapped.get_base_model()).shape[-1] == 2 and wrapped.config.num_labels == 2
    with wrapped.disable_adapter():
        assert outputs(wrapped.get_base_model()).shape[-1] == 3 and wrapped.config.num_labels == 3


def test_merged_it_gives_the_same_and_is_a_checkpoint_of_its_own(two, tmp_path):
    model, processor = load_model(two["four"], "cpu")
    expected = outputs(model)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-4)
    save_merged(model, processor, tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged", "cpu")
    assert not hasattr(merged, "peft_config") and list(merged.config.id2label.values()) == LAB
    torch.testing.assert_close(outputs(merged), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="is not empty"):
        save_merged(merged, processor, tmp_path / "merged")


def test_an_adapter_without_its_base_says_where_it_was_looked_for(two, base, tmp_path):
    lonely = shutil.copytree(two["four"], tmp_path / "lonely")
    values = json.loads((lonely / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(tmp_path / "elsewhere" / "base")
    (lonely / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"an adapter of '.*elsewhere/base', which is neither a folder here.*hf download"
    ):
        load_model(lonely)
    # A base of that name beside the adapter is taken.
    shutil.copytree(base, tmp_path / "base")
    assert adapter_base(lonely) == tmp_path / "base"
    (lonely / "adapter_model.safetensors").rename(lonely / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"without adapter_model.safetensors.*Pickled weights"):
        load_model(lonely)


def test_eight_bit_without_a_gpu_is_refused(two):
    with pytest.raises(CheckpointError, match="8 bit needs an NVIDIA GPU"):
        load_model(two["four"], "cpu", load_in_8bit=True)


def adapter_run(smears, base, output, **changes) -> RunConfig:
    settings = {
        "model.overrides": {},
        "model.initial_checkpoint": str(base),
        "data.tasks": ["detection"],
        "adapter.method": "lora",
        "optimisation.ema_decay": None,
        "optimisation.max_steps": 4,
    }
    return run_config(smears, output, **settings).with_overrides(changes)


def test_a_run_leaves_the_adapter_and_not_a_byte_of_the_base_is_changed(smears, base, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    more = {"logging.evaluate_every": 1, "logging.keep_best": True}
    report = train(adapter_run(smears, base, tmp_path / "run", **more))
    assert {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()} == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "metrics.json"} <= names
    assert not {"config.json", "model.safetensors", "README.md"} & names
    assert all(
        "lora_" in key or "head" in key or "embedding" in key
        for key in load_file(tmp_path / "run" / "adapter_model.safetensors")
    )
    model, processor = load_model(tmp_path / "run", "cpu")
    assert list(model.config.id2label.values()) == list(report["detection"]["per_class"])
    assert model.config.trained.detection_thresholds.keys() <= set(model.config.label2id)
    assert processor.default_prompts["detection"] == ", ".join(model.config.label2id)
    # BatchNorm statistics are weights of the base as well.
    model.disable_adapters()
    kept = {
        name.replace("base_layer.", "").replace("original_module.", ""): v for name, v in model.state_dict().items()
    }
    saved = load_file(base / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in saved.items())


def test_a_resumed_adapter_equals_one_that_was_never_stopped(smears, base, tmp_path):
    unmeasured = {"data.val_split": ""}
    train(adapter_run(smears, base, tmp_path / "whole", **unmeasured, **{"optimisation.schedule": "constant"}))
    config = adapter_run(smears, base, tmp_path / "parts", **unmeasured, **{"optimisation.schedule": "constant"})
    train(config.with_overrides({"optimisation.max_steps": 2}))
    train(config, resume=True)
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6)


def test_it_stops_when_it_no_longer_gets_better(smears, base, tmp_path):
    more = {"logging.evaluate_every": 1, "optimisation.patience": 2, "optimisation.learning_rate": 1e-12}
    lines = []
    train(
        adapter_run(smears, base, tmp_path / "run", **more, **{"optimisation.max_steps": 50}), callbacks=[lines.append]
    )
    # The first is the best, and two more are waited for; an epoch has two steps.
    assert [line["epoch"] for line in lines if line["event"] == "evaluation"] == [1, 2, 3]


def test_old_runs_are_read_and_an_adapter_needs_a_base(smears, base, tmp_path):
    values = run_config(smears, tmp_path).to_dict()
    del values["adapter"], values["optimisation"]["patience"], values["data"]["folds"]
    assert RunConfig.from_dict(values).adapter.method == "none"
    with pytest.raises(RunConfigError, match="adapter.method needs a base"):
        adapter_run(smears, base, tmp_path).with_overrides({"model.initial_checkpoint": None}).check()
    with pytest.raises(RunConfigError, match=r"data.fold=3 of data.folds=3"):
        adapter_run(smears, base, tmp_path, **{"data.folds": 3, "data.fold": 3}).check()
    with pytest.raises(RunConfigError, match="leave model.trained_parts out"):
        adapter_run(smears, base, tmp_path, **{"model.trained_parts": ["detection_head"]}).check()


def test_best_weights_are_put_back(base, tmp_path):
    model = adapted("detection", folder=base)
    expected = outputs(model)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_adapter_weights(model, tmp_path)
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=0)


def test_class_layers_take_other_rows_only_in_an_adapter():
    layer = ClassLinear(4, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(ClassLinear(4, 5).state_dict())
    embedding = ClassEmbedding(3, 4)
    old = embedding.weight.detach().clone()
    embedding.set_rows([2, 0, None, 2])
    assert embedding.num_embeddings == 4
    assert torch.equal(embedding.weight, torch.stack([old[2], old[0], old.mean(0), old[2]]))


def test_dora_leaves_out_layers_with_empty_rows():
    model = unihema.UniHemaForMultiTask(very_tiny_config())
    processor = unihema.UniHemaProcessor.from_default(max_text_length=64)
    # Of a new model, whose last box layers are zero.
    attach_adapter(model, processor, AdapterConfig(method="dora"), rows_of("detection"))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not any("box_head.layers.2.lora_A" in name for name, _ in model.named_parameters())
    assert any("box_head.layers.1.lora_A" in name for name, _ in model.named_parameters())


def test_an_adapter_says_what_its_own_scores_mean():
    stated = dict.fromkeys(("threshold", "recall", "precision", "false_positives"), 0.5)
    fitted = [{"detection": {"slope": slope, "shift": 0.5, "shifts": {}}} for slope in (2.0, 3.0)]
    model = lively(
        unihema.UniHemaForMultiTask(very_tiny_config(trained={"calibration": fitted[0], "parasites": stated}))
    )
    processor = unihema.UniHemaProcessor.from_default(max_text_length=64)
    attach_adapter(model, processor, AdapterConfig(method="lora"), rows_of("detection"))
    assert model.config.trained.calibration == {}, "the base's scores are others"
    assert model.config.trained.parasites is None
    model.config.trained.calibration = fitted[1]
    model.refresh_adapter_fields("default")
    model.disable_adapters()
    assert model.config.trained.calibration == fitted[0] and model.config.trained.parasites == stated
    model.enable_adapters()
    assert model.config.trained.calibration == fitted[1]


def test_an_adapter_says_how_large_the_cells_of_its_microscope_are():
    model = lively(unihema.UniHemaForMultiTask(very_tiny_config(trained={"red_cell_diameter": [40, 50, 60]})))
    processor = unihema.UniHemaProcessor.from_default(max_text_length=64, detection={"longest_edge": 320})
    cells = {"bbox": [[0.0, 0.0, 40.0, 40.0]] * 5, "category": ["red blood cell"] * 5}
    row = {"task": "detection", "image": "a.png", "dataset": "lab", "size": (640, 480), "objects": cells}
    attach_adapter(model, processor, AdapterConfig(method="lora"), {"detection": [row] * 10})
    assert model.config.trained.red_cell_diameter == [20, 20, 20]
    model.refresh_adapter_fields("default")
    (stored,) = model.peft_config.values()
    assert adapter_fields(stored)["trained"]["red_cell_diameter"] == [20, 20, 20]
    # What was saved before this was written down is of an unknown size, not of the base's.
    del stored.auto_mapping[FIELDS_KEY]["trained"]["red_cell_diameter"]
    assert adapter_fields(stored)["trained"]["red_cell_diameter"] is None
    model.disable_adapters()
    model.follow_adapter()
    assert model.config.trained.red_cell_diameter == [40, 50, 60]


def test_an_adapter_has_the_hierarchy_that_is_stated():
    cells = {"bbox": [[0.0, 0.0, 40.0, 40.0]] * 2, "category": ["ring", "film"]}
    row = {"task": "detection", "image": "a.png", "dataset": "lab", "size": (640, 480), "objects": cells}
    for stated, found in ((None, {}), ({"ring": "film"}, {"ring": "film"})):
        model = lively(unihema.UniHemaForMultiTask(very_tiny_config()))
        processor = unihema.UniHemaProcessor.from_default(max_text_length=64)
        attach_adapter(model, processor, AdapterConfig(method="lora"), {"detection": [row]}, stated)
        assert model.config.label_parents == found
    with pytest.raises(RunConfigError, match="data.label_parents: no class 'blood'"):
        attach_adapter(
            lively(unihema.UniHemaForMultiTask(very_tiny_config())),
            processor,
            AdapterConfig(method="lora"),
            {"detection": [row]},
            {"blood": "ring"},
        )


def detections(analyzer) -> list[tuple[str, float]]:
    return [
        (cell.label, round(cell.score, 3)) for cell in analyzer(SMEAR, "detection", threshold=0.0, tiles="off").cells
    ]


SMEAR = torch.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).byte().numpy()


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """A base and two adapters of it with classes of their own, each with its processor."""
    root = tmp_path_factory.mktemp("labs")
    save_lively(root / "base", 1)
    for name, labels in (("first", ["neutrophil", "eosinophil"]), ("second", ["blast", "band", "platelet"])):
        model, processor = load_model(root / "base", "cpu")
        attach_adapter(model, processor, AdapterConfig(method="lora"), rows_of("detection", labels))
        torch.manual_seed(len(labels))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        save_adapter(model, root / name)
        processor.save_pretrained(root / name)
    return root


def test_what_is_asked_for_is_what_the_adapter_in_use_was_taught(labs, tmp_path):
    both = Analyzer.from_pretrained(
        labs / "base", device="cpu", adapters=[labs / "first", labs / "second"], prepare=False
    )
    alone = {
        name: detections(Analyzer.from_pretrained(labs / name, device="cpu")) for name in ("base", "first", "second")
    }
    for name in ("second", "first", "second"):
        both.model.set_adapter(name)
        assert detections(both) == alone[name]
    both.model.disable_adapters()
    assert detections(both) == alone["base"]
    both.model.enable_adapters()
    save_merged(both.model, both.processor, tmp_path / "merged")
    assert (
        unihema.UniHemaProcessor.from_pretrained(tmp_path / "merged").default_prompts["detection"]
        == "blast, band, platelet"
    )


def test_thresholds_that_were_set_are_saved_with_the_adapter(labs, tmp_path):
    analyzer = Analyzer.from_pretrained(labs / "second", device="cpu", prepare=False)
    analyzer.model.config.trained.detection_thresholds = {"blast": 0.2, "band": 0.3, "platelet": 0.4}
    analyzer.model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["auto_mapping"][FIELDS_KEY]
    assert saved["trained"]["detection_thresholds"] == {"blast": 0.2, "band": 0.3, "platelet": 0.4}


def test_an_adapter_is_refused_by_a_base_that_was_trained_anew(labs, tmp_path):
    for name in ("base", "first"):
        shutil.copytree(labs / name, tmp_path / name)
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "first" / "adapter_config.json").write_text(json.dumps(config))
    load_model(tmp_path / "first", "cpu", "float16")
    shutil.rmtree(tmp_path / "base")
    save_lively(tmp_path / "base", 2)
    with pytest.raises(CheckpointError, match="first: was trained on other weights than those in .*base"):
        load_model(tmp_path / "first", "cpu")


def test_int8_leaves_the_layers_of_an_adapter_as_they_are(labs):
    quantised = Analyzer.from_pretrained(labs / "second", device="cpu", int8=True)
    exact = Analyzer.from_pretrained(labs / "second", device="cpu", prepare=False)
    assert len(detections(quantised)) == len(detections(exact)) > 3
    assert detections(quantised)[0][1] == pytest.approx(detections(exact)[0][1], abs=0.01)
