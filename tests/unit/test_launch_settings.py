"""Which rows of the table of launch settings a chip takes that has none of its own."""

import pytest

from kernels.cce_minus import launch_settings
from kernels.cce_minus.launch_settings import rows_of, settings_for

RELATIVES = {
    "sm_80": ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121"),
    "sm_90": ("sm_90", "sm_100", "sm_103", "sm_110"),
    "gfx942": ("gfx90a", "gfx942", "gfx950", "gfx1100"),
}


@pytest.mark.parametrize(("known", "arch"), [(known, arch) for known, found in RELATIVES.items() for arch in found])
def test_a_chip_takes_the_rows_of_its_family(known, arch):
    for kernel, width, dtype, bound in rows_of(known):
        rows = (kernel, width, dtype, bound or 1 << 20)
        assert settings_for(rows[0], arch, *rows[1:]) == settings_for(rows[0], known, *rows[1:])


@pytest.fixture
def more_chips(monkeypatch):
    """Some more of every family have rows."""
    names = [*RELATIVES, "sm_86", "sm_103", "sm_120", "gfx90a", "gfx1100"]
    monkeypatch.setattr(launch_settings, "_rows", lambda: {(name, "", 0, ""): [] for name in names})
    launch_settings._known_architecture.cache_clear()
    yield
    launch_settings._known_architecture.cache_clear()


@pytest.mark.usefixtures("more_chips")
@pytest.mark.parametrize(
    ("arch", "known"),
    [
        ("sm_75", "sm_80"),
        ("sm_89", "sm_86"),
        ("sm_121", "sm_120"),
        ("sm_100", "sm_90"),
        ("sm_110", "sm_103"),
        ("gfx908", "gfx90a"),
        ("gfx950", "gfx942"),
        ("gfx1201", "gfx1100"),
    ],
)
def test_the_nearest_below_is_found_by_number(arch, known):
    assert launch_settings._known_architecture(arch) == known
