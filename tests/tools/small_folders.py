"""Small folders in every layout that the examples read, written for their tests."""

import json

import h5py
import nibabel as nib
import numpy as np
from PIL import Image


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


def write_msd(folder, cases=6, labels=("background", "Anterior", "Posterior"), names=None, **kind):
    names = names or [f"case_{number:03d}" for number in range(cases)]
    for number, name in enumerate(names):
        image, label = volume(number, **kind)
        save(folder / "imagesTr" / f"{name}.nii.gz", image)
        save(folder / "labelsTr" / f"{name}.nii.gz", label)
    index = {
        "name": "boxes",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(number): name for number, name in enumerate(labels)},
        "numTraining": len(names),
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


def rows_from_the_top(array):
    """[X, Y, Z], Y upwards, as files of rows have it: [Z, H, W]."""
    return np.ascontiguousarray(array.transpose(2, 1, 0)[:, ::-1])


def save_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")


def write_h5(folder, patients=6, by_slice=False, by_volume=True, slices="slices", **kind):
    """The same volumes as write_acdc, in the layout of SSL4MIS; `slices`: the folder of slices, "." beside volumes."""
    for number in range(patients):
        for frame in (1, 9):
            name = f"patient{number + 1:03d}_frame{frame:02d}"
            image, label = map(rows_from_the_top, volume(10 * number + frame, **{"classes": 4, **kind}))
            if by_volume:
                save_h5(folder / "data" / f"{name}.h5", image=image, label=label)
            for z in range(len(image) if by_slice else 0):
                save_h5(folder / "data" / slices / f"{name}_slice_{z + 1}.h5", image=image[z], label=label[z])
    return folder


def write_nnunet(folder, cases=6, channels=("T2", "ADC"), version=2, names=None, **kind):
    """nnU-Net's raw data: a file for each channel, the second one darker."""
    names = names or [f"case_{number:03d}" for number in range(cases)]
    for number, name in enumerate(names):
        image, label = volume(number, **kind)
        for channel in range(len(channels)):
            save(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image * 0.5**channel + channel)
        save(folder / "labelsTr" / f"{name}.nii.gz", label)
    classes = {"background": 0, "Anterior": 1, "Posterior": 2}
    index = {"numTraining": len(names), "file_ending": ".nii.gz"}
    numbered = {str(number): name for number, name in enumerate(channels)}
    if version == 2:
        index |= {"channel_names": numbered, "labels": classes}
    else:
        index |= {"modality": numbered, "labels": {str(number): name for name, number in classes.items()}}
        index["training"] = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def write_la(folder, cases=6, inside=".", names=None, **kind):
    """LA as semi-supervised repositories keep it: CASE/mri_norm2.h5, [X, Y, Z]."""
    for number, name in enumerate(names or [f"CASE{number:02d}" for number in range(cases)]):
        image, label = volume(number, **{"classes": 2, **kind})
        save_h5(folder / inside / name / "mri_norm2.h5", image=image, label=label)
    return folder


def write_instances(folder, names=("n0", "n1", "n2", "n3", "n4", "n5"), size=(40, 30)):
    """DSB2018 as it is downloaded: RGBA pictures, and a mask of 0 and 255 for each instance."""
    for number, name in enumerate(names):
        image, label = (rows_from_the_top(array)[0] for array in volume(number, (*size, 1), 4))
        for part in ("images", "masks"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        grey.convert("RGBA").save(folder / name / "images" / f"{name}.png")
        for value in range(1, 4):
            Image.fromarray(np.uint8(255 * (label == value))).save(folder / name / "masks" / f"{name}{value}.png")
    return folder


def write_pictures(
    folder, count=6, size=(40, 30), values=(0, 255), masks="masks", ending="", names=None, kind="png", mask_kind="png"
):
    """Grey pictures of boxes, size = (width, height), and their masks with these values."""
    names = names or [f"p{number}" for number in range(count)]
    for path in (folder / "images", folder / masks):
        path.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        image, label = (rows_from_the_top(array)[0] for array in volume(number, (*size, 1), len(values)))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.{kind}")
        Image.fromarray(np.array(values, np.uint8)[label]).save(folder / masks / f"{name}{ending}.{mask_kind}")
    return folder


def write_ssl4mis(folder, patients=9, **kind):
    """ACDC as SSL4MIS has it, in one folder: slices of the training patients, volumes of the others, and the lists."""
    write_h5(folder, patients, by_slice=True, slices=".", **kind)
    names = [f"patient{number + 1:03d}_frame{frame:02d}" for number in range(patients) for frame in (1, 9)]
    train, val, test = names[:-8], names[-8:-4], names[-4:]
    slices = []
    for name in names:
        own = sorted((folder / "data").glob(f"{name}_slice_*.h5"))
        if name in train:
            slices += own
            (folder / "data" / f"{name}.h5").unlink()
        else:
            for path in own:
                path.unlink()
    lists = {"train": train, "val": val, "test": test, "train_slices": [path.stem for path in slices]}
    for part, lines in lists.items():
        (folder / f"{part}.list").write_text("\n".join(lines) + "\n")
    return folder
