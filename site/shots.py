"""What a reader sees, as pictures: the finished site at two widths in light and dark, a notebook in
JupyterLab whose sliders were moved, or the page of `scenimefy app` with its wipe moved. Needs
`pip install playwright` and a Chromium or Chrome of the system.

    python site/shots.py site -o shots
    python site/shots.py widget nbs/06_losses.ipynb -o shots
    python site/shots.py app photo.jpg -o shots
"""
import argparse
import functools
import http.server
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {'desktop': (1280, 900), 'phone': (390, 844)}
PAGES = ('index', '06_losses', 'api/core', 'labs/index')
LAB_SETTINGS = {'notebook-extension/tracker': {'windowingMode': 'none'},
                'apputils-extension/notification': {'fetchNews': 'false'}}
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def find_browser() -> str: # '' if there is none
    "The path of a Chromium or Chrome."
    found = [shutil.which(name) for name in BROWSERS]
    return next((path for path in found if path), '')


@contextmanager
def browser():
    "A headless browser."
    from playwright.sync_api import sync_playwright
    path = find_browser()
    if not path: raise SystemExit(f'no browser: none of {", ".join(BROWSERS)} is installed')
    with sync_playwright() as tools:
        made = tools.chromium.launch(executable_path=path, args=['--no-sandbox'])
        try: yield made
        finally: made.close()


# ---- the site

class Quiet(http.server.SimpleHTTPRequestHandler):
    "Files of a folder, without a line for each request."
    def log_message(self, *args): pass


@contextmanager
def served(folder): # its address
    "A folder on this machine, as a web server shows it."
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()


def shoot_page(window, address:str, file, wait:float=120) -> list: # what is wrong
    "One page as a picture; requests to other servers and pages wider than the window are faults."
    page, faults = window.new_page(), []
    page.on('request', lambda r: faults.append(f'asks for {r.url}') if foreign(r.url) else None)
    page.on('pageerror', lambda e: faults.append(f'error {e}'))
    page.goto(address, wait_until='load', timeout=wait*1000)
    page.wait_for_timeout(1500)        # formulas
    width = page.evaluate('[document.documentElement.scrollWidth, window.innerWidth]')
    if width[0] > width[1]: faults.append(f'{width[0]} px wide, the window {width[1]}')
    page.screenshot(path=str(file))
    page.close()
    return [f'{file.name}: {fault}' for fault in faults]


def foreign(url:str) -> bool: return url.startswith('http') and '127.0.0.1' not in url


def shoot_site(html, out, pages=PAGES) -> list: # faults
    "Pages of the site, each at two widths in light and dark."
    out.mkdir(parents=True, exist_ok=True)
    faults = []
    with served(html) as address, browser() as made:
        for name, (width, height) in SIZES.items():
            for scheme in ('light', 'dark'):
                window = made.new_context(viewport=dict(width=width, height=height), color_scheme=scheme)
                for page in pages:
                    path = page.partition('#')[0]
                    if not (html/f'{path}.html').exists(): continue
                    target = page.replace(path, f'{path}.html', 1)
                    file = out/f'{re.sub("[/#]", "-", page)}-{name}-{scheme}.png'
                    faults += shoot_page(window, f'{address}/{target}', file)
                window.close()
    return faults


# ---- a widget in JupyterLab

def find_lab() -> str:
    "`jupyter-lab` of this Python, else of the PATH."
    beside = Path(sys.executable).with_name('jupyter-lab')
    return str(beside) if beside.exists() else shutil.which('jupyter-lab') or ''


@contextmanager
def jupyterlab(folder): # address of the server, and its token
    "JupyterLab over a folder; all cells of a notebook are drawn, not only those in the window."
    for name, values in LAB_SETTINGS.items():
        file = folder/'.settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    token = secrets.token_hex(8)
    command = [find_lab(), '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=0',
               '--expose-app-in-browser', f'--IdentityProvider.token={token}',
               f'--ServerApp.root_dir={folder}']
    env = os.environ | {'JUPYTERLAB_SETTINGS_DIR': str(folder/'.settings'),
                        'JUPYTER_RUNTIME_DIR': str(folder/'.run')}
    log = open(folder/'.log', 'w')
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=env)
    try: yield lab_address(folder/'.log', server), token
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def lab_address(log, server, wait:float=120) -> str:
    "The address that a starting server writes into its log."
    for _ in range(int(wait*2)):
        found = re.search(r'http://127\.0\.0\.1:\d+', log.read_text())
        if found: return found.group()
        if server.poll() is not None: break
        time.sleep(.5)
    raise SystemExit(f'JupyterLab did not start:\n{log.read_text()[-1500:]}')


CONTROLS = re.compile(r'\binteract(ive)?\(')


def with_controls(notebook) -> dict:
    "A notebook up to its last cell with controls, without outputs."
    nb = json.loads(notebook.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    places = [k for k, cell in enumerate(nb['cells']) if CONTROLS.search(''.join(cell['source']))]
    if not places: raise SystemExit(f'{notebook.name}: no cell with interact(…)')
    return dict(nb, cells=nb['cells'][:places[-1] + 1])


KERNEL = 'window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel'


def run_cells(page, wait:float):
    "Run every cell, until the last one is done."
    page.wait_for_function(f"() => {KERNEL}?.status === 'idle'", timeout=wait*1000)    # else nothing runs
    done = "window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => {window.ran = true})"
    page.evaluate(f'() => {{{done}}}')
    page.wait_for_function('() => window.ran', timeout=wait*1000)
    failed = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    if failed.count(): raise SystemExit(f'a cell failed: {failed.first.inner_text()[-500:]}')
    page.wait_for_selector('.widget-interact .jp-OutputArea-output', timeout=wait*1000)


def shown_value(box) -> str:
    "What stands beside the first slider of a box of controls."
    readout = box.locator('.widget-readout')
    if readout.count(): return readout.first.inner_text()
    return box.locator('.noUi-handle').first.get_attribute('aria-valuetext')


def move_slider(page, box, steps:int, wait:float) -> tuple: # value before and after
    "Push the handle with the arrow keys; what is below it must be drawn anew."
    before, area = shown_value(box), box.locator('.jp-OutputArea').first
    old = area.inner_html()
    box.locator('.noUi-handle').first.focus()
    for _ in range(steps): page.keyboard.press('ArrowRight')
    page.wait_for_function('([area, old]) => area.innerHTML !== old', arg=[area.element_handle(), old],
                           timeout=wait*1000)
    page.wait_for_timeout(2000)
    return before, shown_value(box)


def shoot_boxes(page, out, stem:str, steps:int, wait:float) -> list: # (before, after) of each slider
    "Every box of controls with a slider, before and after a move."
    boxes, moved = page.locator('.widget-interact'), []
    for k in range(boxes.count()):
        box = boxes.nth(k)
        if not box.locator('.noUi-handle').count(): continue
        box.scroll_into_view_if_needed()
        page.screenshot(path=str(out/f'{stem}-widget{k + 1}-before.png'))
        moved.append(move_slider(page, box, steps, wait))
        page.screenshot(path=str(out/f'{stem}-widget{k + 1}-after.png'))
    return moved


def shoot_widgets(notebook, out, steps:int=8, wait:float=300) -> list: # (before, after) of each slider
    "A notebook in JupyterLab: run it up to its last controls, move each slider, keep pictures."
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, browser() as made:
        folder = Path(name)
        (folder/notebook.name).write_text(json.dumps(with_controls(notebook)), encoding='utf-8')
        with jupyterlab(folder) as (address, token):
            page = made.new_page(viewport=dict(width=1280, height=900))
            page.goto(f'{address}/lab/tree/{notebook.name}?token={token}', timeout=wait*1000)
            run_cells(page, wait)
            return shoot_boxes(page, out, notebook.stem, steps, wait)


# ---- the app

def shoot_app(photo, out, wait:float=120) -> list: # pictures, one for each width
    "The page of `scenimefy app` with this photo (None: its example) and the wipe at a third."
    from scenimefy.app import serving
    out.mkdir(parents=True, exist_ok=True)
    made = []
    with serving() as address, browser() as chromium:
        for name, (width, height) in SIZES.items():
            page = chromium.new_page(viewport=dict(width=width, height=height))
            page.set_default_timeout(wait*1000)
            page.goto(address)
            page.wait_for_selector('.wipe')
            if photo:
                page.set_input_files('input[type=file]', photo)
                page.get_by_text('px in').wait_for()
            box = page.locator('.wipe input').bounding_box()
            page.mouse.click(box['x'] + box['width']/3, box['y'] + box['height']/2)
            page.wait_for_timeout(500)
            made.append(out/f'app-{name}.png')
            page.screenshot(path=str(made[-1]))
            page.close()
    return made


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('site', 'widget', 'app'))
    parser.add_argument('files', nargs='*', help='widget: a notebook; app: a photo, or none; site: pages '
                        'such as 06_losses#eq-lsgan')
    parser.add_argument('-o', '--out', type=Path, default=ROOT/'_docs'/'shots')
    args = parser.parse_intermixed_args()
    if args.what == 'site':
        faults = shoot_site(ROOT/'_docs'/'html', args.out, args.files or PAGES)
        print(*faults, sep='\n')
        sys.exit(bool(faults))
    if args.what == 'app':
        print(*shoot_app(args.files[0] if args.files else None, args.out))
        sys.exit()
    for file in args.files: print(file, shoot_widgets(Path(file), args.out))
