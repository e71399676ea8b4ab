"""For all tests: hypothesis sets no deadline, because a busy machine is not a wrong answer."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
