"""The model of a run: a transformers causal language model with prediction heads on its hidden states.

    hidden   = trunk(input_ids)             [B, S, D]
    logits_h = unembed(head_h(hidden))      H x [B, S, V]

All heads share the trunk's own unembedding, so an extra head costs D^2 + D parameters and not V * D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mtp_ce.heads import MTPHeads
from mtp_ce.linear import weighted_mtp_linear_ce
from mtp_ce.loss import CallOptions, MTPLoss, weighted_mtp_ce
from mtp_ce.scorers.next_token import NextToken
from mtp_ce.training.schema import DataConfig, Recipe, TrunkConfig


class MultiTokenModel(nn.Module):
    """A trunk and its heads, and the loss of all heads.

    Args:
        trunk: a causal language model with `base_model` and `get_output_embeddings()`.
        heads: prediction heads of the trunk's hidden size.
        loss: "linear" never builds the logits [B, S, H, V]; "logits" builds them. The same loss.
    """

    def __init__(self, trunk: PreTrainedModel, heads: MTPHeads, loss: Literal["linear", "logits"] = "linear") -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads
        self.loss = loss

    def forward(
        self,
        input_ids: Tensor,  # [B, S]
        position_ids: Tensor,  # [B, S]
        labels: Tensor,  # [B, S], unshifted
        weigh: Callable[[NextToken], Tensor] | None = None,
        document_ids: Tensor | None = None,  # [B, S]
        normalizer: Tensor | None = None,  # []
    ) -> MTPLoss:
        """Give the weighted loss and its statistics.

        It is computed in here because whoever gathers sharded parameters does so around forward.

        Args:
            input_ids: the tokens.
            position_ids: beginning again at every document.
            labels: `input_ids` with -100 where nothing is to be learnt.
            weigh: gives the weights [B, S] of the tokens that stand there, from the next-token head of this very
                forward; None means ones.
            document_ids: no head looks across their borders.
            normalizer: what the sum over positions is divided by; None means the positions of this batch.
        """
        hidden = self.hidden_states(input_ids, position_ids)
        unembed = self.trunk.get_output_embeddings()
        token_weights = None if weigh is None else weigh(NextToken(hidden[0], unembed.weight, unembed.bias))
        rule: CallOptions = {"weight_alignment": "target", "document_ids": document_ids, "normalizer": normalizer}
        if self.loss == "linear":
            return weighted_mtp_linear_ce(
                hidden, unembed.weight, labels, token_weights, bias=unembed.bias, return_stats=True, **rule
            )
        logits = [unembed(x) for x in hidden]
        # Nobody else sees these logits, so the gradient may have their place.
        return weighted_mtp_ce(
            logits, labels, token_weights, inplace_backward=torch.is_grad_enabled(), return_stats=True, **rule
        )

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor) -> list[Tensor]:  # [B, S], [B, S]
        """Give the hidden states of every head, H tensors [B, S, D].

        Position ids that begin again mark a new document, and attention does not cross that border.
        """
        # transformers looks for such borders only without a cache and without an attention mask, and makes
        # a cache unless told otherwise.
        output = self.trunk.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        )
        return self.heads(output.last_hidden_state)

    def logits(self, input_ids: Tensor, position_ids: Tensor) -> list[Tensor]:  # [B, S], [B, S]
        """Give the logits of every head, H tensors [B, S, V]."""
        unembed = self.trunk.get_output_embeddings()
        return [unembed(hidden) for hidden in self.hidden_states(input_ids, position_ids)]


def build_model(recipe: Recipe, end_of_text: int | None = None) -> MultiTokenModel:
    """Build the model with random weights, on the default device (meta included), from torch's global seed.

    Args:
        recipe: sizes come from `recipe.model`, vocabulary and longest row from `recipe.data`.
        end_of_text: token id that opens and closes a document; None where there is no tokenizer yet.
    """
    sizes = recipe.model
    heads = MTPHeads(sizes.hidden_size, sizes.mtp.horizon, sizes.mtp.kind)
    return MultiTokenModel(LlamaForCausalLM(llama_config(sizes, recipe.data, end_of_text)), heads, sizes.mtp.loss)


def llama_config(sizes: TrunkConfig, data: DataConfig, end_of_text: int | None = None) -> LlamaConfig:
    """Give the configuration of a Llama that reads the recipe's rows.

    Args:
        sizes: widths and depth.
        data: the vocabulary and the longest row.
        end_of_text: token id that opens and closes a document; None where there is no tokenizer yet.
    """
    return LlamaConfig(
        vocab_size=data.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.attention_heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=data.sequence_length,
        initializer_range=sizes.init_std,
        tie_word_embeddings=sizes.tie_embeddings,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
