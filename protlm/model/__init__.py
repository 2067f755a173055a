"""The network: plain `nn.Module`s."""
