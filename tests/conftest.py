"""Loads the fixtures where tests run, and only there."""

import gc
import os


def pytest_configure(config):
    gc.disable()  # what is imported for the tests stays: not to be looked through again and again
    if config.getoption("dist", "no") == "no":  # else this process hands tests out to others, and needs no torch
        config.pluginmanager.import_plugin("shared_fixtures")
        os.fsync = lambda file: None  # no test cuts the power off


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
