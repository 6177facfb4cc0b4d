"""What timm's VisionTransformer offers in public: of models whose tokens leave, right or refused in
one line.
"""

import copy
import pickle
from functools import cache

import pytest
import timm
import torch
from conftest import bright_and_dark, varied_model
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import Block, ParallelThingsBlock
from torch import nn

from avit_lib.adaptive import Adaptive, adapt
from avit_lib.backbone import TokensLeave
from avit_lib.errors import UserError
from avit_lib.model import AViT, masked_block

NAME = "avit_nano"


def halting(**kwargs) -> AViT:
    return varied_model(**kwargs).float()


@cache
def _merging() -> Adaptive:
    torch.manual_seed(0)
    model = timm.create_model("deit_nano", depth=5, embed_dim=32).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return adapt(model, images(), 0.25)


def merging() -> Adaptive:
    return copy.deepcopy(_merging())


def images() -> torch.Tensor:
    return torch.cat([bright_and_dark(), -bright_and_dark()]).float()


each_kind = pytest.mark.parametrize("make", [halting, merging])


def refused(match: str):
    return pytest.raises(UserError, match=rf"\A[^\n]*{match}[^\n]*\Z")


# --- features of every layer ----------------------------------------------------------------------


@each_kind
def test_intermediates_end_in_the_features(make):
    model = make()
    features, layers = model.forward_intermediates(images(), norm=True)
    expected = model.forward_features(images())
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(model.forward_head(features), model(images()))
    assert len(layers) == len(model.blocks) and layers[0].shape == (8, model.embed_dim, 4, 4)
    if isinstance(model, Adaptive):
        torch.testing.assert_close(layers[-1].flatten(2).transpose(1, 2), expected[:, 1:])


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_a_token_that_halted_stays_as_it_was(execution):
    model = halting(execution=execution)
    depth = model.forward_with_trace(images())[1].depth
    pairs = model.forward_intermediates(images(), output_fmt="NLC", return_prefix_tokens=True)[1]
    layers = torch.stack([torch.cat([prefix, patches], dim=1) for patches, prefix in pairs])
    last = layers.gather(0, (depth - 1)[None, ..., None].expand(1, *layers.shape[1:]))[0]
    assert depth.min() == 1 and len(depth.unique()) > 3
    for number, tokens in enumerate(layers, start=1):
        gone = depth <= number
        torch.testing.assert_close(tokens[gone], last[gone], rtol=0, atol=0)
        assert (tokens[~gone] != last[~gone]).any() or number == len(layers)


def test_a_merged_token_is_what_stands_for_it():
    model = merging()
    depth = model.forward_with_trace(images())[1].depth
    layers = model.get_intermediate_layers(images(), n=5, return_prefix_tokens=True)
    for number, (patches, _) in enumerate(layers, start=1):
        distinct = torch.tensor([len(tokens.unique(dim=0)) for tokens in patches])
        assert torch.equal(distinct, (depth[:, 1:] > number).sum(dim=1) if number < 5 else distinct)


@each_kind
def test_chosen_layers_and_formats(make):
    model = make()
    whole = model.forward_intermediates(images(), intermediates_only=True)
    chosen = model.forward_intermediates(
        images(), [0, -1], stop_early=True, intermediates_only=True
    )
    torch.testing.assert_close(chosen, [whole[0], whole[-1]])
    found = model.forward_intermediates(images(), 1, output_dict=True, return_prefix_tokens=True)
    assert set(found) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    with refused("NCHW, NLC"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def test_features_only_is_of_the_model_that_halts():
    torch.manual_seed(0)
    kwargs = dict(depth=6, gamma=5.0, beta=0.0)
    net = timm.create_model(NAME, features_only=True, out_indices=[1, 3], **kwargs).eval()
    model = timm.create_model(NAME, **kwargs).eval()
    model.load_state_dict(net.model.state_dict(), strict=False)
    model.blocks = model.blocks[:4]
    expected = model.forward_intermediates(images(), [1, 3], intermediates_only=True)
    torch.testing.assert_close(net(images()), expected)
    plain = nn.Sequential(*model.blocks[:2])(model.embed(images()))[:, 1:]
    assert (net(images())[0].flatten(2).transpose(1, 2) - plain).abs().max() > 1e-3


@each_kind
def test_layers_can_be_pruned(make):
    model = make()
    expected = model.forward_intermediates(images(), [1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    torch.testing.assert_close(
        model.forward_intermediates(images(), 1, intermediates_only=True), expected
    )
    assert len(model.blocks) == 2 and model(images()).shape[-1] == model.embed_dim


@each_kind
def test_another_input_size(make):
    model = make()
    model.set_input_size(img_size=(14, 42))
    logits, trace = model.forward_with_trace(torch.randn(3, 3, 14, 42))
    assert trace.depth.shape == (3, 13) and logits.isfinite().all()


# --- how it is computed ---------------------------------------------------------------------------


def saved_for_backward(model: TokensLeave) -> int:
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images())
    logits.square().sum().backward()
    return total


@pytest.mark.parametrize(
    "make", [lambda: halting(execution="masked"), lambda: halting(execution="packed"), merging]
)
def test_checkpointing_saves_memory_and_changes_no_gradient(make):
    model = make().train()
    whole = saved_for_backward(model)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.set_grad_checkpointing(True)
    assert saved_for_backward(model) < 0.4 * whole
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected)


@each_kind
def test_an_empty_batch(make):
    model, none = make(), images()[:0]
    logits, trace = model.forward_with_trace(none)
    assert logits.shape == model(none).shape == (0, 10) and trace.depth.shape == (0, 17)
    assert model.forward_intermediates(none, 1, intermediates_only=True)[0].shape == (
        0,
        model.embed_dim,
        4,
        4,
    )


@pytest.mark.parametrize("kind", ["truth", "bias"])
def test_an_attention_mask_is_timms(kind):
    plain = timm.create_model("deit_nano").eval()
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[:, 9:] = False
    mask = mask if kind == "truth" else torch.zeros(17, 17).masked_fill(~mask, -2.0)
    model = timm.create_model(NAME, beta=-1e4).eval()
    model.load_state_dict(plain.state_dict())
    expected = plain(images(), attn_mask=mask)
    assert (expected - plain(images())).abs().max() > 1e-4
    torch.testing.assert_close(model(images(), attn_mask=mask), expected)
    with refused("attn_mask"):
        merging()(images(), attn_mask=mask)


@each_kind
def test_causal_attention_is_refused(make):
    with refused("is_causal"):
        make()(images(), is_causal=True)


def test_halted_tokens_are_masked_by_a_bias():
    """Some versions of timm add a mask of truth values to the logits."""

    class Adds(nn.Module):
        def forward(self, tokens, attn_mask):
            return (torch.zeros(len(tokens), 1, 17, 17) + attn_mask).softmax(dim=-1)[:, 0] @ tokens

    tokens, active = torch.randn(2, 17, 8), torch.rand(2, 17) < 0.5
    expected = torch.stack(
        [t[a].mean(dim=0).expand(17, -1) for t, a in zip(tokens, active, strict=True)]
    )
    torch.testing.assert_close(masked_block(Adds(), tokens, active), expected)


HOOKS = {
    "forward": lambda part, hook: part.register_forward_hook(hook),
    "backward": lambda part, hook: part.register_full_backward_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_a_block_see_tokens_in_their_places(kind):
    model, seen = halting(), []
    expected = model(images())
    HOOKS[kind](
        model.blocks[2],
        lambda block, given, found: seen.append(tuple(model.blocks[2].state_dict())),
    )
    found = model(images())
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["", "2", "2.attn", "2.attn.attn_drop"])
def test_a_hook_that_would_never_be_called_is_refused(kind, part):
    model = merging()
    HOOKS[kind](model.blocks.get_submodule(part), lambda *_: None)
    with refused("hook"):
        model(images())
    if not part:
        model = halting()
        HOOKS[kind](model.blocks, lambda *_: None)
        with refused("hook"):
            model(images())


class Louder(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 1.5 * super().forward(x, attn_mask, is_causal)


def test_a_block_of_one_s_own_is_computed():
    model, masked = halting(), halting(execution="masked")
    expected = model(images())
    for one in (model, masked):
        one.blocks[1].__class__ = Louder
    assert (model(images()) - expected).abs().max() > 1e-3
    torch.testing.assert_close(model(images()), masked(images()))
    adaptive = merging()
    adaptive.blocks[1].__class__ = Louder
    with refused("Louder"):
        adaptive(images())


def test_a_forward_of_one_s_own_is_not_adapted():
    model = timm.create_model("deit_nano").eval()
    model.forward = torch.compile(model.forward, backend="eager")
    with refused("forward was replaced"):
        adapt(model, images(), 0.2)


def test_how_it_is_computed_is_an_argument():
    assert timm.create_model(NAME, execution="packed").execution == "packed"
    assert timm.create_model(NAME, exportable=True).execution == "masked"


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "map"])
def test_pooling_over_patches_is_refused(pool):
    with refused("class token"):
        halting().reset_classifier(5, pool)
    with refused("class token"):
        timm.create_model(NAME, global_pool=pool)


def test_a_new_head_of_a_merging_model_pools_all_tokens():
    model = merging()
    model.reset_classifier(5, "avg")
    expected = model.head(model.forward_features(images())[:, 1:].mean(dim=1))
    torch.testing.assert_close(model(images()), expected)


# --- exporters and compilers ----------------------------------------------------------------------


def test_what_is_traced_or_exported_is_right_on_other_images():
    model = halting()
    size = {"x": {0: torch.export.Dim("images", min=2, max=64)}}
    traced = torch.jit.trace(model, images()[:3])
    exported = torch.export.export(model, (images()[:3],), dynamic_shapes=size).module()
    for one in (traced, exported):
        torch.testing.assert_close(one(3 * images().flip(0)), model(3 * images().flip(0)))


def test_a_merging_model_is_not_exported():
    with refused("export the plain model"):
        torch.jit.trace(merging(), images())
    with pytest.raises(Exception, match="export the plain model"):
        torch.export.export(merging(), (images(),))


@each_kind
def test_what_cannot_follow_is_refused(make):
    for follow in (torch.jit.script, torch.fx.symbolic_trace):
        with refused("can't follow tokens that leave"):
            follow(make())


@pytest.mark.parametrize(
    "make", [lambda: halting(depth=2), lambda: halting(depth=2).train(), merging]
)
def test_compiled_it_says_the_same(make):
    model = make()
    compiled = torch.compile(model)
    for batch in (images(), 3 * images().flip(0)):
        torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-5)


# --- state ----------------------------------------------------------------------------------------


def test_a_state_dict_says_when_tokens_halt(tmp_path):
    model = halting()
    model.beta = -1.25
    expected = model(images())
    other = timm.create_model(NAME, depth=6)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(images()), expected)
    save_for_hf(model, tmp_path / "hub", model_args={"depth": 6})
    hub = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    torch.testing.assert_close(hub.eval()(images()), expected)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    own = timm.create_model(NAME, depth=6, checkpoint_path=str(tmp_path / "own.safetensors"))
    torch.testing.assert_close(own.eval()(images()), expected)


def test_half_precision_leaves_the_thresholds_as_they_are():
    model, adaptive = halting(beta=-1.2345678), merging()
    before = adaptive.thresholds.clone()
    assert model.to(torch.bfloat16).beta == torch.tensor(-1.2345678)
    assert torch.equal(adaptive.half().thresholds, before)


def test_a_class_token_that_runs_on_is_not_loaded_into_one_that_halts():
    halts, runs_on = halting(), halting(class_token_halts=False)
    for one, other in ((halts, runs_on), (runs_on, halts)):
        with pytest.raises(RuntimeError, match="class_token_runs_on"):
            one.load_state_dict(other.state_dict())


@each_kind
def test_it_is_pickled_whole(make):
    model = make()
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(again(images()), model(images()))


def test_a_copy_of_a_compiled_model_is_itself():
    model = merging()
    model.compile(backend="eager")
    other = copy.deepcopy(model)
    other.head.weight.data.zero_()
    other.head.bias.data.zero_()
    assert not other(images()).any() and model(images()).any()


def test_a_threshold_is_no_parameter():
    with refused("fixed number"):
        halting().beta = nn.Parameter(torch.tensor(1.0))


def test_a_merging_model_of_another_class_is_pickled_too():
    plain = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2, embed_dim=48)
    model = adapt(plain.eval(), torch.randn(8, 3, 64, 64), 0.1)
    again = copy.deepcopy(model)
    assert isinstance(again, type(plain)) and type(again) is type(model)


def test_pretrained_weights_are_found_where_they_lie(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path))
    plain = timm.create_model("deit_tiny_patch16_224")
    save_file(plain.state_dict(), tmp_path / "deit_tiny_patch16_224.fb_in1k.safetensors")
    model = timm.create_model("avit_tiny_patch16_224", pretrained=True, beta=-3.0)
    assert torch.equal(model.head.weight, plain.head.weight) and model.beta == -3.0


# --- models that tokens can't leave ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vit_tiny_r_s16_p8_224", {}, "HybridEmbed"),
        ("vit_tiny_patch16_224", {"block_fn": ParallelThingsBlock}, "ParallelThingsBlock"),
    ],
)
def test_the_reason_is_the_right_one(name, changes, reason):
    model = timm.create_model(name, depth=1, **changes)
    with refused(reason):
        adapt(model, torch.zeros(4, 3, 224, 224), 0.3)
    if changes:
        with refused(reason):
            timm.create_model(NAME, **changes)


@pytest.mark.parametrize(
    "given", [[torch.zeros(3, 28, 28)] * 4, torch.zeros(4, 3, 28, 28, dtype=torch.uint8)]
)
def test_images_that_are_no_batch_are_named(given):
    with refused("one tensor of floats"):
        merging().calibrate(given, 0.2)


def test_an_interrupted_calibration_changes_nothing():
    model = merging()
    before = model.thresholds.clone()

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.calibrate(images(), 0.1, report=interrupt)
    assert torch.equal(model.thresholds, before)
