"""Tiny detectors and estimators of depth of the real classes, saved as users find them, for tests of who looks at images."""

import torch
from models import build_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertTokenizer,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from tests.detectors import label_options


WORDS = ["red", "blue", "green", "circle", "square", "dog", "tv", "remote", "##s"]
_SWIN = dict(
    image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, patch_size=4,
    initializer_range=0.2,
)  # fmt: skip
_ENCODER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


@torch.no_grad()
def draw_weights(model):
    """Matrices that are the same whatever order a version of the library initializes them in."""
    generator = torch.Generator().manual_seed(3)
    for _, weight in sorted(model.named_parameters()):
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def save_mask2former(folder):
    """Mask2Former with a Swin backbone, as GenEval's; classes as [`label_options`]."""
    torch.manual_seed(3)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**_SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]), feature_size=32,
        mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=16, num_queries=8, init_std=0.5, init_xavier_std=3.0, **label_options(),
    )  # fmt: skip
    draw_weights(Mask2FormerForUniversalSegmentation(config)).save_pretrained(folder)  # masks of different sizes
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_grounding_dino(folder):
    """Grounding DINO with tokens of BERT, whose numbers of the special ones the model knows."""
    torch.manual_seed(3)
    vocab = [f"[unused{index}]" for index in range(1100)]
    for index, token in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }.items():
        vocab[index] = token
    vocab[1030 : 1030 + len(WORDS)] = WORDS
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(vocab)})
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**_SWIN, out_indices=[2, 3, 4]),
        text_config=dict(_ENCODER, model_type="bert", vocab_size=1100, max_position_embeddings=64, initializer_range=0.5),
        d_model=32, num_queries=12, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_n_points=2, decoder_n_points=2, max_text_len=64,
        init_std=0.3,
    )  # fmt: skip
    draw_weights(GroundingDinoForObjectDetection(config)).save_pretrained(folder)  # it finds every class
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_owlv2(folder):
    """OWLv2, whose texts end with the token that CLIP takes for the text's."""
    torch.manual_seed(4)
    tokenizer = build_tokenizer([f"a photo of a {word}" for word in WORDS] + ["a photo of a red circle"], 1000)
    end = ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[end])
    tokenizer.model_max_length = 16
    sizes = _ENCODER | dict(initializer_factor=10.0)
    text = sizes | dict(
        vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    config = Owlv2Config(text_config=text, vision_config=sizes | dict(image_size=64, patch_size=16), projection_dim=16)
    model = Owlv2ForObjectDetection(config)
    with torch.no_grad():  # a new one finds a thing with a chance of next to 0, in no place
        model.class_head.logit_shift.bias.fill_(1.0)
        for parameter in (*model.class_head.parameters(), *model.box_head.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def save_depth_anything(folder, **options):
    """Depth Anything, relative if not said otherwise."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        **(_ENCODER | dict(num_hidden_layers=4)), image_size=56, patch_size=14, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False, apply_layernorm=True, initializer_range=0.3,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8, initializer_range=0.3, **options,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 56, "width": 56}, ensure_multiple_of=14).save_pretrained(folder)
    return folder
