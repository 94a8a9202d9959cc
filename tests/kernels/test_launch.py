import pytest

from grpo_kernels.launch import ARCHS, CANDIDATES, D_CLASSES, FUSED, RIVALS, architecture, choose


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)]
)
def test_a_device_gets_an_architecture_whose_instructions_it_has(capability, arch):
    assert architecture(capability) == arch


@pytest.mark.parametrize("D", [1, 576, 1536, 2048, 4096, 8192, 1 << 20])
@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0)])
def test_every_width_has_a_launch_until_measured_by_tiles(capability, D):
    assert choose(capability, D).candidate == "tile"


@pytest.mark.parametrize("candidate", ["tile", "fused"])
@pytest.mark.parametrize("capability", [None, (9, 0)])
def test_a_candidate_can_be_forced(capability, candidate):
    assert choose(capability, 4096, candidate=candidate).candidate == candidate


def test_an_unknown_candidate_is_named():
    with pytest.raises(ValueError, match="candidate must be 'tile', 'fused' or None, got 'cublas'"):
        choose((9, 0), 4096, candidate="cublas")


def test_the_tables_are_complete():
    assert set(FUSED) == set(RIVALS) == set(ARCHS)
    assert set(CANDIDATES) == {(arch, d_class) for arch in ARCHS for d_class in D_CLASSES}


def test_the_first_architecture_has_no_descriptors():
    """sm_80 has no copy engine for them."""
    assert not any(blocks.has_descriptors for blocks in (FUSED[80].plain, FUSED[80].capped, *RIVALS[80]))
