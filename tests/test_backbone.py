"""What timm's VisionTransformer offers: right, or refused, where tokens leave the model."""

import pickle
from unittest.mock import Mock

import pytest
import timm
import torch
from conftest import bright_and_dark, noise, refused, scatter, varied_model
from safetensors.torch import save_file
from timm.layers import Mlp
from timm.models import save_for_hf
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelThingsBlock,
    VisionTransformer,
)
from torch import nn
from torch.testing import assert_close

from avit_lib import backbone
from avit_lib.adaptive import adapt, without_thresholds
from avit_lib.flops import counted_flops, flops_of, plain_flops, trace_model
from avit_lib.merging import find_partners
from avit_lib.model import AViT, masked_block

NAME = "avit_nano"


def halting(**kwargs):
    return varied_model(**kwargs).float()


def plain_model():
    """A DeiT whose tokens differ more than at the initialisation."""
    torch.manual_seed(0)
    return scatter(timm.create_model("deit_nano", depth=5, embed_dim=32))


def merging():
    return adapt(plain_model(), images(), 0.25)


def images():
    return torch.cat([bright_and_dark(), -bright_and_dark()]).float()


each_kind = pytest.mark.parametrize("make", [halting, merging])


# --- features of every layer ----------------------------------------------------------------------


@each_kind
def test_intermediates_end_in_the_features(make):
    model = make()
    features, layers = model.forward_intermediates(images(), norm=True)
    assert_close(features, model.forward_features(images()))
    assert_close(model.forward_head(features), model(images()))
    assert len(layers) == len(model.blocks) and layers[0].shape == (8, model.embed_dim, 4, 4)
    if make is merging:
        assert_close(layers[-1].flatten(2).transpose(1, 2), features[:, 1:])
    some = model.forward_intermediates(images(), [0, -1], norm=True, intermediates_only=True)
    assert_close(some, [layers[0], layers[-1]])


def test_a_token_that_halted_stays_as_it_was():
    model = halting()
    depth = model.forward_with_trace(images())[1].depth
    pairs = model.forward_intermediates(images(), output_fmt="NLC", return_prefix_tokens=True)[1]
    layers = torch.stack([torch.cat([prefix, patches], dim=1) for patches, prefix in pairs])
    changes = (layers[1:] != layers[:-1]).any(dim=3)
    assert len(depth.unique()) > 3
    assert torch.equal(changes, torch.arange(2, 7)[:, None, None] <= depth)


def test_features_only_is_of_the_model_that_halts():
    net = timm.create_model(NAME, features_only=True, out_indices=[1, 3], beta=0.0).eval()
    expected = net.model.forward_intermediates(images(), [1, 3], intermediates_only=True)
    assert_close(net(images()), expected)
    assert type(net.model) is AViT and net.model.beta == 0


@each_kind
def test_layers_are_pruned_and_other_sizes_taken(make):
    model = make()
    expected = model.forward_intermediates(images(), [2], intermediates_only=True)
    model.prune_intermediate_layers([2])
    found = model.forward_intermediates(images(), 1, intermediates_only=True)
    assert_close(found, expected)
    assert len(model.blocks) == 3 and model(images()).shape[-1] == model.embed_dim
    model.set_input_size(img_size=(14, 42))
    assert model.forward_with_trace(torch.randn(3, 3, 14, 42))[1].depth.shape == (3, 13)


def test_no_token_merges_in_a_layer_that_pruning_makes_the_last():
    model = merging()
    merges = model.merging_layers().index(True)
    model.prune_intermediate_layers([merges])
    assert len(model.blocks) == merges + 1 and not any(model.merging_layers())
    whole = plain_flops(model, 17)
    assert flops_of(model, trace_model(model, images())[1]).tolist() == [whole] * 8


# --- how it is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: halting(execution="masked"), lambda: halting(execution="packed"), merging]
)
def test_checkpointing_computes_layers_again_and_changes_no_gradient(make, monkeypatch):
    model, spy = make().train(), Mock(wraps=backbone.call)
    monkeypatch.setattr(backbone, "call", spy)

    def compute(checkpointing):
        model.set_grad_checkpointing(checkpointing)
        loss = model(images()).square().sum()
        return torch.autograd.grad(loss, model.parameters(), materialize_grads=True)

    expected, calls = compute(False), spy.call_count
    assert_close(compute(True), expected)
    assert spy.call_count == 3 * calls > 0


@each_kind
def test_an_empty_batch(make):
    logits, trace = make().forward_with_trace(images()[:0])
    assert logits.shape == (0, 10) and trace.depth.shape == (0, 17)


def test_halted_tokens_are_masked_by_a_bias():
    """Some versions of timm add a mask of truth values to the logits."""
    active = torch.tensor([[True, False], [False, False]])  # who attends to nobody would be NaN
    bias = masked_block(lambda tokens, attn_mask: attn_mask, torch.zeros(2, 2, 8), active)
    assert bias[:, 0, 0].tolist() == [[0, -torch.inf], [0, 0]]


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("part", ["", "2", "2.attn.attn_drop", "2.attn.k_norm"])
def test_hooks_on_blocks_are_called_or_refused(kind, part):
    model, adaptive, seen = halting(), merging(), []
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = model(images())
    for one in (model, adaptive):
        getattr(one.blocks.get_submodule(part), kind)(lambda *_: seen.append(part))
    with refused("hook"):
        (adaptive if part else model)(images())
    model.execution = "masked"
    if not part:
        with refused("a hook on all blocks at once"):
            model(images())
    else:
        model.execution = "auto"
        found = model(images())
        found.sum().backward()
        assert_close(found, expected)
        assert len(seen) == 1


class Louder(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 1.5 * super().forward(x, attn_mask, is_causal)


class Mixing(Mlp):
    """An MLP in which the tokens of an image see each other."""

    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


class Gate(nn.Identity):
    def forward(self, x):
        return 2 * x


PARTS = [("1", Louder), ("1.mlp", Mixing), ("1.drop_path2", Gate), ("1.attn.attn_drop", Gate)]


@pytest.mark.parametrize(("part", "kind"), PARTS)
def test_a_part_of_one_s_own_is_computed_or_refused(part, kind):
    model, masked = halting(), halting(execution="masked")
    adaptive, plain = merging(), plain_model()
    expected = model(images())
    for one in (model, masked, adaptive, plain):
        one.blocks.get_submodule(part).__class__ = kind
        one.blocks[1].attn.fused_attn = False  # which calls no dropout
    assert (model(images()) - expected).abs().max() > 1e-3
    assert_close(model(images()), masked(images()))
    with refused(kind.__name__):
        adaptive(images())
    with refused(kind.__name__):
        adapt(plain, images(), 0.2)


def test_norms_of_one_s_own_are_computed_and_see_tokens_in_their_places():
    model, masked, adaptive, seen = halting(), halting(execution="masked"), merging(), []
    expected = [model(images()), adaptive(images())]
    adaptive.norm.register_forward_hook(lambda *given: seen.append(given[2]))
    for one in (model, masked, adaptive):
        one.blocks[1].attn.q_norm = Gate()
    found = [model(images()), adaptive(images())]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(found, expected, strict=True))
    assert_close(found[0], masked(images()))
    assert torch.equal(seen[0], adaptive.forward_features(images()))


def test_another_scale_or_forward_of_attention_is_computed_or_refused(monkeypatch):
    everyone = halting(), halting(execution="masked"), merging(), plain_model()
    model, masked, adaptive, plain = everyone
    expected = model(images())
    for one in everyone:
        one.blocks[1].attn.fused_attn, one.blocks[1].attn.scale = False, 100.0
    own = Attention.forward
    for reason in ("a scale of its own", "Attention was replaced"):
        assert (model(images()) - expected).abs().max() > 1e-3
        assert_close(model(images()), masked(images()))
        with refused(reason):
            adaptive(images())
        with refused(reason):
            adapt(plain, images(), 0.2)
        for one in everyone:
            one.blocks[1].attn.scale = one.blocks[1].attn.head_dim ** -0.5
        monkeypatch.setattr(Attention, "forward", lambda *args, **masks: 2 * own(*args, **masks))


def with_louder_class(blocks):
    return type("Louder", (nn.Sequential,), {})(*blocks)


def with_louder_forward(blocks):
    blocks.forward = lambda x: 2 * nn.Sequential.forward(blocks, x)
    return blocks


@pytest.mark.parametrize("change", [with_louder_class, with_louder_forward])
def test_blocks_in_a_container_of_one_s_own_are_refused(change):
    for model in (halting(), merging(), plain_model()):
        model.blocks = change(model.blocks)
        plain = type(model) is VisionTransformer
        with refused("nn.Sequential"):
            adapt(model, images(), 0.2) if plain else model(images())


def test_blocks_of_different_widths_count_what_they_compute():
    model = plain_model()
    for block in model.blocks[1:]:
        block.mlp = Mlp(32, 8)
    counted = counted_flops(model, images())
    for one, share in ((model, 1.0), (adapt(model, images(), 0.2), 0.8)):
        found = flops_of(one, trace_model(one, images())[1]).mean().item()
        assert found / counted == pytest.approx(share, abs=0.01)


def test_a_frozen_part_stays_in_its_mode_after_a_calibration():
    model = merging().train()
    model.blocks[0].eval()
    model.calibrate(images(), 0.2)
    assert model.blocks[1].training and not model.blocks[0].training


def test_large_keys_in_half_precision_merge_as_in_single():
    keys = 300 * noise(1, 2, 9, 8).float()
    expected, found = (find_partners(one, 1) for one in (keys, keys.half()))
    assert_close(found, expected, atol=2e-3, rtol=0)


# --- what is refused ------------------------------------------------------------------------------


def with_forward_replaced():
    model = timm.create_model("deit_nano").eval()
    model.forward = torch.compile(model.forward, backend="eager")
    return adapt(model, images(), 0.2)


REFUSED = [
    (
        lambda: halting().get_intermediate_layers(images(), attn_mask=torch.ones(17, 17)),
        "attn_mask",
    ),
    (lambda: halting().forward_intermediates(images(), output_fmt="NHWC"), "NCHW, NLC"),
    (lambda: halting().reset_classifier(5, "avg"), "class token"),
    (lambda: timm.create_model(NAME, reg_tokens=1), "reg_tokens"),
    (lambda: setattr(halting(), "beta", nn.Parameter(torch.ones(()))), "fixed number"),
    (with_forward_replaced, "forward was replaced"),
    (lambda: setattr(halting(), "forward_features", print), "replaced forward_features"),
    (lambda: without_thresholds(timm.create_model("vit_tiny_r_s16_p8_224")), "HybridEmbed"),
    (lambda: timm.create_model(NAME, block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
]


@pytest.mark.parametrize(("act", "reason"), REFUSED)
def test_it_is_refused_in_one_line(act, reason):
    with refused(reason):
        act()


# --- exporters and compilers ----------------------------------------------------------------------


def test_what_is_traced_or_exported_is_right_on_other_images():
    model = halting()
    size = {"x": {0: torch.export.Dim("images", min=2, max=64)}}
    traced = torch.jit.trace(model, images()[:3])
    exported = torch.export.export(model, (images()[:3],), dynamic_shapes=size).module()
    for one in (traced, exported):
        assert_close(one(3 * images().flip(0)), model(3 * images().flip(0)))
    with pytest.raises(Exception, match="export the plain model"):
        torch.export.export(merging(), (images(),))
    with refused("export the plain model"):
        torch.jit.trace(merging(), images())


@each_kind
def test_compiled_it_says_the_same(make):
    model = make()
    compiled = torch.compile(model)
    for batch in (images(), 3 * images().flip(0)):
        assert_close(compiled(batch), model(batch))


# --- state ----------------------------------------------------------------------------------------


def test_a_state_dict_says_when_tokens_halt(tmp_path):
    model = halting()
    model.beta = -1.25
    save_for_hf(model, tmp_path / "hub", model_args={"depth": 6})
    hub = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    own = timm.create_model(NAME, depth=6, checkpoint_path=str(tmp_path / "own.safetensors"))
    for again in (hub, own):
        assert_close(again.eval()(images()), model(images()))


def test_weights_that_an_overlay_names_are_taken(tmp_path):
    plain = timm.create_model("deit_tiny_patch16_224")
    save_file(plain.state_dict(), tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    name = "avit_tiny_patch16_224"
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.weight, plain.head.weight)


def test_half_precision_leaves_the_thresholds_as_they_are():
    model, adaptive = halting(beta=-1.2345678), merging()
    before = adaptive.thresholds.clone()
    assert model.to(torch.bfloat16).beta == torch.tensor(-1.2345678)
    assert torch.equal(adaptive.half().thresholds, before)


@each_kind
def test_it_is_pickled_whole(make):
    model = make()
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(again(images()), model(images()))
