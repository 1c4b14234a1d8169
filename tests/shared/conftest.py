import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.deploy.unleash.fixtures")
    config.pluginmanager.import_plugin("tests.shared.metering_customer")
    config.pluginmanager.import_plugin("tests.shared.limits_timed")
