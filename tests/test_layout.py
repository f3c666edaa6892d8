"""The shape of the code base: who imports whom, what is documented, what text may be committed."""

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ltsm_jax", "converters", "experiments")

# From the bottom up; a module imports its own level and those below. `ltsm_jax` itself is the list of public names.
LEVELS = (
    ("ltsm_jax.trees", "ltsm_jax.storage", "ltsm_jax.sharding", "ltsm_jax.hosts", "ltsm_jax.frequency"),
    ("ltsm_jax.layers",),
    ("ltsm_jax.models",),
    ("ltsm_jax.data",),
    ("ltsm_jax.tasks",),
    ("ltsm_jax.training",),
    ("ltsm_jax.methods", "ltsm_jax.landscape"),
    ("ltsm_jax.api",),
    ("ltsm_jax", "ltsm_jax.cli", "experiments"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
CONVERTERS_MAY_USE = ("ltsm_jax.trees", "ltsm_jax.storage", "ltsm_jax.models")
LAZY_CALL = ("ltsm_jax.models.library", "converters")  # load("<original checkpoint>")


def sources():
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports anywhere in it, in full: `from ltsm_jax import trees` is ltsm_jax.trees."""
    modules = {name_of(p) for p in sources()} | {name_of(p.parent / "__init__.py") for p in sources()}
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import; write it in full"
            assert node.module
            found |= {full if (full := f"{node.module}.{a.name}") in modules else node.module for a in node.names}
    return found


def part_of(module: str) -> str:
    """`ltsm_jax.models.timer` -> `ltsm_jax.models`; other packages -> their root."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "ltsm_jax" else parts[:1])


def offences(check) -> list[str]:
    return [f"{name_of(p)} imports {m}" for p in sources() for m in sorted(imports_of(p)) if check(name_of(p), m)]


def test_every_part_has_its_level():
    unplaced = {part_of(name_of(path)) for path in sources()} - LEVEL_OF.keys() - {"converters"}
    assert not unplaced, f"say in LEVELS where {unplaced} belong"


def test_imports_point_downwards():
    def upwards(importer, imported):
        part, other = part_of(importer), part_of(imported)
        if importer == "ltsm_jax" or other not in LEVEL_OF or part == "converters":
            return False
        return LEVEL_OF[other] > LEVEL_OF[part]

    assert not offences(upwards)


def test_converters_know_models_and_trees_only():
    def elsewhere(importer, imported):
        other = part_of(imported)
        return importer.startswith("converters") and other in LEVEL_OF and other not in CONVERTERS_MAY_USE

    assert not offences(elsewhere)


def test_the_library_reaches_converters_and_experiments_in_one_place():
    def outwards(importer, imported):
        return importer.startswith("ltsm_jax") and part_of(imported) in ("converters", "experiments")

    lazy = f"{LAZY_CALL[0]} imports {LAZY_CALL[1]}"
    assert [o for o in offences(outwards) if not o.startswith(lazy)] == []
    top = {id(node) for node in parse(ROOT / "ltsm_jax/models/library.py").body}
    for node in ast.walk(parse(ROOT / "ltsm_jax/models/library.py")):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("converters"):
            assert id(node) not in top, "the call to the converters must stay inside the function that needs it"


def test_only_models_and_layers_know_flax():
    def flax_elsewhere(importer, imported):
        return imported.split(".")[0] in ("flax", "haiku", "equinox") and part_of(importer) not in (
            "ltsm_jax.models",
            "ltsm_jax.layers",
        )

    assert not offences(flax_elsewhere)


def test_no_torch_at_run_time():
    foreign = ("torch", "torchvision", "lightning", "pytorch_lightning", "transformers", "tensorflow")

    def runs_it(importer, imported):  # comparing speed with the original needs the original
        return imported.split(".")[0] in foreign and not importer.startswith("experiments.benchmarks.")

    assert not offences(runs_it)


def undocumented(path: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring; the contract documents its own methods."""
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
            m for m in members if isinstance(m, functions) and not m.name.startswith("_") and m.name not in contract
        ]
        for item in (node, *methods):
            if not ast.get_docstring(item):
                missing.append(f"{path.relative_to(ROOT)}:{item.lineno}: {item.name}")
    return missing


def test_public_names_are_documented():
    benchmarks = ROOT / "experiments/benchmarks"  # scripts: the module's docstring says it all
    missing = [line for path in sources() if path.parent != benchmarks for line in undocumented(path)]
    assert not missing, "no docstring:\n" + "\n".join(missing)


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
                f"{path.relative_to(ROOT)}:{n}: {line.strip()[:120]}" for n, line in lines if machine.search(line)
            ]
    assert not found, "\n".join(found)


def test_committed_files_are_small():
    large = {str(p.relative_to(ROOT)): size for p in committed() if (size := p.stat().st_size) > 6e6}
    assert not large


def test_versions_agree():
    import tomllib

    import ltsm_jax

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ltsm_jax.__version__
    assert f"## [{ltsm_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_floors_are_what_ci_installs():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", d).groups() for d in project["dependencies"])
    pinned = dict(
        line.split("==") for line in (ROOT / ".ci/oldest.txt").read_text().splitlines() if not line.startswith("#")
    )
    pinned.pop("jaxlib")
    assert floors.keys() == pinned.keys()
    for name, floor in floors.items():
        assert (pinned[name] + ".").startswith(floor + "."), f"{name}: pyproject says {floor}, CI has {pinned[name]}"
