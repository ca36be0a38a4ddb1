"""The network that every lesson trains: torchvision's ResNet-18, adapted to small images."""

from torch import nn
from torchvision.models import resnet18


def build_model(num_classes: int, image_size: int = 32) -> nn.Module:
    """Return a ResNet-18 with random weights: float32 (batch, 3, size, size) to logits (batch, num_classes)."""
    # Source: He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385).
    model = resnet18(num_classes=num_classes)
    if image_size < 64:  # its 7×7 convolution with stride 2 would leave 8×8 of 32×32 for the first block, not 16×16
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    return model
