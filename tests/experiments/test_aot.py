"""Steps compiled for machines that are not there: counting, verdicts and messages always; TPUs and
GPUs where their compilers are installed (`pip install -e ".[test,tpu-aot]"`, or cuda-aot).
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import aot, targets
from experiments.counting import Traffic, collectives, product_flops
from ltsm_jax.data.windows import windows_between
from ltsm_jax.models import FAMILIES, folders
from ltsm_jax.training import TrainConfig, loop, step

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs pip install -e ".[tpu-aot]"'
)
needs_cuda = pytest.mark.skipif(
    targets.module_folder("jax_plugins.xla_cuda12") is None
    or targets.module_folder("nvidia.cuda_nvcc") is None,
    reason='needs pip install -e ".[cuda-aot]"',
)

# Timer.small(): patches of 8, width 16, 2 heads of 8, 24 units, 2 layers, 4 tokens a window. Each
# product counts three times, forward and twice backward, but for the first: nothing wants the
# gradient of the data.
TOKENS = 4
LAYER = (
    2 * (4 * 16 * 16 + 2 * 16 * 24) + 4 * TOKENS * 16
)  # q, k, v, out; up, down; scores and weighted sums
FLOPS_A_WINDOW = TOKENS * (3 * 2 * LAYER + 3 * 2 * 16 * 8 + 2 * 2 * 8 * 16)


def in_processes(*commands):
    """Reports of `python -m experiments.aot` with each of some lists of flags, in one process of
    their own.
    """
    script = (
        "import json, sys; from experiments import aot; [aot.main([*c, '--json']) for c in "
        "json.loads(sys.argv[1])]"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


PLAIN = {"lr": 3e-5, "schedule": "constant", "weight_decay": 0.0, "clip": None}


def small_timer():
    model = FAMILIES["timer"](FAMILIES["timer"].small())
    values = np.random.default_rng(0).normal(size=(2, 80))
    return model, windows_between(values, 0, 80, 32, 8)


def trace(**options):
    model, source = small_timer()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = folders.param_shapes(model)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return step.trace_step(
        model.loss, params, source, config=TrainConfig(batch_size=16, **options).filled(PLAIN)
    )


# --- the step


def test_what_is_traced_from_shapes_is_what_fit_runs(monkeypatch):
    model, source = small_timer()
    config = TrainConfig(epochs=1, batch_size=16, weight_decay=0.1, clip=1.0).filled(PLAIN, seed=0)
    real, seen = step.advance, []

    def spy(*args, **kwargs):
        seen.append(str(real.trace(*args, **kwargs).jaxpr))
        raise StopIteration

    with monkeypatch.context() as patch:
        patch.setattr(step, "advance", spy)
        with pytest.raises(StopIteration):
            loop.fit(
                model.loss,
                jax.jit(model.init)(jax.random.key(0)),
                source,
                config=config,
                show_progress=False,
            )
    assert seen == [str(trace(epochs=1, weight_decay=0.1, clip=1.0).jaxpr)]


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        trace(accumulate=3)


# --- floating-point operations


def test_products_of_a_training_step_as_counted_by_hand():
    assert product_flops(trace().jaxpr) == 16 * FLOPS_A_WINDOW


def test_parts_are_counted_as_often_as_they_run():
    assert product_flops(trace(accumulate=4).jaxpr) == 16 * FLOPS_A_WINDOW


def test_recomputed_products_count():
    attention = 2 * TOKENS * 4 * TOKENS * 16  # the products with batch axes, two layers, once more
    assert product_flops(trace(remat="all but products").jaxpr) == 16 * (FLOPS_A_WINDOW + attention)


def test_other_products():
    x, kernel = jnp.ones((2, 10, 3)), jnp.ones((5, 3, 7))
    convolved = jax.make_jaxpr(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1,), "VALID", dimension_numbers=("NTC", "TIO", "NTC")
        )
    )(x, kernel)
    assert product_flops(convolved) == 2 * (2 * 6 * 7) * (5 * 3)
    branches = jax.make_jaxpr(
        lambda p, a: jax.lax.cond(p, lambda a: a @ a, lambda a: a @ a @ a, a)
    )(True, jnp.ones((4, 4)))
    assert product_flops(branches) == 2 * 2 * 4**3


def test_what_each_device_computes_counts_for_all():
    mesh, spec = jax.sharding.AbstractMesh((4,), ("data",)), jax.sharding.PartitionSpec("data")
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert product_flops(jax.make_jaxpr(split)(jnp.ones((8, 3)))) == 4 * (2 * 2 * 2 * 3)


def test_rows_of_experts_count_once_forward_and_backward():
    rows, kernels, sizes = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.asarray([1, 2, 3])

    def loss(rows, kernels):
        return jax.lax.ragged_dot(rows, kernels, sizes).sum()

    assert product_flops(jax.make_jaxpr(loss)(rows, kernels)) == 2 * 6 * 4 * 5
    both = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(rows, kernels)
    assert product_flops(both) == 3 * 2 * 6 * 4 * 5


# --- collectives

HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[4,8]) -> bf16[2,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %rs = bf16[2,8]{1,0} reduce-scatter(%p), channel_id=9, dimensions={0}, to_apply=%add
}

%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %not-one = f32[8]{0} add(%all-reduce.1, %all-reduce.1), metadata={op_name="all-reduce(x)"}
  ROOT %r = (s32[], f32[8]{0}) tuple(%i, %not-one)
}

%inner_condition (t: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ag)
  %rss = ((f32[8]{0}, bf16[4]{0}), (f32[4]{0}, bf16[2]{0})) reduce-scatter-start(%x, %y), channel_id=7, to_apply=%add
  %both = (f32[4]{0}, bf16[2,2]{1,0}) all-reduce(%x, %y), channel_id=3, to_apply=%add
  %scattered = bf16[2,8]{1,0} fusion(%x), kind=kCustom, calls=%fused
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
}

%condition (t: (s32[], f32[8])) -> pred[] {
  ROOT %less.1 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %steps = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%body
  %moved = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=4
  ROOT %done = f32[8]{0} collective-permute-done(%moved)
}
"""  # noqa: E501


def test_collectives_are_counted_as_often_as_they_run():
    assert collectives(HLO) == {
        "all-reduce": Traffic(1 + 5, 4 * 4 + 2 * 4 + 5 * 32),
        "all-gather": Traffic(1, 64),
        "reduce-scatter": Traffic(2, 32 + 16 + 4),
        "collective-permute": Traffic(1, 32),
    }


def test_a_program_without_collectives():
    assert (
        collectives(jax.jit(lambda x: x @ x).lower(jnp.ones((2, 2))).compile().as_text() or "")
        == {}
    )


@pytest.mark.slow
def test_the_small_timer_on_eight_cpu_devices():
    flags = (
        "--family",
        "timer",
        "--preset",
        "small",
        "--topology",
        "cpu:8",
        "--batch",
        "16",
        "--rows",
        "200",
    )
    one, split, half = in_processes(
        (*flags, "--mesh", "data=8"),
        (*flags, "--mesh", "data=2,fsdp=4"),
        (*flags, "--mesh", "data=8", "--trainable", "head"),
    )
    assert one["flops"] == split["flops"] == 16 * FLOPS_A_WINDOW
    assert one["mesh"] == "data=8,fsdp=1,tensor=1" and one["devices"] == 8 and one["fits"] is None
    # every gradient and the loss are added up over the devices, and parameters split over fsdp are
    # gathered
    assert (
        one["collectives"]["all-reduce"]["bytes"] >= 4 * one["parameters"]
        and "all-gather" not in one["collectives"]
    )
    assert "all-gather" in split["collectives"]
    assert one["kept"] == 8 * one["parameters"] > 3 * split["kept"]
    assert (
        one["state"] > 12 * one["parameters"]
        and one["needed"] == one["state"] + one["kept"] + one["temporary"]
    )
    assert half["kept"] == 8 * half["settings"]["trainable"] == 8 * (16 * 8 + 8)
    assert half["flops"] < one["flops"]


# --- verdict and words

REPORT = aot.Report(
    model="m",
    parameters=10**8,
    topology="v5e:4x4",
    devices=16,
    mesh="data=16,fsdp=1,tensor=1",
    batch=512,
    context=64,
    horizon=8,
    settings={},
    state=3 * 2**30,
    kept=2**30,
    temporary=20 * 2**30,
    needed=24 * 2**30,
    capacity=16 * 2**30,
    flops=32 * 10**12,
    compiler_flops=1e12,
    collectives={"all-reduce": Traffic(3, 2**20)},
    seconds=12.0,
)


def test_what_does_not_fit_is_said_with_the_bytes_and_what_to_try():
    said = aot.text(REPORT)
    assert (
        "DOES NOT FIT: 8.00 GiB are lacking on each device" in said
        and "24.00  together of 16.00" in said
    )
    assert (
        "32 TFLOP, 2 TFLOP a device; the compiler counts 1 TFLOP a device" in said
        and "3 all-reduce (1 MiB)" in said
    )
    # 12 GiB are left for 20 GiB of 32 windows a device: two parts
    assert [line.split("  ")[0] for line in aot.advice(REPORT)] == [
        "--mesh data=1,fsdp=16",
        "--compute bfloat16",
        '--remat "all but products"',
        "--accumulate 2",
        "--batch 256",
    ]
    assert "**no**" in aot.row(REPORT) and "data=16" in aot.row(REPORT)


def test_advice_is_what_is_not_done_yet():
    done = dataclasses.replace(
        REPORT,
        mesh="data=1,fsdp=16,tensor=1",
        batch=16,
        settings={"compute": "bfloat16", "remat": "all but products"},
    )
    assert aot.advice(done) == ["more devices: one window (64 steps) a device and part is too much"]
    heavy = dataclasses.replace(done, state=17 * 2**30)
    assert "more devices, or train fewer parameters" in aot.advice(heavy)[0]
    gpu = dataclasses.replace(done, topology="h200:8", needed=17 * 2**30)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in aot.advice(gpu)[-1]
    assert aot.advice(dataclasses.replace(REPORT, capacity=2**35)) == []
    assert "FITS, 8.00 GiB are left" in aot.text(dataclasses.replace(REPORT, capacity=2**35))
    assert "No verdict" in aot.text(dataclasses.replace(REPORT, capacity=None))


def test_messages_of_the_compiler():
    late = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded"  # noqa: E501
    early = "Ran out of memory on HBM, the total memory required for HLO temporaries (85.45G) exceeds available HBM (15.75G)."  # noqa: E501
    gib = 2**30
    assert targets.shortage(late) == targets.Shortage(round(17.5 * gib), round(15.75 * gib), True)
    assert targets.shortage(early) == targets.Shortage(
        round(85.45 * gib), round(15.75 * gib), False
    )
    assert targets.shortage("INTERNAL: 3.0G of something else") is None


# --- names


@pytest.mark.parametrize(
    "text, want",
    [
        ("v5e:4x4", ("tpu", "v5e", (4, 4))),
        ("v4:2x2x2", ("tpu", "v4", (2, 2, 2))),
        ("h200:8", ("cuda", "h200", (8,))),
        ("h100:2x8", ("cuda", "h100", (2, 8))),
        ("cpu:8", ("cpu", "cpu", (8,))),
    ],
)
def test_topologies(text, want):
    assert targets.parse(text) == want


@pytest.mark.parametrize(
    "text, says",
    [
        ("v5litepod-16", "did you mean v5e"),
        ("v7x:2x2", "did you mean tpu7x"),
        ("h20:8", "did you mean h200"),
        ("v5e", "is no shape"),
        ("v5e:16", "does not come as 16"),
        ("v5e:4x0", "is no shape"),
        ("h200:2x2x2", "2 hosts"),
        ("cpu:2x2", "does not come"),
        ("", "no kind"),
    ],
)
def test_topologies_that_are_none(text, says):
    with pytest.raises(ValueError, match=says):
        targets.parse(text)


def test_models_by_name():
    assert aot.find_model("timer", None)[0] == "Timer_forecast_1.0"
    assert aot.find_model(None, "amazon/chronos-bolt-base")[1].family == "chronos_bolt"
    name, model = aot.find_model("time_moe", "small")
    assert name == "time_moe (small)" and model.config == FAMILIES["time_moe"].small()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--family", "timr"], "did you mean timer"),
        (["--preset", "small"], "--family names the model"),
        (["--family", "timer", "--preset", "amazon/chronos-bolt-base"], "timer has no"),
        (["--preset", "amazon/chronos-bolt-bse"], "did you mean 'amazon/chronos-bolt-base'"),
    ],
)
def test_problems_are_said_together(flags, says, capsys):
    assert aot.main([*flags, "--topology", "v9:2x2"]) == 2
    said = capsys.readouterr().err
    assert says in said and "no kind 'v9'" in said


def test_flags_that_do_not_go_together():
    target = targets.Target("cpu:1", tuple(jax.devices()[:1]), None)
    flags = ["--family", "timer", "--preset", "small", "--topology", "cpu:1"]
    for more, says in (
        (("--horizon", "9"), "takes 8 steps"),
        (("--batch", "9999999"), "windows"),
        (("--mesh", "fsdp=2"), "1 are there"),
        (("--rows", "20"), "too few"),
    ):
        with pytest.raises(ValueError, match=says):
            aot.resolve(aot.parse([*flags, *more]), target)
    with pytest.raises(ValueError, match="--batch must be at least 1"):
        aot.parse([*flags, "--batch", "0"])


QUICK = ("timer", "ttm", "chronos_2", "time_moe")


@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in sorted(FAMILIES)],
)
def test_every_family_can_be_asked_for(family):
    """Shapes, shardings and windows of the published size, without compiling anything."""
    target = targets.Target("cpu:1", tuple(jax.devices()[:1]), None)
    job = aot.resolve(
        aot.parse(["--family", family, "--topology", "cpu:1", "--mesh", "data=1"]), target
    )
    assert job.source.n >= job.config.batch_size == job.model.recipe().batch_size
    assert aot.bytes_on_one(job.params) >= 4e5


@pytest.mark.parametrize("topology, package", [("v5e:2x2", "tpu-aot"), ("h200:8", "cuda-aot")])
def test_a_missing_compiler_is_named(topology, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=package):
        targets.find(topology)


# --- with the compilers


@needs_libtpu
def test_a_tpu_says_what_fits():
    flags = ("--family", "timer", "--preset", "small", "--topology", "v5e:2x2")
    small, huge = in_processes(
        (*flags, "--mesh", "data=2,fsdp=2", "--batch", "16"),
        (*flags, "--mesh", "data=4", "--batch", str(2**24), "--rows", "3000000"),
    )
    assert small["fits"] and 15 * 2**30 < small["capacity"] < 16 * 2**30
    assert small["flops"] == 16 * FLOPS_A_WINDOW and small["compiler_flops"] > small["flops"] / 4
    assert {"all-reduce", "all-gather"} <= small["collectives"].keys()
    assert huge["fits"] is False and huge["needed"] > huge["capacity"] == small["capacity"]


@needs_libtpu
def test_a_tpu_that_does_not_exist():
    with pytest.raises(ValueError, match="libtpu does not know"):
        targets.find("v5e:3x5")


@needs_cuda
def test_a_gpu_says_what_fits():
    flags = ("--family", "timer", "--preset", "small", "--topology", "h200:8", "--batch", "16")
    (found,) = in_processes((*flags, "--mesh", "data=8"))
    assert found["fits"] and found["capacity"] == int(0.75 * 151_397_597_184)
    assert found["flops"] == 16 * FLOPS_A_WINDOW and found["collectives"].keys() == {"all-reduce"}
