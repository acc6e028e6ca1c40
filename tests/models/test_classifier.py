import copy

import pytest
import timm
import torch
from torch import nn

from masklr.models import MLP, Classifier

SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
# Name, further arguments, size of the pooled features.
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {"backbone_args": SMALL_VIT, "image_size": (8, 12), "patch_size": 4}, 24),
    "vit, mean of tokens": (
        "vit_tiny_patch16_224",
        {"backbone_args": {**SMALL_VIT, "global_pool": "avg", "class_token": False}, "image_size": 8, "patch_size": 2},
        24,
    ),
    "resnet": ("resnet10t", {"image_size": 32}, 512),
    "convnext": ("convnext_atto", {"backbone_args": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}}, 24),
    "hidden layer in the head": ("mobilenetv3_small_050", {"image_size": 32}, 1024),
}


def images_for(model, batch=3, size=(32, 32)):
    height, width = model.image_size or size
    return torch.randn(batch, model.in_chans, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "options", "num_features"), BACKBONES.values(), ids=BACKBONES)
def test_logits_are_the_head_of_timms_own_pooled_features(name, options, num_features):
    torch.manual_seed(0)
    model = Classifier(name, num_classes=7, **options).eval()
    images = images_for(model)
    assert (model.num_features, model.num_classes, model.in_chans) == (num_features, 7, 3)
    features = model.features(images)
    plain = model.backbone.forward_head(model.backbone.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, plain, rtol=1e-5, atol=1e-5)
    assert features.shape == (3, num_features)
    assert torch.equal(model(images), model.head(features))
    model.train()(images).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_backbone_from_scratch_is_initialized_as_timm_does_under_its_keys(name):
    args = SMALL_VIT if name.startswith("vit") else {}
    torch.manual_seed(3)
    plain = timm.create_model(name, num_classes=0, **args).state_dict()
    torch.manual_seed(3)
    ours = Classifier(name, num_classes=5, backbone_args=args)
    assert list(ours.backbone.state_dict()) == list(plain)
    assert all(torch.equal(ours.backbone.state_dict()[key], value) for key, value in plain.items())
    assert 0.015 < ours.head.weight.std() < 0.025
    assert (ours.head.bias == 0).all()


def test_one_channel_and_the_size_of_images_reach_the_backbone():
    model = Classifier("vit_tiny_patch16_224", 4, 8, 2, in_chans=1, backbone_args=SMALL_VIT)
    assert model.backbone.patch_embed.grid_size == (4, 4)
    assert (model.in_chans, model.image_size) == (1, (8, 8))
    assert Classifier("resnet10t", 4, in_chans=1).in_chans == 1


def test_network_for_any_size_refuses_other_sizes_only_if_one_is_given():
    model = Classifier("resnet10t", 4)
    assert model.image_size is None
    assert model(torch.zeros(2, 3, 40, 24)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"Expected images of 3 x any x any .* got 1 x 40 x 24"):
        model(torch.zeros(2, 1, 40, 24))
    with pytest.raises(ValueError, match=r"Expected images of 3 x 32 x 32 .* got 3 x 40 x 24"):
        Classifier("resnet10t", 4, image_size=32)(torch.zeros(2, 3, 40, 24))
    dynamic = Classifier("vit_tiny_patch16_224", 4, backbone_args={**SMALL_VIT, "dynamic_img_size": True})
    assert dynamic(torch.zeros(1, 3, 32, 48)).shape == (1, 4)


def test_pretrained_encoder_keeps_its_weights_bitwise(make_mae):
    encoder = make_mae().encoder
    before = copy.deepcopy(encoder.state_dict())
    model = Classifier(encoder, num_classes=10)
    assert model.backbone is encoder
    assert list(encoder.state_dict()) == list(before)
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in before.items())
    images = images_for(model)
    tokens = encoder.forward_features(images)
    torch.testing.assert_close(model.eval()(images), model.head(tokens[:, 0]))
    assert (model.in_chans, model.image_size, model.num_features) == (1, (8, 8), 24)


def test_head_of_an_instance_is_taken_off():
    network = timm.create_model("resnet10t", num_classes=1000)
    model = Classifier(network, num_classes=3)
    assert not any("fc" in name for name, _ in model.backbone.named_parameters())
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_any_module_that_states_the_size_of_its_features_is_a_backbone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    network.num_features = 5
    assert Classifier(network, num_classes=3)(torch.zeros(2, 3, 2, 2)).shape == (2, 3)


def test_attention_is_served_by_the_fastest_way():
    model = Classifier("vit_tiny_patch16_224", 4, backbone_args=SMALL_VIT)
    assert all(type(block.attn).__name__ == "FastAttention" for block in model.backbone.blocks)


BAD = {
    "unknown name": ({"backbone": "vit_tiny_patch16_225"}, "'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224"),
    "no class": ({"num_classes": 0}, "Expected `num_classes` of at least 1, got 0"),
    "patches of a convolutional network": (
        {"backbone": "resnet10t", "patch_size": 4},
        "`backbone` 'resnet10t'.*patch_size",
    ),
    "unknown override": ({"backbone_args": {"depthh": 2}}, "`backbone` .*`backbone_args`: .*depthh"),
    "no pretrained weights": (
        {"backbone": "convnext_atto_rms", "pretrained": True},
        "`backbone` 'convnext_atto_rms' .*No pretrained weights exist",
    ),
    "no size of features": ({"backbone": nn.Linear(2, 2)}, "Expected a `backbone` that states its .*, got a Linear"),
    "classifier as a backbone": ({"backbone": MLP([4, 3])}, "Expected a `backbone` .* got a MLP"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_bad_values_raise_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        Classifier(**{"backbone": "vit_tiny_patch16_224", "num_classes": 4, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"image_size": 16}, {"in_chans": 3}, {"patch_size": 2}, {"pretrained": True}, {"backbone_args": {"depth": 1}}],
    ids=lambda options: next(iter(options)),
)
def test_values_that_contradict_a_given_backbone_raise(options, make_mae):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        Classifier(make_mae().encoder, 10, **options)
