"""Sizes of the full report, and of a quick one that tests the script more than the claims."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes of all measurements.

    Attributes:
        seed: Every section draws from generators seeded by it.
        mean_draws: Projections for each mean of section 1.
        error_draws: Projections for each error of section 2.
        kind_draws: Projections for each error of section 3.
        kind_directions: Pairs that each of them meets.
        uniform_length: Queries and keys of section 4.
        uniform_features: Their numbers of features.
        uniform_lengths: Lengths at one number of features.
        draws: Draws of inputs and projection in sections 4 and 5.
        output_length: Tokens of section 5.
        output_features: Its numbers of features.
        norms: Its values of ‖x‖².
        layers: Layers of section 6.
        layer_length: Its tokens.
        layer_draws: Its draws of weights, inputs and projections.
        epsilon_draws: Draws of section 7.
        near_length: Tokens of section 8.
        near_blocks: Its near_block.
        near_features: Its numbers of features, three.
        lengths: Lengths of FAVOR in section 9.
        exact_lengths: Of torch's exact attention.
        formed_lengths: Of exact attention with its matrix in memory.
        repeats: Timed calls of each.
    """

    seed: int
    mean_draws: int = 20_000
    error_draws: int = 200_000
    kind_draws: int = 5_000
    kind_directions: int = 16
    uniform_length: int = 512
    uniform_features: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    uniform_lengths: tuple[int, ...] = (64, 256, 1024, 4096)
    draws: int = 15
    output_length: int = 4096
    output_features: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    norms: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    layers: int = 12
    layer_length: int = 512
    layer_draws: int = 5
    epsilon_draws: int = 15
    near_length: int = 1024
    near_blocks: tuple[int, ...] = (8, 16, 32, 64, 128)
    near_features: tuple[int, int, int] = (32, 128, 512)
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    exact_lengths: tuple[int, ...] = (2048, 4096, 8192)
    formed_lengths: tuple[int, ...] = (2048, 4096)
    repeats: int = 5


def quick_settings(seed: int) -> Settings:
    """Returns a report of some seconds: the same claims, over fewer draws and short lengths."""
    return Settings(
        seed, mean_draws=4_000, error_draws=20_000, kind_draws=500, kind_directions=4, uniform_length=128,
        uniform_features=(64, 256, 1024), uniform_lengths=(64, 256), draws=8, output_length=512,
        output_features=(16, 64, 256), norms=(0.5, 2.0, 8.0), layers=3, layer_length=128, layer_draws=2,
        epsilon_draws=3, near_length=256, near_blocks=(8, 32), near_features=(16, 64, 256),
        lengths=(256, 512, 1024), exact_lengths=(256, 512), formed_lengths=(256, 512), repeats=1,
    )  # fmt: skip
