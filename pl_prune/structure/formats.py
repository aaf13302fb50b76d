"""What `export` writes, one format after another, and how it is run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError
from pl_prune.structure.manifest import CUTS, load_shrunk, save_shrunk
from pl_prune.structure.running import Inputs, as_call, plain_attention, tensors_of

Run: TypeAlias = Callable[[Inputs], list[Tensor]]
_PROTOBUF = 1 << 30  # bytes of weights that go into an ONNX file itself; the format allows 2 GB


def write_weights(model: nn.Module, part: Path) -> None:
    """Write safetensors: of a shrunk network with its cuts, else the state_dict.

    Args:
        model: The network.
        part: The file.
    """
    from safetensors.torch import save

    if hasattr(model, CUTS):
        save_shrunk(model, part)
    else:  # clones: the format knows no tensors that share memory
        part.write_bytes(save({name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}))


def load_weights_of(model: nn.Module, part: Path, dense: nn.Module | None) -> Run:
    """Read what `write_weights` wrote.

    Args:
        model: The network that was written.
        part: The file.
        dense: The network before `shrink`, if it is to be built from that; else the tensors go into a copy.

    Returns:
        The network of the file.
    """
    from safetensors.torch import load_file

    if dense is not None and hasattr(model, CUTS):
        return called(load_shrunk(dense, part).eval())
    again = copy.deepcopy(model).eval()
    again.load_state_dict(load_file(part), strict=False)  # of a shrunk network each tied tensor is there once
    return called(again)


def program_of(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """Export a copy of a network; whatever that returns, the program returns tensors.

    Args:
        model: The network.
        inputs: A batch.
        dynamic_batch: Whether the program takes any number of samples.

    Returns:
        The program, without samples of the data.

    Raises:
        PruneError: If the network cannot be exported.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.register_forward_hook(_tensors_alone)
    size, batch = sample_count(inputs), torch.export.Dim("batch")
    args, kwargs = as_call(sized(inputs, 2) if dynamic_batch else inputs)
    shapes: Any = None
    if dynamic_batch:
        shapes = tree_map(lambda leaf: {0: batch} if _is_batch(leaf, size) else None, as_call(inputs)[bool(kwargs)])
    try:
        with untouched(model), torch.no_grad(), plain_attention():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise PruneError(
            f"Expected {type(model).__name__} to be exported by torch.export; found {type(error).__name__}: {str(error)[:500]}. "
            "Pass dynamic_batch=False where the batch is what it stumbles over; format='torch' writes the weights alone."
        ) from error
    program.example_inputs = tree_map(_blank, (args, kwargs))  # samples of the data do not belong into the file
    return program


def _blank(leaf: Any) -> Any:
    """Return a zero of a tensor's shape, which a file holds once; torch 2.6 wants examples of the right structure."""
    return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _tensors_alone(_module: nn.Module, _inputs: Any, out: Any) -> Any:
    """Make tensors of what a network returns, so that its classes are not needed to load the program."""
    tensors = tensors_of(out)
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def write_graph(program: torch.export.ExportedProgram, part: Path) -> Run:
    """Write an ONNX file and load it.

    Args:
        program: What to write.
        part: The file.

    Returns:
        The network of the file, in onnxruntime on the CPU.

    Raises:
        PruneError: If a package is missing, torch is older than 2.7, or ONNX lacks an operator.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise PruneError(
                f"Expected {package}, to write and check ONNX files; found it missing. Run `pip install 'pl_prune[export]'`."
            ) from error
    if torch.__version__ < "2.7":  # whose exporter stumbles over linear layers and any onnxscript of today
        raise PruneError(
            f"Expected torch 2.7 or newer, to write ONNX files; found {torch.__version__}. Install that, or use format='torch.export'."
        )
    import onnxruntime

    apart = sum(t.nbytes for t in program.state_dict.values()) > _PROTOBUF
    try:
        torch.onnx.export(program, (), part, dynamo=True, external_data=apart, verbose=False)
    except Exception as error:
        raise PruneError(
            f"Expected a network of operators that ONNX has; found {type(error).__name__}: {str(error)[:500]}. "
            "Use format='torch.export'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])
    names, used = program.graph_signature.user_inputs, {one.name for one in session.get_inputs()}

    def run(inputs: Inputs) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(as_call(inputs)) if leaf is not None]
        given = {n: leaf.detach().cpu().numpy() for n, leaf in zip(names, leaves, strict=True) if n in used}
        return [torch.from_numpy(found) for found in session.run(None, given)]

    return run


def called(module: nn.Module) -> Run:
    """Run a module.

    Args:
        module: A network or the module of a program.

    Returns:
        What runs it, without gradients.
    """

    def run(inputs: Inputs) -> list[Tensor]:
        args, kwargs = as_call(inputs)
        with torch.no_grad(), plain_attention():
            return tensors_of(module(*args, **kwargs))

    return run


def moved(inputs: Any, device: torch.device | str) -> Any:
    """Move the tensors of inputs.

    Args:
        inputs: Tensors in containers.
        device: Where to.

    Returns:
        The same containers.
    """
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)


def sample_count(inputs: Any) -> int:
    """Return the number of samples of a batch.

    Args:
        inputs: Tensors in containers.

    Returns:
        The length of the first tensor.

    Raises:
        PruneError: If there is none.
    """
    first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), None)
    if first is None:
        raise PruneError(
            "Expected inputs with a tensor of samples; found none. Pass one batch as the model's forward takes it."
        )
    return len(first)


def _is_batch(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size


def sized(inputs: Any, count: int) -> Any:
    """Return so many samples of a batch.

    Args:
        inputs: Tensors in containers; those as long as the first one are batches.
        count: How many: the first ones, again and again if there are fewer.

    Returns:
        The same containers.
    """
    size = sample_count(inputs)

    def take(leaf: Any) -> Any:
        return leaf[torch.arange(count, device=leaf.device) % size] if _is_batch(leaf, size) else leaf

    return dict(tree_map(take, dict(inputs))) if isinstance(inputs, Mapping) else tree_map(take, inputs)
