"""The cross-layer transcoder: its architecture, encoders, decoders, selection rules, and the scaling of its inputs."""
