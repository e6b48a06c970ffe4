"""The losses in other people's trainers: nnU-Net, MONAI, Lightning, the scripts of SSL4MIS; and a first notebook."""
