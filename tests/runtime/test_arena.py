"""Memory plans: buffers that matter at the same time never share a byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from model_factory import tiny_artifact

from runtime.arena import ALIGNMENT, Lifetime, Placement, place
from runtime.loader import load_model
from runtime.plan import build_plan

LIFETIMES = st.lists(
    st.builds(
        lambda size, first, length: Lifetime(size, first, first + length),
        st.integers(0, 5000),
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    max_size=40,
)


def assert_disjoint(lifetimes: list[Lifetime] | tuple[Lifetime, ...], placement: Placement) -> None:
    """Checks the invariant for every pair of buffers."""
    for i, one in enumerate(lifetimes):
        begin = placement.offsets[i]
        assert begin % ALIGNMENT == 0
        assert begin + one.size <= placement.size
        for j, other in enumerate(lifetimes[:i]):
            if one.overlaps(other) and one.size and other.size:
                start = placement.offsets[j]
                assert begin + one.size <= start or start + other.size <= begin


@given(LIFETIMES)
def test_live_buffers_never_overlap(lifetimes: list[Lifetime]) -> None:
    assert_disjoint(lifetimes, place(lifetimes))


@given(LIFETIMES)
def test_arena_is_no_larger_than_all_buffers_together(lifetimes: list[Lifetime]) -> None:
    assert place(lifetimes).size <= sum(-(-life.size // ALIGNMENT) * ALIGNMENT for life in lifetimes)


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime(640, step, step + 1) for step in range(20)]
    assert place(chain).size == 2 * 640


def test_a_plan_keeps_its_steps_operands_apart() -> None:
    model = load_model(tiny_artifact(channels=20, outputs=33, hash_length=65, tile_size=7).SerializeToString())
    wanted = ("logits", "conv1/codes")
    plan = build_plan(model, {"input": (4, 20, 6, 5)}, wanted, slots=3)
    assert_disjoint(plan.lifetimes, plan.placement)
    for index, step in enumerate(plan.steps):
        for operand in (*step.inputs, *step.outputs):
            if operand.array is None:
                life = plan.lifetimes[operand.index]
                assert life.first <= index <= life.last
    for operand in plan.outputs.values():
        assert plan.lifetimes[operand.index].last == len(plan.steps)
