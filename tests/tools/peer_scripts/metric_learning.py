"""Digits embedded by their labels: a training loop as pytorch-metric-learning's documentation writes them."""

import torch
from pytorch_metric_learning import losses
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:1600], dtype=torch.float32).unsqueeze(1) / 16
dataloader = DataLoader(TensorDataset(images, torch.tensor(digits.target[:1600])), batch_size=64, shuffle=True)

model = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loss_func = losses.SupConLoss(temperature=0.1)

curve = []
for _ in range(8):
    for data, labels in dataloader:
        optimizer.zero_grad()
        embeddings = model(data)
        loss = loss_func(embeddings, labels)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
