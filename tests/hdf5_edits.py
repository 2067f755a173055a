"""Damage to HDF5 files: edits of an open file, and one that replaces a dataset."""

import h5py


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def replace(name, **options):
    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return change
