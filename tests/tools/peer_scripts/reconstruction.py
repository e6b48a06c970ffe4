"""Digits repaired from two damaged views: reconstruction and contrast, as MONAI's tutorial on self-supervision has it.

But for its L1 loss: that gradient jumps where a residual changes sign, which parts any two runs that differ by a bit.
"""

import torch
from monai.losses import ContrastiveLoss
from monai.networks.nets import AutoEncoder
from sklearn.datasets import load_digits
from torch.nn import MSELoss
from torch.utils.data import DataLoader

torch.manual_seed(0)
images = torch.tensor(load_digits().images[:1600], dtype=torch.float32).unsqueeze(1) / 16
train_loader = DataLoader(images, batch_size=64, shuffle=True)


def damaged(image):
    """A third of the pixels is gone."""
    return image * (torch.rand(image.shape) > 0.33)


model = AutoEncoder(spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), strides=(2, 2))
recon_loss = MSELoss()
contrastive_loss = ContrastiveLoss(temperature=0.05)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

curve = []
for _ in range(8):
    model.train()
    for batch_data in train_loader:
        optimizer.zero_grad()
        outputs_v1, outputs_v2 = model(damaged(batch_data)), model(damaged(batch_data))
        r_loss = recon_loss(outputs_v1, batch_data)
        cl_loss = contrastive_loss(outputs_v1.flatten(start_dim=1), outputs_v2.flatten(start_dim=1))
        total_loss = r_loss + cl_loss * r_loss
        total_loss.backward()
        optimizer.step()
        curve.append(total_loss.item())
