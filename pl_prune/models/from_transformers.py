"""Networks of transformers, by name or folder."""

from __future__ import annotations

from torch import nn

from pl_prune.core.types import PruneError


def load_network(kind: str, name: str, pretrained: bool) -> nn.Module:
    """Load a network for a task, in float32 and in training mode; its experts, if it has any, run one by one.

    Args:
        kind: A class of transformers, `AutoModelForCausalLM` say.
        name: A name on the Hugging Face Hub, or a folder with config.json (and weights, if they are wanted).
        pretrained: Whether to load weights; else they are drawn anew.

    Returns:
        The network.

    Raises:
        PruneError: If transformers is missing, or there is no such network.
    """
    try:
        import transformers
    except ImportError as error:
        raise PruneError(
            f"Expected transformers for the network {name!r}; found it missing. Run `pip install 'pl_prune[zoo]'`."
        ) from error
    auto = getattr(transformers, kind)
    try:
        load = transformers.AutoConfig.from_pretrained
        network = auto.from_pretrained(name) if pretrained else auto.from_config(load(name))
    except (OSError, ValueError) as error:
        raise PruneError(
            f"Expected a network for {kind} under the name {name!r}; found none ({str(error).splitlines()[0][:200]}). Set "
            "model.init_args.network to a name on the Hugging Face Hub or to a folder with config.json and weights, or "
            "model.init_args.pretrained=false to do with config.json."
        ) from error
    if hasattr(network, "set_experts_implementation"):  # products of all experts at once want widths of multiples of 8
        network.set_experts_implementation("eager")
    return network.float().train()  # from_pretrained returns it in evaluation mode, which Lightning would keep
