"""What hypothesis draws for several test files."""

from __future__ import annotations

from hypothesis import strategies as st

from monokernel.problem import Hinge

__all__ = ["HINGES"]

HINGES = st.one_of(
    st.none(),
    st.builds(
        Hinge,
        direction=st.sampled_from([(1,), (-1,)]),
        margin=st.sampled_from([0.0, 0.3]),
        squared=st.booleans(),
        elementwise=st.booleans(),
    ),
)
