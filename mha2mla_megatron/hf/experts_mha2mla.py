"""Converted models whose feed-forwards are mixtures of experts: transformers' own blocks, read from its own files.

On disk each expert has its tensors, in memory all of a layer are one; transformers has the conversion between the two
by model type. The router's losses, which balance the load of experts in training, are not added.
"""

from typing import Any

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel, MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoePreTrainedModel, Qwen3MoeSparseMoeBlock
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM

from .configuration_mha2mla import MHA2MLAMixtralConfig, MHA2MLAQwen3MoeConfig
from .modeling_mha2mla import MHA2MLALlamaForCausalLM, MHA2MLALlamaModel


class _GroupedExperts:
    """Says what transformers would look for in the file of the model's class, where these experts are not: that they
    can run as one grouped product. They would run one after the other."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class _MoeModel(_GroupedExperts, MHA2MLALlamaModel):
    block: type[nn.Module]

    def __init__(self, config: MHA2MLAMixtralConfig | MHA2MLAQwen3MoeConfig):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            if layer_idx not in (config.mlp_only_layers or ()):
                layer.mlp = self.block(config)
        self.post_init()


# transformers' base classes of these families come in because they know how to initialise experts.
class MHA2MLAMixtralModel(_MoeModel, MixtralPreTrainedModel):
    config_class = MHA2MLAMixtralConfig
    block = MixtralSparseMoeBlock


class MHA2MLAQwen3MoeModel(_MoeModel, Qwen3MoePreTrainedModel):
    config_class = MHA2MLAQwen3MoeConfig
    block = Qwen3MoeSparseMoeBlock


class _MoeForCausalLM(_GroupedExperts, MHA2MLALlamaForCausalLM):
    model_class: type[_MoeModel]

    def __init__(self, config: MHA2MLAMixtralConfig | MHA2MLAQwen3MoeConfig):
        # SmolLM3's own __init__ builds a SmolLM3 first, which refuses grouped experts.
        super(SmolLM3ForCausalLM, self).__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MHA2MLAMixtralForCausalLM(_MoeForCausalLM):
    config_class = MHA2MLAMixtralConfig
    model_class = MHA2MLAMixtralModel


class MHA2MLAQwen3MoeForCausalLM(_MoeForCausalLM):
    config_class = MHA2MLAQwen3MoeConfig
    model_class = MHA2MLAQwen3MoeModel


for _config, _family in ((MHA2MLAMixtralConfig, "mixtral"), (MHA2MLAQwen3MoeConfig, "qwen3_moe")):
    _conversion: Any = get_checkpoint_conversion_mapping(_family)
    register_checkpoint_conversion_mapping(_config.model_type, _conversion, overwrite=True)

__all__ = [
    "MHA2MLAMixtralForCausalLM",
    "MHA2MLAMixtralModel",
    "MHA2MLAQwen3MoeForCausalLM",
    "MHA2MLAQwen3MoeModel",
]
