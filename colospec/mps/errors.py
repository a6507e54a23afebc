"""What fails around CUDA MPS, apart from the settings of a run."""


class MpsError(RuntimeError):
    """CUDA MPS cannot be used on this machine or with this daemon; the text says why."""


class DaemonDied(MpsError):
    """The daemon ended by itself while it was needed; its logs stay where they are."""
