"""What becomes of halted tokens that live on in others: the most similar patch, the mean of both."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avit_lib.merging import join, merge_masked, most_similar


def test_the_most_similar_is_chosen_by_direction_among_those_that_may_take():
    leaving = torch.tensor([[3.0, 0.1], [0.0, -1.0]])
    staying = torch.tensor([[10.0, 9.0], [0.1, 0.0], [0.2, -9.0]])
    assert most_similar(leaving, staying, torch.tensor([True, True, True])).tolist() == [1, 2]
    assert most_similar(leaving, staying, torch.tensor([True, False, True])).tolist() == [0, 2]


def test_tokens_join_as_a_mean_weighted_by_size():
    tokens, size = torch.tensor([[1.0, 0.0], [5.0, 5.0]]), torch.tensor([3.0, 1.0])
    joining, weight = torch.tensor([[5.0, 4.0], [9.0, 9.0]]), torch.tensor([1.0, 0.0])
    merged, together = join(tokens, size, joining, weight, torch.tensor([0, 1]))
    assert merged.tolist() == [[2.0, 1.0], [5.0, 5.0]] and together.tolist() == [4.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000))
def test_joining_loses_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, joining = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 7))
    size, weight = (torch.randint(1, 9, (n,), generator=generator).double() for n in (5, 7))
    into = torch.randint(0, 5, (7,), generator=generator)
    merged, together = join(tokens, size, joining, weight, into)
    assert together.sum() == size.sum() + weight.sum()
    before = (size[:, None] * tokens).sum(dim=0) + (weight[:, None] * joining).sum(dim=0)
    torch.testing.assert_close((together[:, None] * merged).sum(dim=0), before)


def test_merging_keeps_the_sum_of_all_tokens():
    """Tokens that stand for many add up to all tokens of the image."""
    tokens = torch.randn(3, 17, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    halts = torch.zeros(3, 17, dtype=torch.bool)
    halts[0, 1:9], halts[1, 1:] = True, True  # of the second image all patches, which then join nobody
    merged, size = merge_masked(tokens, torch.ones(3, 17, dtype=torch.float64), halts, ~halts)
    total = ((size * ~halts)[..., None] * merged).sum(dim=1)
    torch.testing.assert_close(total[[0, 2]], tokens.sum(dim=1)[[0, 2]])
    torch.testing.assert_close(total[1], tokens[1, 0])
    assert torch.equal(merged[2], tokens[2]) and torch.equal(size[:, 0], torch.ones(3, dtype=torch.float64))
