"""Token merging: what merges, what a merged token is, and that it stands for those it is made
of.
"""

import pytest
import timm
import torch
from conftest import random_images, small_model
from torch import nn

from avit_lib.errors import UserError
from avit_lib.evaluation import counted_flops, metrics, predict
from avit_lib.peers import tome


def trained_looking(**kwargs):
    """A float64 model in evaluation mode whose tokens differ more than those of a freshly
    initialised one.
    """
    torch.manual_seed(0)
    model = small_model("deit", **kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 28, 28, generator=generator, dtype=torch.float64)


def random_keys(tokens, count=3, width=8):
    return torch.randn(
        count, tokens, width, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64
    )


def test_merging_nothing_is_the_plain_model():
    model = trained_looking()
    torch.testing.assert_close(
        tome.TokenMerging(model, 0)(images()), model(images()), rtol=0, atol=1e-6
    )


def test_merging_changes_the_output_but_no_weight():
    model = trained_looking()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = tome.TokenMerging(model, 3)(images())
    assert not torch.allclose(merged, model(images()), atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (0, [17, 17, 17, 17, 17]),
        (1, [17, 16, 15, 14, 13]),
        (3, [17, 14, 11, 8, 5]),
        (5, [17, 12, 7, 4, 3]),
        (8, [17, 9, 5, 3, 2]),  # half of the rest at most
        (100, [17, 9, 5, 3, 2]),
    ],
)
def test_layers_really_compute_on_so_many_tokens(r, expected):
    model = trained_looking()
    entered, into_mlp = [], []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0].shape[1]))
        block.norm2.register_forward_hook(lambda _, inputs, __: into_mlp.append(inputs[0].shape[1]))
    tome.TokenMerging(model, r)(images())
    assert entered == expected[:-1] and into_mlp == expected[1:]  # fewer already in the MLP


@pytest.mark.parametrize("r", [1, 4, 100])
def test_sizes_sum_to_the_number_of_tokens(r):
    tokens, size = tome.run_merging(trained_looking().blocks, random_keys(17, width=16), r)
    assert tokens.shape[:2] == size.shape
    assert torch.equal(size.sum(dim=1), torch.full((3,), 17.0, dtype=torch.float64))
    assert (size[:, 0] == 1).all()  # the class token stands for itself


def test_the_most_similar_pairs_merge():
    directions = torch.eye(6, dtype=torch.float64)
    # class token, then patches: 2 and 3 agree but for their length, 1 and 4 nearly, 5 agrees with
    # nobody
    near = directions[1] + 0.1 * directions[5]
    keys = torch.stack(
        [directions[0], directions[1], directions[2], 3 * directions[2], near, directions[4]]
    )
    assert tome.match(keys[None], 1).tolist() == [
        [0, 2, 3, 3, 1, 4]
    ]  # kept 0 and 4 of A, then 1, 3, 5 of B
    assert tome.match(keys[None], 2).tolist() == [[0, 1, 2, 2, 1, 3]]


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 17, 50])
def test_groups_are_numbered_without_gaps_and_the_class_token_is_alone(tokens):
    keys = random_keys(tokens)
    keys[1] = keys[1, :1]  # in one image all are the same as the class token
    for r in range((tokens - 1) // 2 + 1):
        groups = tome.match(keys, r)
        for row in groups:
            assert row.unique().tolist() == list(range(tokens - r))
            assert row[0] == 0 and (row == 0).sum() == 1
        assert (
            groups[:, 1::2].diff(dim=1) == 1
        ).all()  # of two tokens in B none merges with the other


def test_a_merged_token_is_the_mean_weighted_by_size():
    tokens = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [6.0, 60.0]]])
    size, groups = torch.tensor([[1.0, 1.0, 2.0, 3.0]]), torch.tensor([[0, 1, 2, 2]])
    merged, sizes = tome.merge(tokens, size, groups, 3)
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.8, 48.0]]]))
    assert sizes.tolist() == [[1, 1, 5]]


def test_images_of_a_batch_do_not_mix():
    merging, batch = tome.TokenMerging(trained_looking(), 5), images(4)
    alone = torch.cat([merging(image[None]) for image in batch])
    torch.testing.assert_close(merging(batch), alone, rtol=0, atol=1e-10)


def test_a_merged_token_counts_as_its_duplicates():
    """Proportional attention: the output does not tell a token of size 2 from two equal tokens."""
    module = trained_looking().blocks[0].attn
    tokens = random_keys(5, width=16)
    doubled = torch.cat([tokens, tokens[:, 3:4], tokens[:, 3:4]], dim=1)  # three times token 3
    ones, size = (
        torch.ones(3, 7, dtype=torch.float64),
        torch.tensor([[1.0, 1, 1, 3, 1]] * 3, dtype=torch.float64),
    )
    expected, _ = tome.attend(module, doubled, ones)
    found, _ = tome.attend(module, tokens, size)
    torch.testing.assert_close(found, expected[:, :5], rtol=0, atol=1e-10)
    unweighted, _ = tome.attend(module, tokens, torch.ones_like(size))
    assert not torch.allclose(unweighted, expected[:, :5], atol=1e-4)


def test_merging_equal_tokens_loses_nothing():
    """Patches that are equal in pairs: with half of them merged away the logits are those of the
    plain model.
    """
    model = trained_looking()
    with torch.no_grad():
        model.pos_embed[:, 2::2] = model.pos_embed[
            :, 1::2
        ]  # token 1 and 2 share a position, 3 and 4, ...
    pixels = images(2)
    pixels = pixels.unflatten(3, (2, 2, 7))
    pixels[:, :, :, :, 1] = pixels[:, :, :, :, 0]
    pixels = pixels.flatten(3)
    expected = model(pixels)
    embedded = model._pos_embed(model.patch_embed(pixels))
    tokens, size = tome.merging_block(
        model.blocks[0], embedded, torch.ones_like(embedded[..., 0]), 8
    )
    assert sorted(size[0].tolist()) == [1] + [2] * 8
    for block in model.blocks[1:]:
        tokens, size = tome.merging_block(block, tokens, size, 0)
    found = model.forward_head(model.norm(tokens))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_it_predicts_and_is_measured_like_other_models():
    model, data = timm.create_model("deit_nano"), random_images(10)
    merging = tome.TokenMerging(model, 4).eval()
    found = predict(merging, data, batch_size=4)
    batch = torch.stack([image for image, _ in data])
    with torch.inference_mode():
        torch.testing.assert_close(found.logits, merging(batch), rtol=0, atol=1e-5)
    assert 0 <= metrics(model, found)["accuracy"] <= 1
    fewer, more = (counted_flops(tome.TokenMerging(model, r).eval(), batch) for r in (6, 2))
    assert fewer < more < counted_flops(model.eval(), batch)


@pytest.mark.parametrize(
    ("model", "r"),
    [
        (lambda: timm.create_model("avit_nano"), 2),
        (lambda: timm.create_model("deit_nano", reg_tokens=1), 2),
        (lambda: nn.Linear(2, 2), 2),
        (lambda: timm.create_model("deit_nano"), -1),
    ],
)
def test_what_cannot_merge_is_refused(model, r):
    with pytest.raises(UserError):
        tome.TokenMerging(model(), r)
