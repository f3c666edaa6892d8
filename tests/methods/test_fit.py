import pytest

import ltsm_jax
from ltsm_jax import training
from ltsm_jax.api import fit


def test_fit_keeps_what_validation_prefers(model, pre, series, splits):
    quiet = dict(config=training.TrainConfig(epochs=3, batch_size=64, lr=3e-3), horizon=8, show_progress=False)
    fitted = fit(model, pre, series, method="ff", **quiet)
    assert fitted.kept == "tuned" and fitted.params is fitted.result.params
    assert fitted.difference == pytest.approx(fitted.tuned["mse"] - fitted.zero_shot["mse"])
    assert fitted.interval[0] < fitted.difference < fitted.interval[1] < 0
    assert fitted.result.test is None
    assert "kept the tuned weights" in str(fitted)

    better = fitted.params
    worse = fit(model, better, splits, method="tfs", **(quiet | {"config": training.TrainConfig(epochs=1, lr=1e-6)}))
    assert worse.kept == "zero_shot" and worse.params is better
    assert worse.difference > 0 and "tuning lost" in str(worse)
    anyway = fit(
        model,
        better,
        splits,
        method="tfs",
        keep="tuned",
        **(quiet | {"config": training.TrainConfig(epochs=1, lr=1e-6)}),
    )
    assert anyway.params is anyway.result.params and anyway.kept == "tuned"


def test_fit_reads_tables_and_files(model, pre, series, tmp_path):
    import pandas as pd

    table = pd.DataFrame(series.values.T, columns=list(series.columns)).assign(date=series.timestamps)
    table.to_csv(tmp_path / "waves.csv", index=False)
    quiet = dict(
        method="sff", alpha=0.9, target="b", config=training.TrainConfig(epochs=1, batch_size=64), show_progress=False
    )
    from_table = fit(model, pre, table, **quiet)
    from_file = fit(model, pre, tmp_path / "waves.csv", **quiet)
    assert from_table.splits.columns == from_file.splits.columns == ("b",)
    assert from_table.tuned == from_file.tuned
    assert from_file.splits.val.horizon == model.horizon


def test_fit_is_public():
    assert ltsm_jax.fit is fit


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"method": "ssf"}, "unknown method"),
        ({"keep": "both"}, "keep must be"),
        ({"mode": "own"}, "mode must be one of ims, direct"),
    ],
)
def test_fit_refuses_what_it_does_not_know(model, pre, splits, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit(model, pre, splits, **kwargs)
