"""SimCLR of digits: backbone, projection head and two views, as lightly's documentation writes it."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader


class SimCLR(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(144, 64, 32)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


def transform(image):
    """Moved by up to a pixel, and noise."""
    across, down = torch.randint(-1, 2, (2,)).tolist()
    return image.roll((across, down), (1, 2)) + 0.1 * torch.randn(image.shape)


torch.manual_seed(0)
images = torch.tensor(load_digits().images[:1600], dtype=torch.float32).unsqueeze(1) / 16
dataset = [(image, image) for image in images]
dataloader = DataLoader(
    dataset,
    batch_size=64,
    shuffle=True,
    collate_fn=lambda pairs: [torch.stack([transform(view) for view in views]) for views in zip(*pairs)],
)

model = SimCLR(nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU()))
criterion = NTXentLoss(temperature=0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

curve = []
for _ in range(8):
    for x0, x1 in dataloader:
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
