"""A problem that trains in a second; also a program, for a test to kill:
`small_problem.py NAME FOLDER`.

With several folders it is no more to be killed, and goes on with each of them.
"""

import dataclasses
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import training
from ltsm_jax.data.windows import windows_between
from ltsm_jax.models.timer import Timer, TimerConfig

CONTEXT, HORIZON = 32, 8


def series(n=300):
    noise = np.random.default_rng(0).standard_normal((2, n))
    return (np.sin(np.arange(n) / 7)[None] + 0.1 * noise).astype(np.float32)


def train_windows(values=None):
    return windows_between(
        series() if values is None else values, 0, 200, CONTEXT, HORIZON, columns=("HUFL", "OT")
    )


def val_windows():
    return windows_between(series(), 200 - CONTEXT, 300, CONTEXT, HORIZON)


def init(seed=1):
    body, head = jax.random.split(jax.random.key(seed))
    return {
        "body": {"kernel": 0.2 * jax.random.normal(body, (CONTEXT, 16)), "bias": jnp.zeros(16)},
        "head": {
            "kernel": 0.2 * jax.random.normal(head, (16, HORIZON)),
            "bias": jnp.zeros(HORIZON),
        },
    }


def predict(params, x, key=None):
    h = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"][None, None])
    if key is not None:
        h = h * jax.random.bernoulli(key, 0.9, h.shape) / 0.9
    return h @ params["head"]["kernel"] + params["head"]["bias"][None, None]


def loss(params, batch, key, train):
    errors = jnp.square(
        predict(params, batch["context"], key if train else None) - batch["target"]
    ).mean((1, 2))
    return (errors * batch["weight"]).sum() / batch["weight"].sum()


def dry_loss(params, batch, key, train):
    """Without dropout."""
    return loss(params, batch, key, False)


@jax.jit
def _mse(params, batch):
    return jnp.square(predict(params, batch["context"]) - batch["target"]).mean()


def validate(params):
    windows = val_windows()
    return {"mse": float(_mse(params, windows.gather(jnp.arange(windows.n))))}


PLAIN = {"schedule": "halving", "weight_decay": 0.0, "clip": None}
CONFIG = training.TrainConfig(  # 322 windows: 7 steps an epoch, the last one of 34
    epochs=4, batch_size=48, lr=3e-3
).filled(PLAIN, seed=0)


def fit(params=None, source=None, *, loss_fn=loss, config=CONFIG, **kwargs):
    kwargs = {"validate": validate, "show_progress": False} | kwargs
    params = init() if params is None else params
    return training.fit(
        loss_fn, params, train_windows() if source is None else source, config=config, **kwargs
    )


def main(name, folder, often=True):
    """often: a checkpoint after every step, so that kills fall into writing as often as into
    training.
    """
    config = (
        dataclasses.replace(CONFIG, checkpoint_seconds=0, steps_per_dispatch=1) if often else CONFIG
    )
    if name == "mlp":
        fit(config=config, folder=folder)
    else:
        model = Timer(TimerConfig.of(HORIZON, 16, 32, 2, 2, context_len=CONTEXT, horizon=HORIZON))
        batch = val_windows().gather(jnp.arange(val_windows().n))
        mse = jax.jit(lambda params: model.point_loss(params, batch))
        fit(
            model.init(jax.random.key(0)),
            loss_fn=model.loss,
            config=config,
            validate=lambda params: {"mse": float(mse(params))},
            folder=folder,
        )


if __name__ == "__main__":
    # A process started in the background of a shell is born deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folders = sys.argv[2:]
    for folder in folders:
        main(sys.argv[1], folder, often=len(folders) == 1)
