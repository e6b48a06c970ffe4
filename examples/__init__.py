"""A thin three-stage trainer on Lightning and MONAI that shows hpcloss at work; run it from a checkout."""
