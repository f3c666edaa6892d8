"""Trains every family of the command line on several meshes of 8 forced CPU devices; prints JSON.
Run by test_sharding.

python sharded_runs.py family mesh[:option=value...] ...

"one" is one device without a mesh; "scored:mesh:mesh" prunes over these meshes; "noise", "experts",
"evaluated", "measured", "adapted", "pruned", "surfaced": see the functions of these names.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import curvature, hosts, landscape, sharding, training, trees
from ltsm_jax.data import Series, prepare
from ltsm_jax.data.windows import windows_between
from ltsm_jax.layers import experts
from ltsm_jax.layers.dims import ExpertDims, HeadDims, equal_layers
from ltsm_jax.layers.masks import place
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.methods import binding, pruning, redundancy, removal
from ltsm_jax.methods.pruning import schedule
from ltsm_jax.methods.run import run as run_strategy
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models import FAMILIES
from ltsm_jax.models.time_moe import TimeMoe, TimeMoeLayer
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks import forecasting
from ltsm_jax.training import TrainConfig, fit, loop, step

jax.config.update("jax_default_matmul_precision", "highest")


@functools.cache
def problem(family):
    """Model, random parameters and windows of a family at its small size."""
    cls = FAMILIES[family]
    model = cls(cls.small())
    params = jax.jit(model.init)(jax.random.key(0))
    length = model.context_len + model.horizon + 40
    t = np.arange(length)
    noise = np.random.default_rng(0).normal(size=(2, length))
    values = np.sin(2 * np.pi * t / 12 + np.arange(2)[:, None]) + 0.1 * noise
    joint = model.variates == "joint"
    return (
        model,
        params,
        windows_between(values, 0, length, model.context_len, model.horizon, joint=joint),
    )


def gradients(model):
    return jax.jit(jax.grad(lambda p, b: model.loss(p, b)))


def noise(family, draws=8):
    """How far each gradient [parameters] moves, at most, on one device when every parameter moves
    to one of the two float32 beside it: what the rounding of other sums, as of other devices, can
    do to it as well.
    """
    model, params, windows = problem(family)
    of, batch = gradients(model), windows.gather(jnp.arange(16))

    def beside(leaf, rng):
        leaf = np.asarray(leaf)
        return np.where(
            rng.random(leaf.shape) < 0.5, np.nextafter(leaf, -np.inf), np.nextafter(leaf, np.inf)
        )

    here, furthest = trees.flatten(of(params, batch)), {}
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        there = trees.flatten(
            of(jax.tree.map(lambda leaf, rng=rng: beside(leaf, rng), params), batch)
        )
        for path, leaf in there.items():
            furthest[path] = max(furthest.get(path, 0.0), float(np.abs(leaf - here[path]).max()))
    return furthest


def expert_layers(family):
    """A mixture of experts with gradients on meshes and on one device: by form and mesh, the
    largest difference, and whether a device holds an array as long as the rows (token, choice) of
    all devices together.
    """
    del family
    t, d, f, e, k = 512, 8, 12, 4, 2
    keys = jax.random.split(jax.random.key(0), 6)
    into, out = (e, d, f), (e, f, d)
    kernels = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, (into, into, out)))
    x, logits, wanted = (jax.random.normal(key, (t, n)) for key, n in zip(keys[3:], (d, e, d)))

    def loss(x, kernels, mesh, form):
        weight, chosen, _ = experts.route(logits, k)
        runtime = Runtime(placement=Placement(mesh))
        y = experts.mixture(x, kernels, weight, chosen, jax.nn.silu, form=form, runtime=runtime)
        return jnp.square(y - wanted).sum()

    def compiled(mesh, form):
        rows, split = None, (None, None, None)
        if mesh is not None:
            rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
            axes = ((None, "fsdp", "tensor"), (None, "fsdp", "tensor"), (None, "tensor", "fsdp"))
            split = tuple(
                jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*a)) for a in axes
            )
        f = jax.jit(
            lambda x, kernels: jax.value_and_grad(loss, (0, 1))(x, kernels, mesh, form),
            in_shardings=(rows, split),
        )
        made = f.lower(x, kernels).compile()
        return jax.tree.leaves(
            made(*jax.device_put((x, kernels), (rows, split)) if mesh else (x, kernels))
        ), made.as_text()

    found = {}
    for form in ("blocks", "ragged"):
        want, _ = compiled(None, form)
        for text in ("data=8", "data=2,fsdp=2,tensor=2"):
            got, program = compiled(sharding.make_mesh(text), form)
            gaps = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want)]
            found[f"{form} {text}"] = {
                "gap": max(gaps),
                "all_rows": f"[{t * k}" in program or f",{t * k}" in program,
            }
    return found


def evaluated(family):
    """MSE of the forecasts of a family by mesh, "one" without."""
    model, params, windows = problem(family)
    found = {"one": forecasting.evaluate(model, params, windows, batch_size=16)["mse"]}
    for text in ("data=8", "data=2,fsdp=2,tensor=2"):
        placed, _ = sharding.shard(params, model.shard_rules, sharding.make_mesh(text))
        found[text] = forecasting.evaluate(model, placed, windows, batch_size=16)["mse"]
    return found


def numbers(tree):
    return {
        path: np.asarray(leaf, np.float64).tolist() for path, leaf in trees.flatten(tree).items()
    }


def layouts(tree):
    """Of every leaf, the mesh axes that its axes are split by."""
    return {path: list(sharding.axes_of(leaf)) for path, leaf in trees.flatten(tree).items()}


def one_layer(family):
    """A model of one layer, its parameters, and splits of 60 windows or so; the compiler is told to
    be quick.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    if family == "timer":
        model = Timer(TimerConfig(8, 16, 8, equal_layers(1, 2, 8, 24), context_len=32, horizon=8))
    else:
        config = dataclasses.replace(
            TimeMoe.small(),
            layers=(TimeMoeLayer(HeadDims.of(2, 8, kv_heads=2), ExpertDims((0, 1, 2, 3), 6), 8),),
            horizons=(1, 4),
            context_len=16,
        )
        model = TimeMoe(config)
    t = np.arange(160)
    values = np.sin(t / 3) + 0.3 * np.random.default_rng(0).normal(size=(1, 160))
    splits = prepare(Series("waves", values, ("a",), None, "h"), model.context_len, model.horizon)
    return model, jax.tree.map(lambda x: 2 * x, model.init(jax.random.key(0))), splits


def scored(family, *meshes):
    """Pruning by mesh, "one" without: sums over the rows of its first batch and how these lie,
    compilations, the end of the run; what of the model is left, and how that and masks and masked
    weights lie; and of "stopped" the end of a run that began on the first mesh and, after SIGTERM
    in the middle of a group, went on with one device.
    """
    model, params, splits = one_layer(family)
    config = pruning.PruneConfig(
        ratio=0.3,
        ema=0.5,
        epochs=1,
        batch_size=10,
        macro_batch=20,
        chunk=5,
        average_expert_score=family == "time_moe",
        ratios=(0.5,),
    )
    options = {"config": config, "show_progress": False}
    real, first = schedule._batch_sums, []

    def watched(*args, **options):
        first.append(real(*args, **options))
        if len(first) == stop:
            hosts._stop.set()  # as the handler does
        return first[-1]

    def end(result):
        return {
            "masks": numbers(result.masks),
            "scores": numbers(result.scores),
            "history": result.history,
            "cut": result.cuts[0.5]["mse"],
        }

    schedule._batch_sums, stop, found = watched, None, {}
    for text in ("one", *meshes):
        placed = (
            params
            if text == "one"
            else sharding.shard(params, model.shard_rules, sharding.make_mesh(text))[0]
        )
        compiled = real._cache_size()
        first.clear()
        result = pruning.prune(model, placed, splits, **options)
        found[text] = end(result) | {
            "sums": numbers(first[0]),
            "compiled": real._cache_size() - compiled,
        }
        found[text] |= {"batches": len(first)}
        found[text] |= {
            "whole": all(leaf.is_fully_replicated for leaf in jax.tree.leaves(first[0]))
        }
        small, left, _ = removal.remove(model, placed, result.masks)
        found[text] |= {"left": numbers(left)}
        if text != "one":
            by_rules, _ = sharding.shard(
                left, small.shard_rules, sharding.Placement.of(placed).mesh
            )
            found[text] |= {"as ruled": layouts(left) == layouts(by_rules)}
            found[text] |= {"as before": layouts(result.pruned) == layouts(placed)}
            found[text] |= {"masks lie": layouts(place(result.masks, placed))}
            bias, _ = sharding.shard(
                {"up": {"bias": jnp.ones(8)}},
                ((".", ("tensor",)),),
                sharding.Placement.of(placed).mesh,
            )
            alone = place({"up": {"in": np.ones(0), "out": np.ones(8)}}, bias | {"whole": placed})
            found[text] |= {"without a kernel": layouts(alone)}
    mesh = sharding.make_mesh(meshes[0])
    placed, first[:], stop = sharding.shard(params, model.shard_rules, mesh)[0], [], 3
    with tempfile.TemporaryDirectory() as folder:
        try:
            with hosts.session():
                pruning.prune(model, placed, splits, folder=folder, **options)
        except hosts.Stopped as err:
            found["said"] = str(err)
        found["stopped"] = end(pruning.prune(model, params, splits, folder=folder, **options))
        found["batches"] = len(first)
    if meshes[0] == "data=8":
        masks, batch = place(pruning.full_masks(model), placed), splits.train.gather(jnp.arange(16))

        def sums_of(p, m, b, where):
            return pruning.gradient_sums(model.loss, p, m, b, placement=where)

        sums = jax.jit(sums_of, static_argnums=3)
        many, one = (
            sums.lower(*x).compile()
            for x in ((placed, masks, batch, Placement(mesh)), (params, masks, batch, Placement()))
        )
        found["share"] = many.cost_analysis()["flops"] / one.cost_analysis()["flops"]
        found["gathers"] = "all-gather" in many.as_text()
    return found


def measured(family):
    """What is measured of a model and taken out of it, by mesh: statistics, use of experts, a model
    with fewer.
    """
    model, params, splits = one_layer(family)
    found = {}
    for text in ("one", "data=8", "data=2,fsdp=2,tensor=2"):
        placed = (
            params
            if text == "one"
            else sharding.shard(params, model.shard_rules, sharding.make_mesh(text))[0]
        )
        parts = splits.train.take(np.arange(20)), splits.val
        statistics = redundancy.measure(model, placed, *parts, batch_size=16, show_progress=False)
        found[text] = {
            "statistics": numbers(vars(statistics.heads["layer_0/attn"]) | {"linear": 0})
        }
        if family == "time_moe":
            usage = pruning.expert_usage(model, placed, parts, horizon=6, batch_size=9)
            fewer, cut = pruning.keep_experts(model, placed, dict.fromkeys(usage, (0, 2)))
            found[text] |= {"usage": numbers(usage), "cut": numbers(cut)}
            if text != "one":
                by_rules, _ = sharding.shard(
                    cut, fewer.shard_rules, sharding.Placement.of(placed).mesh
                )
                found[text] |= {"lie": layouts(cut), "ruled": layouts(by_rules)}
            found[text]["mse"] = forecasting.evaluate(fewer, cut, splits.val)["mse"]
    return found


def adapted(family):
    """By mesh, "one" without: final weights of a model fine-tuned by adapters, how these and their
    moments lie, and how the weights do before and after.
    """
    model, params, splits = one_layer(family)
    moves = lambda state: hasattr(state, "mu")  # noqa: E731
    config, found = (
        binding.train_config(model, epochs=2, batch_size=16, lr=1e-2, schedule="constant"),
        {},
    )
    for text in ("one", "data=2,fsdp=2,tensor=2"):
        placed = (
            params
            if text == "one"
            else sharding.shard(params, model.shard_rules, sharding.make_mesh(text))[0]
        )
        states = []
        begin = loop.Fitting.start
        loop.Fitting.start = lambda self, *args: (begin(self, *args), states.append(self.state))[0]  # noqa: B023
        result = run_strategy(
            model, placed, strategy("lora"), splits, config=config, show_progress=False
        )
        loop.Fitting.start = begin
        found[text] = {
            "params": numbers(result.params),
            "history": result.history,
            "trained": result.trained,
        }
        if text != "one":
            adapters = states[0]["params"]["adapters"]
            adam = next(
                s for s in jax.tree.leaves(states[0]["optimizer"], is_leaf=moves) if moves(s)
            )
            moments = adam.mu["adapters"]
            found[text] |= {"lie": layouts(adapters), "moments": layouts(moments)}
            found[text] |= {"before": layouts(placed), "after": layouts(result.params)}
    return found


def pruned(family):
    """By mesh, "one" without: test MSE and final weights of a pruned model, fine-tuned with its
    masks and with the dead parts taken out, and into how many parts its most divided parameter is
    split.
    """
    model, params, _ = problem(family)
    length = 4 * (model.context_len + model.horizon)
    t = np.arange(length)
    values = np.sin(2 * np.pi * t / 12 + np.arange(2)[:, None]) + 0.1 * np.random.default_rng(
        0
    ).normal(size=(2, length))
    splits = prepare(
        Series("waves", values, ("a", "b"), None, "h"), model.context_len, model.horizon
    )
    config = binding.train_config(model, epochs=1, batch_size=16, lr=1e-3, schedule="constant")
    masks = trees.flatten(pruning.full_masks(model))
    dead = lambda m, e: np.asarray(m) * (np.arange(m.shape[-1]) % e > 0)  # noqa: E731
    masks |= {p: dead(m, 3) for p, m in masks.items() if p.endswith(("/up/out", "/gate/out"))}
    masks |= {p: dead(m, 2) for p, m in masks.items() if p.endswith("/q/in")}
    masks = trees.unflatten(masks)
    small, small_params, rest = removal.remove(model, params, masks)
    found = {}

    def watched(lie, *, loss_fn, **others):
        assert lie == (layouts(loss_fn.args[1]) if lie else []), (
            "masks lie elsewhere than their weights"
        )
        return fit(loss_fn=loss_fn, **others)

    for text in ("one", "data=2,fsdp=2,tensor=2"):
        mesh = None if text == "one" else sharding.make_mesh(text)
        for kind, m, p, k in (
            ("masked", model, params, masks),
            ("removed", small, small_params, rest),
        ):
            p = p if mesh is None else sharding.shard(p, m.shard_rules, mesh)[0]
            lie = [] if mesh is None else layouts(place(k, p))
            training.fit = functools.partial(watched, lie)
            result = run_strategy(
                m, p, strategy("ff"), splits, config=config, masks=k, show_progress=False
            )
            training.fit = fit
            flat = trees.flatten(result.params)
            found[f"{kind} {text}"] = {
                "mse": result.test["mse"],
                "params": {
                    path: np.asarray(leaf, np.float64).ravel().tolist()
                    for path, leaf in flat.items()
                },
                "split": max(
                    leaf.size // leaf.addressable_shards[0].data.size for leaf in flat.values()
                ),
            }
    return found | {"sizes": [trees.count(params), trees.count(small_params)]}


def surfaced(family):
    """By mesh, "one" without: the loss on a plane, its top eigenvalue and trace, and among how many
    devices the points were split.
    """
    model, params, windows = problem(family)
    directions, found = landscape.random_directions(params, seed=0), {}
    for text in ("one", "data=8", "data=2,fsdp=2,tensor=2"):
        placed, beside = params, directions
        if text != "one":
            mesh = sharding.make_mesh(text)
            placed, *beside = (
                sharding.shard(tree, model.shard_rules, mesh)[0] for tree in (params, *directions)
            )
            again = list(landscape.random_directions(placed, seed=0))
            same = jax.tree.map(lambda a, b: a.sharding == b.sharding, again, beside)
            assert all(jax.tree.leaves(same)), "directions lie as their parameters"
        rows = landscape.split_loss(model, windows, sample=16, placement=Placement.of(placed))
        loss = landscape.split_loss(model, windows, sample=16) if text == "data=8" else rows
        spread = landscape.grid._spread_over(Placement.of(placed), placed, loss)
        found[text] = {
            "loss": landscape.surface(loss, placed, beside, points=5).loss.tolist(),
            "top": curvature.top_eigenvalues(rows, placed, steps=8, tolerance=0.0).tolist(),
            "trace": curvature.trace(rows, placed, samples=6),
            "points over": 1 if spread is None else spread.size,
        }
    return found


def run(family, mesh_text, folder=None, **options):
    model, params, windows = problem(family)
    windows = windows.take(np.arange(min(windows.n, 40)))  # the last batch of 16 is partial
    mesh = None if mesh_text == "one" else sharding.make_mesh(mesh_text)
    notes = ()
    if mesh is not None:
        params, notes = sharding.shard(params, model.shard_rules, mesh)
    start = (
        {path: str(leaf.sharding.spec) for path, leaf in trees.flatten(params).items()}
        if mesh
        else {}
    )
    compiled = step.advance._cache_size()
    config = TrainConfig(epochs=2, batch_size=16, lr=1e-3, schedule="constant", **options)
    config = config.filled({"weight_decay": 0.0, "clip": None}, seed=0)
    result = fit(model.loss, params, windows, config=config, folder=folder, show_progress=False)
    flat = trees.flatten(result.params)  # those of the last step, or their average

    # Options change how a step is computed, and this gradient is that of no step.
    grads = {} if options else gradients(model)(params, windows.gather(jnp.arange(16)))
    return {
        "losses": [row["train_loss"] for row in result.history],
        "params": {
            path: np.asarray(leaf, np.float64).ravel().tolist() for path, leaf in flat.items()
        },
        "grads": {
            path: np.asarray(leaf, np.float64).ravel().tolist()
            for path, leaf in trees.flatten(grads).items()
        },
        "start": start,
        "end": {path: str(leaf.sharding.spec) for path, leaf in flat.items()} if mesh else {},
        "split": {
            path: leaf.size // leaf.addressable_shards[0].data.size for path, leaf in flat.items()
        },
        "compiled": step.advance._cache_size() - compiled,
        "notes": list(notes),
        "dtypes": sorted({str(leaf.dtype) for leaf in flat.values()}),
    }


def _value(text):
    if text.isdigit():
        return int(text)
    return float(text) if text.replace(".", "").isdigit() else text


if __name__ == "__main__":
    found = {}
    for text in sys.argv[2:]:
        mesh_text, *rest = text.split(":")
        others = {
            "noise": noise,
            "experts": expert_layers,
            "evaluated": evaluated,
            "scored": scored,
            "measured": measured,
            "adapted": adapted,
            "pruned": pruned,
            "surfaced": surfaced,
        }
        if mesh_text in others:
            found[text] = others[mesh_text](sys.argv[1], *rest)
            continue
        options = dict(item.split("=", 1) for item in rest)
        found[text] = run(sys.argv[1], mesh_text, **{k: _value(v) for k, v in options.items()})
    print(json.dumps(found))
