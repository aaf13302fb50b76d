"""`export`: a network as a file that runs elsewhere, compared with the network before it takes its place."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from pl_prune.core.types import PruneError, check_choice
from pl_prune.structure.formats import (
    Run,
    called,
    load_weights_of,
    moved,
    program_of,
    sample_count,
    sized,
    write_graph,
    write_weights,
)
from pl_prune.structure.running import Inputs, as_call, difference, outputs

Format: TypeAlias = Literal["torch", "torch.export", "onnx"]
SUFFIXES: dict[str, str] = {"torch": ".safetensors", "torch.export": ".pt2", "onnx": ".onnx"}
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the largest output; 2e-2 in half precision


@dataclass(frozen=True)
class Exported:
    """A file, and how far what it computes is from the network that was exported.

    Args:
        path: The file.
        format: Its format.
        bytes: Its size, with weights that lie beside it.
        max_abs: The largest difference of an output.
        max_rel: The same relative to the largest output.
        run: The network of the file as loaded back: from inputs to the tensors of the output.
    """

    path: Path
    format: Format
    bytes: int
    max_abs: float
    max_rel: float
    run: Run = field(repr=False, compare=False)


def export(
    model: nn.Module,
    path: str | Path,
    inputs: Inputs,
    format: Format = "torch.export",
    dynamic_batch: bool = True,
    dense: nn.Module | None = None,
    reference: nn.Module | None = None,
) -> Exported:
    """Write a network in evaluation mode to a file, if the file computes the same.

    "torch" is safetensors: of a network from `shrink` what `save_shrunk` writes, else its state_dict. "torch.export" is a
    program that `torch.export.load` runs, "onnx" a graph for any ONNX runtime; neither needs the code of the network. The file is
    loaded back and run on the inputs (and on one sample of them, where the batch is dynamic); it takes its place only if its
    outputs agree: to 1e-4 of the largest output in float32, 1e-10 in float64, 2e-2 in half precision.

    Args:
        model: The network, dense, masked or shrunk; it is left as it is. Programs run on its device, ONNX anywhere.
        path: Where to; the suffix of the format is added if it is not there.
        inputs: Real ones, as for `trace_groups`: a tensor, a tuple or a dict. Tensors as long as the first one are batches.
        format: What to write.
        dynamic_batch: Whether the file takes any number of samples, or that of the inputs alone.
        dense: For "torch" and a shrunk network, the network before `shrink`: the file is then read back by `load_shrunk`.
        reference: What the file has to agree with, the masked network that was shrunk say; the network itself if None.

    Returns:
        The file and the differences; outputs that are not tensors are left out of programs and graphs.

    Raises:
        PruneError: If the network cannot be exported, a package is missing, or the outputs differ; no file is left then, and one
            that was there stays.

    >>> done = export(nn.Linear(4, 2), getfixture("tmp_path") / "small", torch.randn(3, 4))
    >>> done.path.name, done.max_abs
    ('small.pt2', 0.0)
    """
    check_choice("format", format, get_args(Format))
    path = Path(path)
    path = path if path.suffix == SUFFIXES[format] else path.with_name(path.name + SUFFIXES[format])
    reference = reference or model
    if format == "onnx":
        model, reference = (copy.deepcopy(network).cpu() for network in (model, reference))
        inputs = moved(inputs, "cpu")
    cases = [inputs, sized(inputs, 1)] if dynamic_batch else [inputs]
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        if format == "torch":
            write_weights(model, part)
            run = load_weights_of(model, part, dense)
        else:
            program = program_of(model, inputs, dynamic_batch)
            if format == "onnx":
                run = write_graph(program, part)
            else:
                torch.export.save(program, part)
                run = called(torch.export.load(part).module())
        max_abs, max_rel = _compare(reference, run, cases, format)
        files = sorted(Path(folder).iterdir(), key=lambda file: file.name == part.name)  # the file itself comes last
        size = sum(file.stat().st_size for file in files if file.suffix != ".json")
        for file in files:
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
            file.replace(path.parent / file.name)
    return Exported(path, format, size, max_abs, max_rel, run)


def _compare(model: nn.Module, run: Run, cases: list[Inputs], format: str) -> tuple[float, float]:
    """Return the largest absolute and relative differences of a file's outputs."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    tolerance = max((_TOLERANCES.get(dtype, 2e-2) for dtype in dtypes), default=1e-4)
    worst_abs = worst_rel = 0.0
    for case in cases:
        expected = [t.cpu() for t in outputs(model, *as_call(case))]
        try:
            found = [t.cpu() for t in run(case)]
        except Exception as error:
            raise PruneError(
                f"Expected the {format} file to run on {sample_count(case)} samples; found {type(error).__name__}: {str(error)[:300]}. "
                "No file was left. Pass dynamic_batch=False if the network takes one number of samples alone."
            ) from error
        pairs = list(zip(expected, found, strict=False))
        rel = max((difference(a, b) for a, b in pairs), default=float("inf"))
        if len(expected) != len(found) or rel > tolerance:
            raise PruneError(
                f"Expected the {format} file to agree with the network to {tolerance:.0e} of the largest output; found {rel:.1e} on "
                f"{sample_count(case)} samples, {len(found)} outputs for {len(expected)}. No file was left. Look for a forward pass "
                "that is random in evaluation mode, or depends on values; format='torch' writes the weights alone."
            )
        worst_rel = max(worst_rel, rel)
        worst_abs = max(
            worst_abs, *((a.double() - b.double()).nan_to_num(0, 0, 0).abs().max().item() for a, b in pairs)
        )
    return worst_abs, worst_rel
