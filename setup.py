"""Package list and dependencies; build back end and settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "deepmim_scale" / "__init__.py"
VERSION = re.findall('^__version__ = "(.+)"$', PACKAGE.read_text(), re.MULTILINE)[0]
SAMPLE = ["scikit-image>=0.24", "scikit-learn>=1.5"]
PLOTS = ["matplotlib>=3.9"]
CLIP = ["open_clip_torch>=2.26"]
DEV = ["pytest>=8", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.11"]

setup(
    name="deepmim_scale",
    version=VERSION,
    description="Pre-train deep vision transformers by masked image modelling, stage by stage",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels/` itself is no package: PyPI has one of that name, which it would shadow.
    packages=[*find_packages(include=["deepmim_scale", "deepmim_scale.*"]), "deepmim_kernels"],
    package_dir={"deepmim_kernels": "kernels/deepmim_kernels"},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "deepspeed>=0.19.1",
        "timm>=1.0.9",
        "pydantic>=2.7",
        "tyro>=1.0",
        "numpy>=1.26",
        "pillow>=10",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
        "tensorboard>=2.16",
    ],
    extras_require={
        "dali-cuda12": ["nvidia-dali-cuda120>=1.45"],
        "dali-cuda13": ["nvidia-dali-cuda130>=1.50"],
        "clip": CLIP,
        "sample": SAMPLE,
        "plots": PLOTS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["deepmim-scale=deepmim_scale.cli:main"]},
)
