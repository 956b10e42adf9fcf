"""The notebook runs from top to bottom, offline, and is committed without outputs."""

from __future__ import annotations

import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "first_conversion.ipynb"


def test_outputs_are_not_committed() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_the_notebook_runs_in_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began  # of the kernel, which has ended
    assert 1 < seconds < 60
    printed = "\n".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert "6 of 6 swapped" in printed and "after attention_transfer" in printed and "after finetune" in printed
    assert "The old house stood" in printed and "linear off" in printed
    sizes = {line.split(": ")[1] for line in printed.splitlines() if line.startswith(("64 tokens", "512 tokens"))}
    assert len(sizes) == 1, "the decoding state grew with the context"
