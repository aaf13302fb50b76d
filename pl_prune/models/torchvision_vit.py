"""torchvision's ViT-B/16, ready to be pruned before it is fine-tuned."""

from __future__ import annotations

from torch import nn

from pl_prune.core.types import PruneError


def vit_b_16(image_size: int = 224, num_classes: int = 1000, weights: str | None = None) -> nn.Module:
    """Build torchvision's ViT-B/16 with a new output layer, and positions interpolated to the size of the images.

    torchvision starts the output layer of a ViT at zero, and then no gradient reaches any other layer: every score that
    needs one would be zero. Here it starts as any linear layer does.

    Args:
        image_size: Side of the images in pixels, a multiple of 16.
        num_classes: Number of logits.
        weights: Of torchvision, "IMAGENET1K_V1" for example, downloaded when first asked for; None for none.

    Returns:
        The network. Input (N, 3, image_size, image_size); output (N, num_classes).

    Raises:
        PruneError: If patches do not divide the image, or torchvision is missing.
    """
    if image_size < 16 or image_size % 16:
        raise PruneError(
            f"Expected images of a multiple of 16 pixels; found {image_size}. Take {image_size // 16 * 16 or 16}."
        )
    try:
        from torchvision import models
    except ImportError as error:
        raise PruneError(
            "Expected torchvision for its ViT-B/16; found it missing. Run `pip install 'pl_prune[examples]'`."
        ) from error
    network = models.vit_b_16(image_size=image_size)
    if weights is not None:
        state = models.vit_b_16(weights=weights).state_dict()
        network.load_state_dict(models.vision_transformer.interpolate_embeddings(image_size, 16, state))
    network.num_classes = num_classes
    network.heads.head = nn.Linear(network.hidden_dim, num_classes)
    return network
