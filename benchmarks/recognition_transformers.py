"""Models of Hugging Face transformers with small sizes and random weights, built from their configurations alone.

Nothing is downloaded. A model type whose small configuration cannot be built by this version is left out.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import transformers
from recognition_nets import Case, Inputs
from torch import nn

SMALL: tuple[tuple[str, int], ...] = (
    (r"token_(id|index)$|_index$", 3),
    (r"vocab_size|num_embeddings$", 99),
    (r"max_(position|source_position|target_position|sequence|seq)|^n_positions$", 64),
    (
        r"(num_.*layers|^n_layers?|num_hidden_layers|^layers|decoder_layers|encoder_layers|^depth|num_blocks|n_layer)$",
        2,
    ),
    (r"experts$", 4),
    (r"experts_per_tok$|top_?k$", 2),
    (r"kv_heads$|key_value_heads$", 2),
    (r"(attention_heads|num_heads|n_heads?|_heads)$", 4),
    (r"^(head_dim|kv_channels|attention_head_size|d_kv)$", 16),
    (r"(hidden_size|hidden_dim|embed_dim|d_model)$|^(n_embd|embedding_size|dim|projection_dim|emb_dim|d_embed)$", 64),
    (r"^(word_embed_proj_dim|model_dim|width|output_hidden_size|out_hidden_size|mask_feature_size|feature_size)$", 64),
    (r"intermediate|ffn|mlp_dim|inner|d_ff|feedforward", 96),
)
"""Name of a setting → the most it may be; the first that fits."""
KEPT = re.compile(r"feat_extract|conv_|num_conv")
DROPPED = frozenset(
    (
        *("transformers_version", "architectures", "dtype", "_name_or_path", "id2label", "label2id"),
        *("layer_types", "mlp_layer_types", "out_features", "out_indices", "stage_names", "per_layer_config"),
    )
)
"""Settings of labels, and lists with an entry for each of the original layers."""

FAMILIES: dict[str, str] = {
    "encoder": "albert bert big_bird camembert canine convbert deberta deberta-v2 distilbert electra ernie esmc "
    "eurobert fnet gte ibert jina_embeddings_v3 layoutlm layoutlmv3 longformer luke megatron-bert mobilebert "
    "modernbert mpnet mra nomic_bert nystromformer rembert roberta "
    "roberta-prelayernorm roformer squeezebert splinter xlm xlm-roberta xlnet yoso",
    "decoder": "afmoe apertus arcee biogpt bitnet bloom codegen cohere cohere2 cpmant ctrl deepseek_v2 deepseek_v3 "
    "deepseek_v4 diffllama ernie4_5 exaone4 falcon flex_olmo fuyu gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 "
    "gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe helium hrm_text imagegpt internlm3 jetmoe kimi_linear lfm2 "
    "llama longcat_flash minicpm3 minimax minimax_m2 mistral mixtral modernbert-decoder mpt nanochat nemotron olmo "
    "olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe "
    "qwen3_next recurrent_gemma seed_oss smollm3 stablelm starcoder2 step3p7 xglm youtu",
    "state space": "falcon_mamba jamba mamba nemotron_h rwkv xlstm zamba",
    "encoder-decoder": "bart bigbird_pegasus blenderbot fsmt led longt5 m2m_100 marian mbart mt5 nllb-moe pegasus "
    "pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5",
    "vision": "aimv2 bit convnext convnextv2 deit dinov2 dinov3_convnext dpt efficientnet focalnet glpn hgnet_v2 hiera "
    "ijepa levit mask2former mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 pixtral poolformer pvt pvt_v2 "
    "radio regnet resnet rt_detr sam segformer seggpt swiftformer swin swin2sr swinv2 textnet timesformer videomae "
    "videoprism vit vit_mae vitdet vivit vjepa2 yolos",
    "speech": "audio-spectrogram-transformer canary clap encodec fastspeech2_conformer gemma3n_audio hubert "
    "moonshine parakeet_ctc sew speech_to_text speecht5 unispeech vits wav2vec2 "
    "wav2vec2-bert wav2vec2-conformer wavlm whisper",
    "several modes": "altclip aria blip blip-2 bridgetower chinese_clip clip clipseg cohere2_vision deepseek_vl "
    "flava gemma3 git grounding-dino groupvit idefics idefics2 instructblip internvl kosmos-2 lightglue llava lxmert "
    "mllama muse_glimmer owlvit paligemma phi4_multimodal qwen2_5_vl qwen2_vl qwen3_vl sam_hq siglip smolvlm tvp udop "
    "vilt visual_bert xclip",
    "series": "decision_transformer patchtsmixer patchtst timesfm",
}


def tokens(vocabulary: int = 90) -> tuple[torch.Tensor, ...]:
    return (torch.randint(5, vocabulary, (1, 8)),)


def images(size: int = 224) -> Inputs:
    return lambda: (torch.randn(1, 3, size, size),)


OVERRIDES: dict[str, dict[str, Any]] = {
    "esmc": {"num_key_value_heads": 4},
    "mobilebert": {"normalization_type": "layer_norm"},  # NoNorm otherwise, under the same names
    "nemotron": {"num_key_value_heads": 2},
    "xlnet": {"d_head": 16},
    "swin2sr": {"embed_dim": 60},
    "swinv2": {"embed_dim": 48},
}
"""What does not follow from the names of the settings."""

RUN: dict[str, Inputs] = {
    **dict.fromkeys(("bert", "gpt2", "llama", "qwen3", "gemma2", "olmo2", "phi", "mamba"), tokens),
    **dict.fromkeys(("resnet", "mobilenet_v2", "vit"), images()),
}
"""Those that are traced and exported as well, with what they are called with."""


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration, and of those inside it, with small widths and depths."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in DROPPED:
            continue
        if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            value = small(value)
        elif type(value) is int and not KEPT.search(name):
            limit = next((most for pattern, most in SMALL if re.search(pattern, name)), value)
            value = min(value, limit)
        elif isinstance(value, list) and re.search(r"depths|layers$|blocks", name):
            value = [min(each, 2) if type(each) is int else each for each in value]
        found[name] = value
    return found


def build(model_type: str) -> nn.Module:
    """Raises whatever the classes of transformers raise where the small settings do not fit together."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    settings = small(config_class().to_dict())
    settings.pop("model_type", None)
    settings |= OVERRIDES.get(model_type, {})
    model: nn.Module = transformers.AutoModel.from_config(config_class(**settings))
    if model_type in RUN:
        model.config.use_cache = False
        model.config.return_dict = False
    return model


def cases() -> list[Case]:
    transformers.logging.set_verbosity_error()
    return [
        Case(f"transformers, {family}", name, partial(build, name), RUN.get(name))
        for family, names in FAMILIES.items()
        for name in names.split()
        if name in transformers.CONFIG_MAPPING
    ]
