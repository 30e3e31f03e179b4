"""The exported model. The `*_mha2mla.py` files import torch and transformers only; every export has a copy of them."""
