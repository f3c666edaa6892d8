"""The README's Python runs as printed. The stage `wheel` of .ci/run runs it from an installed wheel
too.
"""

import pytest
import readme_blocks

# These take longest; the stage `wheel` runs them all.
LONG = (0, 2)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=pytest.mark.slow if n in LONG else ())
        for n in range(len(readme_blocks.BLOCKS))
    ],
)
def test_block(number, tmp_path, monkeypatch):
    readme_blocks.write_tables(tmp_path)
    monkeypatch.chdir(tmp_path)
    readme_blocks.run(number)


def test_there_is_python_to_run():
    assert len(readme_blocks.BLOCKS) >= 2
