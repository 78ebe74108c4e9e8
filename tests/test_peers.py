"""Single-task peers beside UniHema: each trains and is measured, none twice, and the table adds up."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from data_folders import write_photograph
from killing import killed_and_resumed, undisturbed, weights
from tiny_models import batch, very_tiny_config
from tiny_runs import TASKS, run_config

from benchmarks.peers import comparison as comparing
from benchmarks.peers import speed
from benchmarks.peers.answerers import BlipLike, TextOnlyT5
from benchmarks.peers.comparison import UNIHEMA
from benchmarks.peers.detectors import DeformableDetr, RTDetrV2
from benchmarks.peers.image_heads import AttributeHeads
from benchmarks.peers.peer import padded
from benchmarks.peers.peers import ATTRIBUTES, FIGURES, PEERS, chosen_peers
from benchmarks.peers.table import best_peers, comparison, page
from unihema.errors import RunConfigError
from unihema.training.data.synthetic.folder import write_synthetic
from unihema.training.evaluation import evaluate_model
from unihema.training.run.build import LITE0_BACKBONE, build, training_rows, validation_rows
from unihema.training.run.checkpoint import save_trained


pytest.importorskip("segmentation_models_pytorch")

CONDITIONS = {
    "command": "it",
    "processor": "none",
    "threads": 1,
    "load": 0.5,
    "torch": "2",
    "transformers": "5",
    "seed": 0,
    "start": "efficientnet-lite0",
    "folders": ["a"],
    "minutes": 2.0,
    "image_sizes": {"detection": {"longest_edge": 320}},
    "device": "cpu",
}
LITE0 = {"backbone_config": LITE0_BACKBONE, "freeze_backbone_norm": True}


def write_attributes(folder):
    """A table of four crops a split: two kinds of cells, two attributes."""
    for seed, split in enumerate(("train", "val")):
        lines = ["file_name,label,cell_size,granularity"]
        for number, kind in enumerate(("neutrophil", "lymphocyte") * 2):
            name = f"{number}.png"
            write_photograph(folder / "images" / split / name, 10 * seed + number, (96, 96))
            lines.append(f"{name},{kind},{('big', 'small')[number % 2]},{('yes', 'no')[number // 2]}")
        (folder / f"attributes_{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Settings of peers that train two steps on synthetic smears, and the folder of an untrained UniHema."""
    root = tmp_path_factory.mktemp("quality")
    smears = write_synthetic(
        root / "smears", 3, 2, seed=0, crops_per_field=2, width=224, height=168, crop_size=96, progress=False
    )
    config = run_config(
        smears, root / "peers", **{"data.folders": [str(smears), str(write_attributes(root / "crops"))]}
    )
    config.model.overrides |= LITE0
    # DeformableDetr's norms want more than one pixel on the coarsest level.
    config.data.image_sizes["detection"] = {"longest_edge": 96}
    config.optimisation.max_steps, config.optimisation.time_limit_minutes = 2, 5.0
    torch.manual_seed(0)
    described = config.with_overrides({"data.attributes_as_detection": True})
    save_trained(*build(described, training_rows(described)), root / "unihema")
    return config, root / "unihema"


@pytest.fixture(scope="module")
def results(lab):
    return comparing.compare(*lab)


def test_every_peer_trains_and_is_measured_on_the_rows_of_unihema(lab, results):
    assert set(results) == {UNIHEMA, *PEERS}
    rows = validation_rows(lab[0], TASKS)
    expected = {task: len(found) for task, found in rows.items()} | {ATTRIBUTES: 4}
    for name, kind in PEERS.items():
        report = results[name]["report"][kind.compared]
        assert results[name]["trained"]["steps"] == 2
        assert report["rows"] == results[UNIHEMA]["report"][kind.compared]["rows"] == expected[kind.compared]
        assert math.isfinite(report[FIGURES[kind.compared][0]]) and "intervals" in report


@pytest.mark.parametrize("name", ["rt_detr_v2", "unet", "linear_head", "blip_like"])
def test_saved_peer_is_the_one_that_was_measured(lab, results, name):
    config, task = lab[0], PEERS[name].compared
    peer = PEERS[name].build.from_pretrained(Path(config.output_dir) / name)
    assert results[name]["parameters"] == sum(value.numel() for value in peer.parameters())
    _, processor = build(config, training_rows(config.with_overrides({"data.tasks": [task]})))
    again = evaluate_model(peer, processor, validation_rows(config, [task]), progress=False, bootstrap=0)[task]
    expected = results[name]["report"][task][FIGURES[task][0]]
    assert again[FIGURES[task][0]] == pytest.approx(expected, abs=1e-6)


def test_finished_peers_are_not_trained_again(lab, results, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained again")

    config, checkpoint = lab
    monkeypatch.setattr(comparing, "train", never)
    monkeypatch.setattr(comparing, "evaluate_model", never)
    again = comparing.compare(config, checkpoint, resume=True)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(results))
    with pytest.raises(
        RunConfigError,
        match=r"linear_head in .*results.json .* made with optimisation.learning_rate=0.0005; now it is 0.1",
    ):
        comparing.compare(config, checkpoint, ["linear_head"], {"linear_head": 0.1}, resume=True)
    with pytest.raises(RunConfigError, match=r"of an earlier run. Go on with it \(resume=True\)"):
        comparing.compare(config, checkpoint)


def test_peer_whose_weights_are_gone_is_made_anew(lab, results):
    config, checkpoint = lab
    (Path(config.output_dir) / "t5" / "model.safetensors").unlink()
    again = comparing.compare(config, checkpoint, ["t5"], resume=True)
    assert again["t5"]["report"] == results["t5"]["report"] and again["t5"]["trained"]["steps"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is copied")
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_comparison_changes_no_figure(lab, tmp_path, kills):
    changes = {"optimisation.time_limit_minutes": None, "logging.checkpoint_steps": 1, "optimisation.device": "cpu"}
    peers = ["linear_head"] if kills == 1 else ["linear_head", "unet"]

    def compare(folder):
        config = lab[0].with_overrides({**changes, "output_dir": str(folder)})
        found = comparing.compare(config, lab[1], peers, resume=True)
        for name in peers:
            found[name]["trained"].pop("seconds")
        return found

    whole = undisturbed(lambda: compare(tmp_path / "whole"))
    for folder, found in killed_and_resumed(compare, tmp_path, kills, whole):
        assert found == whole.result and weights(folder) == weights(tmp_path / "whole")


def test_checkpoint_that_knows_no_attribute_of_the_data_has_no_figure_for_them(lab, tmp_path):
    config = lab[0].with_overrides({"output_dir": str(tmp_path / "peers")})
    without = config.with_overrides({"data.folders": config.data.folders[:1]})
    save_trained(*build(without, training_rows(without)), tmp_path / "unihema")
    found = comparing.compare(config, tmp_path / "unihema", ["attribute_heads"])
    assert found[UNIHEMA]["report"] == {} and math.isfinite(found["attribute_heads"]["report"][ATTRIBUTES]["macro_f1"])
    assert comparison(found, {})["verdicts"] == []


def test_data_that_nothing_is_trained_on_are_measured_whole(lab, tmp_path):
    config = lab[0].with_overrides({"output_dir": str(tmp_path / "peers")})
    strange = write_attributes(tmp_path / "strange")
    found = comparing.compare(config, lab[1], ["linear_head"], abroad=[strange])
    for name in (UNIHEMA, "linear_head"):
        report = found[name]["abroad"]["single_cell"]["strange"]
        assert report["rows"] == 8 and 0 <= report["accuracy"] <= 1
    text = page(comparison(found, {}), CONDITIONS)
    assert text.count("| single_cell | strange | 8 |") == 2 and "backbone and linear head | macro-F1 " in text
    with pytest.raises(RunConfigError, match="--abroad crops: the peers are trained on it"):
        comparing.compare(config, lab[1], ["linear_head"], abroad=config.data.folders[1:], resume=True)


def test_bad_choices_are_said_before_anything_is_trained(lab, tmp_path):
    config = lab[0].with_overrides({"output_dir": str(tmp_path / "peers")})
    with pytest.raises(RunConfigError, match="--peer yolo: no such peer; there are rt_detr_v2, deformable_detr"):
        comparing.compare(config, lab[1], ["yolo"])
    with pytest.raises(RunConfigError, match="--learning-rate t5: no such peer is trained; those are unet"):
        comparing.compare(config, lab[1], ["unet"], {"t5": 1e-3})
    with pytest.raises(RunConfigError, match="--peer unet needs data for segmentation; the folders have detection"):
        chosen_peers(["unet"], ["detection"])
    endless = config.with_overrides({"optimisation.max_steps": None, "optimisation.time_limit_minutes": None})
    with pytest.raises(RunConfigError, match="--minutes"):
        comparing.compare(endless, lab[1])
    assert not (tmp_path / "peers").exists()


def test_all_models_are_timed_alone_and_together(lab, results, monkeypatch):
    measured = []
    monkeypatch.setattr(speed, "peak_memory", lambda module, *items: measured.append(items[2:]) or 1.0)
    folder = Path(lab[0].output_dir)
    best = ["unet", "t5"]
    asked = ["segmentation", ATTRIBUTES, "question_answering"]
    found = speed.measure(folder, list(PEERS), best, asked, lab[1], rounds=1)
    own = {f"unihema/{compared}" for compared in asked}
    assert set(found) == {*PEERS, *own, speed.ALL_PEERS, UNIHEMA}
    assert all(times["wall ms"] > 0 and times["peak MB"] == 1 for times in found.values())
    assert tuple(best) in measured and tuple(f"unihema/{compared}" for compared in asked) in measured


def test_tasks_on_one_image_look_at_it_once(lab, results):
    model = speed.load_prepared(lab[1])
    looks = []
    model.model.visual_backbone.register_forward_hook(lambda *_: looks.append(1))
    items = [f"{UNIHEMA}/{compared}" for compared in (ATTRIBUTES, "single_cell", "question_answering", "cloze")]
    features = {}
    with torch.inference_mode():
        for run in speed.runners(Path(lab[0].output_dir), items, model).values():
            run(features)
    assert len(looks) == len(features) == 1


def test_attribute_peer_learns_attributes_and_its_one_cell_is_the_crop():
    torch.manual_seed(0)
    peer = AttributeHeads(very_tiny_config(**LITE0, morphology={"size": ["big", "small"], "shape": ["a", "b", "c"]}))
    images = torch.randn(2, 3, 64, 64)
    values = torch.tensor([[[0, -100]], [[1, 2]]])
    labels = [{"morphology": of_image} for of_image in values]
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = peer.eval()(images, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    with torch.inference_mode():
        found = peer(images)
    assert found.pred_morphology.shape == (2, 1, 5) and found.logits.shape[:2] == (2, 1)
    assert found.pred_morphology[:, 0, :2].argmax(-1).tolist() == [0, 1]
    assert found.pred_boxes.tolist() == [[[0.5, 0.5, 1.0, 1.0]]] * 2


def _labels(config, annotated=None):
    cells = {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.2]])}
    return [cells if annotated is None else cells | {"annotated_classes": torch.tensor(annotated)}] * 2


@pytest.mark.parametrize("build_peer", [RTDetrV2, DeformableDetr])
def test_class_that_is_not_annotated_teaches_a_detector_nothing(build_peer):
    peer = build_peer(very_tiny_config(**LITE0)).train()
    images = torch.randn(2, 3, 64, 64)
    last = -2 if build_peer is DeformableDetr else -1  # of DeformableDetr's, the last is the first stage's
    row = {}
    for annotated in (None, [True, False, True]):
        peer.zero_grad()
        peer(images, labels=_labels(peer.config, annotated)).loss.backward()
        row[annotated is None] = peer.network.class_embed[last].weight.grad[1].abs().max().item()
    assert row[True] > 1e-6 and row[False] == 0


def test_first_stage_of_deformable_detr_is_taught():
    peer = DeformableDetr(very_tiny_config(**LITE0)).train()
    peer(torch.randn(2, 3, 64, 64), labels=_labels(peer.config)).loss.backward()
    assert peer.network.class_embed[-1].weight.grad[0].abs().max() > 1e-6


def test_boxes_of_rt_detr_are_relative_to_the_image_not_its_padding():
    peer = RTDetrV2(very_tiny_config(**LITE0)).eval()
    _, mask = padded(torch.zeros(2, 3, 48, 40), None)
    assert mask.shape == (2, 64, 64) and mask.sum() == 2 * 48 * 40
    assert peer.box_scale(mask)[0].tolist() == pytest.approx([40 / 64, 48 / 64] * 2)
    inside = torch.tensor([[0.5, 0.5, 0.2, 0.4]]) * peer.box_scale(mask)[0]
    # Centre and size in pixels of the padded image.
    assert (inside * 64).tolist()[0] == pytest.approx([20, 24, 8, 19.2])


def test_frozen_norms_stay_and_the_activations_inside_them_too():
    peer = DeformableDetr(very_tiny_config(**LITE0)).train()
    norms = [part for part in peer.backbone_network.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert any(isinstance(part, torch.nn.ReLU6) for norm in norms for part in norm.modules())


def test_blip_like_peer_sees_its_own_image_and_the_text_only_peer_none():
    inputs = batch("question_answering")
    inputs.pop("labels")
    peer = BlipLike(very_tiny_config(**LITE0)).eval()
    two = {
        name: value.repeat_interleave(2, 0)
        for name, value in inputs.items()
        if name not in ("pixel_values", "pixel_mask")
    }
    images = {name: inputs[name] for name in ("pixel_values", "pixel_mask")}
    answers = torch.tensor([[5, 9, 1]]).repeat(4, 1)
    logits = peer(**images, **two, labels=answers).logits
    # Questions of an image lie together: both of the first image are alike, those of the second are not.
    assert torch.allclose(logits[0], logits[1], atol=1e-5) and torch.allclose(logits[2], logits[3], atol=1e-5)
    other = peer(pixel_values=images["pixel_values"].flip(0), **two, labels=answers).logits
    assert (other[0] - logits[0]).abs().max() > 1e-3
    blind = TextOnlyT5(very_tiny_config()).eval()
    assert torch.equal(blind(**inputs, labels=answers[:2]).logits, blind(**two, labels=answers).logits[::2])


def _result(task, figures, parameters, minutes=2.0, rate=1e-3):
    report = {task: {**figures, "rows": 10, "images": 5, "intervals": {}}}
    trained = {"seconds": 60 * minutes, "passes": 1.5, "device": "cpu"}
    return {"report": report, "parameters": parameters, "trained": trained, "learning_rate": rate}


@pytest.fixture
def made_up():
    report = {
        "detection": {"mAP50": 0.6, "mAP": 0.3, "rows": 10, "images": 5, "intervals": {"mAP50": [0.5, 0.7]}},
        "segmentation": {"dice": 0.9, "iou": 0.8, "rows": 10, "images": 5},
    }
    parts = {"a": {"mAP50": 0.7, "rows": 4}, "b": {"mAP50": None, "rows": 6}}
    report["detection"]["datasets"] = parts
    return {
        UNIHEMA: {"report": report, "parameters": 8_000_000},
        "rt_detr_v2": _result("detection", {"mAP50": 0.5, "mAP": 0.2}, 7_000_000),
        "deformable_detr": _result("detection", {"mAP50": None, "mAP": None}, 5_000_000),
        "unet": _result("segmentation", {"dice": 0.95, "iou": 0.85}, 4_000_000, minutes=3.0),
    }


def test_sums_are_those_of_the_best_peer_of_each_task(made_up):
    assert best_peers(made_up) == {"detection": "rt_detr_v2", "segmentation": "unet"}
    times = {"wall ms": 10.0, "processor ms": 9.0, "peak MB": 400.0}
    compared = comparison(made_up, {speed.ALL_PEERS: times, "unet": times}, checkpoint_minutes=50.0)
    peers, one = compared["sums"]
    assert peers["parameters"] == 11_000_000 and peers["minutes"] == pytest.approx(5.0) and peers["wall ms"] == 10.0
    assert one["parameters"] == 8_000_000 and one["minutes"] == 50.0 and one["wall ms"] is None
    differences = {verdict["task"]: verdict["difference"] for verdict in compared["verdicts"]}
    assert differences == {"detection": pytest.approx(0.1), "segmentation": pytest.approx(-0.05)}
    assert [verdict["at_least_as_good"] for verdict in compared["verdicts"]] == [True, False]
    assert [row["model"] for row in compared["rows"] if row["task"] == "detection"] == [
        "UniHema, all tasks in one",
        "RT-DETRv2",
        "DeformableDetr, two-stage",
    ]


def test_page_says_what_the_comparison_has(made_up):
    times = {"wall ms": 10.0, "processor ms": 9.0, "peak MB": 400.0}
    text = page(comparison(made_up, {"rt_detr_v2": times}), CONDITIONS)
    assert "| detection | UniHema, all tasks in one | mAP50 0.600 (0.500 to 0.700); mAP 0.300 | 5 | 10 | 8.00 |" in text
    assert "| RT-DETRv2 | mAP50 0.500; mAP 0.200 | 5 | 10 | 7.00 | 10.0 | 9.0 | 400 | 2.0 | 1.5 | 0.001 |" in text
    noted = page(comparison(made_up, {}), CONDITIONS | {"note": "Peers of another day."})
    assert "\n\nPeers of another day.\n\n" in noted and "Peers of another day." not in text
    assert "mAP50 none; mAP none" in text and "at least as good as the best peer on 1 of 2 tasks" in text
    assert "| detection | a | 4 | UniHema, all tasks in one | mAP50 | 0.700 |" in text
    assert "| detection | b | 6 | UniHema, all tasks in one | mAP50 | none |" in text


def test_recorded_page_is_what_the_recorded_figures_say():
    docs = Path(__file__).parents[1] / "docs" / "results"
    recorded = json.loads((docs / "peers.json").read_text(encoding="utf-8"))
    assert (docs / "peers.md").read_text(encoding="utf-8") == page(recorded, recorded["conditions"])
