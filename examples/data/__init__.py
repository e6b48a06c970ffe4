"""Where the slices come from: virtual subjects (built in) or folders of NIfTI files, and how they are split."""
