"""The authors' checkpoint converted and back, and what is refused."""

import argparse
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint

import unihema
from unihema.official.convert import (
    OFFICIAL_MATHS,
    TokenizerWarning,
    convert_from_official,
    convert_to_official,
    official_config,
    to_official,
)
from unihema.official.keys import OfficialKeyError, translate
from unihema.processing_unihema.processing_unihema import DEFAULT_TOKENIZER


def small_config():
    """The official kind of model at the smallest size that its key names allow."""
    text = {"model_type": "t5", "vocab_size": 700, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}
    return unihema.UniHemaConfig(
        text_config={**text, "num_layers": 1, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"},
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=24,
        fusion_ffn_dim=8,
        num_queries=12,
        id2label={index: f"class {index}" for index in range(30)},
        single_cell_labels=[f"cell {index}" for index in range(45)],
        **OFFICIAL_MATHS,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unihema.UniHemaForMultiTask(small_config()).eval()


@pytest.fixture
def official(model):
    return to_official(model.state_dict(), model.config)


@pytest.fixture
def checkpoint(official, tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"model": official, "args": argparse.Namespace(nheads=8, lr=1e-4), "epoch": 3}, path)
    return path


def test_there_and_back_is_the_same(model, official, checkpoint, tmp_path):
    became = convert_from_official(checkpoint, tmp_path / "ours", DEFAULT_TOKENIZER, report=True, progress=False)
    assert set(became.converted) | set(became.dropped) == set(official)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(ours) == set(model.state_dict())
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items() if "num_batches" not in key)
    report = (tmp_path / "ours" / "conversion.tsv").read_text(encoding="utf-8").splitlines()
    assert len(report) == len(official)
    assert "transformer.encoder.cls_pos\tdropped: position of the class token, which never attends" in report

    count = convert_to_official(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert count == len(back) and set(back) == set(official)
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_the_result_is_a_whole_checkpoint(model, checkpoint, tmp_path):
    convert_from_official(checkpoint, tmp_path / "ours", DEFAULT_TOKENIZER, progress=False)
    loaded = unihema.UniHemaForMultiTask.from_pretrained(tmp_path / "ours")
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(task="detection", pixel_values=pixels, input_ids=torch.tensor([[5, 6, 1]]))
        found = loaded(task="detection", pixel_values=pixels, input_ids=torch.tensor([[5, 6, 1]]))
    assert torch.equal(found.logits, expected.logits)
    assert loaded.config.id2label[23] == "RBC" and loaded.config.single_cell_labels[44] == "trypanosome"
    processor = unihema.UniHemaProcessor.from_pretrained(tmp_path / "ours")
    image = torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8).numpy()
    result = unihema.Analyzer(loaded, processor)(image, questions=["Q"], threshold=0.5)
    assert len(result.answers) == 1


def test_larger_than_one_file(model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("unihema.official.convert.SHARD_SIZE", "40MB")
    convert_from_official(checkpoint, tmp_path / "ours", DEFAULT_TOKENIZER, progress=False)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    loaded = unihema.UniHemaForMultiTask.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items() if "num_batches" not in key)


def broken(official, change):
    state = dict(official)
    change(state)
    return state


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.update({"transformer.novelty.weight": torch.zeros(2)}),
            "transformer.novelty.weight: no such tensor",
        ),
        (lambda s: s.update({"input_proj.0.0.weight": torch.zeros(3, 3)}), r"input_proj.0.0.weight has shape \[3, 3\]"),
        (lambda s: s.pop("xformer.txt_proj.bias"), "becomes model.hema_former.cross_modal_fusion.text_projection.bias"),
        (
            lambda s: s.update({"class_embed.1.bias": torch.ones(30)}),
            "class_embed.1.bias differs from class_embed.0.bias",
        ),
        (
            lambda s: s.pop("transformer.level_embed"),
            "level_embed is missing: this is not a checkpoint of the official",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(official, tmp_path, change, message):
    torch.save(broken(official, change), tmp_path / "odd.pth")
    with pytest.raises(OfficialKeyError, match=message):
        convert_from_official(tmp_path / "odd.pth", tmp_path / "ours", DEFAULT_TOKENIZER, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.pth"]


class Payload:
    def __reduce__(self):
        return print, ("the pickle ran",)


def test_nothing_a_pickle_says_is_run(tmp_path, capsys):
    torch.save({"model": {}, "extra": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth: not a PyTorch checkpoint that can be read safely"):
        convert_from_official(tmp_path / "evil.pth", tmp_path / "ours", DEFAULT_TOKENIZER)
    with open(tmp_path / "plain.pth", "wb") as file:
        pickle.dump(Payload(), file)
    with pytest.raises(ValueError, match=r"plain\.pth"):
        convert_from_official(tmp_path / "plain.pth", tmp_path / "ours", DEFAULT_TOKENIZER)
    assert "the pickle ran" not in capsys.readouterr().out
    assert not (tmp_path / "ours").exists()


def test_other_bad_input(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth: no such file"):
        convert_from_official(tmp_path / "missing.pth", tmp_path / "ours", DEFAULT_TOKENIZER)
    torch.save({"optimizer": {"lr": 1}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: holds no state dict"):
        convert_from_official(tmp_path / "other.pth", tmp_path / "ours", DEFAULT_TOKENIZER)
    with pytest.raises(OSError, match="No tokenizer at nobody/nothing.*--tokenizer"):
        convert_from_official(checkpoint, tmp_path / "ours", "nobody/nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is there already"):
        convert_from_official(checkpoint, tmp_path / "full", DEFAULT_TOKENIZER)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"official\.pth is there already"):
        convert_to_official(tmp_path / "full", checkpoint)


def test_a_sentencepiece_file_that_is_not_t5s_is_told(checkpoint, tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"neutrophil {n} lymphocyte basophil {n * 7}" for n in range(200)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "own"), vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    with pytest.warns(TokenizerWarning, match="not the SentencePiece file of T5"):
        convert_from_official(checkpoint, tmp_path / "ours", tmp_path / "own.model", progress=False)
    tokenizer = unihema.UniHemaProcessor.from_pretrained(tmp_path / "ours").tokenizer
    assert tokenizer.decode(tokenizer("lymphocyte").input_ids, skip_special_tokens=True) == "lymphocyte"

    (tmp_path / "broken.model").write_bytes(b"no model at all")
    with pytest.warns(TokenizerWarning), pytest.raises(ValueError, match=r"broken\.model: cannot be read"):
        convert_from_official(checkpoint, tmp_path / "again", tmp_path / "broken.model")


def test_a_model_of_another_kind_cannot_go_back(tmp_path):
    config = small_config()
    config.refinement = "concat"
    other = unihema.UniHemaForMultiTask(config)
    with pytest.raises(OfficialKeyError, match="merge.weight: the official model has no such tensor"):
        to_official(other.state_dict(), config)


def test_a_model_with_one_head_cannot_go_back(tmp_path):
    save_tiny_checkpoint(tmp_path / "one", unihema.UniHemaForDetection)
    with pytest.raises(ValueError, match="one is a UniHemaForDetection: the official model has every head"):
        convert_to_official(tmp_path / "one", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_command(checkpoint, tmp_path):
    command = [sys.executable, "-m", "unihema", "convert"]
    options = ["--tokenizer", str(DEFAULT_TOKENIZER)]
    run = subprocess.run(
        [*command, str(checkpoint), str(tmp_path / "ours"), *options], capture_output=True, text=True, check=True
    )
    assert "tensors converted" in run.stdout and "another name of a tensor that is read" in run.stdout
    run = subprocess.run(
        [*command, str(checkpoint), str(tmp_path / "ours"), *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and "is there already" in run.stderr


def test_every_key_of_the_official_manifest(official_dir):
    import json

    manifest = json.loads((official_dir / "state_dict_manifest.json").read_text(encoding="utf-8"))["configs"]
    for size in ("small", "full"):
        with torch.device("meta"):
            state = {key: torch.empty(entry["shape"]) for key, entry in manifest[size].items()}
            config = official_config(state)
            back = to_official(unihema.UniHemaForMultiTask(config).state_dict(), config)
        assert {key: list(value.shape) for key, value in back.items()} == {
            key: entry["shape"] for key, entry in manifest[size].items()
        }
        assert all(translate(key).ours or translate(key).reason for key in manifest[size])
