"""Loads the fixtures where tests run, and only there."""

import gc


def pytest_configure(config):
    """What is imported for the tests stays: the garbage collector would look it through again and again."""
    gc.disable()
    if config.getoption("dist", "no") == "no":  # else this process hands tests out to others, and needs no torch
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish():
    gc.enable()
