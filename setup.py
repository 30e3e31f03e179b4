"""Packaging of mha2mla_megatron. `pip install -c constraints.txt -e '.[dev]'` gives the versions that were tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "mha2mla_megatron" / "__init__.py").read_text()).group(1)

setup(
    name="mha2mla_megatron",
    version=VERSION,
    description="Convert MHA/GQA language models to multi-head latent attention and fine-tune them on Megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["mha2mla_megatron", "mha2mla_megatron.*"]),
    python_requires=">=3.12",
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.19,<0.20",
        "transformers>=5,<6",
        "accelerate",
        "datasets",
        "einops",
        "huggingface_hub",
        "matplotlib",
        "numpy",
        "omegaconf",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
    ],
    extras_require={
        # Transformer Engine: fused kernels on NVIDIA GPUs; pip compiles its torch extension, which needs nvcc
        "te": ["transformer-engine[core_cu13,pytorch]"],
        # lighteval 0.13 breaks with xxhash 4.1; jieba cuts the Chinese texts of LongBench into words
        "eval": ["lighteval==0.13.0", "xxhash<4", "jieba"],
        # quantised KV cache
        "quant": ["hqq"],
        # examples/serve.py
        "serve": ["fastapi>=0.165", "uvicorn"],
        # pyright[nodejs] brings its own node; gguf reads the example model; the last four: the server and its clients
        "dev": [
            "pytest",
            "pytest-timeout",
            "ruff",
            "pyright[nodejs]",
            "gguf",
            "fastapi",
            "uvicorn",
            "httpx",
            "openai",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
