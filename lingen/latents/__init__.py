"""From shards of clips to shards of latents: what is to be made, the folder it goes into, and the work."""
