"""The presets, one file each. Every file in this folder is found by itself; nothing has to be listed."""
