"""Matrix factorisation, the smallest two-tower model, for transformers.

    hidden_t = U[user_t]          logits_t = hidden_t @ W.T

One tower is a table of users, the other a table of items, and the score of a pair is an inner
product. The items are the vocabulary of the head, so every objective trains it as it trains a
language model; ``input_ids`` are the numbers of users, and the label of a position is an item that
its user has met.

It is a model type of its own, ``two_tower``. A saved model loads by
``AutoModelForCausalLM.from_pretrained(folder)`` after ``import sce_lm.recsys``. Without that it
needs ``trust_remote_code=True``, which runs the copy of this file that ``save_pretrained`` puts
beside the weights (it imports nothing of its package): allow it for folders that you trust.
"""

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"A two-tower model needs transformers 5 or newer, and this is {transformers.__version__}; "
        "update it."
    )

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import can_return_tuple


@strict
class TwoTowerConfig(PreTrainedConfig):
    """Sizes of a two-tower model.

    Args:
        vocab_size: items and special tokens.
        num_users: rows of the table of users.
        hidden_size: width d of both.
        initializer_range: standard deviation of fresh rows.
    """

    model_type = "two_tower"

    vocab_size: int = 10_000
    num_users: int = 10_000
    hidden_size: int = 32
    initializer_range: float = 0.1
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class TwoTowerForCausalLM(PreTrainedModel):
    """A user's scores over all items."""

    config: TwoTowerConfig

    def __init__(self, config: TwoTowerConfig):
        super().__init__(config)
        self.user_embeddings = nn.Embedding(config.num_users, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.user_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.user_embeddings = value

    @can_return_tuple
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs) -> CausalLMOutput:
        """``input_ids`` int64 [rows, length], a user at each position, and ``labels`` int64 [rows,
        length], items (-100: none), which the loss shifts by one as of any causal language model:
        the user at one place is asked for the item at the next.

        Returns:
            ``loss`` (None without labels), ``logits`` [rows, length, vocab_size].
        """
        logits = self.lm_head(self.user_embeddings(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("two_tower", TwoTowerConfig)
AutoModelForCausalLM.register(TwoTowerConfig, TwoTowerForCausalLM)
TwoTowerConfig.register_for_auto_class()
TwoTowerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
