"""The model zoo: plain architectures, locked by `fedkl.lock` like anyone's model.

A new model is any `nn.Module` in a new file; a line in `MODELS` (registry.py) makes it known to the command
line.

* lenet.py, resnet_cifar.py, resnet.py, vgg.py, vit.py: one family each
* residual.py, initialization.py, checks.py: what families share
* preprocessing.py: standardization inside the model
* registry.py: `MODELS` and `build_model`
"""

from fedkl.models.lenet import LeNet
from fedkl.models.registry import MODELS, ModelEntry, ModelInitialization, build_model
from fedkl.models.resnet import ResNet
from fedkl.models.resnet_cifar import CifarResNet
from fedkl.models.vgg import VGG
from fedkl.models.vit import ViT

__all__ = [
    "MODELS",
    "VGG",
    "CifarResNet",
    "LeNet",
    "ModelEntry",
    "ModelInitialization",
    "ResNet",
    "ViT",
    "build_model",
]
