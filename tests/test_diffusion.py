"Pairs by diffusion: the promises of a source, what is refused, and a whole pipeline of random weights."
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import scenimefy.cli as cli
from scenimefy.core import SettingsError, UserError, seeded, to_image, to_model
from scenimefy.data import PairedSet
from scenimefy.diffusion import PROMPT, DiffusionPairs, load_pipeline
from scenimefy.painters import render
from scenimefy.selection import make_pairs, read_scores, signature

from test_selection import Colors, cfg, everything

NOTEBOOK = Path(__file__).resolve().parents[1]/'nbs'/'08e_diffusion.ipynb'


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path/'photos'
    folder.mkdir()
    for k in range(3): to_image(render([k], 64, 'photo')).save(folder/f'{k}.png')
    return folder


class Painter:
    "Called like a pipeline: the photo, with the noise that each generator gives."
    def __init__(self, flagged=()): self.flagged, self.heard, self.done = flagged, [], 0

    def __call__(self, image, generator, **how):
        assert 0 <= image.min() and image.max() <= 1 and len(image) == len(generator)
        self.heard.append(how)
        noise = torch.stack([torch.rand(x.shape, generator=g) for x, g in zip(image, generator)])
        flags = [self.done + k in self.flagged for k in range(len(image))]
        self.done += len(image)
        return SimpleNamespace(images=.7*image + .3*noise, nsfw_content_detected=flags)


def pairs_of(photos, painter=None, **how): return DiffusionPairs(photos, painter or Painter(), size=64, **how)


# ---- the source, without diffusers

def test_a_pair_is_a_function_of_its_seed(photos):
    source = pairs_of(photos)
    photo, anime = source.pairs(range(7))
    for seed in (0, 4, 6):
        one = pairs_of(photos).pairs([seed])
        assert torch.equal(one[0][0], photo[seed]) and torch.equal(one[1][0], anime[seed])
    assert not torch.equal(anime[0], anime[3]) and source.length is None
    for seed in range(7):                               # photo number seed, whole, perhaps mirrored
        file = to_model(Image.open(photos/f'{seed % 3}.png'))[0]
        assert torch.equal(photo[seed], file) or torch.equal(photo[seed], file.flip(-1))


def test_what_the_model_is_asked(photos):
    painter = Painter()
    pairs_of(photos, painter, prompt='a "village"', strength=.3, guidance=2., steps=10).pairs([0, 1])
    assert painter.heard == [dict(prompt=['a "village"']*2, strength=.3, guidance_scale=2.,
                                  num_inference_steps=10, output_type='pt')]
    pairs_of(photos, painter).pairs([0])
    assert painter.heard[1]['prompt'] == [PROMPT]


def test_about_tells_sources_apart(photos):
    start = pairs_of(photos).about
    ways = [dict(prompt='other'), dict(strength=.6), dict(guidance=3.), dict(steps=20)]
    said = [pairs_of(photos, **how).about for how in ways]
    said.append(DiffusionPairs(photos, Painter(), size=96).about)
    (photos/'1.png').write_bytes((photos/'0.png').read_bytes())          # the same name, another picture
    said.append(pairs_of(photos).about)
    assert len({start, *said}) == 7 and pairs_of(photos).about == said[-1]


def test_signature_sees_names_order_and_contents(tmp_path):
    files = [tmp_path/name for name in 'abc']
    for f in files: f.write_text('one')
    start = signature(files)
    assert signature(files) == start != signature(files[::-1])
    files[2].write_text('two')
    assert signature(files) != start
    files[2].unlink()
    assert len({start, signature(files), signature(files[:2])}) == 3


@pytest.mark.parametrize('how, said', [(dict(strength=0), 'above 0'), (dict(strength=1.5), 'at most 1'),
                                       (dict(strength=float('nan')), 'above 0'),
                                       (dict(strength=.01), 'none of 50 steps'),
                                       (dict(steps=0), 'none of 0 steps'), (dict(steps=10.5), 'whole number'),
                                       (dict(guidance=float('nan')), 'finite'),
                                       *((dict(size=n), 'multiple of 32') for n in (0, 100, -32))])
def test_numbers_that_make_no_sense(photos, how, said):
    with pytest.raises(SettingsError, match=said): DiffusionPairs(photos, Painter(), **how)


def test_the_size_that_the_model_was_trained_at(photos):
    def side(**parts):
        model = Painter()
        vars(model).update(parts)
        return DiffusionPairs(photos, model).cut.size
    def net(side): return SimpleNamespace(config=SimpleNamespace(sample_size=side))
    assert side() == side(unet=net([64, 96]), vae_scale_factor=8) == 512             # it does not say
    assert side(unet=net(96), vae_scale_factor=8) == 768
    assert side(transformer=net(128), vae_scale_factor=8) == 1024


def test_scenes_of_another_size_are_refused(photos):
    def smaller(image, **how): return SimpleNamespace(images=image[..., :56, :56])
    with pytest.raises(UserError, match=r'makes pictures \(1, 3, 56, 56\) of photos \(1, 3, 64, 64\)'):
        pairs_of(photos, smaller).pairs([0])


def test_a_flagged_picture_is_left_out_and_said(photos, tmp_path):
    with pytest.warns(UserWarning, match='safety checker of the model flagged pair 2'):
        _, anime = pairs_of(photos, Painter(flagged=[1])).pairs([7, 2, 3])
    assert anime[1].isnan().all() and anime[0].isfinite().all() and anime[2].isfinite().all()
    rule = cfg(count=5, batch=3, max_lbce=9., min_categories=1)
    with pytest.warns(UserWarning, match='flagged pair 4'):
        make_pairs(rule, pairs_of(photos, Painter(flagged=[4])), Colors(), tmp_path/'p')
    lines = read_scores(tmp_path/'p')
    assert [x['seed'] for x in lines if not x['accepted']] == [4] and lines[4]['lbce'] is None


def test_a_folder_goes_on_after_a_kill(photos, tmp_path):
    rule = cfg(count=8, batch=3, max_lbce=9., min_categories=1)
    def killed(*progress): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        make_pairs(rule, pairs_of(photos), Colors(), tmp_path/'a', on_progress=killed)
    for name in 'ab': make_pairs(rule, pairs_of(photos), Colors(), tmp_path/name)
    assert everything(tmp_path/'a') == everything(tmp_path/'b') and len(PairedSet(tmp_path/'a', 64)) == 8
    with pytest.raises(UserError, match='another source'):
        make_pairs(rule.but(count=9), pairs_of(photos, strength=.6), Colors(), tmp_path/'a')


def test_a_broken_photo_is_said_and_replaced(photos):
    (photos/'1.png').write_text('no picture')
    with pytest.warns(UserWarning, match='1.png'): photo, _ = pairs_of(photos).pairs(range(3))
    assert photo.isfinite().all()


def test_without_diffusers_it_says_what_to_install(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    with pytest.raises(UserError, match=r'pip install "scenimefy\[diffusion\]"'):
        DiffusionPairs(photos, 'some/model', device='cpu')


# ---- the command

def run(*words): return CliRunner().invoke(cli.app, [str(w) for w in words])


@pytest.mark.parametrize('words, said', [
    (['--photos', 'x'], '--photos belongs to --diffusion'), (['--prompt', 'x'], '--prompt belongs'),
    (['--strength', '0'], '--strength belongs'), (['--diffusion', 'x'], 'add --photos'),
    (['--diffusion', 'x', '--photos', 'y', '--source', 'z'], 'replaces --source'),
    (['--diffusion', 'x', '--photos', 'y', '--strength', '0'], 'above 0')])
def test_options_that_do_not_belong_together(words, said, tmp_path):
    done = run('pairs', '--preset', 'tiny', '-o', tmp_path/'p', *words)
    assert done.exit_code == 2 and said in done.output, done.output
    assert not (tmp_path/'p').exists()


# ---- a pipeline of the kind of Stable Diffusion, with random weights

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A folder as `save_pretrained` writes it."
    diffusers = pytest.importorskip('diffusers')
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder = tmp_path_factory.mktemp('diffusion')
    letters = [chr(c) for c in range(ord('!'), ord('~') + 1)]
    words = [*letters, *(c + '</w>' for c in letters), '<|startoftext|>', '<|endoftext|>']
    (folder/'vocab.json').write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder/'merges.txt').write_text('#version: 0.2\n')
    tokenizer = CLIPTokenizer(str(folder/'vocab.json'), str(folder/'merges.txt'), model_max_length=16)
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, projection_dim=32,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=1))
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2)
    schedule = diffusers.DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear',
                                       clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=schedule,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder/'model')
    return folder/'model'


def copy_of(model, to):
    for file in model.rglob('*'):
        if not file.is_file(): continue
        (to/file.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        (to/file.relative_to(model)).write_bytes(file.read_bytes())
    return to


def levels(x): return ((x.clamp(-1, 1) + 1)*127.5).round()


def test_the_model_of_a_folder_paints(model, photos):
    source = DiffusionPairs(photos, model, 'a village', steps=6, device='cpu')
    photo, anime = source.pairs(range(3))
    assert photo.shape == anime.shape == (3, 3, 64, 64)                    # what the UNet says: 32 codes × 2
    assert anime.isfinite().all() and anime.abs().max() <= 1
    alone = source.pairs([2])[1][0]
    assert (levels(alone) - levels(anime[2])).abs().max() <= 1
    again = DiffusionPairs(photos, str(model), 'a village', steps=6, device='cpu')
    assert again.about == source.about and torch.equal(again.pairs(range(3))[1], anime)
    other = DiffusionPairs(photos, model, 'a forest', steps=6, device='cpu').pairs([2])[1][0]
    assert not torch.equal(other, alone)                                   # the prompt is heard


@torch.no_grad()
def test_the_path_from_photo_to_picture_by_hand(model, photos):
    "Encode, add noise, take it away in the last steps with guidance, decode."
    source = DiffusionPairs(photos, model, 'a village', strength=.5, guidance=3., steps=6, device='cpu')
    photo, anime = source.pairs([1])
    parts = source.pipeline.components
    dice = seeded('diffusion', 1)
    source.cut.draw(dice)                                                  # the window is drawn first
    code = parts['vae'].encode(photo).latent_dist
    code = code.mean + code.std*torch.randn(code.mean.shape, generator=dice)
    code = code*parts['vae'].config.scaling_factor
    noise = torch.randn(code.shape, generator=dice)
    def meaning(text):
        ids = parts['tokenizer'](text, padding='max_length', max_length=16, return_tensors='pt').input_ids
        return parts['text_encoder'](ids)[0]
    both = torch.cat([meaning(''), meaning('a village')])
    beta = torch.linspace(.00085**.5, .012**.5, 1000).square()
    kept = (1 - beta).cumprod(0)
    x = kept[333]**.5*code + (1 - kept[333])**.5*noise                     # 6 times: 831 665 499 333 167 1
    for now, then in ((333, 167), (167, 1), (1, None)):
        without, with_prompt = parts['unet'](torch.cat([x, x]), now, both).sample.chunk(2)
        noise = without + 3.*(with_prompt - without)
        best = (x - (1 - kept[now])**.5*noise)/kept[now]**.5
        later = kept[0] if then is None else kept[then]
        x = later**.5*best + (1 - later)**.5*noise
    mine = parts['vae'].decode(x/parts['vae'].config.scaling_factor).sample.clamp(-1, 1)
    assert (mine - anime).abs().max() < 2e-3


def test_the_lesson_has_the_schedule_and_the_steps_of_diffusers():
    diffusers = pytest.importorskip('diffusers')
    cells = {c.id: c.source for c in nbformat.read(NOTEBOOK, 4).cells}
    lesson = dict(torch=torch)
    for name in ('eq-schedule', 'eq-levels'): exec(cells[name], lesson)
    theirs = diffusers.DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
    assert torch.allclose(lesson['alpha_bars'](), theirs.alphas_cumprod, atol=1e-6)
    pipeline = SimpleNamespace(scheduler=theirs)
    for strength in (.1, .3, .5, .8, 1.):
        theirs.set_timesteps(20)
        times, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, 20, strength, 'cpu')
        assert torch.allclose(lesson['levels'](strength, 20), theirs.alphas_cumprod[times], atol=1e-6)


def test_every_weight_is_signed(model, photos):
    source = DiffusionPairs(photos, model, steps=6, device='cpu')
    for part in ('unet', 'vae', 'text_encoder'):
        pipeline = load_pipeline(model, 'cpu')
        with torch.no_grad(): next(pipeline.components[part].parameters()).view(-1)[0] += 1e-3
        assert DiffusionPairs(photos, pipeline, steps=6).about != source.about, part
    pipeline = load_pipeline(model, 'cpu')
    pipeline.scheduler.register_to_config(beta_end=.02)
    assert DiffusionPairs(photos, pipeline, steps=6).about != source.about


def test_a_model_in_bfloat16_makes_pairs(model, photos):
    photo, anime = DiffusionPairs(photos, load_pipeline(model, 'cpu').to(torch.bfloat16), steps=4).pairs([0])
    assert photo.shape == anime.shape and anime.isfinite().all() and anime.dtype == torch.float32


def test_the_checker_of_the_model_is_obeyed(model, photos, monkeypatch):
    source = DiffusionPairs(photos, model, steps=4, device='cpu')
    monkeypatch.setattr(source.pipeline, 'run_safety_checker', lambda image, *_: (image*0, [False, True]))
    with pytest.warns(UserWarning, match='flagged pair 6'): _, anime = source.pairs([5, 6])
    assert anime[1].isnan().all() and anime[0].isfinite().all()


class Canary:
    "Whoever unpickles it leaves a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize('part, name, bad', [
    ('unet', 'diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.bin'),
    ('vae', 'diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.bin'),
    ('text_encoder', 'model.safetensors', 'pytorch_model.bin')])
def test_nothing_is_unpickled(model, tmp_path, part, name, bad):
    "Neither sound weights in a pickle nor a pickle that runs something."
    mine = copy_of(model, tmp_path/'m')
    sound = load_file(mine/part/name)
    (mine/part/name).unlink()
    for content in (sound, Canary(tmp_path/'ran')):
        torch.save(content, mine/part/bad)
        with pytest.raises(UserError, match='cannot load a diffusion model'): load_pipeline(mine, 'cpu')
    assert not (tmp_path/'ran').exists()


def test_code_of_strangers_is_not_run(model, tmp_path):
    mine = copy_of(model, tmp_path/'m')
    code = f'from pathlib import Path\nPath({str(tmp_path/"ran")!r}).touch()\nclass Net: pass\n'
    for folder in (mine, mine/'unet'): (folder/'mine.py').write_text(code)
    index = json.loads((mine/'model_index.json').read_text())
    (mine/'model_index.json').write_text(json.dumps({**index, 'unet': ['mine', 'Net']}))
    with pytest.raises(UserError, match='cannot load a diffusion model'): load_pipeline(mine, 'cpu')
    (mine/'model_index.json').write_text(json.dumps({**index, '_class_name': ['mine', 'Net']}))
    with pytest.raises(UserError, match='cannot load a diffusion model'): load_pipeline(mine, 'cpu')
    assert not (tmp_path/'ran').exists()


def test_names_that_are_no_model(tmp_path, monkeypatch):
    pytest.importorskip('diffusers')
    monkeypatch.setenv('SCENIMEFY_OFFLINE', '1')
    (tmp_path/'empty').mkdir()
    for name in (tmp_path/'empty', 'nobody/nothing-here', 'hf:nobody/nothing-here@v1', 'a b', ''):
        with pytest.raises(UserError) as e: load_pipeline(name, 'cpu')
        assert 'model_index.json' in str(e.value) and '\n' not in str(e.value)


def test_the_command_from_photos_to_pairs(model, photos, tmp_path):
    words = ['pairs', '--preset', 'tiny', '--diffusion', model, '--photos', photos, '--device', 'cpu',
             '--max-lbce', 9, '--min-categories', 1, '--batch', 2, '-o', tmp_path/'pairs']
    first = run(*words, '--count', 2, '--strength', .1, '--prompt', 'a village')
    assert first.exit_code == 0 and '2 of 2 pairs kept' in first.output, first.output
    more = run(*words, '--count', 3, '--strength', .1, '--prompt', 'a village')
    assert more.exit_code == 0 and len(PairedSet(tmp_path/'pairs', 64)) == 3, more.output
    other = run(*words, '--count', 4, '--strength', .2, '--prompt', 'a village')
    assert other.exit_code == 1 and 'another source' in other.output
    made_by = json.loads((tmp_path/'pairs'/'source.json').read_text())['source']
    assert '"a village", strength 0.1, guidance 7.5, 50 steps, 64 px' in made_by
    assert 'a village' in (tmp_path/'pairs'/'report.html').read_text(encoding='utf8')


def test_offline_and_revision_reach_the_loader(monkeypatch):
    diffusers, heard = pytest.importorskip('diffusers'), []
    def from_pretrained(place, **how):
        heard.append((place, how['revision'], how['local_files_only']))
        raise OSError('enough')
    monkeypatch.setattr(diffusers.AutoPipelineForImage2Image, 'from_pretrained', from_pretrained)
    for offline in '01':
        monkeypatch.setenv('SCENIMEFY_OFFLINE', offline)
        with pytest.raises(UserError, match='enough'): load_pipeline('hf:owner/name@v1', 'cpu')
    assert heard == [('owner/name', 'v1', False), ('owner/name', 'v1', True)]
