"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# A busy machine is no defect: nothing here depends on how long an example takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
