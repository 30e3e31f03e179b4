"""The model in Megatron-core: parallel layout, the MHA2MLA attention layer, layer specs, and building a GPTModel."""
