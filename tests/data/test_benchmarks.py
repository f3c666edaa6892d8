"""Benchmark files by name: where they are looked for, what is checked, and downloads from a server
of our own.
"""

import dataclasses
import gzip
import hashlib
import http.server
import io
import threading
from typing import ClassVar

import numpy as np
import pytest

from ltsm_jax.data import benchmarks
from ltsm_jax.data.benchmarks import (
    BENCHMARKS,
    MissingDataError,
    benchmark_named,
    load_series,
    locate,
)
from ltsm_jax.data.series import DataError
from ltsm_jax.data.splits import prepare


def csv_bytes(n_rows=17420, n_variates=7, seed=0):
    """A file of the form of ETTh1 with made-up values; stamps of one hour."""
    stamps = np.datetime64("2016-07-01") + np.arange(n_rows) * np.timedelta64(1, "h")
    values = np.random.default_rng(seed).integers(0, 100, (n_rows, n_variates))
    lines = [",".join(["date", *(f"v{c}" for c in range(n_variates))])]
    lines += [
        f"{str(t).replace('T', ' ')}:00:00,{','.join(map(str, row))}"
        for t, row in zip(stamps, values, strict=True)
    ]
    return ("\n".join(lines) + "\n").encode()


MADE_UP = csv_bytes()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """$LTSM_DATA, with an empty cache beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("LTSM_DATA", str(folder))
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cache(own, tmp_path):
    folder = tmp_path / "cache" / "data"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine; `files` maps paths to bytes, `cut` paths end early, `hits`
    counts requests.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        files: ClassVar[dict[str, bytes]] = {}
        cut: ClassVar[set[str]] = set()
        hits: ClassVar[list[str]] = []

        def do_GET(self):
            self.hits.append(self.path)
            if self.path not in self.files:
                self.send_error(404)
                return
            body = self.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path in self.cut else body)

        def log_message(self, *args):
            pass

    Handler.files, Handler.cut, Handler.hits = {}, set(), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        Handler.url = f"http://127.0.0.1:{listening.server_port}"
        yield Handler
        listening.shutdown()


@pytest.fixture
def publish(server, monkeypatch):
    """Makes the server the public place of a benchmark, with these bytes as the published ones."""

    def _publish(name, body, path=None, digest=None):
        benchmark = BENCHMARKS[name]
        path = path or f"/{benchmark.file}"
        plain = gzip.decompress(body) if path.endswith(".gz") else body
        digest = digest or f"sha256:{hashlib.sha256(plain).hexdigest()}"
        changed = dataclasses.replace(benchmark, url=server.url + path, digest=digest)
        server.files[path] = body
        for alias, known in list(benchmarks._BY_ALIAS.items()):
            if known is benchmark:
                monkeypatch.setitem(benchmarks._BY_ALIAS, alias, changed)
        return changed

    return _publish


# ---- the table
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alias, name",
    [
        ("etth1", "ETTh1"),
        ("ETTM2", "ETTm2"),
        ("ecl", "electricity"),
        ("ILI", "national_illness"),
        ("Exchange", "exchange_rate"),
        ("exchange_rate", "exchange_rate"),
        ("Weather", "weather"),
        ("solar_AL", "solar"),
        ("pems08", "PEMS08"),
        ("solar_12", "solar_12"),
        ("traffic_6", "traffic_6"),
    ],
)
def test_names_and_aliases(alias, name):
    benchmark = benchmark_named(alias)
    assert benchmark is not None
    assert benchmark.name == name


def test_every_entry_is_whole():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        algorithm, digest = benchmark.digest.split(":")
        assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16}[algorithm]
        assert benchmark.url.startswith("https://")
        assert benchmark.url.endswith((".csv", ".txt.gz", ".npz"))
    assert benchmark_named("my_data") is None


# ---- found here
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["ETTh1.csv", "ETTh1.csv.gz", "ETT-small/ETTh1.csv", "ett/etth1.CSV", "x/ETTh1.csv.gz"]
)
def test_a_benchmark_is_found_in_the_data_folder(own, publish, place):
    publish("ETTh1", MADE_UP)
    path = own / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(MADE_UP) if place.endswith(".gz") else MADE_UP)
    series = load_series("ETTh1")
    assert (series.name, series.benchmark, series.freq, series.season) == (
        "ETTh1",
        "ETTh1",
        "h",
        24,
    )
    assert series.values.shape == (7, 17420)
    assert series.notes == ()
    assert load_series(path).benchmark == "ETTh1"
    assert prepare(series, 672, 96).borders.test == (11520, 14400)


def test_line_ends_do_not_matter(own, publish):
    publish("ETTh1", MADE_UP.replace(b"\n", b"\r\n"))
    (own / "ETTh1.csv").write_bytes(MADE_UP)
    assert load_series("ETTh1").notes == ()


def test_the_nearer_and_published_name_comes_first(own, publish):
    publish("electricity", b"")
    for place in ("sub/electricity.csv", "ECL.csv", "electricity.csv.gz", "electricity.csv"):
        path = own / place
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = []
    while (here := [p for p in own.rglob("*") if p.is_file()]) and here:
        path, cached = locate(benchmark_named("ECL"), download=False)
        assert not cached
        found.append(str(path.relative_to(own)))
        path.unlink()
    assert found == ["electricity.csv", "ECL.csv", "electricity.csv.gz", "sub/electricity.csv"]


def test_another_file_of_that_name_is_used_with_a_warning(own, publish, caplog):
    publish("ETTh1", MADE_UP)
    other = csv_bytes(seed=1)
    (own / "ETTh1.csv").write_bytes(other)
    series = load_series("ETTh1")
    assert series.benchmark == "ETTh1"
    for digest in (hashlib.sha256(other).hexdigest(), hashlib.sha256(MADE_UP).hexdigest()):
        assert digest in series.notes[0]
        assert digest in caplog.text
    plain = load_series(own / "ETTh1.csv", as_benchmark=False)
    assert (plain.name, plain.benchmark, plain.notes) == ("ETTh1", None, ())
    assert prepare(plain, 672, 96).borders.train == (0, 12194)


def test_rows_of_a_benchmark_are_read_as_they_are(own, publish):
    lines = MADE_UP.decode().splitlines()
    body = "\n".join(lines[:100] + lines[99:200] + lines[250:]).encode()  # a stamp twice, a gap
    publish("ETTh1", body)
    (own / "ETTh1.csv").write_bytes(body)
    assert load_series("ETTh1").n_rows == len(body.splitlines()) - 1
    with pytest.raises(DataError, match="stamps repeated"):
        load_series(own / "ETTh1.csv", as_benchmark=False)
    with pytest.raises(DataError, match="stamps repeated"):
        load_series("ETTh1", irregular="error")


def test_what_is_wrong_inside_is_still_said(own):
    (own / "weather.csv").write_text("date,T\n2020-01-01,1\n2020-01-02,oops\n")
    with pytest.raises(DataError, match="row 1 'oops'"):
        load_series("weather")
    (own / "ETTh2.csv").write_text("date,HUFL,OT\n2020-01-01,1,2\n")
    with pytest.raises(DataError, match="did you mean 'HUFL'"):
        load_series("ETTh2", target="hufl")


def test_solar_has_neither_stamps_nor_header(own, publish):
    publish("solar", b"0,1\n2,3\n")
    (own / "solar_AL.txt").write_bytes(b"0,1\n2,3\n")
    series = load_series("solar")
    np.testing.assert_array_equal(series.values, [[0, 2], [1, 3]])
    assert (series.timestamps, series.freq, series.season) == (None, "10min", 144)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_pems_takes_feature_0_of_data(own, publish):
    data = np.arange(24.0).reshape(4, 2, 3)
    body = npz(data=data)
    publish("PEMS08", body)
    (own / "PEMS08.npz").write_bytes(body)
    series = load_series("PEMS08")
    np.testing.assert_array_equal(series.values, data[:, :, 0].T)
    assert (series.columns, series.timestamps, series.freq) == (("0", "1"), None, "5min")
    for broken in (b"no zip", npz(other=data), body[:-30], npz(data=np.array([{}], object))):
        (own / "PEMS08.npz").write_bytes(broken)
        with pytest.raises(DataError, match=r"PEMS08\.npz: .*array `data`"):
            load_series("PEMS08")
    (own / "PEMS08.npz").write_bytes(npz(data=np.arange(4)))
    with pytest.raises(DataError, match="not numbers"):
        load_series("PEMS08")


def test_a_path_that_is_not_there(own, tmp_path):
    with pytest.raises(
        MissingDataError, match=r"no data file at .*mine\.csv; benchmarks by name: ETTh1, ETTh2"
    ) as error:
        load_series(tmp_path / "mine.csv")
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, FileNotFoundError)
    with pytest.raises(MissingDataError, match="did you mean etth1"):
        load_series("ETTh11")


# ---- fetched
# --------------------------------------------------------------------------------------------------


def test_a_download_is_checked_kept_and_used_again(own, cache, publish, server):
    publish("ETTh1", MADE_UP)
    series = load_series("ETTh1")
    assert series.values.shape == (7, 17420)
    assert [p.name for p in cache.iterdir()] == ["ETTh1.csv"]
    assert (cache / "ETTh1.csv").read_bytes() == MADE_UP
    np.testing.assert_array_equal(load_series("etth1").values, series.values)
    assert server.hits == ["/ETTh1.csv"]


def test_a_zipped_download_is_checked_unzipped(own, cache, publish):
    publish("solar", gzip.compress(b"0,1\n2,3\n"), path="/solar_AL.txt.gz")
    np.testing.assert_array_equal(load_series("solar").values, [[0, 2], [1, 3]])
    assert [p.name for p in cache.iterdir()] == ["solar_AL.txt.gz"]
    load_series("solar", download=False)


def test_a_download_of_other_bytes_is_refused_and_not_kept(own, cache, publish):
    publish("ETTh1", MADE_UP, digest="sha256:" + "0" * 64)
    with pytest.raises(DataError) as error:
        load_series("ETTh1")
    assert hashlib.sha256(MADE_UP).hexdigest() in str(error.value)
    assert "0" * 64 in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_damaged_file_of_the_cache_is_refused(own, cache, publish):
    publish("ETTh1", MADE_UP)
    (cache / "ETTh1.csv").write_bytes(MADE_UP[:-100])
    with pytest.raises(DataError, match=r"ETTh1\.csv is damaged .*delete it"):
        load_series("ETTh1")


@pytest.mark.parametrize("trouble", ["404", "cut", "refused"])
def test_a_failed_download_lists_every_place(own, cache, publish, server, trouble):
    benchmark = publish("ETTh1", MADE_UP)
    if trouble == "404":
        server.files.clear()
    elif trouble == "cut":
        server.cut.add("/ETTh1.csv")
    else:
        benchmark = dataclasses.replace(benchmark, url="http://127.0.0.1:1/ETTh1.csv")
    with pytest.raises(MissingDataError) as error:
        locate(benchmark)
    text = str(error.value)
    for part in (str(own), str(cache), benchmark.url, "Put ETTh1.csv (or ETTh1.csv.gz) into"):
        assert part in text
    assert {"404": "Not Found", "cut": f"of {len(MADE_UP)} bytes", "refused": "refused"}[
        trouble
    ] in text
    assert list(cache.iterdir()) == []


def test_places_that_do_not_exist_are_said(own, monkeypatch, server):
    monkeypatch.delenv("LTSM_DATA")
    with pytest.raises(
        MissingDataError,
        match=r"\$LTSM_DATA: not set(.|\n)*not asked for(.|\n)*set LTSM_DATA to that folder",
    ):
        load_series("ETTh2", download=False)
    monkeypatch.setenv("LTSM_DATA", str(own / "nowhere"))
    with pytest.raises(MissingDataError, match=r"nowhere nor one folder below \(no folder\)"):
        load_series("ETTh2", download=False)
    assert server.hits == []


def test_an_unknown_digest_is_said(own, cache, publish, caplog):
    benchmark = dataclasses.replace(publish("ETTh1", MADE_UP), digest=None)
    assert locate(benchmark) == (cache / "ETTh1.csv", True)
    assert "unverified" in caplog.text


def test_a_slow_download_shows_itself(own, cache, publish, monkeypatch, capsys):
    benchmark = publish("ETTh1", MADE_UP)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(benchmarks.time, "monotonic", lambda: next(clock))
    locate(benchmark)
    assert "downloading http://127.0.0.1" in capsys.readouterr().err.replace("\n", "")
