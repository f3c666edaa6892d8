import contextlib
import gzip
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltsm_jax.tasks import anomaly, labelled


def nab(tmp_path, n=200, windows=((60, 69), (100, 104)), packed=True):
    stamps = pd.date_range("2014-07-01", periods=n, freq="30min")
    place = tmp_path / "realX"
    place.mkdir(exist_ok=True)
    table = (
        pd.DataFrame({"timestamp": stamps, "value": np.arange(n) % 7}).to_csv(index=False).encode()
    )
    path = place / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(table) if packed else table)
    spans = [[f"{stamps[first]}.000000", f"{stamps[last]}.000000"] for first, last in windows]
    (tmp_path / labelled.NAB_LABELS).write_text(json.dumps({"realX/a.csv": spans}))
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_nab_windows_become_rows(tmp_path, packed):
    found = labelled.read_nab(nab(tmp_path, packed=packed))
    assert found is not None
    assert (found.name, found.train_end, found.spans) == ("a", 30, ((60, 69), (100, 104)))
    assert len(found.values) == 200


def test_nab_windows_of_the_probation_are_left_out(tmp_path):
    assert labelled.read_nab(nab(tmp_path, windows=[(10, 50)])) is None
    found = labelled.read_nab(nab(tmp_path, windows=[(10, 50), (90, 95)]))
    assert found is not None and found.spans == ((90, 95),)
    long = labelled.read_nab(nab(tmp_path, n=9000, windows=[(5000, 5100)]))
    assert long is not None and long.train_end == 750


def test_nab_refusals(tmp_path):
    path = nab(tmp_path)
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    with pytest.raises(ValueError, match="timestamp"):
        labelled.read_nab(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="timestamp"):
        labelled.read_nab(path)
    (tmp_path / labelled.NAB_LABELS).write_text("{}")
    with pytest.raises(ValueError, match="no windows of realX/a.csv"):
        labelled.read_nab(path)
    (tmp_path / labelled.NAB_LABELS).write_text('{"realX/a.csv": [[null, null]]}')
    with pytest.raises(ValueError, match="None is no date"):
        labelled.read_nab(path)
    (tmp_path / labelled.NAB_LABELS).write_text("{")
    with pytest.raises(ValueError, match="label windows"):
        labelled.read_nab(path)
    (tmp_path / labelled.NAB_LABELS).unlink()
    with pytest.raises(ValueError, match="in no folder above"):
        labelled.read_nab(path)


def smap(tmp_path, spans="[[10, 19], [30, 32]]"):
    for part, n in (("train", 100), ("test", 60)):
        (tmp_path / part).mkdir(exist_ok=True)
        np.save(tmp_path / part / "P-1.npy", np.arange(n * 3.0).reshape(n, 3))
    table = pd.DataFrame({"chan_id": ["P-1", "X-9"], "anomaly_sequences": [spans, "[[1, 2]]"]})
    table.to_csv(tmp_path / labelled.SMAP_LABELS, index=False)


def test_channels_in_the_form_of_smap(tmp_path):
    smap(tmp_path)
    (found,) = labelled.read_channels(tmp_path)
    assert (found.name, found.train_end, found.spans) == ("P-1", 100, ((110, 119), (130, 132)))
    np.testing.assert_array_equal(found.values[[0, 1, 100, 101]], [0, 3, 0, 3])
    assert labelled.read_labelled([tmp_path])[0][0].name == "P-1"
    with pytest.raises(ValueError, match="no channel"):
        labelled.read_channels(tmp_path, ["X-9"])


@pytest.mark.parametrize(
    "spans", ["[]", "[[1]]", "[[1, 2", "open('x')", "[['a', 'b']]", "[[50, 80]]"]
)
def test_hostile_spans_are_refused(tmp_path, spans):
    smap(tmp_path, spans)
    with pytest.raises(ValueError):
        labelled.read_channels(tmp_path)


def test_hostile_arrays_are_refused(tmp_path):
    smap(tmp_path)
    file = tmp_path / "test" / "P-1.npy"
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        labelled.read_channels(tmp_path)
    np.save(file, np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="rows, columns"):
        labelled.read_channels(tmp_path)


def test_folders_of_several_archives(tmp_path):
    nab(tmp_path)
    (tmp_path / "1_UCR_Anomaly_x_40_50_59.txt").write_text("\n".join(map(str, range(100))))
    found, notes = labelled.read_labelled([tmp_path])
    assert [series.name for series in found] == ["1_UCR_Anomaly_x_40_50_59", "a"] and not notes
    nab(tmp_path, windows=[(0, 5)])
    found, notes = labelled.read_labelled([tmp_path])
    assert len(found) == 1 and "a.csv.gz: left out" in notes[0]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no labelled series"):
        labelled.read_labelled([tmp_path / "none"])
    with pytest.raises(FileNotFoundError):
        labelled.read_labelled([tmp_path / "absent"])


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path, content):
    path = nab(tmp_path, packed=False)
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        labelled.read_nab(path)


def test_the_first_of_several_anomalies_counts():
    series = anomaly.Labelled("a", np.ones(400), 100, (150, 160), ((300, 310),))
    scores = np.zeros(300)
    scores[[10, 205]] = 3.0, 2.0  # token 0, and token 2 with the second anomaly, rows 292 to 387
    found = anomaly.rank_rows(scores, series)
    assert (found.rank, found.n_tokens) == (1, 4)  # token 0, rows 100 to 195, holds the first one
    scores[10] = 0.0
    assert anomaly.rank_rows(scores, series).rank == 1
    scores[[150, 205]] = 9.0, 2.0  # row 250 has no anomaly
    assert anomaly.rank_rows(scores, series).rank == 2
