"""Damaged and hostile checkpoints: an error that names the file or field, before anything large is allocated; no code runs."""

import json
import shutil
import struct
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer, CheckpointError
from unihema.loading import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copied")


def change(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def header(folder):
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(folder, entries, data):
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "fields", [{"decoder_layers": 128, "decoder_ffn_dim": 65536}, {"encoder_layers": 128, "encoder_ffn_dim": 65536}]
)
def test_more_parameters_than_the_file_holds(copied, fields, monkeypatch):
    change(copied, "config.json", **fields)
    built = []
    real = torch.nn.Linear.__init__
    monkeypatch.setattr(
        torch.nn.Linear,
        "__init__",
        lambda self, *a, **k: (real(self, *a, **k), built.append(self.weight.device.type))[0],
    )
    with pytest.raises(CheckpointError, match=r"a model of [\d,]{11,} parameters, many more than its files"):
        load_model(copied)
    # Shapes alone were made.
    assert set(built) == {"meta"}


def shapes(entries, data):
    name = next(name for name in entries if name.endswith("class_head.weight"))
    entries[name]["shape"] = entries[name]["shape"][::-1]
    return data


def short(entries, data):
    return data[:-100]


def long(entries, data):
    return data + bytes(100)


def overlap(entries, data):
    first, second = [name for name in entries if name != "__metadata__"][:2]
    entries[first]["data_offsets"] = entries[second]["data_offsets"]
    return data


def negative(entries, data):
    name = next(name for name in entries if name != "__metadata__")
    entries[name]["data_offsets"] = [-4, 0]
    return data


def unknown_dtype(entries, data):
    name = next(name for name in entries if name != "__metadata__")
    entries[name]["dtype"] = "F33"
    return data


def other_dtype(entries, data):
    entries[next(name for name in entries if name.endswith("class_head.weight"))]["dtype"] = "F64"
    return data


def whole_numbers(entries, data):
    entries[next(name for name in entries if name.endswith("class_head.weight"))]["dtype"] = "I32"
    return data


def enormous(entries, data):
    name = next(name for name in entries if name != "__metadata__")
    entries[name]["shape"] = [1 << 40, 1 << 40]
    return data


def missing(entries, data):
    name = next(name for name in entries if name.endswith("class_head.weight"))
    entries[name + "x"] = entries.pop(name)
    return data


@pytest.mark.parametrize(
    "spoil",
    [shapes, short, long, overlap, negative, unknown_dtype, other_dtype, whole_numbers, enormous, missing],
    ids=lambda it: it.__name__,
)
def test_damaged_weights(copied, spoil):
    entries, data = header(copied)
    data = spoil(entries, data)
    write_header(copied, entries, data)
    with pytest.raises(CheckpointError, match=r"copied.*(model\.safetensors|weights|class_head)"):
        load_model(copied)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 7, struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 2) + b"[]"]
)
def test_a_header_that_is_none(copied, content):
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Analyzer.from_pretrained(copied)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", ["", "[]", "null", "7", '"text"', "[" * 10**6, '{"a":' * 10**5, '{"a": 1' + "0" * 5000]
)
def test_json_of_any_other_form(copied, file, content):
    (copied / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        Analyzer.from_pretrained(copied)


@pytest.mark.parametrize("named", ["../other.safetensors", "/etc/passwd", "pytorch_model.bin", 7, "a\nb.safetensors"])
def test_a_list_of_weight_files_names_its_own_folder(copied, named):
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    with pytest.raises(CheckpointError, match="safetensors files of its own folder"):
        Analyzer.from_pretrained(copied)


@pytest.mark.parametrize("named", [[], "UniHemaForDetection", [7], ["os"], ["UniHemaModel"], ["ContextVar"], {"a": 1}])
def test_architectures_that_are_none(copied, named):
    change(copied, "config.json", architectures=named)
    if named == []:
        assert type(load_model(copied)[0]).__name__ == "UniHemaForMultiTask"
        return
    with pytest.raises(CheckpointError, match="architecture"):
        load_model(copied)


def test_code_of_the_folder_never_runs(copied, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    for path in copied.glob("*.py"):
        path.write_text(f"open({str(ran)!r}, 'w')\nraise SystemExit(3)\n")
    (copied / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    every = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoBackbone")
    own = {"auto_map": dict.fromkeys(every, "evil.Evil")}
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        change(copied, file, **own)
    config = json.loads((copied / "config.json").read_text())
    change(
        copied, "config.json", backbone_config=config["backbone_config"] | own, text_config=config["text_config"] | own
    )
    monkeypatch.chdir(copied)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked whether to trust the folder"))
    with suppress(CheckpointError):
        Analyzer.from_pretrained(copied)
    assert not ran.exists()


def test_every_number_may_be_half_precision(copied):
    """The count of parameters is one of values, not of bytes."""
    weights = {name: weight.half() for name, weight in load_file(copied / "model.safetensors").items()}
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    load_model(copied)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "use_cache", "do_sample"])
@pytest.mark.parametrize("value", [float("inf"), "yes", [1]])
def test_switches_of_generation_that_are_none(copied, name, value):
    change(copied, "generation_config.json", **{name: value})
    with pytest.raises(CheckpointError, match=f"(generation_config.json: {name} is|checkpoint cannot be read)"):
        load_model(copied)


@pytest.mark.parametrize("names", [False, {}, ["stem"]])
def test_a_backbone_whose_fields_contradict_each_other(copied, names):
    backbone = json.loads((copied / "config.json").read_text())["backbone_config"]
    change(copied, "config.json", backbone_config=backbone | {"stage_names": names})
    with pytest.raises(CheckpointError, match="backbone_config makes no backbone"):
        load_model(copied)


def test_an_unknown_result_of_training_is_shown_without_control_characters(copied):
    trained = json.loads((copied / "config.json").read_text())["trained"]
    change(copied, "config.json", trained=trained | {"\x08": 1})
    with pytest.raises(CheckpointError, match=r"unknown key '\\x08'"):
        load_model(copied)
