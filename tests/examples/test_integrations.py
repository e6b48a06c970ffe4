"""examples/integrations: each file does on tiny data what it says, within the trainer that it is written for."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import shutil
import sys
import types
from multiprocessing.pool import ThreadPool

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

for package in ("monai", "lightning", "nibabel", "h5py", "matplotlib", "nilearn"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402

from examples.integrations import lightning_module, monai_loop  # noqa: E402
from tests.tools.cases import ROOT  # noqa: E402
from tests.tools.documents import LINK  # noqa: E402
from tests.tools.small_folders import save, volume, write_h5, write_msd  # noqa: E402

FOLDER = ROOT / "examples/integrations"

# ------------------------------------------------------------------------------------------------------------ nnU-Net

IGNORED = 3
SHORT_TRAINER = """
from nnunet import nnUNetTrainerRegionContrast


class nnUNetTrainerShort(nnUNetTrainerRegionContrast):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1
"""


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory):
    """A data set in nnU-Net's raw format, planned and preprocessed; fields: its folders, nnU-Net's modules."""
    pytest.importorskip("nnunetv2", reason="needs nnU-Net, see the `integrations` extra")
    home = tmp_path_factory.mktemp("nnunet")
    folders = {name: home / name for name in ("raw", "preprocessed", "results", "extTrainer")}
    shutil.copytree(FOLDER, folders["extTrainer"], ignore=lambda _, names: set(names) - {"nnunet.py"})
    (folders["extTrainer"] / "short.py").write_text(SHORT_TRAINER)
    raw = folders["raw"] / "Dataset007_Boxes"
    for number in range(3):
        image, label = volume(number, shape=(32, 32, 16))
        label[:5] = IGNORED
        save(raw / "imagesTr" / f"case{number}_0000.nii.gz", image, (1.0, 1.0, 1.0))
        save(raw / "labelsTr" / f"case{number}.nii.gz", label, (1.0, 1.0, 1.0))
    labels = {"background": 0, "one": 1, "two": 2, "ignore": IGNORED}
    index = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 3, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(index))
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(f"nnUNet_{name}", str(folder))
        patch.setenv("nnUNet_def_n_proc", "1")
        patch.setenv("nnUNet_n_proc_DA", "1")
        threads_for_processes(patch)
        without_timm(patch)
        from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

        few = few_samples(DatasetFingerprintExtractor.collect_foreground_intensities)
        patch.setattr(DatasetFingerprintExtractor, "collect_foreground_intensities", staticmethod(few))
        patch.setattr(sys, "argv", "nnUNetv2_plan_and_preprocess -d 7 -c 2d 3d_fullres -npfp 1 -np 1".split())
        plan_and_preprocess_entrypoints.plan_and_preprocess_entry()
        plans = folders["preprocessed"] / "Dataset007_Boxes" / "nnUNetPlans.json"
        narrow(plans)
        splits = [{"train": ["case0", "case1"], "val": ["case2"]}]
        (plans.parent / "splits_final.json").write_text(json.dumps(splits))
        patch.setenv("nnUNet_n_proc_DA", "0")
        yield types.SimpleNamespace(raw=raw, results=folders["results"] / "Dataset007_Boxes")
    torch.set_num_threads(1)  # planning has its own mind


def threads_for_processes(patch):
    """nnU-Net's pools as threads: each process would import torch anew, for longer than it then works."""
    get_context = multiprocessing.get_context
    pools = types.SimpleNamespace(Pool=ThreadPool)
    patch.setattr(multiprocessing, "get_context", lambda kind=None: pools if kind == "spawn" else get_context(kind))


def without_timm(patch):
    """In its search for a trainer nnU-Net imports its transformers, which need timm, and that a torchvision that was
    built with this very torch. Where there is none, their names will do: no U-Net uses them."""
    if importlib.util.find_spec("timm") is not None:
        return
    names = ("PatchDropout", "trunc_normal_", "apply_keep_indices_nlc", "RotaryEmbeddingCat", "EvaBlock")
    for name in ("timm", "timm.layers", "timm.models", "timm.models.eva"):
        module = types.ModuleType(name)
        vars(module).update(dict.fromkeys(names, object))
        patch.setitem(sys.modules, name, module)


def few_samples(collect):
    """nnU-Net's fingerprint from a thousand voxels a case, not from 33 million draws of them."""
    return lambda segmentation, images, seed=1234, num_samples=0: collect(segmentation, images, seed, 1000)


def narrow(plans):
    """Fewer channels than nnU-Net would take."""
    content = json.loads(plans.read_text())
    for name in ("2d", "3d_fullres"):
        architecture = content["configurations"][name]["architecture"]["arch_kwargs"]
        architecture["features_per_stage"] = [4 * 2**stage for stage in range(architecture["n_stages"])]
    plans.write_text(json.dumps(content))


@pytest.fixture(scope="module", params=["2d", "3d_fullres"])
def trained(request, nnunet):
    """A configuration and the folder of a fold that nnU-Net has trained and validated."""
    from nnunetv2.run.run_training import run_training

    run_training("7", request.param, 0, "nnUNetTrainerShort", device=torch.device("cpu"))
    return request.param, nnunet.results / f"nnUNetTrainerShort__nnUNetPlans__{request.param}" / "fold_0"


def trainer_of(configuration, continued=False):
    from nnunetv2.run.run_training import get_trainer_from_args

    cpu = torch.device("cpu")
    trainer = get_trainer_from_args("7", configuration, 0, "nnUNetTrainerShort", "nnUNetPlans", continued, cpu)
    trainer.initialize()
    return trainer


def one_batch(trainer):
    """Images and the labels of each deep-supervision output, from nnU-Net's loader."""
    batch = next(trainer.get_dataloaders()[0])
    return batch["data"], batch["target"]


def test_nnunet_trains_and_validates(trained):
    _, fold = trained
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    losses = checkpoint["logging"]["train_losses"]
    assert len(losses) == 2 and np.isfinite(losses).all()
    head = [name for name in checkpoint["network_weights"] if name.startswith("decoder.contrast.")]
    assert len(head) == 4
    momentum = [state["momentum_buffer"] for state in checkpoint["optimizer_state"]["state"].values()]
    shapes = [checkpoint["network_weights"][name].shape for name in head]
    assert [buffer.shape for buffer in momentum[-4:]] == shapes  # the head's parameters are the network's last
    assert all((buffer != 0).any() for buffer in momentum[-4:])
    assert 0 <= json.loads((fold / "validation/summary.json").read_text())["foreground_mean"]["Dice"] <= 1


def test_nnunet_the_loss_reaches_the_encoder(trained):
    trainer = trainer_of(trained[0])
    images, target = one_batch(trainer)
    outputs, embeddings = trainer.network.train()(images)
    assert len(outputs) == len(target) and target[0].shape[2:] == images.shape[2:]
    assert embeddings.shape[1] == 64 and embeddings.shape[2:] == torch.Size(size // 2 for size in images.shape[2:])
    trainer.loss.weight = 2.0
    segmentation = trainer.loss.segmentation(outputs, target)
    contrast = trainer.loss.contrast(embeddings, target[0])
    torch.manual_seed(0)
    assert contrast > 0 and trainer.loss((outputs, embeddings), target) > segmentation
    torch.testing.assert_close(trainer.loss(outputs, target), segmentation)  # without embeddings: nnU-Net's own
    contrast.backward()
    network = trainer.network
    assert network.encoder.stages[0][0].convs[0].conv.weight.grad.abs().sum() > 0
    assert all(
        parameter.grad.abs().sum() > 0 for parameter in network.decoder.contrast.parameters() if parameter.ndim > 1
    )
    assert network.decoder.seg_layers[-1].weight.grad is None


def test_nnunet_ignored_pixels_take_no_part(trained):
    trainer = trainer_of(trained[0])
    contrast = trainer.loss.contrast
    shape = [8] * len(trainer.configuration_manager.patch_size)
    labels, embeddings = torch.randint(3, (1, 1, *shape)), torch.randn(1, 5, *shape)
    labels[..., :4] = IGNORED
    changed = torch.where(labels == IGNORED, torch.randn(embeddings.shape), embeddings)
    torch.testing.assert_close(contrast(embeddings, labels), contrast(changed, labels), rtol=0, atol=0)
    assert contrast(embeddings, labels) > 0


def test_nnunet_weight_rises_over_a_fifth_of_the_epochs(trained):
    trainer = trainer_of(trained[0])
    trainer.num_epochs, weights = 20, []
    for trainer.current_epoch in (0, 1, 2, 4, 19):
        trainer.on_train_epoch_start()
        weights.append(trainer.loss.weight)
    assert weights == pytest.approx([0, 0.025, 0.05, 0.1, 0.1])


def test_nnunet_continues(trained):
    configuration, fold = trained
    trainer = trainer_of(configuration, continued=True)
    trainer.load_checkpoint(str(fold / "checkpoint_final.pth"))
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert trainer.current_epoch == trainer.num_epochs == 2  # where the learning rate is 0
    trainer.current_epoch = 1
    torch.testing.assert_close(dict(trainer.network.state_dict()), dict(checkpoint["network_weights"]), rtol=0, atol=0)
    states = trainer.optimizer.state_dict()["state"], checkpoint["optimizer_state"]["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    before = trainer.network.decoder.contrast["seg_layers"].layers[0].weight.clone()
    trainer.on_train_epoch_start()
    images, target = one_batch(trainer)
    assert np.isfinite(trainer.train_step({"data": images, "target": target})["loss"])
    assert not torch.equal(trainer.network.decoder.contrast["seg_layers"].layers[0].weight, before)


def test_nnunet_inference_is_that_of_the_network_alone(trained, nnunet, tmp_path):
    configuration, fold = trained
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(fold.parent), (0,))
    image = nnunet.raw / "imagesTr/case2_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], [str(tmp_path / "case2")])
    predicted, validated = (nib.load(folder / "case2.nii.gz").get_fdata() for folder in (tmp_path, fold / "validation"))
    assert np.array_equal(predicted, validated)

    managers = predictor.plans_manager, predictor.configuration_manager
    plain = nnUNetTrainer.build_network_architecture(*managers, 1, 3, enable_deep_supervision=False)
    load_pretrained_weights(plain, fold / "checkpoint_final.pth")  # all but the layers that segment
    plain.decoder.seg_layers.load_state_dict(predictor.network.decoder.seg_layers.state_dict())
    images = torch.randn(2, 1, *predictor.configuration_manager.patch_size)
    with torch.no_grad():
        torch.testing.assert_close(predictor.network.eval()(images), plain.eval()(images), rtol=0, atol=0)

    torch.save({"network_weights": plain.state_dict()}, tmp_path / "plain.pth")
    trainer = trainer_of(configuration)
    load_pretrained_weights(trainer.network, tmp_path / "plain.pth")
    torch.testing.assert_close(trainer.network.encoder.state_dict(), plain.encoder.state_dict(), rtol=0, atol=0)


def test_nnunet_under_autocast_and_ddp(nnunet, tmp_path):
    """As nnU-Net wraps them on GPUs: half-precision embeddings, a loss of fp32, gradients of every parameter."""
    trainer = trainer_of("2d")
    images, target = one_batch(trainer)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        network = DistributedDataParallel(trainer.network.train())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, embeddings = network(images)
            contrast = trainer.loss.contrast(embeddings, target[0])
            loss = sum(trainer.loss.segmentation.loss(*pair) for pair in zip(outputs, target)) + contrast
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert embeddings.dtype == torch.bfloat16 and contrast.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert all(parameter.grad.any() for parameter in trainer.network.decoder.contrast.parameters())


def test_nnunet_refuses_overlapping_classes(nnunet, monkeypatch):
    trainer = trainer_of("2d")
    monkeypatch.setattr(type(trainer.label_manager), "has_regions", True)
    with pytest.raises(NotImplementedError, match="region-based training"):
        trainer._build_loss()


def test_nnunet_compiles(nnunet):
    """As one graph, hooks and all, in training and evaluation."""
    network = trainer_of("2d").network
    images = torch.randn(2, 1, 32, 32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    for _ in range(2):
        outputs, embeddings = compiled.train()(images)
        assert counter.frame_count == 1
    expected, expected_embeddings = network.train()(images)
    torch.testing.assert_close([*outputs, embeddings], [*expected, expected_embeddings])
    embeddings.square().mean().backward()
    assert network.encoder.stages[0][0].convs[0].conv.weight.grad.abs().sum() > 0
    assert network.decoder.stages[-2].kept_features is None
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images), network.eval()(images))


# ------------------------------------------------------------------------------------------------------------ SSL4MIS


@pytest.fixture(scope="module")
def h5_slices(tmp_path_factory):
    """A folder as SSL4MIS has it: slices to train on, volumes to validate on, lists."""
    folder = write_h5(tmp_path_factory.mktemp("h5"), patients=4, by_slice=True, shape=(32, 32, 2))
    names = [path.stem for path in sorted((folder / "data/slices").glob("patient00[12]*.h5"))]
    (folder / "train_slices.list").write_text("\n".join(names))
    for part, number in (("val", 3), ("test", 4)):
        (folder / f"{part}.list").write_text("\n".join(f"patient00{number}_frame0{frame}" for frame in (1, 9)))
    return folder


def run_ssl4mis(source, folder):
    names = {"__name__": "a script", "__doc__": ""}
    exec(compile(source, "ssl4mis.py", "exec"), names)
    sizes = "--max_iterations 1 --batch_size 4 --labeled_bs 2 --labeled_num 1 --patch_size 32 32 --consistency 10"
    model, dice = names["train"](names["parser"].parse_args(["--root_path", str(folder), *sizes.split()]))
    assert dice.shape == (3,) and ((0 <= dice) & (dice <= 100)).all()
    return model.state_dict()


def test_ssl4mis_script_runs_with_and_without_its_marked_lines(h5_slices):
    """Two new lines, a changed one and an import; without them a mean teacher, whose first step differs wherever the
    features pass."""
    script = (FOLDER / "ssl4mis.py").read_text(encoding="utf-8")
    marked = [line for line in script.splitlines() if line.endswith("# hpcloss")]
    assert [line.startswith("from hpcloss import") for line in marked] == [True, False, False, False]
    call = "        outputs, features = tap(images)  # hpcloss"
    plain = script.replace(call, "        outputs = model(images)")
    plain = "\n".join(line for line in plain.splitlines() if not line.endswith("# hpcloss"))
    assert "hpcloss." not in plain.partition('"""\n\n')[2] and "features[" not in plain
    ours, theirs = run_ssl4mis(script, h5_slices), run_ssl4mis(plain, h5_slices)
    changed = {name: not torch.equal(ours[name], value) for name, value in theirs.items() if name.endswith("weight")}
    last = "final_conv.weight"  # the features do not pass it
    assert not changed.pop(last) and all(changed.values())


# -------------------------------------------------------------------------------------------------------------- MONAI


def test_monai_loop_trains_and_evaluates(tmp_path, capsys):
    folder = write_msd(tmp_path, cases=3, shape=(32, 32, 32))
    sizes = "--steps 2 --patch 32 32 32 --features 4 4 4 4 8 4".split()
    log = monai_loop.main([str(folder), *sizes])
    assert np.isfinite(log["segmentation"]).all() and log["contrast"][0] > 0
    assert len(log["dice"]) == 2 and all(0 <= value <= 1 for value in log["dice"])
    assert "Dice of 1 held-out cases" in capsys.readouterr().out


def test_monai_loop_holds_out_whole_subjects_and_scores_no_padding(tmp_path, monkeypatch):
    names = [f"patient{number}_frame{frame}" for number in range(6) for frame in (1, 2)]
    folder = write_msd(tmp_path, names=names, shape=(20, 32, 28))
    used, seen = [], []
    cached, infer = monai_loop.CacheDataset, monai_loop.sliding_window_inference
    monkeypatch.setattr(monai_loop, "CacheDataset", lambda cases, *a, **o: used.append(cases) or cached(cases, *a, **o))
    monkeypatch.setattr(
        monai_loop, "sliding_window_inference", lambda image, *a, **o: seen.append(image.shape) or infer(image, *a, **o)
    )
    monai_loop.main([str(folder), *"--steps 1 --patch 32 32 32 --features 4 4 4 4 8 4".split()])
    training, held_out = ({case["image"].rsplit("/", 1)[1][:8] for case in cases} for cases in used)
    assert held_out == {"patient0", "patient5"} and training == {f"patient{n}" for n in (1, 2, 3, 4)}
    assert set(seen) == {(1, 1, 20, 32, 28)}, "as stored, not padded to the patch"


# ---------------------------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own call of torch
def test_lightning_module_fits_and_logs(tmp_path):
    folder = write_msd(tmp_path / "data", cases=6, shape=(28, 20, 4))
    trainer = lightning_module.main([str(folder), "--steps", "3", "--out", str(tmp_path / "out")])
    assert trainer.global_step == 3
    logged = trainer.logged_metrics | trainer.callback_metrics
    for _, labels in (*trainer.train_dataloader.dataset, *trainer.val_dataloaders.dataset):
        assert (labels[2:30, 6:26] >= 0).all() and (labels >= 0).sum() == 28 * 20, "padding counts in no loss"
    names = {"train/cross_entropy", "train/contrast", "val/cross_entropy", "contrast/counted_anchors"}
    assert names <= set(logged) and all(logged[name].isfinite() for name in names)
    assert logged["train/contrast"] > 0 and logged["contrast/counted_anchors"] > 0
    module = trainer.lightning_module
    images = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(module(images), module.tapped(images)[0])
    checkpoint = next((tmp_path / "out").rglob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(module.state_dict()), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("devices", [1, 2])
def test_lightning_module_gathers_on_several_devices(devices, monkeypatch):
    module = lightning_module.ContrastiveSegmentation(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1)), "0", 4, 10)
    trainer = types.SimpleNamespace(world_size=devices)
    monkeypatch.setattr(lightning_module.ContrastiveSegmentation, "trainer", trainer)
    module.setup("fit")
    assert module.contrast.options["gather"] is (devices > 1)


# ----------------------------------------------------------------------------------------------------------- notebook


def test_notebook_prints_what_it_shows(monkeypatch):
    """Its code cells, in one namespace: their text is that of the stored outputs, their figures are drawn."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    notebook = json.loads((FOLDER / "first_ten_minutes.ipynb").read_text(encoding="utf-8"))
    names = {}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        stored = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
        assert printed.getvalue() == "".join(stored)
        figures = [output for output in cell["outputs"] if output["output_type"] == "display_data"]
        assert len(plt.get_fignums()) == len(figures)
        plt.close("all")
    assert names["ours"] == pytest.approx(names["dense"], rel=1e-4)


def test_notebook_links_lead_somewhere():
    notebook = json.loads((FOLDER / "first_ten_minutes.ipynb").read_text(encoding="utf-8"))
    text = "".join(line for cell in notebook["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    assert LINK.findall(text)
    for link in LINK.findall(text):
        assert (FOLDER / link).exists(), link
