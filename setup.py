"""Packaging of dapo_mcore. The folder `kernels/` installs as `dapo_mcore.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
KERNELS = find_packages("kernels")
MATH = "math-verify[antlr4_13_2]>=0.8,<0.10"

setup(
    name="dapo_mcore",
    version="0.2.0",
    description="A Megatron-core training backend for DAPO: one code path from a laptop's CPU to a GPU cluster",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dapo_mcore", "dapo_mcore.*"]) + [f"dapo_mcore.kernels.{name}" for name in KERNELS],
    package_dir={f"dapo_mcore.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in KERNELS},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1,<0.20",  # 0.17 and later need Python 3.12
        "transformers>=5.12",
        "safetensors>=0.5",
        "pydantic>=2.8",
        "pyyaml>=6",
        "numpy>=1.26",
        "pyarrow>=17",
        "rich>=13",
        "tensorboard>=2.17",
        "matplotlib>=3.8",
        "psutil>=5.9",
        "jinja2>=3.1",
        "aiohttp>=3.10",
        "msgspec>=0.19",
        "jsonschema>=4.18",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "triton>=3.6; platform_system == 'Linux'",
            "ray>=2.52",
            "datasets>=4",
            MATH,
        ],
        "gpu": ["triton>=3.4"],
        # as megatron-core asks for it: 0.16 below 2.12, later versions without an upper end
        "te": [
            "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[pytorch]>=2.9; python_version >= '3.12'",
        ],
        "sglang": ["sglang>=0.5.15,<0.5.24"],
        "ray": ["ray>=2.52"],
        "math": [MATH],
        "datasets": ["datasets>=4"],  # from 4 on it runs no scripts; for data sets on the hub
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=3.0"],  # enough for a server; databases of its own need mlflow
        "swanlab": ["swanlab>=0.10"],
        "dali": ["nvidia-dali-cuda130==2.4.0; platform_system == 'Linux'"],  # 0.6 GB; runs without a GPU too
        "mbridge": ["mbridge==0.15.1", "einops>=0.7"],
    },
    entry_points={"console_scripts": ["dapo-mcore=dapo_mcore.cli:main"]},
)
