"""Checkpoints: Hugging Face folders, Megatron's torch_dist folders, and the table of names between them."""
