"""Batches that depend on the seed, the epoch and the position alone.

A training sample is made under random state derived from (seed, epoch, position in the epoch), its batch is joined
under state derived from (seed, epoch, position of its first sample). So the number of loading processes does not change
a run, a resumed epoch sees what the interrupted one saw, and loading inside the training process leaves that process's
own random state alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import InputError
from .joint import seed_joint
from .loader import collate_fn
from .processes import die_with

# Keep the streams of different purposes apart.
_ORDER, _SAMPLE, _BATCH, PROCESS = range(4)

Ticket = tuple[int, int, int]  # epoch, position in the epoch, index into the dataset


def seed_words(*parts: int) -> list[int]:
    """Eight 32-bit words that differ wherever the parts do."""
    return np.random.SeedSequence([int(part) for part in parts]).generate_state(8).tolist()


def _seed_cpu(words: Sequence[int]) -> None:
    random.seed(words[0] << 32 | words[1])
    np.random.seed(words[2:6])
    # The default generator alone: torch.manual_seed would reach for CUDA as well.
    torch.default_generator.manual_seed(words[6] << 32 | words[7])


@contextmanager
def random_state(*parts: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators seeded from `parts`, and put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(seed_words(*parts))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_process(seed: int, epoch: int, rank: int) -> None:
    """Seed every generator of this process, CUDA's included, for one epoch (0: building the model).

    Draws that concern a whole batch get the stream of rank 0 in every process: what a single process draws from.
    """
    first_words = seed_words(PROCESS, seed, epoch, 0)
    seed_joint(first_words[6] << 32 | first_words[7])
    words = seed_words(PROCESS, seed, epoch, rank)
    _seed_cpu(words)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(words[6] << 32 | words[7])


class EpochBatchSampler(Sampler[list[Ticket]]):
    """Batches of (epoch, position, index); the order of an epoch follows from (seed, epoch).

    Args:
        size: samples in the dataset.
        batch_size: samples per batch and process.
        shuffle: permute anew every epoch.
        drop_last: leave out the samples that do not fill a batch on every process.
        rank, world: this process and their number; one batch of `world` processes holds neighbouring positions.
        even: give every process equally many samples by starting over at the beginning; training needs it, evaluation
            must not count a sample twice.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        even: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(
                f"a batch needs at least one sample per process, got {batch_size}: raise batch_size"
            )
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.drop_last, self.rank, self.world, self.even = drop_last, rank, world, even
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        words = seed_words(_ORDER, self.seed, self.epoch)
        return np.random.default_rng(words).permutation(self.size).tolist()

    def __iter__(self) -> Iterator[list[Ticket]]:
        order = self._order()
        total = self.batch_size * self.world
        end = self.size - self.size % total if self.drop_last else self.size
        positions = list(range(end))
        if self.even and not self.drop_last:
            positions += [i % self.size for i in range(-end % self.world)]
        for start in range(0, len(positions), total):
            block = positions[start : start + total]
            share = -(-len(block) // self.world)
            own = block[self.rank * share : (self.rank + 1) * share]
            if own:
                yield [(self.epoch, position, order[position]) for position in own]

    def __len__(self) -> int:
        total = self.batch_size * self.world
        full, rest = divmod(self.size, total)
        if self.drop_last or not rest:
            return full
        share = -(-rest // self.world)
        return full + int(self.even or self.rank * share < rest)


class SeededBatches(Dataset):
    """A dataset that hands out joined batches for lists of tickets."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, tickets: Sequence[Ticket]) -> Any:
        samples = []
        for epoch, position, index in tickets:
            with random_state(_SAMPLE, self.seed, epoch, position):
                samples.append(self.dataset[index])
        epoch, position, _ = tickets[0]
        with random_state(_BATCH, self.seed, epoch, position):
            return self.collate(samples)

    def names(self, tickets: Sequence[Ticket]) -> list[str]:
        """What the samples of a batch are called; their index where the dataset has no names."""
        named = getattr(self.dataset, "get_data_name", None)
        return [str(named(i)) if named else f"{i:06d}" for _, _, i in tickets]


def first(samples: Sequence[Any]) -> Any:
    """The one sample of a batch of one, as it is."""
    return samples[0]


def _as_is(batch: Any) -> Any:
    return batch


def build_loader(
    dataset: Any,
    sampler: EpochBatchSampler,
    seed: int,
    workers: int,
    collate: Callable[[list[Any]], Any] = collate_fn,
    pin_memory: bool = False,
    persistent: bool = False,
) -> DataLoader:
    """A loader of seeded batches.

    Args:
        workers: loading processes; 0 loads in this process.
        persistent: keep them between epochs. Those of a training set start while this process is small; others would
            start as copies of a process in the middle of training and keep its memory alive as long as they live.
    """
    return DataLoader(
        SeededBatches(dataset, collate, seed),
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=partial(die_with, os.getpid()),
        # Its own generator: the loader draws from it at every start, which would shift the global stream.
        generator=torch.Generator(),
    )
