import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltsm_jax.data import DataError
from ltsm_jax.data.ts_files import read_problem, read_ts

HEADER = "# made up\n@problemName Two\n@timeStamps false\n@classLabel true a b\n@data\n"


def write(path, text, header=HEADER):
    path.write_bytes((header + text).encode() if isinstance(text, str) else text)
    return path


def test_examples_dimensions_and_missing_values(tmp_path):
    found = read_ts(write(tmp_path / "x.ts", "1,2,3:4,5,6:b\n# between\n\n7,?,9:1e-3,-1,0: a\r\n"))
    assert (found.name, found.classes, found.labels.tolist()) == ("Two", ("a", "b"), [1, 0])
    assert found.values.shape == (2, 2, 3) and found.values.dtype == np.float32
    np.testing.assert_allclose(found.values[1], [[7, np.nan, 9], [1e-3, -1, 0]])


def test_shorter_examples_have_nothing_in_front(tmp_path):
    found = read_ts(write(tmp_path / "x.ts", "1,2,3:a\n4:b\n"))
    np.testing.assert_array_equal(found.values[1, 0], [np.nan, np.nan, 4])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no examples"),
        ("1,2,3\n", "no ':'"),
        ("1,2:c\n", "no class 'c'"),
        ("1,two:a\n", "line 6: 'two' is no number"),
        ("1,,2:a\n", "'' is no number"),
        ("1,inf:a\n", "not finite"),
        ("1,1e300:a\n", "not finite"),
        ("1:2:a\n1:a\n", "1 to 2 dimensions"),
        ("?,?:a\n", "no value at all"),
        (b"\xff\xfe\x00", "no text"),
        (b"", "no @data"),
        (b"1,2:a\n", "before @data"),
        (b"@what x\n@data\n", "unknown @what"),
        (b"@data\n1:a\n", "classLabel"),
        (b"@classLabel false\n@data\n1:a\n", "classLabel"),
        (b"@classLabel true a a\n@data\n1:a\n", "twice"),
        (b"@timeStamps true\n@classLabel true a b\n@data\n(0,1):a\n", "time stamps"),
        (b"@dimensions 3\n@classLabel true a b\n@data\n1:2:a\n", "says 3 dimensions"),
    ],
)
def test_hostile_files_are_refused(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        read_ts(write(tmp_path / "x.ts", text))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(st.binary(max_size=120), st.text("0123456789.,:?ab@# \nclassLabelrtue", max_size=120))
)
def test_any_bytes_are_read_or_refused(tmp_path, content):
    text = content if isinstance(content, bytes) else content.encode()
    with contextlib.suppress(DataError):
        found = read_ts(write(tmp_path / "x.ts", HEADER.encode() + text))
        assert found.values.ndim == 3 and not np.isinf(found.values).any()
        assert len(found.values) == len(found.labels) and found.labels.max() < 2


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data(), st.integers(1, 3), st.integers(1, 5))
def test_what_is_written_is_read(tmp_path, data, n_dimensions, n_steps):
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    size = n_dimensions * n_steps
    values = np.array(data.draw(st.lists(finite, min_size=size, max_size=size)), np.float32)
    values = values.reshape(n_dimensions, n_steps)
    text = ":".join(",".join(map(repr, row.tolist())) for row in values)
    np.testing.assert_array_equal(
        read_ts(write(tmp_path / "x.ts", f"{text}:b\n")).values[0], values
    )


def test_pairs(tmp_path):
    train = write(tmp_path / "X_TRAIN.ts", "1,2,3:a\n1,2,4:b\n")
    with pytest.raises(FileNotFoundError):
        read_problem(train)
    write(tmp_path / "X_TEST.ts", "5:a\n")
    for path in (train, tmp_path):
        first, second = read_problem(path)
        assert first.values.shape == (2, 1, 3) and second.values.shape == (1, 1, 3)
    write(tmp_path / "X_TEST.ts", "5:1:a\n")
    with pytest.raises(DataError, match="differ"):
        read_problem(train)
    with pytest.raises(DataError, match="not called"):
        read_problem(tmp_path / "X_TEST.ts")
    write(tmp_path / "Y_TRAIN.ts", "1:a\n")
    with pytest.raises(DataError, match="2 files called"):
        read_problem(tmp_path)
