from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ouroboros_llm.decoding.decoder import fit
from ouroboros_llm.decoding.draft_tree import MAX_WIDTH, DraftTree, TreeBuilder
from ouroboros_llm.decoding.drafter import Budget
from ouroboros_llm.decoding.verification import accept


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Trees of up to 64 nodes over few tokens, so that siblings often agree."""
    builder = TreeBuilder(draw(st.integers(0, 5)), MAX_WIDTH)
    for _ in range(draw(st.integers(0, 80))):
        parent = draw(st.integers(0, len(builder.token_ids) - 1))
        builder.add(parent, draw(st.integers(0, 5)), draw(st.floats(0.01, 1)), "test")
    return builder.build()


@given(trees())
def test_every_node_sees_its_path_and_nothing_else(tree: DraftTree) -> None:
    for node in range(tree.width):
        path = tree.path_to(node)
        assert set(np.flatnonzero(tree.ancestor_mask[node])) == set(path)
        assert tree.depths[node] == len(path) - 1
        assert path[0] == 0 and path[-1] == node and list(path) == sorted(path)


@given(trees())
def test_siblings_differ(tree: DraftTree) -> None:
    edges = list(zip(tree.parents, tree.token_ids, strict=True))
    assert len(set(edges)) == len(edges)
    for node in range(1, tree.width):
        assert tree.child(tree.parents[node], tree.token_ids[node]) == node


@given(trees(), st.integers(1, 64), st.integers(0, 6), st.sampled_from(["tree", "chain"]))
def test_fitted_drafts_are_trees_within_the_budget(tree: DraftTree, width: int, depth: int, branching: str) -> None:
    fitted = fit(tree, tree.token_ids[0], Budget(width, depth), branching)  # type: ignore[arg-type]
    assert fitted.width <= max(width, 1) and max(fitted.depths) <= depth
    assert all(parent < node for node, parent in enumerate(fitted.parents))
    assert branching == "tree" or fitted.is_chain
    lengths = {
        len(column) for column in (fitted.token_ids, fitted.parents, fitted.chances, fitted.sources, fitted.evidence)
    }
    assert lengths == {fitted.width}


@given(trees(), st.lists(st.integers(0, 5), min_size=30, max_size=30), st.integers(1, 30), st.sets(st.integers(0, 5)))
def test_acceptance_emits_the_target_s_choices(tree: DraftTree, wanted: list[int], limit: int, ends: set[int]) -> None:
    """Whatever the tree, what is emitted is a prefix of what the target wants, and as long as the tree allows."""
    accepted = accept(tree, lambda node, emitted: wanted[len(emitted)], limit=limit, end_token_ids=ends)
    emitted = list(accepted.token_ids)
    assert emitted == wanted[: len(emitted)] and 1 <= len(emitted) <= limit
    assert len(accepted.path) == len(emitted)
    assert [tree.token_ids[node] for node in accepted.path[1:]] == emitted[:-1]
    assert not ends.intersection(emitted[:-1])
    if len(emitted) < limit and emitted[-1] not in ends:
        assert tree.child(accepted.path[-1], emitted[-1]) is None


@given(trees())
def test_the_main_chain_follows_the_likeliest_children(tree: DraftTree) -> None:
    chain = tree.main_chain()
    assert chain.is_chain
    node = 0
    for token_id in chain.token_ids[1:]:
        node = tree.child(node, token_id)
        siblings = [other for other in range(tree.width) if tree.parents[other] == tree.parents[node]]
        assert tree.chances[node] == max(tree.chances[sibling] for sibling in siblings)
    assert not [other for other in range(tree.width) if tree.parents[other] == node]


def test_a_full_builder_adds_nothing_but_finds_what_is_there() -> None:
    builder = TreeBuilder(1, 3)
    first, second = builder.add(0, 5, 0.5, "a"), builder.add(0, 6, 0.5, "a")
    assert builder.room == 0 and builder.add(0, 7, 0.5, "a") is None
    assert builder.add(0, 5, 0.9, "b") == first and builder.add(0, 6, 0.9, "b") == second
    assert builder.build() == DraftTree((1, 5, 6), (-1, 0, 0), (1.0, 0.5, 0.5), ("", "a", "a"), (None,) * 3)
