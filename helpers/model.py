"""The network that every lesson trains: torchvision's ResNet-18, fitted to small pictures."""

from torch import nn
from torchvision.models import resnet18


def build_model(num_classes: int) -> nn.Module:
    """Return a ResNet-18 with random weights for pictures of 32×32 pixels.

    The standard network's first convolution, 7×7 with stride 2, and its max-pooling suit 224×224 photographs: of a
    32×32 picture they would leave 8×8 for the first residual block and 1×1 at the end. Here a 3×3 convolution with
    stride 1 stands in for the first one, so that the first block sees 16×16.

    Args:
        num_classes: the number of classes, 2 or more.

    Returns:
        A module from float32 (batch, 3, 32, 32) to logits, float32 (batch, num_classes).

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385).
    """
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    return model
