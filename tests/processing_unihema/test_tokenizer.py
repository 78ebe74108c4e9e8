"""Our own tokenizer: small, complete for hematology, and free of what it was trained with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unihema.processing_unihema.processing_unihema import DEFAULT_TOKENIZER, load_default_tokenizer


# The two label lists of the paper's official code, and the attribute words of WBCAtt.
NAMES = """
myeloblast; lymphoblast; neutrophil; atypical lymphocyte; promonocyte; monoblast; lymphocyte; myelocyte; abnormal promyelocyte;
monocyte; metamyelocyte; eosinophil; basophil; none; gametocyte; schizont; trophozoite; ring; concentrated_leishman_parasite;
leishman_parasite; platelet; Sickle Cells; RBC; WBC; parasite; plasmodium; TBbacillus; leukocyte; difficult; abnormal eosinophil;
artefact; blast; erythroblast; faggot cell; hairy cell; smudge cell; immature lymphocyte; band neutrophil; segmented neutrophil;
not identifiable; other cell; proerythroblast; plasma cell; promyelocyte; lymphocyte variant; giant thrombocyte; blast no lineage;
thrombocyte aggregation; unidentified; normoblast; prolymphocyte; wbc; rbc; neutrophil band; babesia; leishmania; toxoplasma;
trichomonad; trypanosome; segmented bilobed; segmented multilobed; unsegmented band-shaped; unsegmented indented; densely packed;
loosely packed; purple blue; light blue; frosted; coarse; granularity; vacuoles; inconspicuous; basophilia; scanty
"""


@pytest.fixture(scope="module")
def tokenizer():
    return load_default_tokenizer()


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_round_trip(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids, text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_files_are_small_and_sentinels_are_in_t5_order(tokenizer):
    assert (DEFAULT_TOKENIZER / "tokenizer.json").stat().st_size < 150_000
    ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    assert ids == list(range(len(tokenizer) - 1, len(tokenizer) - 101, -1))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 64
    assert tokenizer("neutrophil")["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", [entry.strip() for entry in NAMES.split(";")])
def test_names_round_trip(tokenizer, name):
    for text in (" ".join(name.split()), f"This image is for the detection of {' '.join(name.split())} cells"):
        assert_round_trip(tokenizer, text)


@pytest.mark.parametrize(
    "text",
    [
        "What type of white blood cell is this?",
        "The nuclear to cytoplasmic ratio is low.",
        "Neutrophil with 3 lobes, 12.5 µm ± 0.3; WBC 7.5 x 10^9/L (60 %).",
        'It\'s "normal": ≥ 4 and ≤ 11 × 10 – at 37 °C!',
        "Zyxwvut, a word nobody has seen",
    ],
)
def test_sentences_round_trip(tokenizer, text):
    assert_round_trip(tokenizer, text)


def test_sentinels_are_single_tokens_within_a_sentence(tokenizer):
    sentence = "The <extra_id_0> shows a <extra_id_1> nucleus."
    ids = tokenizer(sentence)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    sentinels = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    assert [token for token in ids if token >= min(sentinels)] == sentinels


def test_saving_keeps_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    text = "mask: a <extra_id_0> nucleus, clear cytoplasm"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.model_max_length == 64


def test_real_questions_and_answers_round_trip(tokenizer, data_dir):
    texts = set()
    for file in (data_dir / "pbc").glob("qa_*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            texts |= {row["question"], row["answer"]}
    if not texts:
        pytest.skip("no questions in the real data")
    for text in texts:
        assert_round_trip(tokenizer, text)
        assert len(tokenizer(f"Q: {text}")["input_ids"]) <= 64


def test_loading_needs_neither_sentencepiece_nor_protobuf_nor_the_network():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "sys.modules['sentencepiece'] = sys.modules['google.protobuf'] = None\n"
        "from unihema.processing_unihema.processing_unihema import load_default_tokenizer\n"
        "print(len(load_default_tokenizer()('neutrophil')['input_ids']))"
    )
    assert int(python(code)) >= 2


def test_training_again_gives_the_committed_file(tmp_path):
    command = [sys.executable, "-m", "tools.train_tokenizer", "-o", tmp_path]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, timeout=600)
    trained = json.loads((tmp_path / "tokenizer.json").read_text())
    assert trained == json.loads((DEFAULT_TOKENIZER / "tokenizer.json").read_text())
