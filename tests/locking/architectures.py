"""Small models of many kinds, most of them written by others, and how each is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 4, 2, 2), nn.GroupNorm(1, 4), nn.SiLU())
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        low = self.down(x)
        return self.head(self.up(torch.cat([low, self.middle(low)], 1)))


class SharedNorm(nn.Module):
    """One norm module in two places, under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm_a = self.norm_b = nn.LayerNorm(8)

    def forward(self, x):
        return self.head(self.norm_b(self.b(torch.tanh(self.norm_a(self.a(x))))))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 2, 2)
        self.c3, self.fc = nn.Conv2d(12, 12, 5, 1, 2), nn.Linear(192, 10)

    def forward(self, x):
        for layer in (self.c1, self.c2, self.c3):
            x = torch.sigmoid(layer(x))
        return self.fc(x.flatten(1))


class FunctionalNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.head(self._normed(self.b(torch.relu(self.a(x)))))

    def _normed(self, x):
        return F.layer_norm(x, (8,), self.gain, self.shift)


@dataclass(frozen=True)
class Architecture:
    make: Any
    shape: tuple[int, ...] = (4, 3, 16, 16)
    trains: bool = True
    vocabulary: int = 0

    def model(self):
        torch.manual_seed(0)
        return self.make()

    def inputs(self):
        if self.vocabulary:
            return torch.arange(self.shape[0] * self.shape[1]).view(self.shape) % self.vocabulary
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(1))

    def call(self, model):
        """The output tensor; the same dropout at every call."""
        torch.manual_seed(3)
        output = model(self.inputs())
        return output if isinstance(output, torch.Tensor) else output[0]

    def loss(self, model):
        output = self.call(model)
        return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).mean()


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


_BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
_VIT = {**_BERT, "image_size": 16, "patch_size": 8}

ARCHITECTURES = {
    "hf-resnet": Architecture(
        lambda: transformers.ResNetModel(
            transformers.ResNetConfig(
                embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=None
            )
        ),
        shape=(4, 3, 32, 32),
    ),
    "hf-vit": Architecture(
        lambda: transformers.ViTModel(transformers.ViTConfig(**_VIT), add_pooling_layer=False)
    ),
    "hf-convnext": Architecture(
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
        ),
    ),
    "hf-mobilenet": Architecture(
        lambda: transformers.MobileNetV2Model(
            transformers.MobileNetV2Config(depth_multiplier=0.1, image_size=32), add_pooling_layer=False
        ),
        shape=(4, 3, 32, 32),
    ),
    "hf-bert": Architecture(
        lambda: transformers.BertModel(
            transformers.BertConfig(**_BERT, vocab_size=20), add_pooling_layer=False
        ),
        shape=(2, 5),
        vocabulary=20,
    ),
    "mlp": Architecture(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (4, 6)
    ),
    "unet-groupnorm": Architecture(UNet),
    "cnn-1d": Architecture(
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 3)),
        (4, 2, 12),
    ),
    "cnn-3d": Architecture(
        lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 2)),
        (3, 1, 5, 5, 5),
    ),
    "torch-transformer": Architecture(_encoder, (2, 5, 8)),
    "torch-transformer-prenorm": Architecture(lambda: _encoder(norm_first=True, bias=False), (2, 5, 8)),
    "shared-norm": Architecture(SharedNorm, (4, 6)),
    "rmsnorm": Architecture(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8)),
        (4, 6),
    ),
    "instancenorm": Architecture(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.InstanceNorm2d(4),
        )
    ),
    "transposed-conv": Architecture(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3), nn.Conv2d(3, 3, 1)
        )
    ),
    "sync-batchnorm": Architecture(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        trains=False,
    ),
    "lenet": Architecture(LeNet),
    "lstm-layernorm": Architecture(
        lambda: nn.Sequential(nn.Embedding(20, 6), nn.LayerNorm(6), nn.LSTM(6, 5, batch_first=True)),
        shape=(2, 5),
        vocabulary=20,
    ),
}
