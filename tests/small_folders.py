"""Small NIfTI folders in MSD and ACDC layout, written for the tests of the examples."""

import json

import nibabel as nib
import numpy as np


def save(path, array, spacing=(1.0, 1.0, 3.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def volume(number, shape=(20, 28, 3), classes=3, dtype=np.uint8):
    """An image whose classes are bright boxes, and its label; another one for every number."""
    rng = np.random.default_rng(number)
    label = np.zeros(shape, dtype)
    for value in range(1, classes):
        corner = rng.integers(2, 10, 2)
        label[corner[0] : corner[0] + 8, corner[1] : corner[1] + 10] = value
    return (label * 40 + rng.normal(100, 10, shape)).astype(np.float32), label


def write_msd(folder, cases=6, labels=("background", "Anterior", "Posterior"), **kind):
    names = [f"case_{number:03d}" for number in range(cases)]
    for number, name in enumerate(names):
        image, label = volume(number, **kind)
        save(folder / "imagesTr" / f"{name}.nii.gz", image)
        save(folder / "labelsTr" / f"{name}.nii.gz", label)
    index = {
        "name": "boxes",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(number): name for number, name in enumerate(labels)},
        "numTraining": cases,
        "numTest": 1,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/unlabelled.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def write_acdc(folder, patients=4, tests=2):
    for part, numbers in (("training", range(patients)), ("testing", range(patients, patients + tests))):
        for number in numbers:
            name = f"patient{number + 1:03d}"
            home = folder / part / name
            for frame in (1, 9):
                image, label = volume(10 * number + frame, classes=4)
                save(home / f"{name}_frame{frame:02d}.nii.gz", image, (1.5, 1.5, 10.0))
                save(home / f"{name}_frame{frame:02d}_gt.nii.gz", label, (1.5, 1.5, 10.0))
            save(home / f"{name}_4d.nii.gz", np.zeros((4, 4, 2, 3), np.float32))
    return folder
