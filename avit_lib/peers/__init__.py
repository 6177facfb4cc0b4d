"""Other methods on the same backbone: a small file each, written from its paper, and an entry here.

A peer is made from a trained model and one number. Like our models it says its logits and trace
(``forward_with_trace``) and what they cost (``flops_of``).
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from avit_lib.peers.ats import TokenSampling
from avit_lib.peers.mctf import fuse_tokens
from avit_lib.peers.pruning import draw_worth, prune
from avit_lib.peers.tome import merge_tokens

# Of each, how it is made from a model and its number, and what that is called.
PEERS = {
    "ToMe": (merge_tokens, "r"),
    "ToMe in every second layer": (partial(merge_tokens, step=2), "r"),
    "EViT": (prune, "kept"),
    "Top-k attention": (partial(prune, fuse=False), "kept"),
    "Random patches": (partial(prune, rate=draw_worth, fuse=False), "kept"),
    "ATS": (TokenSampling, "K"),
    "MCTF": (fuse_tokens, "r"),
}


def make_peers(model: nn.Module, numbers: Mapping[str, Sequence[float]]) -> dict[str, nn.Module]:
    """The peers of a trained ``model`` by label, such as "ToMe, r = 8", for each of its numbers."""
    made = {}
    for name, chosen in numbers.items():
        make, meaning = PEERS[name]
        made |= {f"{name}, {meaning} = {number}": make(model, number) for number in chosen}
    return made
