"""`pl-prune export`: a checkpoint as a file that runs elsewhere, and what it is worth beside the dense network."""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pl_prune.callbacks.structured import StructuredPruning
    from pl_prune.commands.recipe import RealInputs
    from pl_prune.report.table import Part
    from pl_prune.structure.export import Exported

_RUNTIMES = {"torch": "torch", "torch.export": "torch, by the exported program", "onnx": "onnxruntime"}


@dataclass(frozen=True)
class Row:
    """A network of the table.

    Args:
        network: "dense", "masked" or "shrunk".
        params: Its parameters.
        nonzero: Those that are not zero.
        macs: Multiply-accumulates of its weights for one sample, zeros counted.
        bytes: Size of its file.
        latency: Quartiles of the seconds of one run.
        max_abs: The largest difference of its file's outputs from the checkpoint's network; None for another network.
        max_rel: The same relative to the largest output.
    """

    network: str
    params: int
    nonzero: int
    macs: int
    bytes: int
    latency: tuple[float, float, float]
    max_abs: float | None
    max_rel: float | None


def run(argv: Sequence[str]) -> int:
    """Write a checkpoint as a file, and compare.

    Args:
        argv: Arguments after `export`; those that are not its own go to the recipe's parser, as those of `fit` do.

    Returns:
        Exit status: 0.

    Raises:
        PruneError: If there is no checkpoint or recipe, or the network cannot be exported.
    """
    options, rest = _parser().parse_known_args(argv)

    import torch

    from pl_prune.commands.checkpoint import network_of
    from pl_prune.commands.recipe import Recipe, recipe_words
    from pl_prune.core.types import PruneError, check_count
    from pl_prune.report.latency import device_name
    from pl_prune.report.terminal import show, show_json
    from pl_prune.structure.formats import moved, sample_count

    check_count("--batch", options.batch)
    check_count("--repeats", options.repeats)
    device = _device(options.device)
    if not Path(options.ckpt).is_file():
        raise PruneError(f"Expected a checkpoint; found none at {options.ckpt!r}. Look at the path.")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    taken: list[tuple[Any, str]] = []

    def look(bridge: RealInputs, structured: StructuredPruning | None) -> None:
        taken.append((bridge.inputs(options.batch), bridge.source))

    words = [*recipe_words(options.config, options.ckpt), *rest, "--weights=null", "--ckpt_path=null"]
    model = Recipe(words, look).model
    ((inputs, source),) = taken
    inputs, dense = moved(inputs, device), copy.deepcopy(model).to(device).eval()
    network, sliced = network_of(dense, options.ckpt)
    written, rows, why = _compare(dense, network.eval(), sliced, inputs, options)
    ran_on = torch.device("cpu") if options.format == "onnx" else device
    told = {
        "file": str(written.path),
        "format": options.format,
        "networks": [asdict(row) for row in rows],
        "inputs": {"samples": sample_count(inputs), "source": source},
        "latency": {
            "repeats": options.repeats,
            "batch": sample_count(inputs),
            "threads": torch.get_num_threads(),
            "device": device_name(ran_on),
            "runtime": _RUNTIMES[options.format],
        },
        "verdict": _verdict(rows, why),
    }
    if options.json:
        show_json(told, sys.stdout)
    else:
        show(_parts(told, rows), sys.stdout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pl-prune export",
        description="Write the network of a checkpoint to a file that runs elsewhere, without the units that its zeros remove, once "
        "the file computes the same on the recipe's data; then time it beside the dense and the masked network. Further options are "
        "those of `pl-prune fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", required=True, help="a checkpoint of a run, a state_dict, or .safetensors")
    parser.add_argument("--config", action="append", help="the recipe; default: config.yaml of the checkpoint's run")
    parser.add_argument(
        "--format",
        default="torch.export",
        choices=("torch", "torch.export", "onnx"),
        help="torch (weights, for plp.load_shrunk), torch.export (a program, the default) or onnx",
    )
    parser.add_argument("--out", help="the file; default: beside the checkpoint, under its name")
    parser.add_argument("--batch", type=int, default=64, help="samples to compare and to time with (default 64)")
    parser.add_argument("--fixed-batch", action="store_true", help="write a file for that number of samples alone")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each network that are timed (default 20)")
    parser.add_argument("--device", default="cpu", help="where programs run, here and later (default cpu)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    return parser


def _compare(
    dense: nn.Module, network: nn.Module, sliced: bool, inputs: Any, options: argparse.Namespace
) -> tuple[Exported, list[Row], str]:
    """Write the file, and measure it beside the networks that it comes from; say why nothing was sliced off, if so."""
    import torch

    from pl_prune.report.latency import time_in_turn
    from pl_prune.structure.export import export

    zeros = any(p.ndim > 1 and not bool(p.all()) for p in network.parameters())
    small, macs, why = _without_zero_units(dense, network, sliced, inputs)
    kind = "masked" if small or (zeros and not sliced) else "shrunk" if sliced else "dense"
    networks = {"dense": dense, kind: network, **({"shrunk": small} if small else {})}
    last, dynamic = list(networks)[-1], not options.fixed_batch
    files = {last: export(networks[last], _out(options), inputs, options.format, dynamic, dense, network)}
    with TemporaryDirectory() as folder:
        for name in list(networks)[:-1]:
            files[name] = export(networks[name], Path(folder) / name, inputs, options.format, dynamic, dense)
        device = torch.device("cpu" if options.format == "onnx" else options.device)
        runs = {name: partial(files[name].run, inputs) for name in networks}
        times = time_in_turn(runs, device, options.repeats)
    rows = [
        Row(
            name,
            sum(p.numel() for p in one.parameters()),
            sum(int(p.count_nonzero()) for p in one.parameters()),
            sum(n * one.get_parameter(w).numel() // dense.get_parameter(w).numel() for w, n in macs.items()),
            files[name].bytes,
            times[name],
            None if one is dense else files[name].max_abs,
            None if one is dense else files[name].max_rel,
        )
        for name, one in networks.items()
    ]
    return files[last], rows, why


def _device(name: str) -> torch.device:
    import torch

    from pl_prune.core.types import PruneError

    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise PruneError(
            f"Expected a device of this machine; found {name!r} ({str(error).splitlines()[0][:150]}). Take --device cpu, or cuda where "
            "torch sees a GPU."
        ) from error


def _out(options: argparse.Namespace) -> Path:
    from pl_prune.core.types import PruneError
    from pl_prune.structure.export import SUFFIXES

    out = Path(options.out or Path(options.ckpt).with_suffix(SUFFIXES[options.format]))
    if out.resolve() == Path(options.ckpt).resolve():
        raise PruneError(f"Expected another file than the checkpoint; found {str(out)!r}. Name one by --out.")
    return out


def _without_zero_units(
    dense: nn.Module, network: nn.Module, sliced: bool, inputs: Any
) -> tuple[nn.Module | None, dict[str, int], str]:
    """Slice zero units off, if there are any; return MACs by weight of the dense network, and why nothing was sliced."""
    from pl_prune.core.masks import MaskSet
    from pl_prune.core.types import PruneError
    from pl_prune.report.cost import layer_macs
    from pl_prune.structure.formats import sized
    from pl_prune.structure.running import as_call
    from pl_prune.structure.shrink import shrink
    from pl_prune.structure.trace import trace_groups

    two = sized(inputs, 2)
    macs: dict[str, int] | None = None
    try:
        groups = trace_groups(dense, two)
        macs = groups.macs
        masks = MaskSet.from_zeros(dict(network.named_parameters()))
        return shrink(network, masks, two, None if sliced else groups).eval(), macs, ""
    except PruneError as error:
        if macs is None:  # of layers alone
            args, kwargs = as_call(two)
            macs = {name: n // 2 for name, n in layer_macs(dense, lambda: dense(*args, **kwargs)).items()}
        return None, macs, str(error)


def _verdict(rows: Sequence[Row], why: str) -> str:
    """Say what was gained, and that masks gain nothing."""
    found = {row.network: row for row in rows}
    if len(rows) == 1:
        return "Nothing of this checkpoint is pruned: the file holds the dense network."
    dense = found["dense"]
    slower = {name: row.latency[1] / dense.latency[1] for name, row in found.items()}
    said = []
    if "masked" in found:
        noise = "" if slower["masked"] > 0.9 else ", which the machine did, as the kernels are the same"
        said.append(
            f"Masks alone do not speed up: the masked network takes {slower['masked']:.2f} times as long as the dense one{noise}."
        )
    if "shrunk" in found:
        share = found["shrunk"].macs / max(dense.macs, 1)
        said.append(f"Sliced, it takes {slower['shrunk']:.2f} times as long as dense, with {share:.2f} of the MACs.")
    else:
        said.append(f"No unit could be sliced off, so the file holds the masked network ({why})")
    return " ".join(said)


def _parts(told: dict[str, Any], rows: Sequence[Row]) -> list[Part]:
    from pl_prune.report.table import Facts, Table

    lines = [
        (
            row.network,
            f"{row.params:,}",
            f"{row.nonzero:,}",
            f"{row.macs:,}",
            f"{row.bytes:,}",
            "{1:.4g} ({0:.4g} to {2:.4g})".format(*(1000 * t for t in row.latency)),
            "-" if row.max_abs is None else f"{row.max_abs:.1e} ({row.max_rel:.1e})",
        )
        for row in rows
    ]
    head = ("network", "parameters", "not zero", "MACs", "bytes", "latency in ms", "difference")
    where, many = told["latency"], "" if told["latency"]["threads"] == 1 else "s"
    facts = [
        ("file", f"{told['file']} ({told['format']})"),
        (
            "latency",
            f"median and quartiles of {where['repeats']} runs of each file in turn, batch of {where['batch']}, {where['threads']} "
            f"thread{many}, {where['device']}, {where['runtime']}",
        ),
        (
            "difference",
            f"of the file's outputs from the checkpoint's network in torch, the largest (relative to the largest output), on "
            f"{told['inputs']['samples']} samples of {told['inputs']['source']}",
        ),
    ]
    return [Table(head, lines), "", Facts(facts), "", told["verdict"]]
