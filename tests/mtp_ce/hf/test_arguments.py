"""Arguments of the wrapper's forward: each is read by the wrapper or by its model, or is an error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from mtp_ce import MTPWrapper, weighted_mtp_ce
from mtp_ce.hf.arguments import ModelArguments, forward_arguments

V, H = 61, 3
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
OWN = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# With **kwargs that are annotated, with some that are not, with a router, without position_ids of its own.
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "opt", "mixtral", "bloom"]
TOKENS = torch.randint(2, V, (2, 12), generator=torch.Generator().manual_seed(1))
# As a collator for flash attention packs rows, and what else transformers documents for any model.
OF_ANY_MODEL: dict[str, Any] = {
    "cu_seq_lens_q": torch.tensor([0, 12, 24]), "cu_seq_lens_k": torch.tensor([0, 12, 24]), "max_length_q": 12,
    "max_length_k": 12, "seq_idx": torch.zeros(1, 24, dtype=torch.int32), "use_cache": False,
    "output_hidden_states": False, "return_dict": True,
}  # fmt: skip


def wrap(kind: str = "residual", architecture: str = "llama", **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(architecture, **{**SIZES, **OWN.get(architecture, {})})
    wrapper = MTPWrapper(AutoModelForCausalLM.from_config(config), H, heads=kind, **options)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapper.eval()


MISSPELT = {
    "token_weight": "token_weights",
    "tokens_weights": "token_weights",
    "weights_alignment": "weight_alignment",
    "document_id": "document_ids",
    "head_weight": "head_weights",
    "headreduction": "head_reduction",
    "seq_len": "seq_lens",
    "label_smooting": "label_smoothing",
    "label": "labels",
    "num_items": "num_items_in_batch",
    "attn_mask": "attention_mask",
    "cu_seq_len_q": "cu_seq_lens_q",
    "return_stat": "return_stats",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_misspelt_argument_is_an_error_that_names_the_nearest_known_one(architecture):
    """With labels and without: the model's own forward would ignore it, too."""
    wrapper = wrap(architecture=architecture)
    for name, meant in MISSPELT.items():
        for labels in (TOKENS, None):
            with pytest.raises(TypeError, match=rf"^{name} is an argument that neither .* expected {meant}\.$"):
                wrapper(TOKENS, labels=labels, **{name: torch.ones(2, 12)})
    for method in (wrapper.head_hidden_states, wrapper.head_logits):
        with pytest.raises(TypeError, match=r"^input_id is .* expected input_ids\.$"):
            method(input_ids=TOKENS, input_id=TOKENS)


def test_an_argument_near_none_is_answered_with_all_that_are_known():
    with pytest.raises(TypeError, match=r"qqq is an argument .* one of attention_mask, .*head_reduction.*z_loss\.$"):
        wrap()(TOKENS, labels=TOKENS, qqq=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_transformers_documents_for_any_model_is_passed_on(architecture):
    wrapper = wrap(architecture=architecture)
    known = {name: x for name, x in OF_ANY_MODEL.items() if name in forward_arguments(wrapper.causal.base_model)}
    assert architecture == "bloom" or known.keys() == OF_ANY_MODEL.keys()
    plain = wrapper(TOKENS, labels=TOKENS).loss
    assert torch.equal(wrapper(TOKENS, labels=TOKENS, **known).loss, plain)
    wrapper(TOKENS, **known)


def test_what_one_model_alone_takes_is_passed_on():
    """Images of a vision-language model, routers of a mixture, embeddings in the place of tokens."""
    for model in (LlavaModel, LlavaForConditionalGeneration, Qwen2_5_VLModel):
        assert "pixel_values" in forward_arguments(object.__new__(model))
    assert {"image_grid_thw", "second_per_grid_ts"} <= forward_arguments(object.__new__(Qwen2_5_VLModel))
    with pytest.raises(TypeError, match="pixel_values is an argument that neither MTPWrapper nor LlamaForCausalLM"):
        wrap()(TOKENS, labels=TOKENS, pixel_values=torch.ones(1))
    wrapper = wrap()
    embedded = wrapper.get_input_embeddings()(TOKENS)
    assert torch.equal(wrapper(inputs_embeds=embedded, labels=TOKENS).loss, wrapper(TOKENS, labels=TOKENS).loss)
    mixture = wrap(architecture="mixtral")
    assert mixture(TOKENS, labels=TOKENS, output_router_logits=True).aux_loss > 0


def test_what_a_models_own_forward_passes_on_beyond_its_base_models_signature_is_passed_on():
    """As `image_sizes` of AyaVision and InternVL, and not what it reads for its logits."""

    class Base:
        def forward(self, input_ids=None, **kwargs):
            raise NotImplementedError

    class Causal:
        base_model = Base()

        def forward(self, input_ids=None, image_sizes=None, labels=None, logits_to_keep=0, **kwargs):
            raise NotImplementedError

    causal = Causal()
    arguments = ModelArguments.of(causal, causal, MTPWrapper.forward)
    arguments.check_base({"input_ids": 1, "image_sizes": 1})
    for name in ("labels", "logits_to_keep", "num_items_in_batch"):
        with pytest.raises(TypeError, match=f"^{name} is given for the loss or the hidden states of the heads"):
            arguments.check_base({name: 1})
        arguments.check_own({name: 1})


def test_what_the_model_reads_without_labels_only_is_refused_with_them():
    wrapper = wrap()
    assert wrapper(TOKENS, logits_to_keep=1).logits.shape == (2, 1, V)
    with pytest.raises(TypeError, match=r"logits_to_keep is given for the loss .* expected a call without labels"):
        wrapper(TOKENS, labels=TOKENS, logits_to_keep=1)
    assert len(wrapper(TOKENS, output_hidden_states=True).hidden_states) == 2
    with pytest.raises(ValueError, match="output_hidden_states is True with labels, where no such output"):
        wrapper(TOKENS, labels=TOKENS, output_hidden_states=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_weights", torch.ones(2, 12)),
        ("document_ids", torch.zeros(2, 12, dtype=torch.long)),
        ("head_weights", torch.ones(H)),
        ("seq_lens", torch.tensor([3, 4])),
        ("head_reduction", "live"),
        ("label_smoothing", 0.1),
        ("return_stats", True),
    ],
)
def test_what_the_loss_alone_reads_is_refused_without_labels(name, value):
    with pytest.raises(ValueError, match=f"{name} is given without labels, where nothing reads it"):
        wrap()(TOKENS, **{name: value})


SETTINGS: dict[str, dict[str, Any]] = {
    "head_weights": {"head_weights": torch.tensor([1.0, 0.5, 0.25])},
    "head_weights, some 0": {"head_weights": torch.tensor([1.0, 0.0, 0.25])},
    "head_reduction": {"head_reduction": "horizon"},
    "live": {"head_reduction": "live"},
    "seq_lens": {"seq_lens": torch.tensor([7, 12])},
    "ignore_index": {"ignore_index": int(TOKENS[0, 5])},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "loss_scale": {"loss_scale": 3.0},
    "several": {"head_weights": torch.tensor([1.0, 2.0, 3.0]), "z_loss": 1e-2, "seq_lens": torch.tensor([5, 9])},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["residual", "sequential", "teacher_forcing"])
def test_options_of_the_loss_are_the_contracts(kind, setting):
    """Of one call, and of the wrapper where it takes them: they change the loss, to that of `weighted_mtp_ce`."""
    options, weights = SETTINGS[setting], torch.rand(2, 12) + 0.5
    wrapper = wrap(kind)
    if kind == "teacher_forcing":
        logits = [torch.roll(wrapper(TOKENS).logits, -h, 1) for h in range(H)]
    else:
        logits = wrapper.head_logits(input_ids=TOKENS)
    contract = {"weight_alignment": "target", "head_reduction": "target", "impl": "reference", **options}
    expected = weighted_mtp_ce(logits, TOKENS, weights, **contract)
    got = wrapper(TOKENS, labels=TOKENS, token_weights=weights, **options).loss
    torch.testing.assert_close(got, expected)
    # All heads of "teacher_forcing" that predict a token have its cross entropy, so that no mean over them matters.
    if kind != "teacher_forcing" or not setting.startswith("head_weights"):
        assert not torch.allclose(got, wrapper(TOKENS, labels=TOKENS, token_weights=weights).loss, rtol=1e-4)
    if options.keys() <= {"head_weights", "head_reduction", "label_smoothing", "z_loss"}:
        of_wrapper = wrap(kind, **{name: x.tolist() if name == "head_weights" else x for name, x in options.items()})
        assert torch.equal(of_wrapper(TOKENS, labels=TOKENS, token_weights=weights).loss, got)
        assert of_wrapper.state_dict().keys() == wrapper.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_reduction": "tokens"}, "head_reduction is 'tokens'; expected one of"),
        ({"head_weights": [1.0, 2.0]}, r"head_weights is \[2\]; expected \[H\] = \[3\] from horizon"),
        ({"head_weights": [1.0] * H, "head_reduction": "horizon"}, "head_reduction is 'horizon' and head_weights"),
    ],
)
def test_an_impossible_option_of_the_loss_is_refused_when_the_wrapper_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        wrap(**options)


def test_options_of_the_loss_are_passed_to_from_pretrained_again(tmp_path):
    wrapper = wrap(head_reduction="live", head_weights=[1.0, 0.5, 0.25])
    wrapper.save_pretrained(tmp_path)
    again = MTPWrapper.from_pretrained(tmp_path, head_reduction="live", head_weights=[1.0, 0.5, 0.25]).eval()
    assert torch.equal(again(TOKENS, labels=TOKENS).loss, wrapper(TOKENS, labels=TOKENS).loss)
    default = MTPWrapper.from_pretrained(tmp_path)
    assert (default.loss_options.head_reduction, default.head_weights) == ("target", None)


def test_the_entropy_of_head_0_is_that_of_its_own_logits(monkeypatch):
    """In nats, where it has a target; whatever the chunks."""
    labels = TOKENS.clone()
    labels[0, 4:9] = -100
    wrapper = wrap(architecture="gemma2")
    output = wrapper(TOKENS, labels=labels, return_entropy=True)
    logp = wrapper(TOKENS).logits.log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1)[:, :-1] * (labels[:, 1:] != -100)
    torch.testing.assert_close(output.entropy[:, :-1], expected)
    assert (output.entropy[:, -1] == 0).all()
    monkeypatch.setattr("mtp_ce.next_token.ENTROPY_CHUNK_BYTES", 4 * V * 5)
    torch.testing.assert_close(wrapper(TOKENS, labels=labels, return_entropy=True).entropy, output.entropy)
    none = wrapper(TOKENS, labels=torch.full_like(TOKENS, -100), return_entropy=True)
    assert (none.entropy == 0).all()
