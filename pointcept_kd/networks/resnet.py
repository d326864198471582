"""Residual networks of images, as trunks: no pooling, no classes, torchvision's parameter names.

Strides of the later stages may be replaced by dilation, so that the features keep up to a quarter of the image's side.
At the places that a network with all its strides has, a dilated one has the same numbers from the same weights.

He et al., 2016, arXiv:1512.03385; dilation in place of strides: Yu et al., 2017, arXiv:1705.09914, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pointcept_kd.host import InputError

# Depths of the four stages, width of the first, and whether blocks are bottlenecks.
RESNETS: dict[str, dict] = {
    "resnet18": dict(depths=(2, 2, 2, 2), width=64, bottleneck=False),
    "resnet34": dict(depths=(3, 4, 6, 3), width=64, bottleneck=False),
    "resnet50": dict(depths=(3, 4, 6, 3), width=64, bottleneck=True),
}
EXPANSION = 4
# ImageNet's, of channels in 0 .. 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _conv3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each with BatchNorm, around which the input is added.

    Args:
        in_channels, width: of input and output.
        stride: of the first convolution.
        before: dilation of the first convolution, that of the input.
        dilation: of the second.
        project: a 1 x 1 convolution on the way around.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, before: int, dilation: int, project: bool
    ) -> None:
        super().__init__()
        self.conv1 = _conv3(in_channels, width, stride, before)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, width, h / stride, w / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution, each with BatchNorm, around which the input is added.

    Args:
        in_channels, width: of the input, and of the 3 x 3 convolution; the output has 4 widths.
        stride: of the 3 x 3 convolution.
        before: its dilation, that of the input.
        dilation: of what follows; there is no such convolution in this block.
        project: a 1 x 1 convolution on the way around.
    """

    expansion = EXPANSION

    def __init__(
        self, in_channels: int, width: int, stride: int, before: int, dilation: int, project: bool
    ) -> None:
        super().__init__()
        out = width * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width, stride, before)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(in_channels, out, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, 4 width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network without pooling and classes.

    Without classes ResNet-18 has 11,176,512 parameters, ResNet-34 21,284,672 and ResNet-50 23,508,032.

    Args:
        depths: blocks of each stage.
        width: channels of the stem and of the first stage's 3 x 3 convolutions, doubled per stage.
        bottleneck: blocks are `Bottleneck`, else `BasicBlock`.
        stride: pixels of the image per feature, 4, 8, 16 or 32. Stages that may not halve are dilated instead: at
            stride 4 their 3 x 3 convolutions have dilation 2, 4 and 8, the first one of a stage that of the stage
            before.

    Raises:
        InputError: for another stride, depths that are not four numbers of 1 or more, or no width.
    """

    mean, std = MEAN, STD

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        bottleneck: bool = True,
        stride: int = 4,
    ) -> None:
        super().__init__()
        if stride not in (4, 8, 16, 32):
            raise InputError(f"stride={stride!r} is none of 4, 8, 16, 32")
        if len(depths) != 4 or min(depths) < 1 or width < 1:
            raise InputError(
                f"depths={tuple(depths)}, width={width}: expected four depths and a width, of 1 or more"
            )
        self.stride = self.multiple = stride
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        block = Bottleneck if bottleneck else BasicBlock
        channels, reached, dilation = width, 4, 1
        for stage, depth in enumerate(depths):
            before, step, wide = dilation, 1, width * 2**stage
            if stage and reached < stride:
                step, reached = 2, reached * 2
            elif stage:
                dilation *= 2
            # Only the first block of a stage may change size or width; torchvision gives it a shortcut where it does.
            blocks = []
            for index in range(depth):
                out = wide * block.expansion
                project = index == 0 and (stage > 0 or channels != out)
                first = (step, before) if index == 0 else (1, dilation)
                blocks.append(block(channels, wide, *first, dilation, project))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.out_channels = channels

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c i j"]:
        """Features of normalised images."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x
