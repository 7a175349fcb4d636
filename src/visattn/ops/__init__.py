"""The mathematics: functions on tensors, without parameters."""
