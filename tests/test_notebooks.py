"""The notebooks run from top to bottom, in small, and show pictures."""

import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
nbformat = pytest.importorskip("nbformat")
NAMES = [
    pytest.param(path.name, marks=[pytest.mark.long] if path.stem == "distil_a_student" else [])
    for path in sorted(FOLDER.glob("*.ipynb"))
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, monkeypatch):
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.setenv("SQUARES", "2")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert not [output for output in shown if output.output_type == "error"]
