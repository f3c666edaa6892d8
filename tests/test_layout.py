"""The shape of the code base: who imports whom, what is documented, what text may be committed."""

import ast
import functools
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import converters
import ltsm_jax
from ltsm_jax import original_files

ROOT = Path(__file__).parent.parent
PACKAGES = ("ltsm_jax", "converters", "experiments")

# From the bottom up; a module imports its own level and those below. `ltsm_jax` itself is the list
# of public names.
GROUND = (
    "ltsm_jax.frequency",
    "ltsm_jax.hosts",
    "ltsm_jax.hub",
    "ltsm_jax.original_files",
    "ltsm_jax.sharding",
    "ltsm_jax.stacks",
    "ltsm_jax.storage",
    "ltsm_jax.trees",
)
LEVELS = (
    GROUND,
    ("ltsm_jax.layers",),
    ("ltsm_jax.models",),
    ("ltsm_jax.data",),
    ("ltsm_jax.tasks",),
    ("ltsm_jax.training",),
    ("ltsm_jax.methods", "ltsm_jax.curvature", "ltsm_jax.landscape"),
    ("ltsm_jax.loading",),
    (
        "ltsm_jax.api",
        "ltsm_jax.capsule",
        "ltsm_jax.detection",
        "ltsm_jax.doctor",
        "ltsm_jax.forecaster",
        "ltsm_jax.imputation",
        "ltsm_jax.plotting",
        "ltsm_jax.report",
    ),
    (
        "ltsm_jax",
        "ltsm_jax.flags",
        "ltsm_jax.terminal",
        "ltsm_jax.cli",
        "ltsm_jax.__main__",
        "experiments",
    ),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# Beside that ladder: the files of the originals, and the models by name, which may come from such
# files.
MAY_USE = {
    "converters": (*GROUND, "ltsm_jax.models", "converters"),
    "ltsm_jax.loading": (*GROUND, "ltsm_jax.models"),
}


@functools.cache
def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def module_names() -> frozenset[str]:
    packages = {name_of(path.parent / "__init__.py") for path in sources()}
    return frozenset(packages | {name_of(path) for path in sources()})


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Every module that the file imports anywhere in it, in full: `from ltsm_jax import trees` is
    ltsm_jax.trees.
    """
    modules = module_names()
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import; write it in full"
            assert node.module
            found |= {
                full if (full := f"{node.module}.{a.name}") in modules else node.module
                for a in node.names
            }
    return found


def part_of(module: str) -> str:
    """`ltsm_jax.models.timer` -> `ltsm_jax.models`; other packages -> their root."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "ltsm_jax" else parts[:1])


def offences(check) -> list[str]:
    return [
        f"{name_of(p)} imports {m}"
        for p in sources()
        for m in sorted(imports_of(p))
        if check(name_of(p), m)
    ]


def test_every_part_has_its_level():
    unplaced = {part_of(name_of(path)) for path in sources()} - LEVEL_OF.keys() - MAY_USE.keys()
    assert not unplaced, f"say in LEVELS where {unplaced} belong"


def test_imports_point_downwards():
    def upwards(importer, imported):
        part, other = part_of(importer), part_of(imported)
        if importer == "ltsm_jax" or other not in LEVEL_OF or part == "converters":
            return False
        return LEVEL_OF[other] > LEVEL_OF[part]

    assert not offences(upwards)


def test_converters_and_loading_know_models_and_the_ground_only():
    def elsewhere(importer, imported):
        ours = imported.split(".")[0] in PACKAGES
        return (
            ours
            and part_of(importer) in MAY_USE
            and part_of(imported) not in MAY_USE[part_of(importer)]
        )

    assert not offences(elsewhere)


def test_the_library_imports_no_converter():
    """They are built on it. It finds them as an installed package, see `original_files`."""

    def upwards(importer, imported):
        return part_of(imported) == "converters" and importer.split(".")[0] == "ltsm_jax"

    assert not offences(upwards)
    groups = project()["entry-points"]
    assert groups == {original_files.GROUP: {"converters": "converters"}}
    assert original_files.find_converters() is converters


def test_the_library_knows_no_experiment():
    def outwards(importer, imported):
        return part_of(imported) == "experiments" and part_of(importer) != "experiments"

    assert not offences(outwards)


def test_imports_make_no_circle():
    modules = {name_of(path) for path in sources()}
    below = {
        name_of(path): sorted(imports_of(path) & modules - {name_of(path)}) for path in sources()
    }
    finished: set[str] = set()

    def circle(module: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
        """The first circle met on going down from a module, from its beginning to its beginning."""
        if module in way:
            return (*way[way.index(module) :], module)
        if module in finished:
            return None
        for other in below[module]:
            if found := circle(other, (*way, module)):
                return found
        finished.add(module)
        return None

    for module in sorted(modules):
        found = circle(module, ())
        assert not found, " imports ".join(found)


def imports_inside_functions(path: Path) -> list[tuple[int, str]]:
    """Line and module of what a file imports when a function of it runs: statements, and calls by
    name.
    """
    found = set()
    for function in ast.walk(parse(path)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                found |= {(node.lineno, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.lineno, node.module or ""))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("import_module", "__import__")
            ):
                found.add((node.lineno, "/".join(PACKAGES)))  # may be anything
    return sorted(found)


def test_no_function_imports_our_own_packages():
    """An import that waits for its function hides an arrow up. Packages of others may wait where
    they take long.
    """
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources()
        # The two sides of a benchmark run in two Pythons, and each has packages that the other
        # lacks.
        if path.parent != ROOT / "experiments/benchmarks"
        for line, module in imports_inside_functions(path)
        if re.split(r"[./]", module)[0] in PACKAGES
    ]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_library_runs_without_the_converters():
    """They may be imported first, or never."""
    code = "import sys, ltsm_jax.cli; assert 'converters' not in sys.modules; import converters"
    for program in ("import converters", code):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_only_models_and_layers_know_flax():
    def flax_elsewhere(importer, imported):
        return imported.split(".")[0] in ("flax", "haiku", "equinox") and part_of(importer) not in (
            "ltsm_jax.models",
            "ltsm_jax.layers",
        )

    assert not offences(flax_elsewhere)


def test_one_argument_is_hidden():
    """Signatures name all that functions depend on, but for the runtime of the layers."""
    hidden = ("ContextVar", "threading.local")
    found = []
    for path in sources():
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        found += [name_of(path) for call in calls if ast.unparse(call.func).endswith(hidden)]
    assert found == ["ltsm_jax.layers.runtime"]


def test_no_torch_at_run_time():
    foreign = (
        "torch",
        "torchvision",
        "lightning",
        "pytorch_lightning",
        "transformers",
        "tensorflow",
    )

    def runs_it(importer, imported):  # comparing speed with the original needs the original
        return imported.split(".")[0] in foreign and not importer.startswith(
            "experiments.benchmarks."
        )

    assert not offences(runs_it)


def undocumented(path: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring; the contract documents
    its own methods.
    """
    family = parse(ROOT / "ltsm_jax/models/family.py")
    contract = {
        f.name
        for c in family.body
        if isinstance(c, ast.ClassDef) and c.name == "Model"
        for f in c.body
        if isinstance(f, ast.FunctionDef)
    }
    tree, missing = parse(path), []
    if tree.body and not ast.get_docstring(tree):
        missing.append(f"{path.relative_to(ROOT)}: the module")
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if not isinstance(node, (*functions, ast.ClassDef)) or node.name.startswith("_"):
            continue
        members = node.body if isinstance(node, ast.ClassDef) else []
        methods = [
            m
            for m in members
            if isinstance(m, functions) and not m.name.startswith("_") and m.name not in contract
        ]
        for item in (node, *methods):
            if not ast.get_docstring(item):
                missing.append(f"{path.relative_to(ROOT)}:{item.lineno}: {item.name}")
    return missing


def test_public_names_are_documented():
    benchmarks = ROOT / "experiments/benchmarks"  # scripts: the module's docstring says it all
    missing = [
        line for path in sources() if path.parent != benchmarks for line in undocumented(path)
    ]
    assert not missing, "no docstring:\n" + "\n".join(missing)


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Comments for the tools, which can't be wrapped, and addresses.
UNBREAKABLE = re.compile(r"\s*# (?:noqa|type|pyright|fmt|ruff):.*|https?://[^\s\"')]+")


def dense(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and kind of what a reader has to unpack: lambdas that get a name, and comprehensions of
    several loops.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            value = node.value
            either = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            if all(isinstance(part, ast.Lambda) for part in either):
                found.add((node.lineno, "a lambda with a name; make it a def"))
        if isinstance(node, COMPREHENSIONS):
            inside = [inner for inner in ast.walk(node) if isinstance(inner, COMPREHENSIONS)]
            if len(node.generators) > 1 or len(inside) > 1:
                found.add((node.lineno, "a nested comprehension; make it a loop or two steps"))
    return sorted(found)


def long_lines(text: str) -> list[int]:
    """Numbers of the lines over 100 columns, addresses and comments for tools not counted."""
    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if len(UNBREAKABLE.sub("", line)) > 100]


def test_code_is_not_dense():
    found = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        found += [f"{name}:{line}: {kind}" for line, kind in dense(parse(path))]
    assert not found, "\n".join(found)


def test_lines_have_at_most_100_columns():
    found = []
    for path in sources():
        numbers = long_lines(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(ROOT)}:{number}" for number in numbers]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "double = lambda x: 2 * x",
        "double: object = lambda x: 2 * x",
        "def f(up):\n    step = (lambda x: x + 1) if up else (lambda x: x - 1)\n    return step",
        "if (double := lambda x: 2 * x): pass",
        "flat = [x for row in rows for x in row]",
        "table = {k: [f(x) for x in row] for k, row in rows.items()}",
        "total = sum(max(x for x in row) for row in rows)",
        "found = [x for x in rows if x not in {y for y in others}]",
    ],
)
def test_dense_code_would_be_found(code):
    assert len(dense(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "names = sorted(rows, key=lambda row: row.name)",
        "step = layout.pin if layout else (lambda x: x)",
        "odd = [x for x in rows if x % 2]\neven = [x for x in rows if x not in odd]",
        "for row in rows:\n    total += sum(x for x in row)",
    ],
)
def test_plain_code_is_not_dense(code):
    assert not dense(ast.parse(code))


def test_long_lines_would_be_found():
    full = "x = " + 96 * "1"
    address = "https://example.org/" + 90 * "a"
    told = "  # pyright: ignore[reportArgumentType]"
    assert long_lines("\n".join((full, full + "1", full + told, full + "1" + told))) == [2, 4]
    assert long_lines(f'URL = "{address}"\n# {address} and a comment {100 * "b"}') == [2]


# Files whose statements may still hold several comprehensions.
def crowded(tree: ast.AST) -> list[int]:
    """Lines of statements with several comprehensions; of a compound one its head counts."""
    found = []
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.stmt):
            continue
        inside, count = list(ast.iter_child_nodes(statement)), 0
        while inside:
            node = inside.pop()
            if not isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)):
                count += isinstance(node, COMPREHENSIONS)
                inside += ast.iter_child_nodes(node)
        if count > 1:
            found.append(statement.lineno)
    return sorted(found)


def test_a_statement_has_at_most_one_comprehension():
    found = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        found += [f"{name}:{line}" for line in crowded(parse(path))]
    assert not found, "\n".join(found)


def test_crowded_statements_would_be_found():
    code = """
a, b = [x for x in rows], {y: 1 for y in rows}
c = [x for x in rows]
for x in [f(y) for y in c]:
    d = {y for y in c}
if any(x for x in c) and all(x for x in c):
    e = sum(x for x in c)
"""
    assert crowded(ast.parse(code)) == [2, 6]


INNER = "an inner layer of a family: a model file reads from top to bottom and names its own parts"
PROTOCOL = "what every converter defines; found by these names"
TASK = "what every task file has; its `Task` calls it"
# Public functions and classes of the library that several modules may define, and why.
SAME_NAME = {
    **dict.fromkeys(("Attention", "Block", "Gate", "Layer", "Norm", "Residual"), INNER),
    **dict.fromkeys(("buffers", "check_buffers", "configure", "published", "recognise"), PROTOCOL),
    **dict.fromkeys(("evaluate", "loss_fn"), TASK),
    "keys": f"a key table, {PROTOCOL}; and `training.keys`, PRNG keys by name",
    "fit": "`ltsm_jax.fit` takes tables, `training.fit` a loss and windows: both are public",
    "prune": "`ltsm_jax.prune` takes tables, `pruning.prune` windows: both are public",
    "ema": "the public step on trees, and the strategy of that name",
    "wise_ft": "the public average of trees, and the strategy of that name",
    "main": "entry points of programs",
    "error_unit": "capsule/runner.py runs without the library and repeats what it takes over",
}


def test_a_public_name_means_one_thing():
    """Of the library. Each file of experiments is a program, and their parts are called alike."""
    modules: dict[str, list[str]] = {}
    for path in sources():
        if name_of(path).split(".")[0] == "experiments":
            continue
        for node in parse(path).body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                modules.setdefault(node.name, []).append(name_of(path))
    several = {name: where for name, where in modules.items() if len(where) > 1}
    new = [f"{name}: {', '.join(several[name])}" for name in sorted(several.keys() - SAME_NAME)]
    assert not new, "names defined in several modules:\n" + "\n".join(new)
    assert not SAME_NAME.keys() - several, "exceptions that nothing needs any more"
    for name, reason in SAME_NAME.items():
        if reason == INNER:
            assert all(
                m.startswith(("ltsm_jax.models.", "ltsm_jax.layers.")) for m in several[name]
            )


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Of arrays, whose names carry their axes, in the order of the formula.
BY_POSITION = ("ltsm_jax.models", "ltsm_jax.layers")
# Methods of a compiled function that take its arguments.
STAGES = ("trace", "lower", "eval_shape")


@functools.cache
def ours() -> frozenset[str]:
    """Names of our functions and classes, but for those that take any number of arguments."""
    plain, open_ended = set(), set()
    for path in sources():
        for node in ast.walk(parse(path)):
            if isinstance(node, FUNCTIONS):
                (open_ended if node.args.vararg else plain).add(node.name)
            elif isinstance(node, ast.ClassDef):
                plain.add(node.name)
    return frozenset(plain - open_ended)


def by_position(tree: ast.AST, names: Collection[str]) -> list[tuple[int, str]]:
    """Line and name of calls of our functions with more than three arguments by position.

    A bare name that is neither defined nor imported in the file is that of a variable, such as a
    loss that somebody brought, or what `jax.shard_map` made.
    """
    known = {"cls"}
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.name for alias in node.names}

    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) <= 3:
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in STAGES:
            function = function.value
        name = ast.unparse(function).rpartition(".")[2]
        if isinstance(function, ast.Name) and name not in known:
            continue
        if name == "cls" or name in names:
            found.append((node.lineno, name))
    return sorted(found)


def test_calls_of_many_arguments_name_them():
    found = []
    for path in sources():
        if part_of(name_of(path)) not in BY_POSITION:
            calls = by_position(parse(path), ours())
            found += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in calls]
    assert not found, "more than three arguments by position:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "from ltsm_jax.a import f\nf(1, 2, 3, 4)",
        "def f(*args): ...\nf.lower(1, 2, 3, 4)",
        "a.b.f(*x, 2, 3, y)",
        "cls(1, 2, 3, 4)",
    ],
)
def test_calls_by_position_would_be_found(code):
    assert len(by_position(ast.parse(code), {"f"})) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from ltsm_jax.a import f\nf(1, 2, 3, d=4)",
        "f = jax.shard_map(g)\nf(1, 2, 3, 4)",
        "a.f(1)(1, 2, 3, 4)",
        "jnp.where(1, 2, 3, 4)",
    ],
)
def test_calls_by_name_are_not(code):
    assert not by_position(ast.parse(code), {"f"})


def lengths(tree: ast.AST) -> list[tuple[str, int]]:
    """Name and lines of every function and method, from `def` to its end, inner functions included,
    without the docstring: a long contract is no long function.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            found.append((node.name, lines))
    return found


def test_functions_are_short():
    """Half have fewer than 15 lines, and none has over 80."""
    every, long = [], set()
    for path in sources():
        for name, lines in lengths(parse(path)):
            every.append(lines)
            if lines > 80:
                long.add(f"{path.relative_to(ROOT).as_posix()}: {name}")
    assert statistics.median(every) < 15
    assert not long


def test_lengths_leave_out_docstrings_only():
    code = """
@cached
def outer(
    x,
):
    '''First line.

    More.
    '''

    def inner(y):
        # a comment counts
        return y

    return inner(x)

def bare(): ...
"""
    assert dict(lengths(ast.parse(code))) == {"outer": 9, "inner": 3, "bare": 1}


def committed() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_committed_text_names_no_machine():
    """Paths of one machine and package-index options: a clone elsewhere has neither."""
    machine = re.compile(
        r"(?<![\w.~}])/(?:home|Users|root|work|farm|opt|tmp|mnt|scratch)/\w|\.\./shared\b"
        r"|--(?:extra-)?index-url|--find-links|--trusted-host|PIP_(?:EXTRA_)?INDEX_URL"
    )
    found = []
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        if path != Path(__file__):
            found += [
                f"{path.relative_to(ROOT)}:{n}: {line.strip()[:120]}"
                for n, line in lines
                if machine.search(line)
            ]
    assert not found, "\n".join(found)


def test_committed_files_are_small():
    large = {
        str(p.relative_to(ROOT)): size for p in committed() if (size := p.stat().st_size) > 6e6
    }
    assert not large


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_agree():
    version = project()["version"]
    assert version == ltsm_jax.__version__
    assert re.search(
        rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE
    )

    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(.*?)\] - (.*)$", changelog, re.MULTILINE)
    assert released[0][0] == version, "the newest heading is the version"
    assert len(released) == len(re.findall(r"^## ", changelog, re.MULTILINE)), (
        "## [1.2.3] - 2030-01-31 | unreleased"
    )
    order = [tuple(int(part) for part in name.split(".")) for name, _ in released]
    assert order == sorted(order, reverse=True)
    assert all(len(numbers) == 3 for numbers in order), "semantic versions"
    for _, date in released[1:]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date), date


def pinned(path: str) -> dict[str, list[str]]:
    """Versions by package name of a file of `name==version ; marker` lines; a package may have one
    for every Python.
    """
    found = {}
    for line in (ROOT / path).read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            found.setdefault(name.replace("_", "-").lower(), []).append(version)
    return found


def test_the_lock_fits_the_project():
    """Somebody who edits pyproject.toml calls `make lock` too."""
    locked = pinned("requirements-dev.lock")
    extras = project()["optional-dependencies"]
    names = ("test", "plots", "dev", "docs")
    for wanted in (*project()["dependencies"], *(w for name in names for w in extras[name])):
        name, bounds = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", wanted).groups()
        versions = locked.get(name.replace("_", "-").lower(), [])
        assert versions, f"{name} is not in requirements-dev.lock: make lock"
        for version in versions:
            assert version in SpecifierSet(bounds), (
                f"{name}=={version} is locked, pyproject says {bounds}: make lock"
            )


IMPORT_NAMES = {
    "orbax-checkpoint": "orbax",
    "pyyaml": "yaml",
    "huggingface-hub": "huggingface_hub",
}
# Packages that work without being imported, and what needs them.
NOT_IMPORTED = {
    "flatbuffers": "jax.export writes programs with it",
    "ipykernel": "nbclient runs notebooks in it",
    "pytest-xdist": "`pytest -n`",
}


def test_every_dependency_is_used():
    """What nothing imports leaves pyproject.toml, tools of developers aside."""
    extras = project()["optional-dependencies"]
    imported = set()
    for path in (*sources(), *(ROOT / "tests").rglob("*.py")):
        imported |= {name.split(".")[0] for name in imports_of(path)}
        imported |= set(re.findall(r'importorskip\("(\w+)', path.read_text(encoding="utf-8")))
    idle = []
    for wanted in (*project()["dependencies"], *extras["plots"], *extras["eval"], *extras["test"]):
        name = re.match(r"[\w-]+", wanted)[0].replace("_", "-").lower()
        if name not in NOT_IMPORTED and IMPORT_NAMES.get(name, name) not in imported:
            idle.append(name)
    assert not idle, f"nothing imports {', '.join(idle)}"


def test_pre_commit_checks_with_the_locked_ruff():
    hooks = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    assert set(hooks) == set(pinned("requirements-dev.lock")["ruff"])


def test_the_workflow_and_the_makefile_agree():
    """Every `make` target that the workflow calls exists, and every stage of .ci/run that it stands
    for.
    """
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    called = set(re.findall(r"run: make (\w+)", workflow)) | set(
        re.findall(r"target: (\w+)", workflow)
    )
    assert called == {
        "check",
        "docs",
        "test",
        "slow",
        "oldest",
        "newest",
        "wheel",
        "torch",
        "peers",
    }
    assert called <= set(phony.split())
    stages = set(re.findall(r"^#   (\w+)  ", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert stages == called | {"aot"}


def test_floors_are_what_ci_installs():
    floors = {}
    for wanted in project()["dependencies"]:
        name, floor = re.match(r"([\w-]+)>=([\d.]+)", wanted).groups()
        floors[name.replace("_", "-")] = floor

    oldest = pinned(".ci/oldest.txt")
    oldest.pop("jaxlib")
    assert floors.keys() == oldest.keys()
    for name, floor in floors.items():
        (version,) = oldest[name]
        assert (version + ".").startswith(floor + "."), (
            f"{name}: pyproject says {floor}, CI has {version}"
        )


def test_no_two_test_files_have_one_name():
    """They are modules without packages: of two with one name, pytest can import only the first."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
