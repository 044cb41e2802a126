"""Which tensors of real models are weights of layers, told by name and shape alone."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from tcompress.checkpoint.dtypes import BY_NAME
from tcompress.checkpoint.layers import Layer, LayerKind, find_layers, layer_of
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.reader import TensorInfo

LINEAR = {
    "fc.weight": (1000, 512),
    "weight": (10, 4),
    "bert.encoder.layer.0.attention.self.query.weight": (768, 768),
    "bert.encoder.layer.11.attention.output.dense.weight": (768, 768),
    "bert.pooler.dense.weight": (768, 768),
    "cls.predictions.decoder.weight": (30522, 768),
    "h.0.attn.c_attn.weight": (768, 2304),
    "transformer.h.5.mlp.c_fc.weight": (768, 3072),
    "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
    "model.layers.31.mlp.down_proj.weight": (4096, 11008),
    "lm_head.weight": (32000, 4096),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (512, 512),
    "decoder.block.1.layer.2.DenseReluDense.wi_0.weight": (1024, 512),
    "vit.encoder.layer.0.intermediate.dense.weight": (3072, 768),
    "blocks.0.attn.qkv.weight": (2304, 768),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (2304, 768),
    "time_embedding.linear_1.weight": (1280, 320),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (320, 320),
    "lstm.weight_ih_l0": (512, 128),
    "lstm.weight_hh_l1_reverse": (512, 128),
    "model.layers.0.block_sparse_moe.gate.weight": (8, 4096),
    "model.layers.0.block_sparse_moe.experts.7.w1.weight": (14336, 4096),
    "model.layers.3.mlp.experts.63.up_proj.weight": (1408, 2048),
    "model.layers.3.mlp.shared_experts.gate_proj.weight": (2816, 2048),
    "dense/kernel": (128, 10),
    "lstm_1/lstm_cell/recurrent_kernel": (64, 256),
    "layers.dense.kernel": (128, 10),
}
CONV = {
    "conv1.weight": (64, 3, 7, 7),
    "layer1.0.downsample.0.weight": (256, 64, 1, 1),
    "features.1.conv.0.0.weight": (32, 1, 3, 3),
    "patch_embed.proj.weight": (768, 3, 16, 16),
    "vit.embeddings.patch_embeddings.projection.weight": (768, 3, 16, 16),
    "unet.down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
    "decoder.up.0.upsample.conv.weight": (128, 128, 3, 3),
    "feature_extractor.conv_layers.0.conv.weight": (512, 1, 10),
    "blocks.0.conv3d.weight": (16, 3, 3, 3, 3),
    "conv2d/kernel": (3, 3, 1, 32),
}
EMBEDDING = {
    "bert.embeddings.word_embeddings.weight": (30522, 768),
    "bert.embeddings.position_embeddings.weight": (512, 768),
    "bert.embeddings.token_type_embeddings.weight": (2, 768),
    "wte.weight": (50257, 768),
    "transformer.wpe.weight": (1024, 768),
    "model.embed_tokens.weight": (32000, 4096),
    "model.decoder.embed_positions.weight": (2050, 768),
    "user_embedding.weight": (1000, 64),
    "emb.weight": (100, 16),
    "visual.positional_embedding": (50, 768),
    "pos_embed": (197, 768),
    "embedding/embeddings": (100, 16),
    "encoder.token_embed.embedding": (100, 16),
}
NONE = {
    "fc.bias": (1000,),
    "bn1.weight": (64,),
    "bn1.running_mean": (64,),
    "model.layers.0.input_layernorm.weight": (4096,),
    "bert.embeddings.LayerNorm.weight": (768,),
    "model.norm.weight": (4096,),
    "cls_token": (1, 1, 768),
    "vit.embeddings.position_embeddings": (1, 197, 768),
    "logit_scale.weight": (),
    "attention_bias": (12, 64),
    "decoder.bias": (4, 4),
    "anchors": (3, 2),
    "lstm.bias_ih_l0": (512,),
    "empty.weight": (0, 16),
    "odd.weight": (2, 2, 2, 2, 2, 2),
    "rotary_emb.inv_freq": (64,),
    "weight_norm.gain": (8, 8),
    "fc.weight.left": (8, 2),
}


def info(name, shape, dtype="float32"):
    return TensorInfo(name, shape, BY_NAME[dtype])


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        (name, shape, kind)
        for kind, table in ((LayerKind.LINEAR, LINEAR), (LayerKind.CONV, CONV), (LayerKind.EMBEDDING, EMBEDDING))
        for name, shape in table.items()
    ],
)
def test_a_weight_is_known_by_name_and_shape(name, shape, kind):
    assert layer_of(info(name, shape)) == Layer(name, kind, shape, BY_NAME["float32"])


@pytest.mark.parametrize(("name", "shape"), NONE.items())
def test_biases_statistics_and_tables_are_no_layers(name, shape):
    assert layer_of(info(name, shape)) is None


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
def test_only_floating_point_of_16_bits_and_more_is_a_layer(dtype):
    is_layer = layer_of(info("fc.weight", (8, 8), dtype)) is not None
    assert is_layer == (dtype in {"float64", "float32", "float16", "bfloat16"})


def test_a_layer_knows_its_size():
    layer = layer_of(info("fc.weight", (10, 4), "bfloat16"))
    assert (layer.values, layer.dense_bytes) == (40, 80)


def test_layers_come_in_the_order_of_the_file_and_tied_names_once(tmp_path):
    weight = torch.ones(6, 4)
    state = OrderedDict(
        [
            ("z.weight", torch.ones(3, 2)),
            ("embed_tokens.weight", weight),
            ("fc.bias", torch.ones(3)),
            ("conv.weight", torch.ones(2, 2, 3, 3)),
            ("lm_head.weight", weight),
        ]
    )
    torch.save(state, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        layers = find_layers(checkpoint)
    assert [(layer.name, str(layer.kind)) for layer in layers] == [
        ("z.weight", "linear"),
        ("embed_tokens.weight", "embedding"),
        ("conv.weight", "conv"),
    ]
