"""What a plan cannot be made of, or a peak that cannot be kept."""


class PlanError(ValueError):
    """No plan keeps what was asked for; the message says why, and what could be asked for."""
