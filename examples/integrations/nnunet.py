"""nnU-Net v2 with region contrast: a trainer class, chosen by name on nnU-Net's command line.

nnU-Net looks for trainers in its own package, then in the folders that the variable nnUNet_extTrainer names, and
imports every file there. So this file gets a folder of its own, known to training and prediction alike:

    pip install "nnunetv2>=2.8"                      # and hpcloss, from its checkout
    mkdir trainers && cp nnunet.py trainers/ && export nnUNet_extTrainer=$PWD/trainers
    nnUNetv2_train 4 2d 0 -tr nnUNetTrainerRegionContrast
    nnUNetv2_predict -d 4 -c 2d -f 0 -tr nnUNetTrainerRegionContrast -i images -o predictions

Plans, augmentation, deep supervision, mixed precision, torch.compile and `--c` are nnU-Net's. In training the network
also returns embeddings, which two hooks take from its decoder; they are part of the output, so torch.compile and
DistributedDataParallel see them. The projection head is part of the network: the optimiser, gradient clipping and
checkpoints have it without further lines. In evaluation the network computes what it always did, and
`-pretrained_weights` takes the weights of a training with or without the term. Where hpcloss is not installed a
checkpoint predicts as plain nnU-Net's, once its weights `decoder.contrast.*` are gone and its `trainer_name` is that.

Other settings are subclasses, as everywhere in nnU-Net. The U-Nets of its plans (plain and residual encoder) will do.
"""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from hpcloss import ProjectionHead, RegionPHPCLoss

# Of the decoder: half the resolution, a quarter of the pixels; of volumes an eighth, of thick slices a quarter.
STAGE = -2


class nnUNetTrainerRegionContrast(nnUNetTrainer):
    """Dice + CE + contrast_weight · RegionPHPC, whose weight rises over the first fifth of the epochs."""

    contrast_weight = 0.1

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        """nnU-Net's network of these plans; training and prediction both come here."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        decoder = network.decoder
        channels = decoder.seg_layers[STAGE].in_channels
        head = ProjectionHead(channels, dim=64, spatial_dims=len(configuration_manager.patch_size))
        # Layers of this name are those that nnU-Net does not look for in pre-trained weights.
        decoder.contrast = nn.ModuleDict({"seg_layers": head})
        decoder.tapped_stage = STAGE
        decoder.stages[STAGE].register_forward_hook(keep_features)
        decoder.register_forward_hook(append_embeddings)
        return network

    def _build_loss(self):
        if self.label_manager.has_regions:
            raise NotImplementedError("nnU-Net's region-based training has overlapping classes: no label of a pixel")
        ignored = self.label_manager.ignore_label
        contrast = RegionPHPCLoss(
            region_size=16,
            num_classes=self.label_manager.num_segmentation_heads,
            samples_per_class=128,
            max_regions=16,
            ignore_index=-1 if ignored is None else ignored,
            gather=True,  # with -num_gpus, over the whole batch
        )
        return SegmentationAndContrast(super()._build_loss(), contrast)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.loss.weight = self.contrast_weight * min(1.0, 5 * self.current_epoch / self.num_epochs)


class SegmentationAndContrast(nn.Module):
    """nnU-Net's loss and, where the network returns embeddings, the contrastive term of the full-resolution labels."""

    def __init__(self, segmentation, contrast):
        super().__init__()
        self.segmentation, self.contrast, self.weight = segmentation, contrast, 0.0

    def forward(self, output, target):
        if not isinstance(output, tuple):  # in evaluation
            return self.segmentation(output, target)
        output, embeddings = output
        labels = target[0] if isinstance(target, list) else target  # with deep supervision, or without
        return self.segmentation(output, target) + self.weight * self.contrast(embeddings, labels)


# The hooks use no other name of this file: torch.compile would look for it in the imported modules, where nnU-Net does
# not leave a trainer's file.


def keep_features(stage, args, output):
    """Forward hook of a decoder stage."""
    stage.kept_features = output if stage.training else None


def append_embeddings(decoder, args, output):
    """Forward hook of the decoder, whose output is the network's: in training (output, embeddings [B, 64, *S])."""
    if decoder.training:
        stage = decoder.stages[decoder.tapped_stage]
        features, stage.kept_features = stage.kept_features, None
        output = output, decoder.contrast["seg_layers"](features)
    return output
