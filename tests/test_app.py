"The page: what it refuses, what it leaves behind (nothing), and how it works in a real browser."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import scenimefy.app as app
import scenimefy.cli as cli
from scenimefy.core import SettingsError, UserError
from scenimefy.data import ImageError

# `scenimefy app`, without the seconds that the example takes
QUICK = ('import scenimefy.app as app; from scenimefy.cli import main; '
         'app._Desk.photo = lambda desk, *_: ("", desk.visitors.new_file("example", "none.png"), ""); main()')
HOME = '127.0.0.1', '::1', 'localhost'


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.05)
    return true()


# ---- without Gradio

def test_a_message_holds_no_path_of_this_computer():
    error = ImageError('/secret/place/me.png', 'it is text, not a picture')
    assert app._trouble(error, 'me.png') == 'me.png: it is text, not a picture'
    assert app._trouble(UserError('choose a smaller size'), 'me.png') == 'choose a smaller size'
    assert 'me.png: unexpected KeyError' in app._trouble(KeyError('x'), 'me.png')


def test_what_was_not_offered_is_refused(tmp_path):
    "A browser may send anything, such as a file of this computer in place of a translator."
    desk = app._Desk(tmp_path, 'drawn', None)
    good = '1280 px', 'drawn'
    for size, painter in (('9999999 px', good[1]), ([], good[1]), (good[0], '/etc/passwd'), (good[0], {})):
        with pytest.raises(SettingsError, match='none of the choices'):
            desk.photo('example', None, size, 1., painter)
    for visitor, upload in (('nobody', None), ('example', {'path': str(tmp_path)})):    # a folder
        with pytest.raises(UserError, match='lost its connection'):
            desk.photo(visitor, upload, '1280 px', 1., 'drawn')
    desk.leave('example')
    assert tmp_path.is_dir() and not list(tmp_path.iterdir()) and desk.worker.process is None


def test_painters_that_are_offered():
    assert list(app._painters('drawn'))[0] == 'drawn' and len(app._painters('drawn')) == 2
    mine = app._painters('runs/mine/net.safetensors')
    assert list(mine.items())[0] == ('net.safetensors', 'runs/mine/net.safetensors') and len(mine) == 3


def test_a_visitor_who_leaves_ends_the_job(tmp_path):
    desk = app._Desk(tmp_path, 'drawn', None)
    desk.visitors.arrive('me')
    place, said = desk.visitors.new_file('me', 'scene.png'), []
    place.write_text('half a scene')
    def work():
        try: desk.worker.run('me', 90, time.sleep, 60)
        except UserError as error: said.append(str(error))
    job = threading.Thread(target=work)
    job.start()
    assert wait_until(lambda: desk.worker.owner == 'me')
    desk.leave('somebody else')
    assert desk.worker.process.is_alive() and place.exists()
    desk.leave('me')
    job.join(10)
    assert said and not desk.worker.process.is_alive() and not list(tmp_path.iterdir())


def test_command(monkeypatch):
    asked = []
    monkeypatch.setattr(app, 'run_app', lambda *args: asked.append(args[:4]))
    def run(*words): return CliRunner().invoke(cli.app, ['app', *words])
    plain = run()
    assert plain.exit_code == 0 and asked.pop() == ('drawn', '127.0.0.1', None, None)
    assert 'note:' not in plain.output
    open_to_all = run('--host', '0.0.0.0', '--port', '80', '--max-pixels', '99', '--weights', 'shinkai')
    assert asked.pop() == ('shinkai', '0.0.0.0', 80, 99)
    assert 'can be reached by others' in open_to_all.output and 'password' in open_to_all.output
    assert run('--port', '70000').exit_code == 2 and not asked


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    result = CliRunner().invoke(cli.app, ['app'])
    assert result.exit_code == 1 and 'pip install "scenimefy[app]"' in result.output
    assert 'Traceback' not in result.output


# ---- with Gradio

CALLS = []       # the addresses that this process asked for, while the page is served


def listen(event, args):
    if event == 'socket.connect' and isinstance(args[1], tuple): CALLS.append(str(args[1][0]))
    if event == 'socket.getaddrinfo' and args[0]: CALLS.append(str(args[0]))


@pytest.fixture(scope='module')
def served():
    "(address, folder of its files) of a page; afterwards the folder must be gone."
    pytest.importorskip('gradio')
    desks, real = [], app._Desk
    def keep(*args):
        desks.append(real(*args))
        return desks[-1]
    before = dict(os.environ)
    sys.addaudithook(listen)
    app._Desk = keep
    with app.serving() as url:
        app._Desk = real
        yield url, desks[0]
    asked = {name for name in CALLS if name not in HOME}
    assert CALLS and not asked, asked
    assert not desks[0].visitors.folder.exists() and not desks[0].worker.process.is_alive()
    assert {k: v for k, v in os.environ.items() if k.startswith('GRADIO')} == {
        k: v for k, v in before.items() if k.startswith('GRADIO')}


def files(desk): return [p for p in desk.visitors.folder.rglob('*') if p.is_file()]


def get(url, data=None):
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json'})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error: return error.code, error.read().decode()


def test_server_is_local_and_tells_nobody(served):
    url, _ = served
    status, text = get(url)
    assert status == 200 and url.startswith('http://127.0.0.1:')
    config = json.loads(get(f'{url}config')[1])
    assert config['analytics_enabled'] is False and not config.get('run_history')
    assert 'fonts.googleapis' not in text + get(f'{url}theme.css')[1]


def test_server_gives_no_file_of_this_computer(served, tmp_path):
    url, desk = served
    (tmp_path/'secret.txt').write_text('secret')
    for path in ('/etc/hosts', tmp_path/'secret.txt', Path('settings.ini').resolve(), app.__file__):
        assert get(f'{url}gradio_api/file={path}')[0] in (403, 404), path
    assert not files(desk)[1:]                                     # one, the example's scene


def test_server_offers_no_functions_by_name(served):
    url, _ = served
    info = json.loads(get(f'{url}gradio_api/info')[1])
    assert not info['named_endpoints'] and not info['unnamed_endpoints']


def test_port_that_is_taken(served, monkeypatch):
    monkeypatch.setattr(app._Desk, 'photo', lambda desk, *_: ('', desk.visitors.new_file('example', 'x'), ''))
    port = int(re.search(r':(\d+)', served[0])[1])
    with pytest.raises(UserError, match=f'port {port} .* is taken'):
        with app.serving(port=port): pass


# ---- in a browser

@pytest.fixture(scope='module')
def browser(served):
    playwright = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if chromium is None: pytest.skip('no Chromium here')
    options = ['--no-sandbox', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


class Visit:
    "A page in the browser, and every address that it asked for."
    def __init__(self, browser, url, **how):
        self.page, self.asked = browser.new_page(**{'viewport': dict(width=1280, height=900), **how}), []
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.set_default_timeout(60_000)
        self.page.goto(url)
        self.page.wait_for_selector('.wipe')

    def choose(self, path): self.page.set_input_files('input[type=file]', path)
    def at(self): return self.page.eval_on_selector('.wipe', "e => e.style.getPropertyValue('--at')")


@pytest.fixture
def visit(browser, served):
    opened = []
    def start(**how):
        opened.append(Visit(browser, served[0], **how))
        return opened[-1]
    yield start
    for one in opened:
        if not one.page.is_closed(): one.page.close()


@pytest.fixture
def photo(tmp_path):
    "A photo as a phone makes it: lying on its side, with the place in it."
    exif = Image.Exif()
    exif[274] = 6                                                  # turn it to see it: 60×90 becomes 90×60
    exif.get_ifd(34853).update({1: 'N', 2: (52., 31., 12.)})       # GPS
    sky = Image.linear_gradient('L').resize((60, 90))
    picture = Image.merge('RGB', (sky, sky.rotate(180), sky.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    picture.save(tmp_path/'holiday.jpg', exif=exif)
    return tmp_path/'holiday.jpg'


def test_a_visit(served, visit, photo, tmp_path):
    "Choose, wait, wipe, download, close: the scene is right, and nothing is left."
    url, desk = served
    before, here = set(files(desk)), visit()
    page, wipe = here.page, here.page.locator('.wipe input')
    here.choose(photo)
    page.get_by_text('90 × 60 px in').wait_for()
    assert [i.get_attribute('alt') for i in page.locator('.wipe img').all()] == [
        'holiday.jpg as an anime scene', 'holiday.jpg']
    assert here.at() in ('', '50%')
    wipe.focus()
    for _ in range(3): page.keyboard.press('ArrowRight')
    assert here.at() == '53%' and wipe.get_attribute('aria-valuetext') == '53 % photo'
    box = wipe.bounding_box()
    page.mouse.click(box['x'] + .25*box['width'], box['y'] + box['height']/2)
    assert abs(int(here.at().rstrip('%')) - 25) <= 2
    with page.expect_download() as download: page.get_by_text('Download the scene').click()
    download.value.save_as(tmp_path/'got.png')
    scene = Image.open(tmp_path/'got.png')
    assert download.value.suggested_filename == 'holiday-scene.png'
    assert scene.size == (90, 60) and not scene.getexif() and set(scene.info) <= {'Software', 'srgb'}
    assert len(set(files(desk)) - before) == 2                     # photo and scene, while the page is open
    kept = page.evaluate('''async () => [Object.keys(localStorage).length, Object.keys(sessionStorage).length,
                                         (await indexedDB.databases()).length]''')
    assert kept == [0, 0, 0]
    page.close()
    assert wait_until(lambda: set(files(desk)) <= before)
    strangers = {a for a in here.asked if not a.startswith((url, 'data:', 'blob:'))}
    assert len(here.asked) > 10 and not strangers, strangers


def test_a_text_that_is_called_png(served, visit, tmp_path, photo):
    (tmp_path/'notes.png').write_text('I am no picture.')
    here = visit()
    here.choose(tmp_path/'notes.png')
    alert = here.page.get_by_role('alert').filter(has_text='notes.png')
    alert.wait_for()
    assert alert.inner_text() == 'notes.png: it is text, not a picture'
    here.page.get_by_label('Remove Image').click()
    here.choose(photo)                                             # the page still works
    here.page.get_by_text('90 × 60 px in').wait_for()


def test_camera(served, visit, monkeypatch):
    "The browser's pretended camera: a picture is taken, it arrives, and the note says which share is done."
    desk, page, taken, seen = served[1], visit(permissions=['camera']).page, [], threading.Event()
    def paint(owner, seconds, job, photo, out, name, *how, tell=None):
        tell(.25)
        seen.wait(30)
        taken.append(Image.open(photo).size)
        Image.new('RGB', (40, 30)).save(out)
        return 'painted'
    monkeypatch.setattr(desk.worker, 'run', paint)
    page.get_by_label('Capture from camera').click()
    page.get_by_text('Click to Access Webcam').click()
    page.get_by_label('capture photo').click()
    page.get_by_text('Painting … 25%').wait_for()
    seen.set()
    page.get_by_text('40 × 30 px in').wait_for()
    assert len(taken) == 1 and min(taken[0]) > 100


def small_film(path):
    "Six frames of 48×32."
    av = pytest.importorskip('av')
    with av.open(path, 'w') as container:
        stream = container.add_stream('mpeg4', 6)
        stream.width, stream.height, stream.pix_fmt = 48, 32, 'yuv420p'
        for gray in range(0, 240, 40):
            frame = av.VideoFrame.from_image(Image.new('RGB', (48, 32), (gray, gray, 90)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frames(path):
    import av
    with av.open(path) as container: return [f.to_image().size for f in container.decode(video=0)]


def test_film(served, visit, tmp_path):
    url, desk = served
    before, page = set(files(desk)), visit().page
    page.get_by_role('tab', name='A film').click()
    alert = page.get_by_role('alert')
    page.get_by_text('Paint the film').click()
    alert.filter(has_text='choose a film first').wait_for()
    (tmp_path/'broken.mp4').write_text('no film')
    page.set_input_files('input[type=file] >> visible=false >> nth=-1', tmp_path/'broken.mp4')
    alert.filter(has_text='broken.mp4: it is').wait_for()
    page.get_by_label('Clear').or_(page.get_by_label('Remove')).last.click()
    page.set_input_files('input[type=file] >> visible=false >> nth=-1', small_film(str(tmp_path/'sea.mp4')))
    page.get_by_text('Painted in').wait_for()
    address = page.locator('video').last.get_attribute('src')
    assert 'sea-scene.mp4' in address
    urllib.request.urlretrieve(address, tmp_path/'got.mp4')
    assert frames(str(tmp_path/'got.mp4')) == [(48, 32)]*6
    page.close()
    assert wait_until(lambda: set(files(desk)) <= before)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_phone(served, visit, scheme):
    "Nothing sticks out of a narrow screen; the colors follow the reader's choice; every control has a name."
    page = visit(viewport=dict(width=390, height=844), color_scheme=scheme).page
    page.get_by_text('Paint it').wait_for()
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    red = int(re.search(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[0])
    assert red < 40 if scheme == 'dark' else red > 240
    tree = page.locator('body').aria_snapshot()
    named = re.findall(r'- (button|slider|radio|img|spinbutton)( "[^"]+")?', tree)
    assert len([kind for kind, _ in named if kind == 'slider']) == 2
    nameless = [kind for kind, name in named if not name and kind != 'img']
    assert len(named) > 12 and not nameless, tree


def test_keyboard_reaches_everything(served, visit):
    page = visit().page
    page.get_by_text('Paint it').wait_for()
    reached = set()
    for _ in range(30):
        page.keyboard.press('Tab')
        reached.add(page.evaluate('''() => { const e = document.activeElement;
            return e.getAttribute('aria-label') || e.innerText || e.parentNode.innerText }'''))
    wanted = ('A film', 'Wipe', 'Download the scene', 'Upload file', 'Capture', 'Strength', '1280 px',
              'drawn', 'Paint it')
    missed = [word for word in wanted if not any(word in text for text in reached)]
    assert not missed, reached


# ---- the whole program

@pytest.mark.skipif(os.name == 'nt', reason='no SIGTERM there')
def test_asked_to_end_it_leaves_nothing(tmp_path):
    pytest.importorskip('gradio')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TMPDIR': str(tmp_path)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, '-c', QUICK, 'app'], env=env, **pipes) as page:
        line = page.stdout.readline()
        folders = list(tmp_path.glob('scenimefy-app-*'))
        page.send_signal(signal.SIGTERM)
        page.communicate(timeout=20)
    assert line.startswith('http://127.0.0.1:') and len(folders) == 1
    assert page.returncode == 0 and not list(tmp_path.glob('scenimefy-app-*'))
