from __future__ import annotations

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.client.versions import check_version, parse_version


def test_a_version_is_its_three_numbers():
    for text in ("0.5.21", "0.5.21.post1", "0.5.21rc2", "0.5.21+cu129"):
        assert parse_version(text) == (0, 5, 21)
    for text in ("0.5", "main", ""):
        with pytest.raises(ValueError, match="is not a version"):
            parse_version(text)


def test_a_version_too_old_for_the_run_is_refused_with_the_remedy():
    for version in ((0, 5, 15), (0, 5, 17), (0, 5, 21), (0, 6, 0)):
        check_version(version, "here")
    with pytest.raises(ConfigError, match=r"here has SGLang 0\.5\.14, but .* at least 0\.5\.15; install a newer one"):
        check_version((0, 5, 14), "here")
    check_version((0, 5, 21), "here", continues_requests=True)
    refused = r"here has SGLang 0\.5\.20, .*on_full keep needs 0\.5\.21 or newer: update SGLang, or set on_full wait"
    with pytest.raises(ConfigError, match=refused):
        check_version((0, 5, 20), "here", continues_requests=True)
