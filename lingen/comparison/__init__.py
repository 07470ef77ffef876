"""LinGen against DiT: loss curves across the transfers of a curriculum, measured, drawn and written up."""
