"""Key table of UniTS: state dicts of mims-harvard/UniTS <-> `ltsm_jax.models.units`.

Files of training on several devices have `module.` before each key, and self-supervised ones nest
the state dict under "student". There is no config file: config.json beside it holds the scripts'
options ("args") and the yaml of the tasks ("task_dataset"); without one the sizes and the tokens'
names say most of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.fields import MAX_LAYERS, Fields, dims, layer_count
from converters.layers import equal_layer, pruned, told
from converters.layout import Layout
from converters.pickles import quoted
from converters.tables import BUFFER, DROP, SAME, TRANSPOSE, Rule, Transform, split_in
from ltsm_jax.models.units import Units, UnitsConfig, UnitsLayer, UnitsTask
from ltsm_jax.original_files import CheckpointError

MODEL = Units
SUFFIXES = {".pth": "state_dict"}
EMBED = "patch_embeddings.value_embedding.weight"
BLOCK = r"blocks\.(\d+)\."
_OPTIONS = (
    "UniTS' own files come without a config: write a config.json beside the file, with the options "
    "of the script that "
    'trained it and its task yaml as JSON: {"args": {"d_model": 64, "n_heads": 8, "e_layers": 3, '
    '"patch_len": 16, '
    '"prompt_num": 10}, "task_dataset": {"LTF_ETTh1": {"task_name": "long_term_forecast", '
    '"dataset": "ETTh1", '
    '"seq_len": 96, "pred_len": 96, "enc_in": 7}}}'
)
HEADS = 8  # of the original's scripts; the number is not in the file
HINTS = {
    r"/(seq|var)/": "check n_heads",
    r"tokens/": "check enc_in, num_class and prompt_num",
    r".": "check args",
}
FIRST = Transform("without the first axis", lambda x: x[0], lambda x: x[None])
TABLE = Transform("position table", lambda x: x[0, 0], lambda x: x[None, None])
CONV3 = Transform(
    "convolution",
    lambda x: np.transpose(_of_rank(x, 3), (2, 1, 0)),
    lambda x: np.transpose(x, (2, 1, 0)),
)  # [out, in, 3] <-> [3, in, out]


def _of_rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim != rank:
        raise ValueError(f"{rank} axes expected")
    return x


def fused(parts: int, head_dim: int) -> Transform:
    """[parts * H * K, D] <-> [D, parts, H, K]."""
    return Transform(
        f"split into {parts} times heads of {head_dim}",
        lambda x: _of_rank(x, 2).T.reshape(x.shape[1], parts, -1, head_dim),
        lambda x: x.reshape(x.shape[0], -1).T,
    )


def keys(config: UnitsConfig) -> list[Rule]:
    """The table, readable beside the original's state dict."""
    wide = config.d_model // 8
    rules: list[Rule] = [
        (r"(prompt|mask)_tokens\.([^.]+)", r"\1_tokens/\2", FIRST),
        (r"(cls|category)_tokens\.([^.]+)", r"\1_tokens/\2", FIRST),
        (r"cls_prompts\..*", DROP, "an older name for tokens, which the original drops too"),
        (r"patch_embeddings\.value_embedding\.weight", "embed/kernel", TRANSPOSE),
        (r"position_embedding\.pe", "positions", TABLE),
        *_dynamic(r"prompt2forecat\.", "generate/"),
        (
            r"blocks\.\d+\.(?:seq|var)_att_block\.proj\.(?:weight|bias)",
            BUFFER,
            "in the file, and used nowhere",
        ),
    ]
    for name in ("seq", "var"):
        block, ours = rf"{BLOCK}{name}_att_block\.", rf"block_\1/{name}/"
        rules += [
            *_pair(rf"{block}norm1\.", rf"block_\1/norm_{name}/", SAME, name="scale"),
            (rf"{block}attn_{name}\.qkv\.weight", f"{ours}qkv/kernel", fused(3, config.head_dim)),
            *_pair(rf"{block}attn_{name}\.proj\.", f"{ours}out/", split_in(config.head_dim)),
            *_pair(rf"{block}ls1\.gate\.", rf"block_\1/gate_{name}/linear/", TRANSPOSE),
        ]
    mlp = rf"{BLOCK}dynamic_mlp\."
    rules += [
        *_pair(rf"{mlp}norm2\.", r"block_\1/norm_mix/", SAME, name="scale"),
        *_pair(rf"{mlp}mlp\.fc1\.", r"block_\1/mix/up/", CONV3),
        *_dynamic(rf"{mlp}mlp\.seq_fc\.", r"block_\1/mix/seq/"),
        *_dynamic(rf"{mlp}mlp\.prompt_fc\.", r"block_\1/mix/prompt/"),
        *_pair(rf"{mlp}mlp\.fc2\.", r"block_\1/mix/down/", TRANSPOSE),
        *_pair(rf"{mlp}ls2\.gate\.", r"block_\1/gate_mix/linear/", TRANSPOSE),
        *_pair(r"cls_head\.proj_in\.", "class_head/proj_in/", TRANSPOSE),
        (r"cls_head\.cross_att\.q\.weight", "class_head/q/kernel", _heads(wide)),
        (r"cls_head\.cross_att\.kv\.weight", "class_head/kv/kernel", fused(2, wide)),
        *_pair(r"cls_head\.cross_att\.proj\.", "class_head/out/", split_in(wide)),
        *_pair(r"cls_head\.mlp\.norm2\.", "class_head/norm/", SAME, name="scale"),
        *_pair(r"cls_head\.mlp\.mlp\.fc1\.", "class_head/up/", TRANSPOSE),
        *_pair(r"cls_head\.mlp\.mlp\.fc2\.", "class_head/down/", TRANSPOSE),
        *_pair(r"cls_head\.mlp\.ls2\.gate\.", "class_head/gate/linear/", TRANSPOSE),
    ]
    for head in ("forecast_head", "pretrain_head"):
        rules += [
            *_pair(rf"{head}\.proj_in\.", f"{head}/proj_in/", TRANSPOSE),
            *_dynamic(rf"{head}\.pos_proj\.", f"{head}/pos_proj/"),
            *_pair(rf"{head}\.mlp\.fc1\.", f"{head}/up/", TRANSPOSE),
            *_pair(rf"{head}\.mlp\.fc2\.", f"{head}/down/", TRANSPOSE),
            *_pair(rf"{head}\.proj_out\.", f"{head}/proj_out/", TRANSPOSE),
        ]
    return rules


def _heads(head_dim: int) -> Transform:
    return Transform(
        f"split outputs into heads of {head_dim}",
        lambda x: _of_rank(x, 2).T.reshape(x.shape[1], -1, head_dim),
        lambda x: x.reshape(x.shape[0], -1).T,
    )


def _pair(key: str, path: str, weight: Transform, name: str = "kernel") -> list[Rule]:
    return [(f"{key}weight", f"{path}{name}", weight), (f"{key}bias", f"{path}bias", SAME)]


def _dynamic(key: str, path: str) -> list[Rule]:
    return [(f"{key}weights", f"{path}kernel", TRANSPOSE), (f"{key}bias", f"{path}bias", SAME)]


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """UniTS, whatever prefix its keys have. None for other models."""
    found = [key for key in state if key.endswith(EMBED)]
    if len(found) == 1 and any(".seq_att_block." in key for key in state):
        return Layout(found[0].removesuffix(EMBED))
    return None


def configure(
    state: Mapping[str, Any], published: Mapping[str, Any] | None, where: str
) -> tuple[UnitsConfig, list[str]]:
    """The config of a state dict (without prefix), from its shapes and the options beside it.

    Raises: CheckpointError that lists every contradiction.
    """
    d_model, patch_len = dims(state, EMBED)
    layers = layer_count(state, BLOCK)
    prompts = {
        k.split(".", 1)[1]: v.shape
        for k, v in state.items()
        if k.startswith("prompt_tokens.") and _four(v)
    }
    prompt_len = next((shape[2] for shape in prompts.values()), None)
    if published is None:
        return _assumed(state, prompts, (d_model, layers, patch_len, prompt_len), where=where)
    parts = {name: published.get(name) for name in ("args", "task_dataset")}
    for name, part in parts.items():
        if not isinstance(part, Mapping) or not part:
            raise CheckpointError(
                f"{where}: the config has no object {name!r}: the original's options and task yaml"
            )
    args, tasks = Fields(published["args"], where), published["task_dataset"]
    args.integer("d_model", weights=d_model)
    args.integer("n_heads", high=4096)
    args.integer("e_layers", high=MAX_LAYERS, weights=layers)
    args.integer("patch_len", weights=patch_len)
    args.integer("prompt_num", high=4096, weights=prompt_len)
    args.number("dropout", 0.1, high=0.999)
    if len(tasks) > 4096:
        args.problems.append(f"task_dataset: {len(tasks)} tasks")
    for name, task in list(tasks.items())[:4096]:
        if not isinstance(task, Mapping) or not isinstance(name, str) or not name.isprintable():
            args.problems.append(f"task_dataset.{quoted(str(name))}: not an object")
            continue
        told = Fields(task, where)
        told.integer("enc_in")
        for field in ("seq_len", "pred_len", "num_class"):
            told.integer(field, 96, low=0)
        told.problems += [
            f"{f}: not a text" for f in ("task_name", "dataset") if not isinstance(task.get(f), str)
        ]
        args.problems += [f"task_dataset.{quoted(name)}.{problem}" for problem in told.problems]
    return args.build(lambda: UnitsConfig.from_published(published)), []


def _four(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 4


def _assumed(
    state: Mapping[str, Any],
    prompts: Mapping[str, tuple[int, ...]],
    sizes: tuple[int | None, ...],
    where: str,
) -> tuple[UnitsConfig, list[str]]:
    d_model, layers, patch_len, prompt_len = sizes
    if (
        d_model is None
        or not layers
        or patch_len is None
        or not prompts
        or prompt_len is None
        or layers > MAX_LAYERS
    ):
        raise CheckpointError(
            f"{where}: the sizes of the model can't be read from the weights. {_OPTIONS}"
        )
    if d_model % HEADS or d_model > 1 << 16 or len(prompts) > 4096:
        raise CheckpointError(
            f"{where}: the number of heads is not in the file, and the scripts' {HEADS} does not "
            f"fit a width of {d_model}. {_OPTIONS}"
        )
    ssl = any(key.startswith("pretrain_head.") for key in state)
    tasks, notes = (
        [],
        [
            f"no config beside the file: n_heads={HEADS}, windows of 96 steps and horizons of 96 "
            f"are assumed. If the file was trained otherwise: {_OPTIONS}"
        ],
    )
    shapes = {
        k: v.shape
        for k, v in state.items()
        if k.startswith(("cls_tokens.", "category_tokens.")) and _four(v)
    }
    for key, shape in shapes.items():
        kind, name = key.split(".", 1)
        if kind != "cls_tokens":
            continue
        category = shapes.get(f"category_tokens.{name}")
        near = [data for data in prompts if data in name and prompts[data][1] == shape[1]]
        if not near:
            raise CheckpointError(
                f"{where}: nothing says which data set the task {quoted(name)} is of. {_OPTIONS}"
            )
        ours = "pretrain_long_term_forecast" if category is None else "classification"
        tasks.append(
            UnitsTask(
                name=name,
                kind=ours,
                dataset=max(near, key=len),
                context_len=96,
                horizon=96 if category is None else 0,
                n_variates=shape[1],
                n_classes=0 if category is None else category[2],
            )
        )
    covered = {t.dataset for t in tasks if t.kind != "classification"}
    tasks = [
        UnitsTask(
            name=f"LTF_{name}",
            kind="long_term_forecast",
            dataset=name,
            context_len=96,
            horizon=96,
            n_variates=shape[1],
        )
        for name, shape in prompts.items()
        if not ssl or name not in covered
    ] + tasks
    try:
        rest = {"patch_len": patch_len, "prompt_len": prompt_len}
        return UnitsConfig.of(d_model, HEADS, layers, tasks=tuple(tasks), **rest), notes
    except ValueError as e:
        raise CheckpointError(
            f"{where}: the config can't be told from the weights: {str(e)[:500]}"
        ) from None


def published(config: UnitsConfig) -> dict[str, Any]:
    """Options and tasks under the names of the original's scripts.

    Raises: ValueError for a pruned model, which the original's classes can't hold.
    """
    layer, d = equal_layer(config.layers, "UniTS"), config.d_model
    if layer != UnitsLayer(d // config.head_dim, d // config.head_dim, 8 * d):
        raise pruned(
            f"the original UniTS has heads that are together as wide as the model ({d}) and units "
            f"of 8 times that; this one has {told(config.layers)}, heads of {config.head_dim}"
        )
    return {
        "args": {
            "d_model": config.d_model,
            "n_heads": layer.seq_heads,
            "e_layers": len(config.layers),
            "patch_len": config.patch_len,
            "stride": config.patch_len,
            "prompt_num": config.prompt_len,
            "dropout": config.dropout,
        },
        "task_dataset": {
            t.name: {
                "task_name": t.kind,
                "dataset": t.dataset,
                "seq_len": t.context_len,
                "pred_len": t.horizon,
                "enc_in": t.n_variates,
                **({"num_class": t.n_classes} if t.n_classes else {}),
            }
            for t in config.tasks
        },
    }


def check_buffers(config: UnitsConfig, state: Mapping[str, Any]) -> list[str]:
    """List problems of the tensors that are used nowhere; empty where their shapes fit."""
    d, problems = config.d_model, []
    for key, value in state.items():
        m = re.fullmatch(r"blocks\.(\d+)\.(seq|var)_att_block\.proj\.(weight|bias)", key)
        if m and getattr(value, "shape", None) != ((d, d) if m[3] == "weight" else (d,)):
            problems.append(f"{quoted(key)}: shape {getattr(value, 'shape', None)}")
    return problems


def buffers(config: UnitsConfig) -> dict[str, np.ndarray]:
    """The unused projections that the original's class has: zeros."""
    d, found = config.d_model, {}
    for i in range(len(config.layers)):
        for name in ("seq", "var"):
            found[f"blocks.{i}.{name}_att_block.proj.weight"] = np.zeros((d, d), np.float32)
            found[f"blocks.{i}.{name}_att_block.proj.bias"] = np.zeros(d, np.float32)
    return found
