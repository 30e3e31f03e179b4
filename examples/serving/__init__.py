"""The parts of examples/serve.py. They import torch, transformers, fastapi and uvicorn, and nothing of this package."""
