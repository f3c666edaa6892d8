"""What the smaller strategies train, add and keep; SAM and averages:
tests/training/test_sam_and_averages.py.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import training, trees
from ltsm_jax.methods import phases
from ltsm_jax.methods.phases import Phase
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.run import run as run_strategy
from ltsm_jax.methods.strategies import Strategy, strategy
from ltsm_jax.models import FAMILIES, parts
from ltsm_jax.tasks.forecasting import Forecasting

CONFIG = training.TrainConfig(epochs=2, batch_size=128, lr=1e-3, schedule="constant")


@pytest.fixture(scope="module")
def tune(model, pre, splits):
    """A quiet run of a strategy."""

    def tune(chosen, **more):
        chosen = chosen if isinstance(chosen, Strategy) else strategy(chosen)
        return run_strategy(
            model, pre, chosen, splits, config=CONFIG, show_progress=False, test=False, **more
        )

    return tune


@pytest.fixture(scope="module")
def tuned(tune):
    """Full fine-tuning, which several of them are compared with."""
    return tune("ff")


def moved(a, b):
    pairs = zip(trees.flatten(a).items(), trees.flatten(b).values(), strict=True)
    return {path for (path, x), y in pairs if (np.asarray(x) != np.asarray(y)).any()}


def chosen_of(phase, name):
    model = FAMILIES[name](FAMILIES[name].small())
    params = jax.eval_shape(model.init, jax.random.key(0))
    mask = phases.trainable_mask(phase, model, params)
    return {path for path, chosen in trees.flatten(mask).items() if chosen}, set(
        trees.flatten(params)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_all_biases_and_scales_of_every_family(name):
    chosen, paths = chosen_of(Phase("norms"), name)
    assert chosen == {path for path in paths if path.rsplit("/", 1)[-1] in ("bias", "scale")}
    assert not any("kernel" in path for path in chosen)
    assert any("norm" in path for path in chosen)


def test_the_last_layers_are_the_last_of_each_stack_and_the_head():
    last, paths = chosen_of(Phase("last"), "timer")
    assert last == {path for path in paths if path.startswith(("layer_1/", "head/"))}
    both, _ = chosen_of(Phase("last", layers=2), "timer")
    assert both - last == {path for path in paths if path.startswith("layer_0/")}
    last, paths = chosen_of(
        Phase("last"), "chronos_bolt"
    )  # an encoder of two layers, a decoder of one
    assert last == {
        path for path in paths if path.startswith(("encoder/layer_1/", "decoder/layer_0/", "head/"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_last_layers_and_can_be_anchored(name):
    model = FAMILIES[name](FAMILIES[name].small())
    chosen, paths = chosen_of(Phase("last"), name)
    assert 0 < len(chosen) < len(paths)
    params = jax.eval_shape(model.init, jax.random.key(0))
    model, params = model.for_series(params, n_variates=2, freq="h", key=jax.random.key(1))
    shapes = {"context": (2, 2, model.context_len), "target": (2, 2, model.horizon)}
    batch = {side: jax.ShapeDtypeStruct(shape, jnp.float32) for side, shape in shapes.items()}
    distance = jax.eval_shape(lambda p, b: phases.anchor_distance(model, p, p, b), params, batch)
    assert distance.shape == ()


def test_layers_stand_in_their_own_order():
    model = FAMILIES["timer"](FAMILIES["timer"].small())
    paths = [f"layer_{i}/up/kernel" for i in (10, 2, 0, 1)]
    assert parts.stacks(model, [*paths, "head/kernel"]) == [
        ("layer_0", "layer_1", "layer_2", "layer_10")
    ]
    ttm = FAMILIES["ttm"](FAMILIES["ttm"].small())
    found = parts.stacks(ttm, trees.flatten(jax.eval_shape(ttm.init, jax.random.key(0))))
    assert sorted(found) == [
        ("decoder/mixers/layer_0",),
        ("encoder/block_0_layer_0", "encoder/block_1_layer_0"),
    ]


def test_partial_unfreezing_moves_what_it_says(tune, pre):
    found = tune("norms")
    assert moved(found.params, pre) == {
        p for p in trees.flatten(pre) if p.endswith(("/bias", "/scale"))
    }
    assert found.trained == sum(
        leaf.size for p, leaf in trees.flatten(pre).items() if p.endswith(("bias", "scale"))
    )


@pytest.mark.slow
def test_the_stronger_the_anchor_the_closer_the_forecasts_stay(model, pre, splits, tune, tuned):
    context = splits.val.gather(jnp.arange(64))["context"]

    def away(params):
        return float(
            jnp.square(
                model.predict(params, context, 8).point - model.predict(pre, context, 8).point
            ).mean()
        )

    free, weak, strong = (
        away(r.params)
        for r in (tuned, tune("anchor"), tune(Strategy("a", phases=(Phase(anchor=50.0),))))
    )
    assert strong < weak < free
    assert strong < free / 5


def test_the_anchor_is_the_squared_distance_of_forecasts(model, pre, splits):
    batch = dict(splits.val.gather(jnp.arange(16))) | {"weight": jnp.ones(16).at[-4:].set(0.0)}
    other = model.init(jax.random.key(1))
    points = [model.predict(params, batch["context"], 8).point[:12] for params in (other, pre)]
    want = np.square(np.subtract(*points)).mean()
    found = phases.anchor_distance(
        model, other, pre, batch | {"target": jnp.full_like(batch["target"], jnp.nan)}
    )
    np.testing.assert_allclose(found, want, rtol=1e-5)  # what really came plays no part
    assert float(phases.anchor_distance(model, pre, pre, batch)) == 0.0

    loss = phases.with_anchor(model.loss, model, pre, 0.5)
    key = jax.random.key(3)
    np.testing.assert_allclose(
        loss(other, batch, key, True), model.loss(other, batch, key, True) + 0.5 * want, rtol=1e-5
    )
    with pytest.raises(ValueError, match="for training on a context and its future"):
        phases.anchor_distance(model, pre, pre, {"context": batch["context"]})


def test_equal_models_share_the_compilation_of_an_anchored_loss(model, pre, splits):
    again = type(model)(model.config)
    jobs = [
        Running(m, pre, strategy("anchor"), splits, config=CONFIG, task=Forecasting()).job()
        for m in (model, again)
    ]
    assert len({job["loss_fn"].func for job in jobs}) == 1


def test_mixout_replaces_weights_and_keeps_their_mean():
    key, p = jax.random.key(0), 0.25
    w = {"a": jnp.linspace(1.0, 2.0, 4000).reshape(40, 100), "b": jnp.ones(3)}
    u = {"a": jnp.full((40, 100), 0.5), "b": jnp.ones(3)}
    mixed = phases.mix_out(w, u, p, key)
    replaced = np.asarray(mixed["a"]) == 0.5
    assert abs(replaced.mean() - p) < 0.03
    # by the paper's formula: (m u + (1 - m) w - p u) / (1 - p)
    want = (replaced * 0.5 + ~replaced * np.asarray(w["a"]) - p * 0.5) / (1 - p)
    np.testing.assert_allclose(mixed["a"], want, rtol=1e-6)
    np.testing.assert_array_equal(mixed["b"], w["b"])  # frozen weights: bit for bit
    many = jax.vmap(lambda k: phases.mix_out(w, u, p, k)["a"].mean())(jax.random.split(key, 64))
    np.testing.assert_allclose(many.mean(), w["a"].mean(), rtol=2e-3)


def test_mixout_has_gradients_at_the_checkpoint_and_draws_anew_each_step():
    w = {"a": jnp.ones(400)}

    def total(params, batch, key, train):
        return params["a"].sum()

    loss = phases.mixed_out(total, w, 0.5)
    one, two = (jax.grad(loss)(w, {}, jax.random.key(seed), True)["a"] for seed in (0, 1))
    assert set(np.unique(one)) == {0.0, 2.0}  # replaced, or 1 / (1 - p)
    assert (one != two).any()
    np.testing.assert_array_equal(
        jax.grad(loss)(w, {}, jax.random.key(0), False)["a"], jnp.ones(400)
    )  # a validation


@pytest.mark.slow
def test_mixout_tunes_the_same_weights_by_another_loss(tune, tuned, pre):
    found = tune("mixout")
    assert found.history[0]["train_loss"] != tuned.history[0]["train_loss"]
    assert moved(found.params, pre) == moved(tuned.params, pre)


def test_wise_ft_keeps_the_mix_that_validates_best(tune, tuned, model, pre, splits):
    found = tune(Strategy("wise_ft", wise=(0.0, 0.5, 1.0)))
    assert list(found.mixes) == [1.0, 0.5, 0.0]
    assert found.mixes[1.0] == tuned.val
    assert found.mixes[0.0] == Forecasting().evaluate(model, pre, splits, "val")
    best = min(found.mixes, key=lambda weight: found.mixes[weight]["mse"])
    assert found.weight == best and found.val == found.mixes[best]
    want = tuned.params if best == 1 else trees.wise_ft(pre, tuned.params, best)
    assert not moved(found.params, want)
    assert found.history == tuned.history


@pytest.mark.slow
def test_wise_ft_takes_the_checkpoint_where_tuning_does_harm(model, pre, splits):
    harmful = training.TrainConfig(epochs=1, batch_size=128, lr=0.5, schedule="constant")
    found = run_strategy(
        model, pre, strategy("wise_ft"), splits, config=harmful, show_progress=False, test=False
    )
    assert found.weight is not None and found.weight < 1
    assert found.val["mse"] < found.mixes[1.0]["mse"]


def test_phases_say_how_to_train(model, pre, splits):
    def config_of(name, **options):
        return Running(model, pre, strategy(name, **options), splits, config=CONFIG).job()["config"]

    assert config_of("sam", rho=0.1).rho == 0.1
    assert config_of("ema", decay=0.9).ema == 0.9
    swa = config_of("swa", share=0.25)
    assert (swa.swa, swa.schedule) == (0.25, "constant")
    assert config_of("ff") == Running(model, pre, strategy("ff"), splits, config=CONFIG).config


def test_folders_of_earlier_versions_know_none_of_the_new_fields():
    record = strategy("l2sp").record()
    assert record["phases"] == [
        {"trainable": "all", "epochs": None, "lr": None, "l2_sp": 0.1, "lora": None}
    ]
    assert set(record) == {"name", "start", "phases", "reinit_head"}
    assert strategy("sff").record()["start"] == {"alpha": 0.7}
    assert strategy("sam").record()["phases"][0]["rho"] == 0.05
    assert len(strategy("wise_ft").record()["wise"]) == 11


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: strategy("sam", rho=0.0), "rho of SAM must be positive"),
        (lambda: strategy("ema", decay=1.0), "decay of the average"),
        (lambda: strategy("last_k", layers=0), "at least 1 layer"),
        (lambda: Phase(mixout=1.0), "Mixout lies in"),
        (lambda: Phase(cast(Any, "norm")), "one of all, head, norms, last, scales, recipe"),
        (lambda: Strategy("mine", wise=(1.5,)), "between 0 and 1; got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
