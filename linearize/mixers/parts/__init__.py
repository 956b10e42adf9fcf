"""The parts that mixers are composed of."""
