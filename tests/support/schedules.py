"""Schedules that hypothesis draws."""

from hypothesis import strategies as st

from guided_diffusion.config import ScheduleConfig

counts, lengths = st.integers(1, 3), st.integers(1, 8)


schedules = st.builds(
    ScheduleConfig,
    t_T=st.integers(1, 24),
    n_sample=counts,
    jump_length=lengths,
    jump_n_sample=counts,
    jump2_length=lengths,
    jump2_n_sample=counts,
    jump3_length=lengths,
    jump3_n_sample=counts,
    start_resampling=st.integers(0, 30),
)
