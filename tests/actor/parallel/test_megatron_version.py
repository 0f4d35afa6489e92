"""Which versions of megatron-core are accepted."""

from __future__ import annotations

import pytest

from dapo_mcore.actor.parallel.megatron_version import check_version
from dapo_mcore.errors import ConfigError


def test_the_installed_version_and_all_supported_ones_are_accepted():
    check_version()
    for version in ("0.16.1", "0.17.0", "0.18.2", "0.19.2", "0.19.3rc1"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0", "1.0"])
def test_other_versions_are_refused_with_the_command_that_installs_one(version):
    with pytest.raises(
        ConfigError, match=rf"megatron-core {version} is installed.*pip install 'megatron-core>=0.16.1,<0.20'"
    ):
        check_version(version)
