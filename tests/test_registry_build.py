"""Every registered model builds, under a name of its own, with the parameters that the catalogue states."""

from __future__ import annotations

import sys

import pytest
import timm
from registered import ALL_NAMES, BACKBONES, FAMILIES, TINY, build, smallest
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint

from zoo import catalog
from zoo.cfg import ModelCfg, RestorationCfg


def test_families_are_found() -> None:
    """Guard the parametrisation itself: an empty list would pass everything."""
    assert {"repavit", "repaswin", "repamlpmixer", "repapoolformer", "cfsr"} <= set(FAMILIES)
    assert len(ALL_NAMES) >= 22
    assert set(TINY) <= set(FAMILIES), "TINY names a family that does not exist"


@pytest.mark.parametrize("name", ALL_NAMES)
def test_builds_on_meta_as_described(name: str) -> None:
    """With the stated parameters; the docstring, the cfgs and their tags say what `zoo info` shows."""
    model = timm.create_model(name, device="meta")
    assert {str(parameter.device) for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == catalog.load()[name]["params"]
    assert model_entrypoint(name).__doc__, f"{name} has no docstring"
    cfgs = get_arch_pretrained_cfgs(name)
    assert cfgs, f"{name} has no default_cfgs entry"
    built = {"{}": model}
    for full, cfg in cfgs.items():
        assert isinstance(cfg, ModelCfg), full
        assert cfg.paper_ids, full
        assert cfg.origin_url or cfg.license, full
        if isinstance(cfg, RestorationCfg):
            assert cfg.input_size[0] == model.in_chans, full
            assert cfg.num_classes == 0, full
            assert cfg.scale >= 1, full
            assert cfg.multiple_of >= 1, full
        else:
            assert cfg.input_size[0] == 3, full
            arguments = repr(cfg.model_args)
            if arguments not in built:
                built[arguments] = timm.create_model(name, device="meta", **cfg.model_args)
            own = dict(built[arguments].named_modules())
            heads = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier  # two with distillation
            assert set(heads) <= own.keys(), full
            assert cfg.first_conv in own, full
            assert own[cfg.first_conv].weight.shape[1] == 3, full


def test_catalogue_is_complete() -> None:
    """`zoo list` shows every registered model and nothing else (denoisers apart)."""
    listed = {name for name, facts in catalog.load().items() if facts["task"] not in catalog.PIPELINE_TASKS}
    assert listed == set(ALL_NAMES), "run `make catalog`"


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_argument_is_refused(family: str) -> None:
    """A mistyped argument must not vanish in **kwargs."""
    with pytest.raises(TypeError, match="idel_ratio"):
        timm.create_model(smallest(family), device="meta", idel_ratio=0.5)


def test_no_name_of_timm_is_replaced() -> None:
    """Our names are new: no model file of timm defines one of them, registered before ours or not."""
    theirs = {
        name
        for path, module in list(sys.modules.items())
        if path.startswith("timm.models.")
        for name in getattr(module, "__all__", ())
    }
    assert {"vit_tiny_patch16_224", "efficientvit_m0"} <= theirs
    assert theirs & set(ALL_NAMES) == set(), "timm has these already"


@pytest.mark.parametrize("family", BACKBONES)
def test_weight_tags_change_arguments(family: str) -> None:
    """`model_args` of a tag are used, and the caller's arguments win over them."""
    tags = [full for name in FAMILIES[family] for full in get_arch_pretrained_cfgs(name)]
    with_args = [full for full in tags if get_pretrained_cfg(full).model_args]
    for full in with_args:
        cfg = get_pretrained_cfg(full)
        model = timm.create_model(full, device="meta", num_classes=7)
        assert model.num_classes == 7
        if "img_size" in cfg.model_args:
            embed = getattr(model, "patch_embed", None) or model.stem
            assert getattr(embed, "img_size", None) in (None, (cfg.model_args["img_size"],) * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_weights(family: str) -> None:
    """Building twice from one seed gives one model; every weight has a value."""
    import torch

    def fresh() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return timm.create_model(smallest(family), **TINY[family].kwargs).state_dict()

    first, second = fresh(), fresh()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        assert torch.isfinite(value).all(), key
    assert build(family).training is False
