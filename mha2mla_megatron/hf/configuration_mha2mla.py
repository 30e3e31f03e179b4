"""Configuration of a Llama-like model whose attention was converted to multi-head latent attention."""

from transformers.models.llama.configuration_llama import LlamaConfig

from .layout_mha2mla import LatentLayout, layer_value


class MHA2MLALlamaConfig(LlamaConfig):
    """LlamaConfig plus what the conversion decided.

    mha2mla: the resolved conversion settings; read here: `partial_rope.qk_rope_head_dim`, `low_rank.method` and
        `low_rank.kv_lora_rank` (numbers, or lists with one per layer).
    attention_bias: biases on the query, key and value projections.
    attention_output_bias: bias on the output projection.
    """

    model_type = "mha2mla_llama"
    base_model_tp_plan = {}

    mha2mla: dict | None = None
    attention_output_bias: bool = False

    def layout(self, layer: int) -> LatentLayout:
        """The shapes of one layer's attention. Raises ValueError for a config without its conversion settings."""
        if not self.mha2mla:
            raise ValueError("config.mha2mla is missing: not a model converted by mha2mla_megatron")
        rope, low_rank = self.mha2mla["partial_rope"], self.mha2mla["low_rank"]
        r = layer_value(rope["qk_rope_head_dim"], layer)
        assert r is not None and self.num_key_value_heads is not None and self.head_dim is not None
        return LatentLayout(
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            r,
            low_rank["method"],
            layer_value(low_rank["kv_lora_rank"], layer),
        )


__all__ = ["MHA2MLALlamaConfig"]
