"""Scikit-learn's digits, and a network trained on them, for the examples beside this file."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

_images, _labels = map(torch.from_numpy, load_digits(return_X_y=True))
_images = _images.float().view(-1, 1, 8, 8) / 8 - 1
_half = len(_images) // 2  # the second half is for testing

loader = DataLoader(TensorDataset(_images[:_half], _labels[:_half]), batch_size=64, shuffle=True)


def trained(network, epochs=10):
    """The network, after it has learnt the labels."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def accuracy(network):
    """The share of test images that the network classifies correctly, in percent."""
    return 100 * (network(_images[_half:]).argmax(1) == _labels[_half:]).double().mean().item()
