"""The networks of SASRec against torch's own attention, and who may see whom."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.networks import PreNormBlock, PublishedBlock, SelfAttention, SequenceEncoder, causal_mask

V, D, T = 30, 16, 9
BLOCKS = {
    "published": PublishedBlock,
    "published padding_mask": lambda width: PublishedBlock(width, padding_mask=True),
    "published basket": lambda width: PublishedBlock(width, see_own_basket=True),
    "pre_norm": PreNormBlock,
    "pre_norm basket": lambda width: PreNormBlock(width, see_own_basket=True),
}


def make_encoder(block, **changes):
    torch.manual_seed(1)
    settings = {"n_items": V, "d_model": D, "max_length": T, "n_blocks": 2, "block": block, "dropout": 0.2}
    return SequenceEncoder(**settings | changes).double().eval()


def histories(n_padding=3):
    items = torch.randint(0, V, (4, T))
    baskets = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4]).expand(4, T).clone()
    items[:, :n_padding], baskets[:, :n_padding] = V, -1
    return items, baskets


def test_attention_equals_torch_multihead_attention():
    ours = SelfAttention(D, 4, 0.0).double()
    theirs = nn.MultiheadAttention(D, 4, batch_first=True).double()
    parts = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    queries, keys = torch.randn(3, T, D).double(), torch.randn(3, T, D).double()
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected, _ = theirs(queries, keys, keys, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(ours(queries, keys, None), expected)
    mask = causal_mask(torch.ones(3, T, dtype=torch.bool))
    torch.testing.assert_close(ours(queries, keys, mask), expected)


def test_published_block_is_the_formula():
    block = PublishedBlock(D).double().eval()
    x, valid = torch.randn(2, T, D).double(), torch.ones(2, T, dtype=torch.bool)
    query = block.norm_query(x)
    first, _, _, second, _ = block.feed
    inner = block.norm_feed(query + block.attention(query, x, None))
    expected = inner + second(torch.relu(first(inner)))
    torch.testing.assert_close(block(x, valid, torch.zeros(2, T)), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_slot_never_sees_a_later_basket(name):
    encoder = make_encoder(BLOCKS[name])
    items, baskets = histories()
    states = encoder(items, baskets)
    changed = items.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V  # baskets 3 and 4
    torch.testing.assert_close(encoder(changed, baskets)[:, :6], states[:, :6], rtol=0, atol=0)
    assert not torch.equal(encoder(changed, baskets)[:, 6:], states[:, 6:])


@pytest.mark.parametrize("name", ["published basket", "pre_norm basket"])
def test_a_slot_sees_all_of_its_own_basket(name):
    encoder = make_encoder(BLOCKS[name])
    items, baskets = histories()
    changed = items.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V  # the last slot of basket 2
    before, after = encoder(items, baskets), encoder(changed, baskets)
    assert (before[:, 3:5] - after[:, 3:5]).abs().amax(-1).gt(0).all()
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["published padding_mask", "published basket", "pre_norm", "pre_norm basket"])
def test_masked_padding_changes_nothing(name):
    encoder = make_encoder(BLOCKS[name])
    items, baskets = histories(n_padding=4)
    shorter = encoder(items[:, 4:], baskets[:, 4:])
    torch.testing.assert_close(encoder(items, baskets)[:, 4:], shorter)


@pytest.mark.parametrize("name", BLOCKS)
def test_states_are_finite_for_an_empty_history(name):
    encoder = make_encoder(BLOCKS[name])
    states = encoder(torch.full((1, T), V), torch.full((1, T), -1))
    assert states.isfinite().all()


def test_first_scores_are_near_zero():
    """Xavier normal on a (V + 1, D) table has deviation sqrt(2 / (V + 1 + D)): scores of a unit state are small."""
    encoder = make_encoder(PublishedBlock, n_items=5000)
    table = encoder.item_table.weight
    assert table.std().item() == pytest.approx(math.sqrt(2 / (5001 + D)), rel=0.02)  # 80,000 draws: 0.25 %
    items = torch.randint(0, 5000, (4, T))
    scores = encoder(items, torch.arange(T).expand(4, T))[:, -1] @ encoder.item_embeddings.T
    loss = torch.logsumexp(scores, 1) - scores[:, 0]
    assert loss.mean().item() == pytest.approx(math.log(5000), abs=0.3)  # scores have a deviation near 0.08


def test_item_embeddings_are_a_view_without_the_padding_row():
    encoder = make_encoder(PublishedBlock)
    assert encoder.item_embeddings.shape == (V, D)
    assert encoder.item_embeddings.data_ptr() == encoder.item_table.weight.data_ptr()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_items": 1}, "n_items must be at least 2, got 1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"d_model": 15}, "n_heads must be a positive divisor of d_model"),
    ],
)
def test_wrong_sizes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_encoder(PublishedBlock, **changes)
    with pytest.raises(ValueError, match="at most max_length=9"):
        make_encoder(PublishedBlock)(torch.zeros(1, 10, dtype=torch.long), torch.zeros(1, 10))
