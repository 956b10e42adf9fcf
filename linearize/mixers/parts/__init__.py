"""The parts that mixers are composed of: feature maps, decays, updates and ways to combine branches, a file each."""
