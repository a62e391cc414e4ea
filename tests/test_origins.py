"""Where every value of the settings comes from, as a table that was compared with the paper by hand.

A setting whose text says "paper" must stand here with the place; one that stands here must say so. Whoever
changes an origin compares it with the paper again and changes the table."""
from dataclasses import fields

import pytest

from scenimefy.ablate import AblateSettings
from scenimefy.bake import BakeSettings
from scenimefy.baselines import BaselineSettings
from scenimefy.control import Look
from scenimefy.core import Settings, SettingsError
from scenimefy.demo import DemoSettings
from scenimefy.finetune import FinetuneSettings
from scenimefy.runs import RunSettings
from scenimefy.selection import SelectSettings
from scenimefy.pretrain import PretrainSettings
from scenimefy.saliency import SaliencySettings
from scenimefy.semisup import SemisupSettings, _Objective, _TermWeights
from scenimefy.stylize import StylizeSettings
from scenimefy.teachers import ClipSettings, SegmenterSettings
from scenimefy.toonify import ToonifySettings
from scenimefy.whitebox import WhiteboxSettings

CLASSES = [AblateSettings, BakeSettings, BaselineSettings, ClipSettings, DemoSettings, FinetuneSettings,
           Look, PretrainSettings, RunSettings, SaliencySettings, SegmenterSettings, SelectSettings,
           SemisupSettings, StylizeSettings, ToonifySettings, WhiteboxSettings, _Objective, _TermWeights]

PAPER = {
    'FinetuneSettings': dict(
        steps='§4.1', blocks='A.1', lam_clip='§4.1', lam_perc='§4.1', lam_patch='§4.1', crops='A.1',
        crop='A.1', negatives='§3.1', perceptual='A.1'),
    'SelectSettings': dict(count='§4.1', max_lbce='§3.2', min_categories='§3.2', psi='§4.1', segmenter='A.2'),
    'SemisupSettings': dict(
        size='§4.1', batch='A.2', epochs='§4.1', n_blocks='A.1', n_patches='A.1', lam_gan='Eq. 7',
        lam_src='§4.1', lam_hdce='§4.1', lam_gan_sup='Eq. 4', lam_style='§4.1', lam_l1='appendix C',
        decay='§3.3'),
    'PretrainSettings': dict(size='§4.1')}
PAPER['TermWeights'] = {k: v for k, v in PAPER['SemisupSettings'].items() if k.startswith('lam_')}
PAPER['_Objective'] = PAPER['TermWeights']
for rival in ('BaselineSettings', 'SaliencySettings', 'WhiteboxSettings'):   # trained by the same run
    PAPER[rival] = PAPER['SemisupSettings']
OTHERS = ('released code', 'released weights', 'StyleGAN2 code by rosinality', 'ours',
          'CartoonGAN', 'AnimeGAN', 'CTSS')


def every_class():
    found, new = set(), [Settings]
    while new:
        new = [c for parent in new for c in parent.__subclasses__() if c.__module__.startswith('scenimefy.')]
        found |= set(new)
    return found


def test_no_settings_are_forgotten(): assert every_class() == set(CLASSES)


@pytest.mark.parametrize('cls', CLASSES, ids=lambda c: c.__name__)
def test_origins(cls):
    said = {f.name: f.metadata['origin'] for f in fields(cls)}
    paper = {name: text for name, text in said.items() if 'paper' in text}
    expected = {name: f'paper {place}' for name, place in PAPER.get(cls.__name__, {}).items()}
    assert {name: text.split(';')[0] for name, text in paper.items()} == expected
    assert not [name for name, text in said.items() if name not in paper and not text.startswith(OTHERS)]


@pytest.mark.parametrize('cls', CLASSES, ids=lambda c: c.__name__)
def test_defaults_are_a_preset_and_say_where_they_come_from(cls):
    settings = cls()
    assert settings == cls.preset(settings.base) and cls.PRESETS[settings.base] == {}
    assert not [f.name for f in fields(cls) if settings.origin(f.name) != f.metadata['origin']]
    with pytest.raises(SettingsError, match='no setting .no_such.*known|did you mean'): cls(no_such=3)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(SettingsError, match="no setting 'epoch' in SemisupSettings; did you mean 'epochs'"):
        SemisupSettings(epoch=3)


def test_numbers_that_the_paper_prints():
    "The values beside the origins: Stage 1, selection and Stage 3 as published."
    stage1, choice, stage3 = FinetuneSettings(), SelectSettings(), SemisupSettings()
    assert (stage1.steps, stage1.blocks) == (1000, 3)
    assert (stage1.lam_clip, stage1.lam_perc, stage1.lam_patch) == (1, .01, .05)
    assert (choice.count, choice.max_lbce, choice.min_categories, choice.psi) == (30_000, 5, 2, .7)
    assert (stage3.epochs, stage3.batch, stage3.size, stage3.n_patches) == (20, 1, 256, 256)
    assert (stage3.lam_src, stage3.lam_hdce, stage3.lam_style) == (.05, .1, .05)
