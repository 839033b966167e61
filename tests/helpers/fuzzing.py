"""Random inputs of readers."""

from datetime import timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

fuzz = settings(
    max_examples=60,
    deadline=timedelta(seconds=5),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
cells = st.text(st.sampled_from("ab é日\"\t,;\n\r\0\x1c\x85\u2028'#\\"), max_size=6)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(["2020-01-01", "2020-01-01 10:00:00", "007", "1e5", "NaN", "null", "true", ""])
)
