"""The exported model. The `*_mha2mla.py` files import torch and transformers only: they are copied into every export."""
