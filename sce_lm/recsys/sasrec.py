"""SASRec (Kang & McAuley, ICDM 2018), a Transformer over item sequences, for transformers.

    x = dropout(sqrt(d) * E[items] + P[positions])
    repeat:  x = attention block(x);  x = feed-forward block(x)        causal, learned positions
    logits = LayerNorm(x) @ E.T                                        the table is input and output

Three arrangements of normalisation are in use under this name, and ``norm`` chooses:

    "query"   q = LN(x);  x = q + attention(q, x);  y = LN(x);  x = y + ffn(y)     the authors' code
    "pre"     x = x + attention(LN(x));             x = x + ffn(LN(x))             their paper
    "post"    x = LN(x + attention(x));             x = LN(x + ffn(x))             BERT, RecBole

In the first, keys and values are not normalised and the residual is; "post" normalises the
embeddings instead of the output.

It is a model type of its own, ``sasrec``, which transformers does not have. A saved model loads by
``AutoModelForCausalLM.from_pretrained(folder)`` after ``import sce_lm.recsys``. Without that it
needs ``trust_remote_code=True``, which runs the copy of this file that ``save_pretrained`` puts
beside the weights (it imports nothing of its package): allow it for folders that you trust.

Padding may be on either side: positions count from the first real item. Packed rows are told apart
by ``position_ids`` that start again at 0, with or without an attention mask.
"""

from collections.abc import Callable
from typing import Literal

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"SASRec needs transformers 5 or newer, and this is {transformers.__version__}; take "
        "another model type, for instance llama."
    )

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@strict
class SASRecConfig(PreTrainedConfig):
    """Sizes and arrangement of a SASRec; the defaults are those of the authors' code.

    Args:
        vocab_size: items and special tokens.
        hidden_size: width d.
        intermediate_size: inner width of the feed-forward block; None: ``hidden_size``.
        num_hidden_layers: blocks.
        num_attention_heads: heads, a divisor of ``hidden_size``.
        max_position_embeddings: longest history.
        norm: arrangement of normalisation, see the module.
        hidden_act: activation of the feed-forward block.
        scale_embeddings: multiply item embeddings by ``sqrt(hidden_size)`` on the way in.
        dropout: of the summed embeddings and of what a block adds (in "query" not of attention).
        attention_dropout: of attention weights.
        activation_dropout: inside the feed-forward block.
        layer_norm_eps: added to variances.
        initializer_range: standard deviation of fresh embeddings; matrices are Glorot uniform.
    """

    model_type = "sasrec"

    vocab_size: int = 10_000
    hidden_size: int = 64
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    max_position_embeddings: int = 200
    norm: Literal["query", "pre", "post"] = "query"
    hidden_act: str = "relu"
    scale_embeddings: bool = True
    dropout: float | int = 0.2
    attention_dropout: float | int = 0.2
    activation_dropout: float | int = 0.2
    layer_norm_eps: float = 1e-8
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_attention_heads "
                f"{self.num_attention_heads}; choose a number of heads that divides the width."
            )


class SASRecAttention(nn.Module):
    """Causal multi-head attention whose queries may come from elsewhere than keys and values."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, queries: Tensor, states: Tensor, attention_mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        rows, length, width = states.shape
        heads = (rows, length, -1, self.head_dim)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        output, weights = attend(
            self,
            self.q_proj(queries).view(heads).transpose(1, 2),
            self.k_proj(states).view(heads).transpose(1, 2),
            self.v_proj(states).view(heads).transpose(1, 2),
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(rows, length, width).contiguous()), weights


class SASRecLayer(GradientCheckpointingLayer):
    """An attention block and a feed-forward block, normalised as ``config.norm`` says."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.norm = config.norm
        self.attention = SASRecAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        if self.norm == "query":
            q = self.attention_norm(x)
            x = q + self.attention(q, x, attention_mask, **kwargs)[0]
            y = self.feed_forward_norm(x)
            return y + self.feed_forward(y)
        if self.norm == "pre":
            q = self.attention_norm(x)
            x = x + self.dropout(self.attention(q, q, attention_mask, **kwargs)[0])
            return x + self.feed_forward(self.feed_forward_norm(x))
        attended = self.attention(x, x, attention_mask, **kwargs)[0]
        x = self.attention_norm(x + self.dropout(attended))
        return self.feed_forward_norm(x + self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation_dropout(self.activation(self.up(x)))))


class SASRecPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers wants to know about the model."""

    config: SASRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASRecLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SASRecLayer, "attentions": SASRecAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # embeddings, biases and norms
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)


class SASRecModel(SASRecPreTrainedModel):
    """SASRec without its output head."""

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.item_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.item_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.item_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Arguments of any decoder: ``input_ids`` int64 [rows, length] or ``inputs_embeds`` [rows,
        length, d]; ``attention_mask`` [rows, length], 1 for items and 0 for padding, or one made
        ready as 4-D; ``position_ids`` [rows, length].

        Raises:
            ValueError: both or neither of ids and embeddings, or more items than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("SASRec takes either input_ids or inputs_embeds; give one of the two.")
        if inputs_embeds is None:
            inputs_embeds = self.item_embeddings(input_ids)
        assert inputs_embeds is not None

        same_sequence = None
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask)
        elif attention_mask is not None and attention_mask.dim() == 2:
            # Without a mask, create_causal_mask tells packed sequences apart itself.
            sequences = find_packed_sequence_indices(position_ids)
            if sequences is not None:
                same_sequence = packed_sequence_mask_function(
                    sequences.expand(inputs_embeds.shape[0], -1)
                )
        mask = create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            None,  # no cache; transformers 5.24 renamed the parameter
            position_ids,
            and_mask_function=same_sequence,
        )
        x = self.scale * inputs_embeds + self.position_embeddings(position_ids)
        if self.config.norm == "post":
            x = self.norm(x)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_ids=position_ids, **kwargs)
        if self.config.norm != "post":
            x = self.norm(x)
        return BaseModelOutput(last_hidden_state=x)

    def _positions(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Places counted from the first real item, so that padding on the left changes nothing."""
        length = x.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"The histories are {length} items long and this SASRec has "
                f"{self.config.max_position_embeddings} positions; give the latest items only."
            )
        if attention_mask is None or attention_mask.dim() != 2:
            return torch.arange(length, device=x.device)[None]
        return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)


class SASRecForCausalLM(SASRecPreTrainedModel):
    """SASRec with scores over all items for the next one."""

    _tied_weights_keys = {"lm_head.weight": "model.item_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.model = SASRecModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutput:
        """Arguments of :class:`SASRecModel`, and ``labels`` int64 [rows, length], the items
        themselves (-100: none), which the loss shifts by one. ``logits_to_keep``: only the last so
        many positions, 0 for all, or their indices.

        Returns:
            ``loss`` (None without labels), ``logits`` [rows, length, vocab_size].
        """
        output: BaseModelOutput = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, **kwargs
        )
        hidden_states = output.last_hidden_state
        assert hidden_states is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoConfig.register("sasrec", SASRecConfig)
AutoModel.register(SASRecConfig, SASRecModel)
AutoModelForCausalLM.register(SASRecConfig, SASRecForCausalLM)
SASRecConfig.register_for_auto_class()
SASRecForCausalLM.register_for_auto_class("AutoModelForCausalLM")
