import numpy as np
import pandas as pd

from experiments import demo, sff
from ltsm_jax.data.tables import read_series


def test_generated_series_is_regular_and_long_enough(tmp_path):
    series = read_series(demo.generated(tmp_path))
    assert series.freq == "h" and series.columns == ("north", "south", "east")
    assert series.n_rows * 0.1 > 672 + 96  # every part holds whole windows
    again = read_series(demo.generated(tmp_path / "again"))
    np.testing.assert_array_equal(series.values, again.values)


def test_without_data_it_says_so_loudly_and_goes_on(tmp_path, monkeypatch, capsys):
    def offline(name, **kwargs):
        raise FileNotFoundError("ETTh1 is nowhere")

    asked = []
    monkeypatch.setattr(demo, "load_series", offline)
    monkeypatch.setattr(sff, "main", lambda argv: asked.append(argv) or 0)
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert "NO REAL DATA" in capsys.readouterr().out
    data = asked[0][asked[0].index("--data") + 1]
    assert data == str(tmp_path / "generated.csv") and len(pd.read_csv(data)) == 17520
    assert sff.parse(asked[0]).methods == ("zero_shot", "tfs", "ff", "sff")


def test_with_data_it_takes_them(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "load_series", lambda name, **kwargs: None)
    monkeypatch.setattr(sff, "main", lambda argv: asked.append(argv) or 1)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert asked[0][asked[0].index("--data") + 1] == "ETTh1"
    assert "NO REAL DATA" not in capsys.readouterr().out


def test_a_plan_says_nothing_of_pictures_that_nobody_drew(tmp_path, monkeypatch, capsys):
    """matplotlib is there: a plan must not say that it is missing."""
    asked = []
    monkeypatch.setattr(demo, "load_series", lambda name, **kwargs: None)
    monkeypatch.setattr(sff, "main", lambda argv: asked.append(argv) or 0)
    assert demo.main(["--out", str(tmp_path), "--plan"]) == 0
    assert "--plan" in asked[0] and "picture" not in capsys.readouterr().out
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert f"picture: {tmp_path / 'ETTh1' / 'plots' / 'forecasts.png'}" in capsys.readouterr().out
