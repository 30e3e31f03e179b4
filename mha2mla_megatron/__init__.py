"""Convert pretrained MHA/GQA language models to multi-head latent attention and fine-tune them on Megatron-core."""

__version__ = "0.1.0"
