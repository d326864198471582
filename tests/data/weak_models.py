"""Tiny detectors and segmenters with random weights, in folders as `transformers` stores them."""

WORDS = (
    "barrier", "bicycle", "bus", "car", "motorcycle", "pedestrian", "traffic", "cone", "truck", "road", "sidewalk",
    "terrain", "vegetation", "building",
)  # fmt: skip
SPECIAL = {
    0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?",
}  # fmt: skip
SIDE = 64  # of the square that the segmenter sees


def write_vocabulary(folder):
    """A vocabulary with the special tokens where the detector expects them, and a tokenizer of it."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True)
    words = [f"[unused{i}]" for i in range(1100)]
    for number, word in SPECIAL.items():
        words[number] = word
    words[1030 : 1030 + len(WORDS)] = WORDS
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(str(folder)).save_pretrained(folder)


def write_detector(folder, seed=0):
    """A Grounding DINO with 12 queries and some 200,000 parameters."""
    import torch
    import transformers as t

    write_vocabulary(folder)
    config = t.GroundingDinoConfig(
        backbone_config=t.SwinConfig(
            image_size=SIDE, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=dict(
            model_type="bert", vocab_size=1100, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=16, max_position_embeddings=300,
        ),
        num_queries=12, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = t.GroundingDinoForObjectDetection(config)
    with torch.no_grad():  # boxes all over the image, not points in its middle
        last = model.model.decoder.bbox_embed[-1].layers[-1]
        last.bias.copy_(torch.tensor([0.0, 0.0, 2.0, 2.0]))
        last.weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    kind = getattr(t, "GroundingDinoImageProcessorPil", None) or t.GroundingDinoImageProcessor
    kind(size={"shortest_edge": SIDE, "longest_edge": 107}).save_pretrained(folder)
    return folder


def write_segmenter(folder, kind="sam", seed=0):
    """A SAM or HQ-SAM (`sam_hq`) with some 20,000 parameters."""
    import torch
    import transformers as t

    configs = {"sam": t.SamConfig, "sam_hq": t.SamHQConfig}
    models = {"sam": t.SamModel, "sam_hq": t.SamHQModel}
    folder.mkdir(parents=True)
    config = configs[kind](
        vision_config=dict(
            hidden_size=16, output_channels=8, num_hidden_layers=4, num_attention_heads=2,
            image_size=SIDE, patch_size=16, mlp_dim=16, num_pos_feats=4, global_attn_indexes=[1, 3],
            window_size=2,
        ),
        prompt_encoder_config=dict(
            hidden_size=8, image_size=SIDE, patch_size=16, mask_input_channels=4, image_embedding_size=4,
        ),
        mask_decoder_config=dict(
            hidden_size=8, mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8,
            **({"vit_dim": 16} if kind == "sam_hq" else {}),
        ),
    )  # fmt: skip
    torch.manual_seed(seed)
    models[kind](config).save_pretrained(folder)
    processor = getattr(t, "SamImageProcessorPil", None) or t.SamImageProcessor
    square, small = {"height": SIDE, "width": SIDE}, SIDE // 4
    processor(
        size={"longest_edge": SIDE}, pad_size=square, mask_size={"longest_edge": small},
        mask_pad_size={"height": small, "width": small},
    ).save_pretrained(folder)  # fmt: skip
    return folder
